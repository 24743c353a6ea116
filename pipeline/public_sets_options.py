"""How often is the right option found: by what retrieval says of each, by what a model gains from passages, by both?

Nothing is fitted. Two rules about retrieval are measured: asking with the question and each option, and asking
with the question alone (MIRAGE's rule, arXiv 2402.13178), whose passages are also what the model reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from domains.records import Passage, Question
from pipeline.bootstrap import paired_difference
from pipeline.progress import Progress
from pipeline.public_sets import RESAMPLES, accuracy, drawn
from pipeline.verify_model import passage_gains
from rag.embed import Vectors
from rag.lexical import LexicalIndex, passage_text
from rag.options import choose, evidence, statement, together
from serve.engine import Engine

Scores = dict[str, float]  # by letter
TOP_K = 3
NEAR = 5  # BM25's best for each option whose cosines are looked at, where not all passages are embedded


class Lexical:
    """BM25 over the passages of a set, as options are scored by it."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = passages
        self._index = LexicalIndex.build(passages)

    def with_options(self, question: Question) -> Scores:
        """BM25 of the best passage for the question with each option."""
        return evidence(
            question.question, question.options or {}, lambda query: float(self._index.scores(query).max())
        )

    def by_question(self, question: Question) -> Scores:
        """BM25 of each option in the passages that the question alone finds, weighed by the question's own."""
        weight = self._index.scores(question.question)
        found = self._index.search(question.question, top_k=TOP_K)
        return {
            letter: float(self._index.scores(text)[found] @ weight[found]) if found else 0.0
            for letter, text in (question.options or {}).items()
        }

    def shown(self, question: Question) -> list[Passage]:
        """The passages that the question alone finds."""
        return [self.passages[i] for i in self._index.search(question.question, top_k=TOP_K)]

    def near(self, question: Question) -> list[int]:
        """Positions of BM25's best for each option."""
        return sorted(
            {
                i
                for text in (question.options or {}).values()
                for i in self._index.search(statement(question.question, text), top_k=NEAR)
            }
        )


def measure_options(
    passages: Sequence[Passage],
    questions: Sequence[Question],
    progress: Progress,
    *,
    engine: Engine | None = None,
    system: str = "",
    asked: int = 0,
    embed: Callable[[Sequence[str]], Vectors] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of each way to choose.

    Args:
        passages: of the documents.
        questions: of kind ``options``.
        progress: one unit per question that the model scores.
        engine: the model; None leaves its arms out.
        system: see `passage_gains`.
        asked: how many questions the model scores, drawn at random; 0 = all.
        embed: adds the arm of cosines over BM25's nearest passages.
        seed: of the draw and the intervals.

    Returns:
        ``chance``, ``majority`` and by arm ``accuracy``, ``interval``, ``n``: ``longest`` (no evidence: the longest
        option), ``bm25_question`` (retrieval by the question alone), ``bm25``, ``bm25_dense``; on the questions
        that the model scored ``gain``, ``bm25_gain``, ``bm25_same`` (for comparison) and ``gain_adds`` (paired).
    """
    lexical = Lexical(passages)
    scores: dict[str, list[Scores]] = {
        "longest": [{key: float(len(text)) for key, text in (q.options or {}).items()} for q in questions],
        "bm25_question": [lexical.by_question(q) for q in questions],
        "bm25": [lexical.with_options(q) for q in questions],
    }
    if embed is not None:
        near = _cosines(lexical, questions, embed, progress)
        scores["bm25_dense"] = [together(a, b) for a, b in zip(scores["bm25"], near, strict=True)]
    result: dict[str, Any] = {
        "chance": round(float(np.mean([1 / len(q.options or {"": ""}) for q in questions])), 4),
        "majority": round(max(Counter(q.answer for q in questions).values()) / len(questions), 4),
        **{arm: _arm(questions, found, seed) for arm, found in scores.items()},
    }
    if engine is not None:
        places = drawn(len(questions), asked, seed=seed)
        result |= _by_model(
            [questions[i] for i in places], [scores["bm25"][i] for i in places], lexical, engine, system, progress, seed
        )  # fmt: skip
    return result


def _by_model(
    questions: Sequence[Question],
    found: Sequence[Scores],
    lexical: Lexical,
    engine: Engine,
    system: str,
    progress: Progress,
    seed: int,
) -> dict[str, Any]:
    progress.start("options: what each gains from the passages", len(questions))
    gained: list[Scores] = []
    for question in questions:
        gained.append(passage_gains(engine, question, lexical.shown(question), system=system))
        progress.advance()
    both = [together(a, b) for a, b in zip(found, gained, strict=True)]
    one = [float(value) for value in _right(questions, both)]
    other = [float(value) for value in _right(questions, found)]
    ones = [1.0] * len(one)
    gap = paired_difference(
        (one, ones), (other, ones), clusters=[q.about for q in questions], resamples=RESAMPLES, seed=seed
    )
    return {
        "gain": _arm(questions, gained, seed),
        "bm25_gain": _arm(questions, both, seed),
        "bm25_same": _arm(questions, found, seed),
        "gain_adds": [round(value, 4) for value in (gap.mean, gap.low, gap.high)] if gap else None,
    }


def _cosines(
    lexical: Lexical,
    questions: Sequence[Question],
    embed: Callable[[Sequence[str]], Vectors],
    progress: Progress,
) -> list[Scores]:
    """The nearest of the passages at hand, for the question with each option."""
    near = [lexical.near(question) for question in questions]
    wanted = sorted({i for each in near for i in each})
    progress.say(f"embedding {len(wanted)} passages")
    vectors = dict(zip(wanted, embed([passage_text(lexical.passages[i]) for i in wanted]), strict=True))
    asked = iter(
        embed([statement(q.question, text) for q in questions for text in (q.options or {}).values()])
    )
    return [
        {
            letter: max((float(vectors[i] @ vector) for i in each), default=0.0)
            for letter, vector in [(letter, next(asked)) for letter in question.options or {}]
        }
        for question, each in zip(questions, near, strict=True)
    ]


def _right(questions: Sequence[Question], scores: Sequence[Scores]) -> list[bool]:
    return [choose(found) == q.answer for q, found in zip(questions, scores, strict=True)]


def _arm(questions: Sequence[Question], scores: Sequence[Scores], seed: int) -> dict[str, Any]:
    return accuracy(_right(questions, scores), [q.about for q in questions], seed=seed)
