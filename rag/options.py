"""Which option do the documents speak for? Ranks the options of a question by retrieval, without a model.

The evidence of an option is the best passage for the question with the option in its place, as the "IR solver" of
the ARC challenge has it (arXiv 1803.05457). The question's own share is the same for all options, so
only what the option adds makes a difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rag.index import Index

# A query -> the score of its best passage.
Best = Callable[[str], float]
_BLANK = re.compile(r"_{2,}")


def statement(question: str, option: str) -> str:
    """What is claimed if the option is right: the question with the option in its blank, or behind it."""
    filled = _BLANK.sub(lambda _: option, question)
    return filled if filled != question else f"{question} {option}"


def best_in(index: Index) -> Best:
    """BM25 of an index's best passage for a query; 0 where no passage shares a word with it."""
    return lambda query: max(index.score_lexical(query, top_k=1).values(), default=0.0)


def evidence(question: str, options: Mapping[str, str], best: Best) -> dict[str, float]:
    """The score of each option's best passage, by letter.

    Args:
        question: without its options.
        options: their texts by letter.
        best: scores a query; comparable between queries that differ in the option only (BM25, a cosine).
    """
    return {letter: best(statement(question, text)) for letter, text in options.items()}


def together(*scores: Mapping[str, float]) -> dict[str, float]:
    """Several scores of the same options as one: each standardised over the options, then added.

    Standardised, because BM25, cosines and log-probabilities have no common unit.
    """
    total: dict[str, float] = dict.fromkeys(scores[0], 0.0)
    for each in scores:
        values = np.array([each[letter] for letter in total])
        spread = float(values.std())
        for letter, value in zip(total, values, strict=True):
            total[letter] += float(value - values.mean()) / spread if spread > 1e-9 else 0.0
    return total


def choose(scores: Mapping[str, float]) -> str:
    """The letter with the highest score, the first where several have it."""
    return max(scores, key=lambda letter: scores[letter])
