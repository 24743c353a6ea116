"""The only place that asks for quality: pointwise scores with a written reason, and what they are worth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.strategies.context import Ask, Ctx, Said
from pipeline.strategies.parse import Unparsed, fields, score

LOW, HIGH = 1, 5
SATURATED = 0.6
# Fewer scores than this say nothing about their distribution.
ENOUGH = 10


@dataclass(frozen=True)
class Grade:
    """The mean of the scores that could be read, and the reasons."""

    score: float
    reason: str


def grade(asks: Sequence[Ask], ctx: Ctx) -> list[tuple[Grade | Unparsed, list[Said]]]:
    """Put the asks to the judge; samples of one are averaged.

    A sample that can't be read does not count; where fewer than half can, the whole is unparsed.
    """
    graded = []
    for replies in ctx.ask(asks):
        read = [_read(said) for said in replies if not said.error]
        good = [each for each in read if isinstance(each, Grade)]
        bad = [each for each in read if isinstance(each, Unparsed)]
        found: Grade | Unparsed
        if good and len(good) * 2 >= len(read):
            mean = sum(each.score for each in good) / len(good)
            found = Grade(mean, "\n".join(each.reason for each in good))
        else:
            found = bad[0] if bad else Unparsed("no_reply")
        graded.append((found, replies))
    return graded


def _read(said: Said) -> Grade | Unparsed:
    found = fields(said.text, ("reason", "score"), truncated=said.truncated)
    if isinstance(found, Unparsed):
        return found
    points = score(f"Score: {found['score']}", low=LOW, high=HIGH)
    return points if isinstance(points, Unparsed) else Grade(points, found["reason"])


def histogram(scores: Sequence[float]) -> dict[str, int]:
    """How often each whole score was given (halves are rounded up), all of the scale's values."""
    counts = Counter(min(HIGH, math.floor(value + 0.5)) for value in scores)
    return {str(value): counts[value] for value in range(LOW, HIGH + 1)}


def saturated(scores: Sequence[float]) -> str:
    """A warning where one value has more than `SATURATED` of all scores: they rank little. Else empty."""
    counts = histogram(scores)
    value, most = max(counts.items(), key=lambda item: item[1])
    if len(scores) < ENOUGH or most <= SATURATED * len(scores):
        return ""
    return (
        f"The judge is saturated: {most} of {len(scores)} scores are {value}. Its order says little; state the "
        "criteria more sharply (prompts/rate.md, or dimension) or take a stronger judge ([elicit.judge])."
    )
