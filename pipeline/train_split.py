"""Which examples are trained on, and which are held out to measure the loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from domains.records import Example

_VALIDATION_SHARE = 0.05
_VALIDATION_ROWS = 4


def choose_rows(examples: Sequence[Example], max_rows: int, *, seed: int) -> list[Example]:
    """At most ``max_rows`` (0 = all) examples, chosen at random, in their order."""
    if not max_rows or len(examples) <= max_rows:
        return list(examples)
    chosen = {e.id for e in sorted(examples, key=lambda example: _hash(seed, example.id))[:max_rows]}
    return [example for example in examples if example.id in chosen]


def split_validation(examples: Sequence[Example], *, seed: int) -> tuple[list[Example], list[Example]]:
    """Training rows and held-out rows; all rows of a question lie on one side.

    Questions are held out until they make up 5 % of the rows and at least four, but never more than half.
    """
    questions = sorted({example.question_id for example in examples}, key=lambda name: _hash(seed, name))
    wanted = max(_VALIDATION_ROWS, math.ceil(_VALIDATION_SHARE * len(examples)))
    held: set[str] = set()
    rows = 0
    for question in questions[: len(questions) // 2]:
        size = sum(example.question_id == question for example in examples)
        if rows >= wanted or rows + size > len(examples) / 2:
            break
        held.add(question)
        rows += size
    training = [example for example in examples if example.question_id not in held]
    return training, [example for example in examples if example.question_id in held]


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
