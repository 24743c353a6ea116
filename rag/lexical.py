"""The lexical list: BM25 over Snowball stems of title, heading and text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domains.records import Passage
from rag.words import index_terms

# The parameters of Pyserini's BM25 baselines, which KARD (arXiv 2305.18395) retrieves with.
K1, B = 0.9, 0.4


def passage_text(passage: Passage) -> str:
    """What both indexes read of a passage: its title, its heading and its text."""
    return "\n".join(part for part in (passage.title, passage.heading, passage.text) if part)


class LexicalIndex:
    """BM25 (Lucene's variant) over passages that are known by their position.

    Args:
        model: a fitted ``bm25s.BM25``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def build(cls, passages: Sequence[Passage], *, k1: float = K1, b: float = B) -> LexicalIndex:
        """Count the terms of all passages; same passages, same bytes when saved.

        Args:
            passages: known by their position from here on.
            k1: how slowly repetitions of a term saturate.
            b: how much long passages are discounted, from 0 to 1.
        """
        import bm25s

        counted = [index_terms(passage_text(passage)) for passage in passages]
        # Numbered in sorted order: left to itself, bm25s numbers a set, whose order changes by process.
        vocabulary = {term: i for i, term in enumerate(sorted({term for terms in counted for term in terms}))}
        ids = [[vocabulary[term] for term in terms] for terms in counted]
        model = bm25s.BM25(k1=k1, b=b, method="lucene")
        model.index((ids, vocabulary), show_progress=False)
        return cls(model)

    def save(self, folder: Path) -> None:
        """Write numpy arrays (no pickle) and the vocabulary."""
        self._model.save(str(folder), show_progress=False)

    @classmethod
    def load(cls, folder: Path) -> LexicalIndex:
        """Read what `save` wrote."""
        import bm25s

        return cls(bm25s.BM25.load(str(folder), show_progress=False, verbosity=0))

    def search(self, query: str, *, top_k: int) -> list[int]:
        """Positions of the best passages that share a term with the query, ties by position."""
        return best_positions(self.scores(query), top_k=top_k)

    def scores(self, query: str) -> NDArray[np.float32]:
        """BM25 of every passage, [passages]; a term that the query repeats counts as often."""
        ids = self._model.get_tokens_ids(index_terms(query))
        if not ids:
            return np.zeros(self._model.scores["num_docs"], dtype=np.float32)
        scores: NDArray[np.float32] = self._model.get_scores_from_ids(ids)
        return scores


def best_positions(scores: NDArray[np.float32], *, top_k: int) -> list[int]:
    """Positions of the highest scores above 0, best first, ties by position."""
    found = np.flatnonzero(scores > 0)
    order = np.argsort(-scores[found], kind="stable")[:top_k]
    return [int(position) for position in found[order]]
