"""What the reranker learns from: per question, passages that BM25 finds and how well they fit the rationale.

KARD (arXiv 2305.18395 §3.2) trains a reranker that sees only the question to order passages as BM25 would if it had the
rationale. A pool holds BM25's best passages for the rationale and for the question. One scorer scores all of
them against the rationale, so that the scores of a pool can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from domains.errors import StageError
from domains.records import Passage, Record
from rag.lexical import LexicalIndex, best_positions


class Candidate(Record):
    """One passage of a pool. ``s_r`` is BM25(rationale, passage); ``origin`` the list that it is from, "r" if both."""

    pid: str
    s_r: float
    origin: Literal["q", "r"]


class Pool(Record):
    """The candidates of one training row: those of the rationale, best first, then those of the question alone."""

    item_id: str
    question: str
    cands: list[Candidate]


@dataclass(frozen=True)
class Row:
    """A question with its rationale. Rows of one ``group`` (a document) never lie on both sides of a split."""

    item_id: str
    question: str
    rationale: str
    group: str


def build_pools(
    rows: Sequence[Row], passages: Sequence[Passage], *, k1: float, b: float, size: int
) -> tuple[list[Pool], list[str]]:
    """A pool per row, and the ids of rows that have none: fewer than two passages share a word with them.

    Args:
        rows: questions and rationales.
        passages: what is searched.
        k1: of BM25.
        b: of BM25.
        size: how many passages the rationale brings, and how many the question.
    """
    scorer = LexicalIndex.build(passages, k1=k1, b=b)
    pools, without = [], []
    for row in rows:
        scores = scorer.scores(row.rationale)
        by_rationale = best_positions(scores, top_k=size)
        by_question = scorer.search(row.question, top_k=size)
        if not by_rationale or len({*by_rationale, *by_question}) < 2:
            without.append(row.item_id)
            continue
        order = [*by_rationale, *(i for i in by_question if i not in set(by_rationale))]
        cands = [
            Candidate(
                pid=passages[i].passage_id,
                s_r=round(float(scores[i]), 5),
                origin="r" if place < len(by_rationale) else "q",
            )
            for place, i in enumerate(order)
        ]
        pools.append(Pool(item_id=row.item_id, question=row.question, cands=cands))
    return pools, without


def standard_scores(pool: Pool) -> NDArray[np.float32]:
    """``s_r`` of the pool less their mean, over their standard deviation, [cands]; zeros where all are equal."""
    scores = np.array([cand.s_r for cand in pool.cands], dtype=np.float64)
    spread = scores.std()
    return ((scores - scores.mean()) / spread if spread > 0 else np.zeros_like(scores)).astype(np.float32)


def draw(pool: Pool, *, count: int, rng: np.random.Generator) -> list[int]:
    """``count`` different positions of the pool: half from the rationale, half from the question alone.

    The rationale's best passage is always among them, and first. Where one half is short the other fills up.
    """
    by_rationale = [i for i, cand in enumerate(pool.cands) if cand.origin == "r"]
    by_question = [i for i, cand in enumerate(pool.cands) if cand.origin == "q"]
    first, rest = by_rationale[:1], rng.permutation(by_rationale[1:]).tolist()
    others = rng.permutation(by_question).tolist()
    half = count // 2
    chosen = [*first, *rest[: count - half - 1], *others[:half]]
    spare = [*rest[count - half - 1 :], *others[half:]]
    return [int(i) for i in [*chosen, *spare][:count]]


def split_rows(rows: Sequence[Row], *, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and rows held out, by whole groups; at least one group on each side.

    Raises:
        StageError: all rows are of one group.
    """
    groups = sorted({row.group for row in rows})
    if len(groups) < 2:
        raise StageError(
            f"{len(rows)} rows about {len(groups)} document(s) can't be split",
            expected="rationales about at least two documents",
            next_step="preceptor elicit DOMAIN (more questions), or [rerank] enabled = false",
        )
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    count = min(len(groups) - 1, max(1, round(share * len(groups))))
    held = {groups[i] for i in order[:count]}
    return [row for row in rows if row.group not in held], [row for row in rows if row.group in held]
