"""The same measures on a domain's own exam: options, yes/no, also as served, and which questions its documents answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from domains.config import CalibrateSection, RetrieveSection
from domains.domain import Domain
from domains.records import Hit, Passage, Question
from pipeline.abstention import Case
from pipeline.bootstrap import paired_difference
from pipeline.fit_yes_no import RESAMPLES, fit_yes_no
from pipeline.progress import Progress
from pipeline.public_sets import Read, accuracy
from pipeline.public_sets_abstention import fit_on_pairs, measure_retrieval_confidence
from pipeline.public_sets_options import measure_options
from pipeline.public_sets_yes_no import measure_yes_no
from pipeline.retrieval_bench import build_index
from rag.answers import parse_reply, parse_yes_no
from rag.embed import MiniLMEmbedder
from rag.index import Index
from rag.lexical import LexicalIndex
from rag.load import load_documents
from rag.passages import split_document
from rag.prompt import render_question
from rag.retrieve import Retriever
from serve.engine import Engine
from serve.yes_no import pick_yes_no


def closed_questions(domain: Domain, progress: Progress, *, engine: Engine | None) -> dict[str, Any]:
    """A domain's own exam: options as OpenStax's, yes/no fitted to its seed questions, with BM25's passages.

    Args:
        domain: with questions.
        progress: told what happens.
        engine: see `measure_options`.
    """
    passages, questions = domain_passages(domain), domain.read_questions()
    index = LexicalIndex.build(passages)

    def read(question: Question) -> Read:
        found = index.search(question.question, top_k=domain.config.retrieve.top_k)
        return Read(question, "\n".join(passages[i].text for i in found))

    options = [q for q in questions if q.kind == "options" and q.split == "exam"]
    seed, exam = (
        [read(q) for q in questions if q.kind == "yes_no" and q.split == split] for split in ("seed", "exam")
    )
    result: dict[str, Any] = {}
    if options:
        result[f"options_{domain.name}"] = measure_options(passages, options, progress, engine=engine)
    if seed and exam:
        result[f"yes_no_{domain.name}"] = measure_yes_no(exam, progress, learn=seed)
    return result


def decided_by_retrieval(domain: Domain, work: Path, progress: Progress) -> dict[str, Any]:
    """What retrieval decides of a domain's exam without a student: which questions its documents answer, and yes or no.

    Both are fitted to its seed questions.

    Args:
        domain: with questions.
        work: a folder for the index.
        progress: told what happens.
    """
    documents = load_documents(domain.documents).documents
    index = build_index(
        documents,
        work / domain.name,
        MiniLMEmbedder(),
        progress,
        passage_chars=domain.config.index.passage_chars,
    )
    with closing(index):
        retriever = hybrid(index)
        seed, exam = (
            [question for question in domain.read_questions() if question.split == split]
            for split in ("seed", "exam")
        )
        if not seed or not exam:
            return {}
        confidence = fit_on_pairs([_response(question) for question in seed], retriever)
        found = measure_retrieval_confidence(
            [_response(question) for question in exam], [q.about for q in exam], retriever, confidence
        )
        served = served_yes_no(seed, exam, retriever, domain.config.calibrate, progress)
    return {f"answerable_{domain.name}": found, f"yes_no_served_{domain.name}": served}


def served_yes_no(
    seed: Sequence[Question],
    exam: Sequence[Question],
    retriever: Retriever,
    calibrate: CalibrateSection,
    progress: Progress,
) -> dict[str, Any]:
    """Yes/no questions of the exam as ``[serve] yes_no = "evidence"`` answers them, over what retrieval finds.

    Returns:
        ``fit`` (see `fit_yes_no`); where there was enough to fit, kept or not: ``accuracy``, ``interval``, ``n``,
        ``unanswered`` (counted as wrong), ``majority`` (always the commonest seed answer), ``minus_majority`` (mean,
        low, high).
    """

    def find(query: str, count: int) -> list[Hit]:
        return retriever.retrieve(query, top_k=count)

    fit = fit_yes_no(seed, find, folds=calibrate.folds, seed=calibrate.seed, progress=progress)
    asked = [question for question in exam if question.kind == "yes_no"]
    if fit.model is None or not asked:
        return {"fit": fit.facts}
    picked = [pick_yes_no(render_question(question), find, [], fit.model) for question in asked]
    said = [parse_yes_no(parse_reply(each.reply).answer) if each else None for each in picked]
    labels: dict[str, int] = fit.facts["labels"]
    commonest = max(labels, key=lambda label: labels[label])
    right, ones = [float(a == q.answer) for a, q in zip(said, asked, strict=True)], [1.0] * len(asked)
    always = [float(question.answer == commonest) for question in asked]
    documents = [question.about for question in asked]
    gap = paired_difference((right, ones), (always, ones), clusters=documents, resamples=RESAMPLES, seed=0)
    assert gap is not None  # there are questions
    return {
        "fit": fit.facts,
        **accuracy(right, documents),
        "unanswered": said.count(None),
        "majority": round(sum(always) / len(always), 4),
        "minus_majority": [round(value, 4) for value in (gap.mean, gap.low, gap.high)],
    }


def _response(question: Question) -> Case:
    homes = {question.about, *(quote.doc_id for quote in question.gold)}
    return Case(question.question, frozenset() if question.kind == "unanswerable" else frozenset(homes))


def domain_passages(domain: Domain) -> list[Passage]:
    """A domain's passages as its index stage cuts them."""
    section = domain.config.index
    return [
        passage
        for document in load_documents(domain.documents).documents
        for passage in split_document(
            document, max_chars=section.passage_chars, overlap_chars=section.overlap_chars
        )
    ]


def hybrid(index: Index) -> Retriever:
    """Hybrid retrieval with the defaults of ``[retrieve]``."""
    section = RetrieveSection()
    return Retriever(
        index,
        candidates=section.candidates,
        rrf_k=section.rrf_k,
        lexical_weight=section.lexical_weight,
        dense_weight=section.dense_weight,
    )
