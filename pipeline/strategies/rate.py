"""AlpaGasus (arXiv 2307.08701): rate each explained answer on one dimension, keep the best share.

The reason comes before the score (asked for first, a number gains nothing from its explanation), and the judge
sees the right answer: without it a judge rewards confident errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from domains.records import Message
from domains.steps import RateStep, StepOptions
from domains.words import squash
from pipeline.strategies.context import Ask, Ctx
from pipeline.strategies.grading import Grade, grade, histogram, saturated
from pipeline.strategies.outcome import answer_text, failed, question_of, reference_text, rejected, unparsed
from pipeline.strategies.parse import Unparsed
from pipeline.strategies.row import Row, child
from pipeline.strategies.strategy import Cost
from pipeline.strategies.templates import numbered
from rag.prompt import render_question
from rag.untrusted import fenced

PROMPTS = {
    "rate": """You judge an explanation that was written for a learner, on one thing only. {dimension}.

Passages:
{passages}

Question:
{question}

Right answer: {gold}

Explanation and answer to judge:
{answer}

5: nothing to object to. 4: right, with a small flaw. 3: right in the main, with a gap. 2: a serious error, or not
from the passages. 1: wrong or useless. First write the reason, then the score. Reply with one JSON object:
{"reason": "one or two sentences", "score": 3}"""
}


def rate(rows: Iterable[Row], ctx: Ctx) -> Iterator[Row]:
    """All rows with their rating; those below the cut are rejected. The order stays."""
    options = ctx.options_as(RateStep)
    given = ctx.affordable(rows)
    ctx.propose(len(given))
    asks = [_ask(row, ctx, options) for row in given]
    rated = []
    for row, (found, replies) in zip(given, grade(asks, ctx), strict=True):
        done = child(row, made=ctx.made(*replies, prompt="rate", writer=row))
        if all(said.error for said in replies):
            rated.append(failed(done, replies[0]))
        elif isinstance(found, Unparsed):
            rated.append(unparsed(done, found))
        else:
            rated.append(_with(done, found))
    scores = [row.scores["rating"] for row in rated if row.status == "kept"]
    ctx.facts["histogram"] = histogram(scores)
    if warning := saturated(scores):
        ctx.facts["warning"] = warning
    yield from select(rated, keep_share=options.keep_share, min_score=options.min_score)


def _ask(row: Row, ctx: Ctx, options: RateStep) -> Ask:
    content = ctx.templates["rate"].fill(
        dimension=options.dimension.rstrip("."),
        passages=numbered(ctx.material.shown(row)),
        question=fenced(render_question(question_of(row))),
        gold=squash(reference_text(row)),
        answer=fenced(answer_text(row)),
    )
    return Ask(
        (Message(role="user", content=content),),
        n=options.samples,
        max_tokens=options.max_tokens,
        role="judge",
    )


def _with(row: Row, found: Grade) -> Row:
    return row.model_copy(
        update={
            "scores": {**row.scores, "rating": found.score},
            "notes": {**row.notes, "rating": found.reason},
        }
    )


def select(rated: Sequence[Row], *, keep_share: float, min_score: float) -> list[Row]:
    """The rows in their order, those below ``min_score`` or not among the ``keep_share`` best rejected.

    Among equal scores the id decides: chance, but the same at every run. Both bounds are inclusive.
    """
    scored = [row for row in rated if row.status == "kept"]
    best = sorted(scored, key=lambda row: (-row.scores["rating"], row.id))
    taken = {row.id for row in best[: math.ceil(keep_share * len(best) - 1e-9)]}
    return [_cut(row, row.id in taken, min_score) if row.status == "kept" else row for row in rated]


def _cut(row: Row, among_best: bool, min_score: float) -> Row:
    points = row.scores["rating"]
    if points < min_score:
        return rejected(row, "low_rating", f"{points:g}, at least {min_score:g} is needed")
    if not among_best:
        return rejected(row, "not_among_best", f"{points:g}")
    return row


def estimate(n_rows: int, options: StepOptions, samples: int) -> Cost:  # noqa: ARG001
    """One request per row and sample."""
    assert isinstance(options, RateStep)
    calls = n_rows * options.samples
    return Cost(calls, 600 * calls, options.max_tokens * calls, math.ceil(n_rows * options.keep_share))
