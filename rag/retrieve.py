"""Hybrid retrieval: the nearest vectors and the best words, fused by rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from domains.config import RetrieveSection
from domains.errors import ConfigError
from domains.records import Hit, Passage
from rag.embed import MiniLMEmbedder
from rag.fuse import fuse
from rag.index import Index, open_index


def open_retriever(folder: Path, retrieve: RetrieveSection) -> Retriever:
    """A retriever over the index in ``folder`` as ``[retrieve]`` wants it; close it after use.

    Raises:
        DataError: there is no index.
        IndexMismatch: it was built with another embedder.
    """
    return Retriever(
        open_index(folder, embedder=MiniLMEmbedder()),
        candidates=retrieve.candidates,
        rrf_k=retrieve.rrf_k,
        lexical_weight=retrieve.lexical_weight,
        dense_weight=retrieve.dense_weight,
    )


class Retriever:
    """Finds passages for a query by dense and lexical search and reciprocal rank fusion.

    Args:
        index: an open index.
        candidates: how many passages each list contributes.
        rrf_k: the constant of the fusion, see `rag.fuse.fuse`.
        lexical_weight: weight of the BM25 list; 0 leaves it out.
        dense_weight: weight of the vectors' list; 0 leaves it out.

    Raises:
        ConfigError: both weights are 0.
    """

    def __init__(
        self, index: Index, *, candidates: int, rrf_k: int, lexical_weight: float, dense_weight: float
    ) -> None:
        weights = {"dense": dense_weight, "lexical": lexical_weight}
        self.index = index
        self._weights = {name: weight for name, weight in weights.items() if weight > 0}
        self._candidates = candidates
        self._rrf_k = rrf_k
        if not self._weights:
            raise ConfigError(
                "lexical_weight and dense_weight are both 0",
                expected="at least one above 0",
                next_step="mend [retrieve] in domain.toml",
            )

    def find(self, query: str, top_k: int) -> list[Passage]:
        """The passages of `retrieve`."""
        return [hit.passage for hit in self.retrieve(query, top_k=top_k)]

    def close(self) -> None:
        """Close the index."""
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        """The ``top_k`` best passages, best first, ties broken by passage id; none for an empty query.

        Scores are fused ranks, comparable within one call only.
        """
        return self.retrieve_many([query], top_k=top_k)[0]

    def retrieve_many(self, queries: Sequence[str], *, top_k: int) -> list[list[Hit]]:
        """`retrieve` for each query; the queries are embedded together."""
        asked = [i for i, query in enumerate(queries) if query.strip()]
        depth = max(self._candidates, top_k)
        dense: dict[int, list[str]] = {}
        if asked and "dense" in self._weights:
            vectors = self.index.embedder.embed([queries[i] for i in asked])
            dense = dict(zip(asked, self.index.search_dense(vectors, top_k=depth), strict=True))
        hits: list[list[Hit]] = [[] for _ in queries]
        for i in asked:
            rankings = {"dense": dense[i]} if i in dense else {}
            if "lexical" in self._weights:
                rankings["lexical"] = self.index.search_lexical(queries[i], top_k=depth)
            fused = fuse(rankings, weights=self._weights, k=self._rrf_k)[:top_k]
            hits[i] = [
                Hit(passage=self.index.by_id[entry.item], score=entry.score, ranks=entry.ranks)
                for entry in fused
            ]
        return hits
