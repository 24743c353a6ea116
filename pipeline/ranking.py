"""Rankings of documents and how good they are: a document stands where its best passage does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from domains.records import Passage, Question
from pipeline.bootstrap import mcnemar

# How much log(fused score) may count against one standard deviation of the reranker's scores; 0: not at all. Ranks 1
# and 2 of one list differ by log(62 / 61) = 0.016, so that 64 makes them a whole standard deviation.
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
# The best of ten weights is looked at, hence not 0.05. With 19 held-out questions a reranker seemed to add 0.1 to hit@1
# that took away 0.2 on the exam.
SURE = 0.01


@dataclass(frozen=True)
class Judged:
    """One question's candidates, best first as fused, with the reranker's scores and the documents that answer it."""

    documents: Sequence[str]
    fused: NDArray[np.float64]
    scores: NDArray[np.float32]
    gold: Collection[str]


@dataclass(frozen=True)
class Fitted:
    """The weight of log(fused score) and, on the same questions, both measures without and with the reranker.

    ``p`` is that of a sign test of its better against its worse rankings: the chance of such a count were it no help.
    """

    weight: float
    questions: int
    hybrid_hit1: float
    hybrid_ndcg10: float
    reranked_hit1: float
    reranked_ndcg10: float
    p: float

    @property
    def helps(self) -> bool:
        """Whether the reranker is better than the fused order by more than a few questions can pretend."""
        better = self.reranked_hit1 + self.reranked_ndcg10 > self.hybrid_hit1 + self.hybrid_ndcg10
        return better and self.p < SURE


def rank_documents(documents: Sequence[str], scores: Sequence[float] | NDArray[np.floating]) -> list[str]:
    """Each document once, by its best passage; ties as given.

    Args:
        documents: of each passage.
        scores: of each passage.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    return list(dict.fromkeys(documents[i] for i in order))


def quoted_passages(question: Question, passages: Iterable[Passage]) -> frozenset[str]:
    """Ids of the passages in which one of the question's gold quotes stands, white space aside."""
    quotes = [(quote.doc_id, " ".join(quote.quote.split())) for quote in question.gold]
    return frozenset(
        passage.passage_id
        for passage in passages
        for doc_id, quote in quotes
        if passage.doc_id == doc_id and quote in " ".join(passage.text.split())
    )


def hit_at_1(ranked: Sequence[str], gold: Collection[str]) -> float:
    """1 where the first document answers the question, else 0."""
    return float(bool(ranked) and ranked[0] in gold)


def ndcg_at_10(ranked: Sequence[str], gold: Collection[str]) -> float:
    """Normalised discounted cumulative gain of the first ten documents, gains 0 or 1 (Järvelin and Kekäläinen 2002)."""
    found = sum(1 / np.log2(place + 2) for place, name in enumerate(ranked[:10]) if name in gold)
    return float(found / sum(1 / np.log2(place + 2) for place in range(min(10, len(gold)))))


def fit_weight(judged: Sequence[Judged]) -> Fitted:
    """The weight among `WEIGHTS`, in spreads of the reranker's scores, with the best mean of both measures.

    A larger weight wins a tie: the reranker has to earn its say. Questions without gold say nothing and are left out.
    """
    usable = [each for each in judged if each.gold and len(each.documents)]
    if not usable:
        return Fitted(0.0, 0, 0.0, 0.0, 0.0, 0.0, 1.0)
    spread = float(np.mean([each.scores.std() for each in usable])) or 1.0
    measured = {weight * spread: measure(usable, weight * spread) for weight in WEIGHTS}
    best = max(measured, key=lambda weight: (round(float(measured[weight].mean()), 9), weight))
    hybrid, reranked = measure(usable, None), measured[best]
    gains = (reranked - hybrid).sum(axis=1)
    p = mcnemar((gains > 1e-9).tolist(), (gains < -1e-9).tolist())
    (hit, ndcg), (hit_after, ndcg_after) = (means.mean(axis=0).tolist() for means in (hybrid, reranked))
    return Fitted(best, len(usable), hit, ndcg, hit_after, ndcg_after, p)


def measure(judged: Sequence[Judged], weight: float | None) -> NDArray[np.float64]:
    """hit@1 and nDCG@10 of each question, [questions, 2], with this weight; None leaves the reranker out."""
    rows = []
    for each in judged:
        fused = np.log(each.fused)
        ranked = rank_documents(each.documents, fused if weight is None else each.scores + weight * fused)
        rows.append((hit_at_1(ranked, each.gold), ndcg_at_10(ranked, each.gold)))
    return np.array(rows)
