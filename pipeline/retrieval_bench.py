"""Measures BM25, dense, hybrid and reranked retrieval on a `Case`, at the level of documents.

Everything runs as in a product: the index stage's index, the retriever that answers, the reranker's files. A case's
rows train the reranker; its weight and its epoch are chosen on rows held out by disease or document; the
questions that are reported serve for nothing else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from domains.config import IndexSection, RerankSection, RetrieveSection
from domains.records import Document
from pipeline.bootstrap import ratio_interval
from pipeline.progress import Progress
from pipeline.ranking import Fitted, Judged, fit_weight, hit_at_1, ndcg_at_10
from pipeline.rerank_pools import Row, build_pools, split_rows
from pipeline.rerank_tower import PassageStates
from pipeline.rerank_train import Recipe, train_reranker
from pipeline.retrieval_cases import Ask, Case
from rag.embed import MiniLMEmbedder, Vectors
from rag.index import Index, open_index, update_index
from rag.rerank import FOLDER, Reranker, Tower, compress_passages, open_reranker, save_reranker
from rag.retrieve import Retriever

DEPTH = 100
RESAMPLES = 2000


class RememberingEmbedder(MiniLMEmbedder):
    """MiniLM that keeps the hidden states of what it embedded (float16): index and reranker need one pass, not two."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, np.ndarray[Any, np.dtype[np.float16]]] = {}

    def token_states(self, texts: Sequence[str]) -> list[Vectors]:
        """As ever, from memory where the text was seen before."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        for text, states in zip(new, super().token_states(new), strict=True):
            self._kept[text] = states.astype(np.float16)
        return [self._kept[text].astype(np.float32) for text in texts]

    def embed(self, texts: Sequence[str]) -> Vectors:
        """The mean of the hidden states, of length 1."""
        if not texts:
            return super().embed(texts)
        means = np.stack([states.mean(axis=0) for states in self.token_states(texts)])
        vectors: Vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
        return vectors


def measure_case(
    case: Case,
    work: Path,
    progress: Progress,
    *,
    rerank: RerankSection,
    rows: int = 0,
    passage_chars: int = IndexSection().passage_chars,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of a case.

    Args:
        case: what is searched, asked and learnt from.
        work: an empty folder for the indexes.
        progress: told what happens.
        rerank: how the reranker is trained; ``enabled`` is not looked at.
        rows: how many rows to learn from, whole groups at a time; 0 takes all.
        passage_chars: length of a passage.
        seed: of the choice of rows and of the intervals.

    Returns:
        ``bm25``, ``dense``, ``hybrid``, ``reranked``: each ``hit@1``, ``ndcg@10`` and their 95 % intervals ``…_interval``
        (drawn by group); ``rerank_ms_50`` and ``rerank_ms_100`` (ms for as many candidates, or for all where there are
        fewer passages); ``bytes_per_passage``; ``fitted`` and ``history`` of the training.
    """
    embedder = RememberingEmbedder()
    chosen = take_groups(case.rows, count=rows, seed=seed)
    learn = learning_documents(case, chosen)
    index = build_index(case.documents, work / "index", embedder, progress, passage_chars=passage_chars)
    source = index
    try:
        if learn is not case.documents:
            source = build_index(learn, work / "learn", embedder, progress, passage_chars=passage_chars)
        tower, fitted, history = train_on(source, chosen, case.gold, embedder, progress, rerank)
        vectors = compress_passages(index.passages, tower.compressor, embedder)
        save_reranker(work / FOLDER, tower, index.passages, vectors, fused_weight=fitted.weight)
        reranker = open_reranker(work / FOLDER, index.passages)
        result: dict[str, Any] = compare(index, case.asks, reranker, candidates=rerank.candidates, seed=seed)
        return result | {
            "rerank_ms_50": milliseconds(index, case.asks, reranker, candidates=50),
            "rerank_ms_100": milliseconds(index, case.asks, reranker, candidates=100),
            "bytes_per_passage": round(vectors.size_bytes / max(1, vectors.count)),
            "questions": len(case.asks), "documents": len(case.documents), "passages": len(index.passages),
            "rows": len(chosen), "fitted": asdict(fitted) | {"helps": fitted.helps}, "history": history,
        }  # fmt: skip
    finally:
        index.close()
        if source is not index:
            source.close()


def learning_documents(case: Case, chosen: Sequence[Row]) -> list[Document]:
    """What is searched for the chosen rows: the case's documents to learn from, less those of rows left out."""
    if case.train_documents is case.documents:
        return case.documents
    about = {name for row in chosen for name in case.gold[row.item_id]}
    others = {name for row in case.rows for name in case.gold[row.item_id]} - about
    return [document for document in case.train_documents if document.doc_id not in others]


def take_groups(rows: Sequence[Row], *, count: int, seed: int) -> list[Row]:
    """About ``count`` rows, whole groups in random order; all for 0."""
    if not count or count >= len(rows):
        return list(rows)
    names = sorted({row.group for row in rows})
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    taken: list[Row] = []
    for i in order:
        if len(taken) >= count:
            break
        taken += by_group[names[i]]
    return taken


def build_index(
    documents: Sequence[Document],
    folder: Path,
    embedder: MiniLMEmbedder,
    progress: Progress,
    *,
    passage_chars: int,
) -> Index:
    """The index stage's index, opened."""
    progress.say(f"indexing {len(documents)} documents")
    update_index(folder, documents, embedder=embedder, max_chars=passage_chars, overlap_chars=0)
    return open_index(folder, embedder=embedder)


