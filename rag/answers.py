"""The form of a student's completion, written and read in one place.

"quote" [n]        zero or more literal quotes with the number of their passage
rationale          optional, one or more sentences
Answer: …          the answer, or the domain's abstention
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from domains.records import Question
from domains.words import squash

_QUOTE = re.compile(r"[\"“]([^\"“”\n]{8,600})[\"”]\s*[.,;]?\s*\[(\d{1,2})\]")
_ANSWER = re.compile(r"(?:^|\n|(?<=[.\]] ))\s*\**Answer\**\s*:\**[ \t]*", re.IGNORECASE)
_ABSTENTIONS = re.compile(
    r"\bI (?:do not|don't|don’t|cannot|can't|can’t) (?:know|answer|say|determine|find)\b"
    r"|\b(?:passages?|documents?|text|context|sources?|information)(?: provided| given)? "
    r"(?:do(?:es)? not|doesn't|don't|did not) (?:say|state|mention|contain|provide|specify|answer|include|give)"
    r"|\bis not (?:stated|mentioned|specified|provided|given) in\b"
    r"|\bcannot be (?:determined|answered) from\b",
    re.IGNORECASE,
)
ABSTENTION_CHARS = 200  # an abstention says so in its first characters; later hedging is part of an answer
# In front of a word a small "a" is no letter: "the answer is a biopsy" names none.
_LETTER = re.compile(
    r"^[\W_]*(?:(?i:option:?|the (?:correct |right |best )?(?:answer|option) is:?)[\s*_]+\(?"
    r"([AB-Hb-h]\b(?![-'’]\w)|a(?=[*_]*\s*(?:$|[.):,\n])))|\(?([A-Ha-h])(?=[*_]*\s*(?:$|[.):,\n])))"
)
# "A, B" and "A or B" choose nothing.
_SECOND = re.compile(
    r"[\s*_)]*(?:[,/&;]\s*(?:(?:and|or)\b)?[\s*_(]*([A-Ha-h])[*_]*\s*"
    r"(?:$|[):,;&\n]|/\s*[A-Ha-h]\b|\.(?!\s*[a-z])|(?:and|or)\b)"
    r"|(?:and|or)[\s*_(]+([A-Hb-h]\b(?![-'’]\w|\.\s*[a-z]|\s+(?:is|was)\b)|a(?=[*_]*\s*(?:$|[.):,;/&\n]))))"
)
_YES_NO = re.compile(r"^\W*(yes|no|maybe)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """A completion taken apart. ``quotes`` are (text, passage number) as written, unchecked."""

    rationale: str
    quotes: tuple[tuple[str, int], ...]
    answer: str
    has_answer_line: bool


def reference_answer(question: Question) -> str:
    """The gold answer in words, as the student shall say it: an option with its letter and text."""
    answer = question.answer or ""
    return f"{answer}. {question.options[answer]}" if question.options else answer


def format_reply(*, quotes: list[tuple[str, int]], rationale: str, answer: str) -> str:
    """The completion that training supervises; `parse_reply` is its inverse."""
    lines = [f'"{text}" [{number}]' for text, number in quotes]
    if rationale:
        lines.append(rationale)
    lines.append(f"Answer: {answer}")
    return "\n".join(lines)


def parse_reply(text: str) -> Reply:
    """Take a completion apart. Without an ``Answer:`` line the whole text is the answer."""
    quotes = tuple((match[1].strip(), int(match[2])) for match in _QUOTE.finditer(text))
    marks = list(_ANSWER.finditer(text))
    if not marks:
        return Reply(rationale="", quotes=quotes, answer=text.strip(), has_answer_line=False)
    last = marks[-1]
    rationale = _QUOTE.sub("", text[: last.start()]).strip()
    return Reply(rationale=rationale, quotes=quotes, answer=text[last.end() :].strip(), has_answer_line=True)


def one_reply(text: str) -> str:
    """``text`` up to a second ``Answer:`` line: a small model that goes on then repeats itself."""
    marks = list(_ANSWER.finditer(text))
    return text[: marks[1].start()] if len(marks) > 1 else text


def before_answer(text: str) -> str:
    """``text`` up to its last ``Answer:`` line, quotes included; all of it where there is none."""
    marks = list(_ANSWER.finditer(text))
    return (text[: marks[-1].start()] if marks else text).strip()


def is_abstention(answer: str, *, abstain: str) -> bool:
    """Whether ``answer`` says that it does not know: the domain's sentence, or words to that effect."""
    plain = " ".join(answer.split()).strip(' ".').lower()
    target = " ".join(abstain.split()).strip(' ".').lower()
    return bool(plain) and (plain.startswith(target) or bool(_ABSTENTIONS.search(answer[:ABSTENTION_CHARS])))


