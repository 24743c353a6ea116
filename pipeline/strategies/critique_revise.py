"""SelFee and Reflection-Tuning (arXiv 2310.11716) on explained answers: one `critic_loop`.

The critic sees the right answer and must not give it away; the reviser sees the feedback only (SelFee's
teacher-student form). A revision must still carry the right answer. What is trained is the last answer, not
the chain: students below 1B learn little from feedback on themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from domains.records import Message
from domains.steps import CritiqueReviseStep, StepOptions
from domains.words import squash
from pipeline.strategies.context import Ask, Ctx, Said
from pipeline.strategies.critic_loop import Chain, Critic, End, critic_loop, unreadable
from pipeline.strategies.outcome import (
    answer_text,
    gold_checked,
    question_of,
    reference_text,
    rejected,
    unparsed,
)
from pipeline.strategies.parse import Unparsed, fields, score
from pipeline.strategies.refusal import refusal
from pipeline.strategies.row import Check, Revision, Row, child
from pipeline.strategies.strategy import Cost
from pipeline.strategies.templates import numbered
from pipeline.teacher_prompt import read_reply
from rag.answers import parse_reply
from rag.prompt import render_question
from rag.untrusted import fenced
from rag.words import words

LEAK_WORDS = 6
PAIR_GAIN = 2.0
PROMPTS = {
    "critique": """You review an explanation that a colleague wrote for a learner.

Passages:
{passages}

Question:
{question}

Explanation and answer:
{answer}

For your eyes only, the right answer: {gold}

List what should be better: what is wrong, not in the passages, missing, or hard to follow. Guide your colleague
without giving the right answer away. Then score the text from 1 to 10 and say whether it must be revised
(below 9 it must). Reply with one JSON object:
{"issues": ["first issue", "second issue"], "score": 7, "revise": true}""",
    "revise": """You improve an explanation that you wrote for a learner, using only the passages below.

Passages:
{passages}

Question:
{question}

Your explanation and answer:
{answer}

A reviewer's remarks:
{issues}