def train_on(
    index: Index,
    rows: Sequence[Row],
    gold: dict[str, frozenset[str]],
    embedder: MiniLMEmbedder,
    progress: Progress,
    rerank: RerankSection,
) -> tuple[Tower, Fitted, list[dict[str, Any]]]:
    """The tower, the weight of the fused score chosen on the held-out rows, and the training's course."""
    learn, held = split_rows(rows, share=rerank.development_share, seed=rerank.seed)
    pools, held_pools = (
        build_pools(part, index.passages, k1=rerank.k1, b=rerank.b, size=rerank.pool)[0]
        for part in (learn, held)
    )
    names = {cand.pid for pool in (*pools, *held_pools) for cand in pool.cands}
    wanted = [passage for passage in index.passages if passage.passage_id in names]
    states = PassageStates.encode(wanted, embedder)
    recipe = Recipe(
        loss=rerank.loss, tau1=rerank.tau1, tau2=rerank.tau2, draws=rerank.draws, epochs=rerank.epochs,
        batch=rerank.batch, learning_rate=rerank.learning_rate, rank=rerank.rank, alpha=rerank.alpha,
        dropout=rerank.dropout, dimensions=rerank.dimensions, seed=rerank.seed,
    )  # fmt: skip
    progress.start("training the reranker", recipe.epochs * len(pools))
    trained = train_reranker(pools, held_pools, states, recipe, on_step=progress.advance)
    tower = Tower(trained.changed, trained.compressor)
    vectors = compress_passages(index.passages, tower.compressor, embedder)
    numbers = {passage.passage_id: number for number, passage in enumerate(index.passages)}
    reranker = Reranker(tower, vectors, numbers, fused_weight=0.0, embedder=embedder)
    asks = [Ask(row.item_id, row.question, gold[row.item_id], row.group) for row in held]
    fitted = fit_weight(judge(index, asks, reranker, candidates=rerank.candidates))
    return tower, fitted, [entry.model_dump() for entry in trained.history]


def judge(index: Index, asks: Sequence[Ask], reranker: Reranker, *, candidates: int) -> list[Judged]:
    """Each question's hybrid candidates with the reranker's scores."""
    retriever = _retriever(index)
    found = retriever.candidates([ask.question for ask in asks], depth=candidates)
    judged = []
    for i, fused in found.items():
        names = [entry.item for entry in fused[:candidates]]
        judged.append(
            Judged(
                documents=[index.by_id[name].doc_id for name in names],
                fused=np.array([entry.score for entry in fused[:candidates]]),
                scores=reranker.scores(asks[i].question, names),
                gold=asks[i].gold,
            )
        )
    return judged


def compare(
    index: Index, asks: Sequence[Ask], reranker: Reranker | None, *, candidates: int, seed: int
) -> dict[str, dict[str, Any]]:
    """hit@1 and nDCG@10 of the four retrievers (three without a reranker)."""
    arms = {
        "bm25": _retriever(index, dense=0.0),
        "dense": _retriever(index, lexical=0.0),
        "hybrid": _retriever(index),
    }
    if reranker is not None:
        arms["reranked"] = _retriever(index, reranker=reranker, candidates=candidates)
    questions = [ask.question for ask in asks]
    result = {}
    for name, retriever in arms.items():
        found = retriever.retrieve_many(questions, top_k=DEPTH)
        ranked = [list(dict.fromkeys(hit.passage.doc_id for hit in hits)) for hits in found]
        values = {
            "hit@1": [hit_at_1(names, ask.gold) for names, ask in zip(ranked, asks, strict=True)],
            "ndcg@10": [ndcg_at_10(names, ask.gold) for names, ask in zip(ranked, asks, strict=True)],
        }
        result[name] = _with_intervals(values, [ask.group for ask in asks], seed=seed)
    return result


def milliseconds(index: Index, asks: Sequence[Ask], reranker: Reranker, *, candidates: int) -> float:
    """Median time in ms to order ``candidates`` passages, the encoding of the query included."""
    found = _retriever(index).candidates([ask.question for ask in asks[:100]], depth=candidates)
    times = []
    for i, fused in found.items():
        begin = time.perf_counter()
        reranker.reorder(asks[i].question, fused[:candidates])
        times.append((time.perf_counter() - begin) * 1000)
    return round(statistics.median(times), 2)


def _retriever(
    index: Index,
    *,
    lexical: float = 1.0,
    dense: float = 1.0,
    reranker: Reranker | None = None,
    candidates: int = DEPTH,
) -> Retriever:
    return Retriever(
        index, candidates=DEPTH, rrf_k=RetrieveSection().rrf_k, lexical_weight=lexical, dense_weight=dense,
        reranker=reranker, rerank_candidates=candidates,
    )  # fmt: skip


def _with_intervals(values: dict[str, list[float]], groups: Sequence[str], *, seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, numbers in values.items():
        interval = ratio_interval(
            numbers, [1.0] * len(numbers), clusters=groups, resamples=RESAMPLES, seed=seed
        )
        assert interval is not None  # a case has questions
        result[name] = interval.mean
        result[f"{name}_interval"] = [interval.low, interval.high]
    return result
