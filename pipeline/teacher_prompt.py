"""What a teacher is asked, and how its reply is read.

KARD's labelling (arXiv 2305.18395 §3.1): the teacher sees the gold answer and explains it. Here it also sees
numbered passages, and the gold quote where the question has one: a strong teacher is kept to the documents, and
a small local one gets what it needs for one right sentence. The short instruction comes last, after the
untrusted text, because a small model follows little else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from domains.records import Message, Passage, Question
from domains.words import find_literal, squash
from rag.answers import before_answer, one_reply, parse_reply, reference_answer
from rag.prompt import neutralise, render_question, student_messages

CLOSING = "Explain in one sentence why the right answer is right. Use the words of the {source}."
# "because it …" speaks of something named before: such an opening stays.
_NO_PRONOUN = r"(?!(?:it|its|this|that|they|these|those|he|she|of)\b)"
_BOILERPLATE = re.compile(
    r"(?:sure|certainly|of course|here is (?:the|an|my) explanation)\s*[!.:,]\s*"
    r"|(?:explanation|rationale|reasoning|reply)\s*:\s*"
    r"|(?:based on|according to|as (?:stated|mentioned|described|shown) in|from|given)\s+(?:the|these)\s+"
    r"(?:(?:provided|given|above|numbered)\s+)?(?:passages?|evidence|information|text|context|documents?)"
    r"(?:\s+(?:provided|given|above))?\s*(?:\[\d{1,2}\]\s*)?,\s*(?:it is clear that\s+|we can see that\s+)?"
    r"|the (?:passages?|evidence|text)(?: provided)? (?:states?|says?|shows?|indicates?|confirms?) that\s+"
    r"|(?:the|this) (?:(?:correct|right|best) )?answer is that\s+"
    r"|(?:the|this) (?:(?:correct|right|best) )?(?:answer|option) is\b(?:\s+\(?[A-H][.)]\s)?"
    rf"(?:[^.!?\n]|\.(?=\S)){{0,120}}?,?\s+because\s+{_NO_PRONOUN}",
    re.IGNORECASE,
)


def teacher_messages(
    instruction: str, question: Question, passages: Sequence[Passage], *, closing: str = ""
) -> tuple[Message, ...]:
    """The chat that the teacher sees.

    Args:
        instruction: the domain's teacher prompt (trusted).
        question: with its reference answer (untrusted).
        passages: numbered from [1] in the order given (untrusted).
        closing: the last line, in the place of `CLOSING`.
    """
    system, user = student_messages(instruction, render_question(question), passages)
    lines = [user.content, neutralise(f"Right answer: {reference_answer(question)}")]
    quotes = evidence(question, passages)
    lines += [neutralise(f'Evidence: "{quote}" [{number}]') for quote, number in quotes]
    lines += ["", closing or CLOSING.format(source="evidence" if quotes else "passages")]
    return system, Message(role="user", content="\n".join(lines))


def evidence(question: Question, passages: Sequence[Passage]) -> list[tuple[str, int]]:
    """The question's gold quotes that stand in these passages, with the passages' numbers from 1."""
    found = []
    for gold in question.gold:
        for number, passage in enumerate(passages, 1):
            literal = find_literal(gold.quote, passage.text) if passage.doc_id == gold.doc_id else None
            if literal is not None:
                found.append((squash(literal), number))
                break
    return found


def read_reply(text: str) -> tuple[str, str]:
    """A teacher's reply as (rationale, answer).

    Without an ``Answer:`` line the whole reply is both, as `rag.answers.parse_reply` reads it: whether it
    carries the gold answer is for curation to judge.
    """
    reply = one_reply(text)
    return strip_boilerplate(before_answer(reply)), parse_reply(reply).answer


def strip_boilerplate(text: str) -> str:
    """``text`` without an opening that says nothing ("Based on the passages provided, …").

    A rationale that is nothing but such an opening is left as it is.
    """
    rest = text.strip()
    while match := _BOILERPLATE.match(rest):
        rest = rest[match.end() :]
    rest = rest.strip()
    if not re.search(r"\w", rest):
        return text.strip()
    # "eGFR" and "iOS" are written so; and what had no such opening is left as it is.
    return rest[0].upper() + rest[1:] if rest != text.strip() and rest.split()[0].islower() else rest
