"""Hybrid retrieval: the nearest vectors and the best words, fused by rank, then reranked where that was learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Self

from domains.config import RerankSection, RetrieveSection
from domains.errors import ConfigError
from domains.records import Hit, Passage
from rag.embed import MiniLMEmbedder
from rag.fuse import Fused, fuse
from rag.index import Index, open_index
from rag.rerank import FOLDER, Reranker, open_reranker


def open_retriever(folder: Path, retrieve: RetrieveSection, rerank: RerankSection | None = None) -> Retriever:
    """A retriever over the index in ``folder`` as ``[retrieve]`` wants it; close it after use.

    Args:
        folder: the index.
        retrieve: how the lists are fused.
        rerank: puts the trained reranker to work that lies beside the index, where it is enabled and
            there; None leaves it out.

    Raises:
        DataError: there is no index, or the reranker is damaged.
        IndexMismatch: it was built with another embedder.
    """
    beside = folder.parent / FOLDER
    index = open_index(folder, embedder=MiniLMEmbedder())
    try:
        wanted = rerank is not None and rerank.enabled and beside.is_dir()
        return Retriever(
            index,
            candidates=retrieve.candidates,
            rrf_k=retrieve.rrf_k,
            lexical_weight=retrieve.lexical_weight,
            dense_weight=retrieve.dense_weight,
            reranker=open_reranker(beside, index.passages) if wanted else None,
            rerank_candidates=rerank.candidates if rerank is not None else 0,
        )
    except BaseException:
        index.close()
        raise


class Retriever:
    """Finds passages for a query by dense and lexical search and reciprocal rank fusion.

    Args:
        index: an open index.
        candidates: how many passages each list contributes.
        rrf_k: the constant of the fusion, see `rag.fuse.fuse`.
        lexical_weight: weight of the BM25 list; 0 leaves it out.
        dense_weight: weight of the vectors' list; 0 leaves it out.
        reranker: orders the first ``rerank_candidates`` of the fused list anew.
        rerank_candidates: how many it orders, and how many passages each list contributes at least.

    Raises:
        ConfigError: both weights are 0.
    """

    def __init__(
        self,
        index: Index,
        *,
        candidates: int,
        rrf_k: int,
        lexical_weight: float,
        dense_weight: float,
        reranker: Reranker | None = None,
        rerank_candidates: int = 100,
    ) -> None:
        weights = {"dense": dense_weight, "lexical": lexical_weight}
        self.index = index
        self._sizes = Counter(passage.doc_id for passage in index.passages)
        self._weights = {name: weight for name, weight in weights.items() if weight > 0}
        self._candidates = candidates
        self._rrf_k = rrf_k
        self._reranker = reranker
        self._rerank_candidates = rerank_candidates if reranker is not None else 0
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

    def retrieve(self, query: str, *, top_k: int, without: Set[str] = frozenset()) -> list[Hit]:
        """The ``top_k`` best passages, best first, ties broken by passage id; none for an empty query.

        Scores are fused ranks, or the reranker's where there is one, comparable within one call only.
        Ranks and scores are as if the documents ``without`` were not in the index.
        """
        return self.retrieve_many([query], top_k=top_k, without=without)[0]

    def retrieve_many(
        self, queries: Sequence[str], *, top_k: int, without: Set[str] = frozenset()
    ) -> list[list[Hit]]:
        """`retrieve` for each query; the queries are embedded together."""
        hits: list[list[Hit]] = [[] for _ in queries]
        for i, fused in self.candidates(queries, depth=top_k, without=without).items():
            if self._reranker is not None:
                pool = fused[: max(self._rerank_candidates, top_k)]
                fused = self._reranker.reorder(queries[i], pool)
            hits[i] = [
                Hit(
                    passage=self.index.by_id[entry.item],
                    score=entry.score,
                    ranks=entry.ranks,
                    scores={name: round(score, 6) for name, score in entry.scores.items()},
                )
                for entry in fused[:top_k]
            ]
        return hits

    def candidates(
        self, queries: Sequence[str], *, depth: int, without: Set[str] = frozenset()
    ) -> dict[int, list[Fused]]:
        """The fused lists of the queries that are not empty, by position, before any reranking.

        Each of the two lists is at least ``depth`` long, where the index has as many besides the passages of the
        documents ``without``.
        """
        asked = [i for i, query in enumerate(queries) if query.strip()]
        length = max(self._candidates, self._rerank_candidates, depth)
        reach = length + sum(self._sizes[document] for document in without)
        dense: dict[int, dict[str, float]] = {}
        if asked and "dense" in self._weights:
            vectors = self.index.embedder.embed([queries[i] for i in asked])
            dense = dict(zip(asked, self.index.score_dense(vectors, top_k=reach), strict=True))
        fused = {}
        for i in asked:
            rankings: dict[str, Mapping[str, float]] = {"dense": dense[i]} if i in dense else {}
            if "lexical" in self._weights:
                rankings["lexical"] = self.index.score_lexical(queries[i], top_k=reach)
            if without:
                rankings = {name: self._without(found, without, length) for name, found in rankings.items()}
            fused[i] = fuse(rankings, weights=self._weights, k=self._rrf_k)
        return fused

    def _without(self, scored: Mapping[str, float], documents: Set[str], length: int) -> dict[str, float]:
        others = (item for item in scored.items() if self.index.by_id[item[0]].doc_id not in documents)
        return dict(islice(others, length))