def parse_option(answer: str, options: dict[str, str]) -> str | None:
    """The option letter an answer names, or None where it names none (counted as wrong).

    Reads a leading letter, else an answer that repeats exactly one option's text, whatever the case, in whole words
    ("Male" does not stand in "female", nor "5 mg" in "2.5 mg"). Inside a longer option's text that the answer
    repeats, a shorter one does not count: "iron deficiency" names no "iron". What an option's text begins with is no
    letter ("C. difficile"), unless that letter's own text follows it.
    """
    texts = {key: _plain(text) for key, text in options.items()}
    if (match := _LETTER.match(answer)) and not _is_text(answer, match, texts):
        letter = _letter(match)
        return letter if letter in options and not _lists(answer, match, texts) else None
    # Of texts that begin at the same place the first in the pattern is taken: the longest.
    known = sorted((re.escape(text) for text in texts.values() if text), key=len, reverse=True)
    pattern = rf"(?<!\w)(?<!\d[.,])(?:{'|'.join(known)})(?!\w|[.,]\d)"
    said = set(re.findall(pattern, squash(answer).casefold())) if known else set()
    named = [key for key, text in texts.items() if text in said]
    return named[0] if len(named) == 1 else None


def without_letter(answer: str, options: dict[str, str]) -> str:
    """An answer without the option letter that it begins with."""
    match = _LETTER.match(answer)
    if match is None or _is_text(answer, match, {key: _plain(text) for key, text in options.items()}):
        return answer
    return _behind(answer, match)


def _plain(text: str) -> str:
    return squash(text).casefold().strip(" .")


def _letter(match: re.Match[str]) -> str:
    return (match[1] or match[2]).upper()


def _behind(answer: str, match: re.Match[str]) -> str:
    return answer[match.end() :].lstrip(" .):,*_\n")


def _says_own(answer: str, match: re.Match[str], texts: dict[str, str]) -> bool:
    """Whether the letter's own text stands behind it."""
    own = texts.get(_letter(match), "")
    return own != "" and _begins(squash(_behind(answer, match)).casefold(), own)


def _begins(said: str, text: str) -> bool:
    return re.match(rf"{re.escape(text)}(?!\w)", said) is not None


def _lists(answer: str, match: re.Match[str], texts: dict[str, str]) -> bool:
    """Whether a second letter stands beside the first ("A, B"), which its own text ("B, A" of a group A) does not count as."""
    second = _SECOND.match(answer, match.end())
    if second is None or _says_own(answer, match, texts):
        return False
    return _letter(second) in texts.keys() - {_letter(match)}


def _is_text(answer: str, match: re.Match[str], texts: dict[str, str]) -> bool:
    """Whether what looks like a letter begins an option's text, with none of its own behind it."""
    said = squash(answer[match.start(1) if match[1] else match.start(2) :]).casefold()
    return not _says_own(answer, match, texts) and any(
        len(text) > 1 and _begins(said, text) for text in texts.values()
    )


def parse_yes_no(answer: str) -> str | None:
    """``yes``, ``no`` or ``maybe`` where the answer begins with it, else None (counted as wrong)."""
    match = _YES_NO.match(answer)
    return match[1].lower() if match else None