Write the explanation anew as if it were your first, without apologies and without mentioning the remarks. Change
only what the remarks ask for. Then write the last line, Answer: and the answer.""",
}
_YES = {"yes", "true", "needed", "revise"}
_NO = {"no", "false", "not needed", "stop"}


def critique_revise(rows: Iterable[Row], ctx: Ctx) -> Iterator[Row]:
    """The rows with their best answer; those that the critic was never content with are rejected."""
    options = ctx.options_as(CritiqueReviseStep)
    critic = _critic(ctx, options.max_tokens)
    for batch in ctx.rounds(rows):
        ctx.propose(len(batch))
        answers = [answer_text(row) for row in batch]
        for chain in critic_loop(batch, answers, ctx, critic, max_rounds=options.max_rounds):
            yield _finish(chain, ctx, keep_unsettled=options.keep_unsettled)


def _critic(ctx: Ctx, max_tokens: int) -> Critic:
    def criticise(row: Row, answer: str) -> Ask:
        prompt = ctx.templates["critique"].fill(
            **_shown(row, ctx), answer=fenced(answer), gold=squash(reference_text(row))
        )
        return Ask((Message(role="user", content=prompt),), max_tokens=max_tokens, role="judge")

    def revise(row: Row, last: Revision) -> Ask:
        prompt = ctx.templates["revise"].fill(
            **_shown(row, ctx), answer=fenced(last.answer), issues=fenced(last.feedback)
        )
        return Ask((Message(role="user", content=prompt),), max_tokens=max_tokens)

    return Critic(criticise, _read_critique, revise, _read_revision)


def _shown(row: Row, ctx: Ctx) -> dict[str, str]:
    return {
        "passages": numbered(ctx.material.shown(row)),
        "question": fenced(render_question(question_of(row))),
    }


def _read_critique(row: Row, answer: str, said: Said) -> Revision | End:
    if said.error:
        return End("error", said.error)
    if phrase := refusal(said.text):
        return End("rejected", "refusal", phrase)
    found = fields(said.text, ("score", "revise"), optional=("issues",), truncated=said.truncated)
    if isinstance(found, Unparsed):
        return unreadable(found)
    points = score(f"Score: {found['score']}", low=1, high=10)
    if isinstance(points, Unparsed):
        return unreadable(points)
    verdict = found["revise"].lower().strip(" .")
    if verdict not in _YES | _NO:
        return unreadable(Unparsed("no_verdict", found["revise"][:80]))
    if verdict in _YES and not found["issues"]:
        return unreadable(Unparsed("no_issues", "must be revised, but nothing is wrong"))
    if leaked := leak(found["issues"], row, answer):
        return End("rejected", "leak", leaked)
    return Revision(
        answer=answer,
        feedback=found["issues"],
        verdict="revise" if verdict in _YES else "stop",
        score=points,
    )


def leak(feedback: str, row: Row, answer: str) -> str:
    """What of the right answer the feedback gives away; empty where nothing.

    The whole answer, its letter as an option, or six of its words in a row. What the criticised answer says
    itself is no secret.
    """
    question, told = question_of(row), f" {' '.join(words(feedback))} "
    known = f" {' '.join(words(answer))} "
    gold = (question.options or {}).get(question.answer or "", question.answer or "")
    tokens = words(gold)
    size = min(len(tokens), LEAK_WORDS)
    for start in range(len(tokens) - size + 1):
        piece = f" {' '.join(tokens[start : start + size])} "
        if size and piece in told and piece not in known:
            return piece.strip()
    if question.kind == "options":
        letter = question.answer or ""
        # In front of a word a small "a" is no letter: "the answer is a bit long" names none.
        small = (
            rf"{letter.lower()}\b(?![-'’]\w|\.\w)"
            if letter != "A"
            else r"a(?=[*_\"'’”\])]*\s*(?:$|[.,:;!?\n]))"
        )
        named = re.compile(
            rf"(?i:\b(?:option|answer(?: is)?))(?:[^\w.!?]|_)+(?:{letter}\b(?![-'’]\w|\.\w)|{small})"
        )
        if (found := named.search(feedback)) and not named.search(answer):
            return " ".join(words(found[0]))
    return ""


def _read_revision(row: Row, said: Said) -> str | End:
    if said.error:
        return End("error", said.error)
    if phrase := refusal(said.text):
        return End("rejected", "refusal", phrase)
    if said.truncated or not parse_reply(said.text).has_answer_line:
        return unreadable(Unparsed("truncated" if said.truncated else "no_answer_line", said.text[-80:]))
    rationale, answer = read_reply(said.text)
    revised = gold_checked(
        row.model_copy(update={"rationale": rationale, "output": answer, "status": "kept"})
    )
    if revised.status != "kept":
        return End("kept", "revision_lost_the_answer", revised.reason)
    return answer_text(revised)


def _finish(chain: Chain, ctx: Ctx, *, keep_unsettled: bool) -> Row:
    first, last = chain.revisions[0], chain.revisions[-1]
    row, end = chain.row, chain.end
    gain = (last.score or 0.0) - (first.score or 0.0)
    changes: dict[str, object] = {"chain": chain.revisions}
    if len(chain.revisions) > 1:
        changes["rationale"], changes["output"] = read_reply(last.answer)
    if gain >= PAIR_GAIN:
        changes |= {"chosen": last.answer, "rejected": first.answer}
    if last.score is not None:
        changes["scores"] = {**row.scores, "critique": last.score}
    revised = len(chain.revisions) - 1
    # Replies alternate: critique, revision, critique, …
    made = ctx.made(
        *chain.said,
        op=f"revision {revised}",
        prompt="critique",
        writer=chain.said[2 * revised - 1] if revised else row,
    )
    done = child(row, made=made.model_copy(update={"sample": row.made.sample}), **changes)
    if end is None:
        return done
    if end.status == "error":
        return done.model_copy(update={"status": "error", "reason": end.reason})
    if end.status == "unparsed":
        return unparsed(done, Unparsed(end.reason, end.detail))
    if end.status == "rejected":
        return rejected(done, end.reason, end.detail)
    check = Check(name=end.reason, ok=False, detail=end.detail)
    if keep_unsettled:
        return done.model_copy(update={"checks": [*done.checks, check]})
    return rejected(done, "unsettled", f"{end.reason}: {end.detail}")


def estimate(n_rows: int, options: StepOptions, samples: int) -> Cost:  # noqa: ARG001
    """At most: a critique of each answer and a revision between each two."""
    assert isinstance(options, CritiqueReviseStep)
    calls = n_rows * (1 + 2 * options.max_rounds)
    return Cost(calls, 800 * calls, options.max_tokens * calls, n_rows)
