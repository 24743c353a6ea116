"""rerank: a reranker that orders passages by the question as BM25 would by the rationale (KARD, arXiv 2305.18395).

reads    the domain's questions, rationales.jsonl, train.jsonl (which rationales were kept), the index
writes   rerank/pools.jsonl, bundle/reranker/ where it certainly helps, rerank/result.json (last);
         without ``[rerank] enabled`` only the last
counts   rows = rationales kept = pools + held_out + without_candidates;
         questions = held-out questions on which the weight of the fused score was chosen

At answering time the reranker and the lists that it orders see the question alone; rationales and answers serve
to train it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.domain import Domain
from domains.errors import StageError
from domains.jsonl import read_jsonl, write_jsonl, write_text_atomic
from domains.records import Example, Question, Rationale
from pipeline.progress import Progress
from pipeline.questions import read_all_questions
from pipeline.ranking import SURE, Fitted, Judged, fit_weight, quoted_passages
from pipeline.rerank_pools import Pool, Row, build_pools, split_rows
from pipeline.rows import rationale_query
from pipeline.run_folder import Report, Run, disk_errors, need
from serve.models import sha256_file

if TYPE_CHECKING:
    from pipeline.rerank_train import Recipe, Trained
    from rag.index import Index
    from rag.rerank import Reranker


def run(domain: Domain, run: Run, progress: Progress) -> Report:
    """Train, choose and store the reranker, or take away an earlier one where it is switched off.

    Raises:
        StageError: an input is missing, or there are too few rationales to hold some out.
        ModelError: the encoder's weights are not installed.
    """
    config = domain.config
    result = run.rerank / "result.json"
    result.unlink(missing_ok=True)
    if not config.rerank.enabled:
        shutil.rmtree(run.reranker, ignore_errors=True)
        progress.say("[rerank] enabled = false: no reranker")
        write_text_atomic(result, json.dumps({"enabled": False}) + "\n")
        return Report(counts={"rows": 0, "pools": 0, "held_out": 0, "without_candidates": 0, "questions": 0})
    from rag.embed import MiniLMEmbedder
    from rag.index import open_index

    questions = {question.id: question for question in read_all_questions(domain, run)}
    rows = _rows(run, questions)
    index = open_index(need(run.index, stage="index"), embedder=MiniLMEmbedder())
    try:
        counts, facts = _train(domain, run, progress, index, rows, questions)
    finally:
        index.close()
    write_text_atomic(result, json.dumps({"enabled": True, "counts": counts, **facts}, indent=1) + "\n")
    return Report(counts=counts, facts=facts)


def _rows(run: Run, questions: dict[str, Question]) -> list[Row]:
    """Rationales that curation kept, as KARD searches with them."""
    kept = {example.request for example in read_jsonl(need(run.examples, stage="curate"), Example)}
    rationales = read_jsonl(need(run.rationales, stage="elicit"), Rationale)
    rows = {
        rationale.request: Row(
            item_id=rationale.question_id,
            question=questions[rationale.question_id].question,
            rationale=rationale_query(questions[rationale.question_id], rationale),
            group=questions[rationale.question_id].about,
        )
        for rationale in rationales
        if rationale.request in kept and rationale.question_id in questions
    }
    if not rows:
        raise StageError(
            "no rationale was kept, so there is nothing that the reranker could learn from",
            expected="kept rationales about at least two documents",
            next_step="preceptor curate DOMAIN, or [rerank] enabled = false",
        )
    return list(rows.values())


def _train(
    domain: Domain,
    run: Run,
    progress: Progress,
    index: Index,
    rows: Sequence[Row],
    questions: dict[str, Question],
) -> tuple[dict[str, int], dict[str, Any]]:
    from pipeline.rerank_tower import PassageStates
    from pipeline.rerank_train import train_reranker
    from rag.embed import MiniLMEmbedder

    rerank = domain.config.rerank
    learn, held = split_rows(rows, share=rerank.development_share, seed=rerank.seed)
    pools, without = build_pools(learn, index.passages, k1=rerank.k1, b=rerank.b, size=rerank.pool)
    held_pools, held_without = build_pools(held, index.passages, k1=rerank.k1, b=rerank.b, size=rerank.pool)
    _need_pools(pools, held_pools)
    write_jsonl(run.rerank / "pools.jsonl", [*pools, *held_pools])
    wanted = {cand.pid for pool in (*pools, *held_pools) for cand in pool.cands}
    passages = [passage for passage in index.passages if passage.passage_id in wanted]
    progress.start("encoding candidates", len(passages))
    states = PassageStates.encode(passages, MiniLMEmbedder(), advance=progress.advance)
    recipe = _recipe(domain)
    progress.start("training the reranker", recipe.epochs * len(pools))
    trained = train_reranker(pools, held_pools, states, recipe, on_step=progress.advance)
    asked = [questions[name] for name in sorted({row.item_id for row in held})]
    with disk_errors(run.reranker):
        fitted, size_bytes = _store(domain, run, progress, index, trained, asked)
    counts = {
        "rows": len(rows), "pools": len(pools), "held_out": len(held_pools),
        "without_candidates": len(without) + len(held_without), "questions": fitted.questions,
    }  # fmt: skip
    facts = {
        "epoch": trained.best.epoch, "history": [entry.model_dump() for entry in trained.history],
        "fitted": asdict(fitted), "size_bytes": size_bytes,
        "kept": fitted.helps or rerank.keep == "always",
        "sha256": {path.name: sha256_file(path) for path in sorted(run.reranker.glob("*"))},
        "bytes_per_passage": round(size_bytes / max(1, len(index.passages))),
    }  # fmt: skip
    return counts, facts


def _need_pools(*parts: Sequence[Pool]) -> None:
    if not all(parts):
        raise StageError(
            "no rationale on one side of the split shares a word with two passages",
            expected="rationales about the documents of the index",
            next_step="preceptor elicit DOMAIN",
        )


def _recipe(domain: Domain) -> Recipe:
    from pipeline.rerank_train import Recipe

    rerank = domain.config.rerank
    return Recipe(
        loss=rerank.loss, tau1=rerank.tau1, tau2=rerank.tau2, draws=rerank.draws, epochs=rerank.epochs,
        batch=rerank.batch, learning_rate=rerank.learning_rate, rank=rerank.rank, alpha=rerank.alpha,
        dropout=rerank.dropout, dimensions=rerank.dimensions, seed=rerank.seed,
    )  # fmt: skip


def _store(
    domain: Domain, run: Run, progress: Progress, index: Index, trained: Trained, asked: Sequence[Question]
) -> tuple[Fitted, int]:
    """Compress all passages, choose the weight on held-out questions, write the files."""
    from rag.embed import MiniLMEmbedder
    from rag.rerank import Reranker, Tower, compress_passages, save_reranker

    embedder = MiniLMEmbedder()
    tower = Tower(trained.changed, trained.compressor)
    progress.start("compressing passages", len(index.passages))
    vectors = compress_passages(index.passages, tower.compressor, embedder, advance=progress.advance)
    numbers = {passage.passage_id: number for number, passage in enumerate(index.passages)}
    reranker = Reranker(tower, vectors, numbers, fused_weight=0.0, embedder=embedder)
    fitted = fit_weight(_judged(domain, index, reranker, asked))
    progress.say(
        f"held-out questions {fitted.questions}: hit@1 {fitted.hybrid_hit1:.3f} hybrid, {fitted.reranked_hit1:.3f} "
        f"reranked; nDCG@10 {fitted.hybrid_ndcg10:.3f}, {fitted.reranked_ndcg10:.3f}; p = {fitted.p:.2g}"
    )
    if fitted.helps or domain.config.rerank.keep == "always":
        save_reranker(run.reranker, tower, index.passages, vectors, fused_weight=fitted.weight)
    else:
        shutil.rmtree(run.reranker, ignore_errors=True)
        progress.say(
            f"That it helps is not certain (p < {SURE} is asked for), so the hybrid order stays and no reranker is "
            "kept. More rationales and more questions may change that"
        )
    return fitted, vectors.size_bytes


def _judged(domain: Domain, index: Index, reranker: Reranker, asked: Sequence[Question]) -> list[Judged]:
    from rag.retrieve import Retriever

    config = domain.config
    retriever = Retriever(
        index,
        candidates=config.retrieve.candidates,
        rrf_k=config.retrieve.rrf_k,
        lexical_weight=config.retrieve.lexical_weight,
        dense_weight=config.retrieve.dense_weight,
    )
    depth = config.rerank.candidates
    judged = []
    for i, fused in retriever.candidates([question.question for question in asked], depth=depth).items():
        names = [entry.item for entry in fused[:depth]]
        quoted = quoted_passages(asked[i], index.passages)
        documents = {quote.doc_id for quote in asked[i].gold} or {asked[i].about}
        judged.append(
            Judged(
                # What the student is shown are passages: the one with the quote counts, where a quote is known.
                documents=names if quoted else [index.by_id[name].doc_id for name in names],
                fused=np.array([entry.score for entry in fused[:depth]]),
                scores=reranker.scores(asked[i].question, names),
                gold=quoted or documents,
            )
        )
    return judged
