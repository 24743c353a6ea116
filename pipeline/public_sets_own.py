"""The same measures on a domain's own exam: options, yes/no, and which questions its documents answer."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from domains.config import RetrieveSection
from domains.domain import Domain
from domains.records import Passage, Question
from pipeline.abstention import Case
from pipeline.progress import Progress
from pipeline.public_sets import Read
from pipeline.public_sets_abstention import fit_on_pairs, measure_retrieval_confidence
from pipeline.public_sets_options import measure_options
from pipeline.public_sets_yes_no import measure_yes_no
from pipeline.retrieval_bench import build_index
from rag.embed import MiniLMEmbedder
from rag.index import Index
from rag.lexical import LexicalIndex
from rag.load import load_documents
from rag.passages import split_document
from rag.retrieve import Retriever
from serve.engine import Engine


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


def answerable_questions(domain: Domain, work: Path, progress: Progress) -> dict[str, Any]:
    """Does retrieval know which of a domain's exam questions its documents answer? Fitted to its seed questions.

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
    return {f"answerable_{domain.name}": found}


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
