"""Retrieval tests: documents, questions with the documents that answer them, and rows to learn from that are none of them.

No row is about a disease (or document) of a question that is reported, whether or not the corpus answers it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domains.jsonl import iter_json_lines, read_jsonl
from domains.records import Document, Question
from pipeline.ranking import quoted_passages
from pipeline.rerank_pools import Row
from rag.load import load_documents
from rag.passages import split_document
from rag.words import words

_LONGEST = 2500  # characters of an answer that become a document to learn from: as long as those of the test


@dataclass(frozen=True)
class Ask:
    """A question, the documents that answer it, and what groups it with others (a disease, a document)."""

    id: str
    question: str
    gold: frozenset[str]
    group: str


@dataclass(frozen=True)
class Case:
    """``documents`` are searched for ``asks``; ``rows`` are about ``train_documents``, answered by ``gold`` (by row id)."""

    name: str
    documents: list[Document]
    asks: list[Ask]
    train_documents: list[Document]
    rows: list[Row]
    gold: dict[str, frozenset[str]]


def medquad_case(answerable: Path, medquad: Path, *, split: str = "dev", titles: bool = True) -> Case:
    """Documents and questions in BEIR's form; rows from MedQuAD, the reference answer in the rationale's place.

    Args:
        answerable: folder with ``<split>_corpus.jsonl`` and ``<split>_questions.jsonl``.
        medquad: file of question-answer rows with ``focus``, ``cui``, ``doc``, ``qtype``.
        split: ``dev`` or ``hidden``.
        titles: whether documents keep their titles.
    """
    corpus = _rows(answerable / f"{split}_corpus.jsonl")
    questions = _rows(answerable / f"{split}_questions.jsonl")
    documents = [_document(row["doc_id"], row["title"] if titles else "", row["text"]) for row in corpus]
    asks = [
        Ask(row["id"], row["question"], frozenset(row["gold_doc_ids"]), _plain(row["focus"]))
        for row in questions
        if row["answerable"]
    ]
    usable = _other_diseases(_rows(medquad), questions)
    train = [
        _document(row["id"], f"{row['focus']} — {row['qtype']}" if titles else "", row["answer"][:_LONGEST])
        for row in usable
    ]
    rows = [
        Row(row["id"], row["question"], row["answer"][:_LONGEST], group=_plain(row["focus"]))
        for row in usable
    ]
    gold = {row["id"]: frozenset([row["id"]]) for row in usable}
    return Case("medquad_answerable", documents, asks, train, rows, gold)


def _other_diseases(rows: list[dict[str, Any]], questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that share neither focus, synonym, UMLS concept, source document, wording nor text with any question."""
    asked = {_plain(row["focus"]) for row in questions}
    wordings = {_plain(row["question"]) for row in questions}
    named = {row["id"].removeprefix("ans-") for row in questions}
    named |= {name for row in questions for name in row["gold_doc_ids"]}
    answers = {_plain(row["answer"]) for row in questions if row["answer"]}
    theirs = [row for row in rows if row["id"] in named or asked & {_plain(row["focus"]), *_synonyms(row)}]
    concepts = {concept for row in theirs for concept in row["cui"]}
    sources = {row["doc"] for row in theirs}
    return [
        row
        for row in rows
        if not row["link_list"]
        and row["id"] not in named
        and row["doc"] not in sources
        and not asked & {_plain(row["focus"]), *_synonyms(row)}
        and not concepts & set(row["cui"])
        and _plain(row["question"]) not in wordings
        and _plain(row["answer"]) not in answers
    ]


def prd_case(folder: Path, *, split: str = "dev", learn_share: float = 0.5) -> Case:
    """Headings as questions over passages without headings; every second document's questions serve to learn from.

    Args:
        folder: with ``<split>_passages.jsonl`` and ``<split>_questions.jsonl``.
        split: ``dev`` or ``hidden``.
        learn_share: of the documents, in the order of their ids.
    """
    passages = _rows(folder / f"{split}_passages.jsonl")
    questions = [row for row in _rows(folder / f"{split}_questions.jsonl") if row["gold_passage_ids"]]
    names = sorted({row["doc_id"] for row in questions})
    learn = {name for i, name in enumerate(names) if (i % 100) < 100 * learn_share}
    documents = [_document(row["passage_id"], row["title"], row["text"]) for row in passages]
    about = {row["passage_id"]: row["doc_id"] for row in passages}
    asks = [
        Ask(row["id"], row["question_in_context"], frozenset(row["gold_passage_ids"]), row["doc_id"])
        for row in questions
        if row["doc_id"] not in learn
    ]
    train = [document for document in documents if about[document.doc_id] in learn]
    rows = [
        Row(row["id"], row["question_in_context"], row["answer"], group=row["doc_id"])
        for row in questions
        if row["doc_id"] in learn
    ]
    gold = {row["id"]: frozenset(row["gold_passage_ids"]) for row in questions}
    return Case("prd_doc_qa", documents, asks, train, rows, gold)


def corpus_case(folder: Path, *, passage_chars: int = 0) -> Case:
    """One of the project's corpora: exam questions; seed answers with their quotes in the rationale's place.

    Args:
        folder: with ``documents`` and ``questions.jsonl``.
        passage_chars: above 0, passages of this length take the place of documents, and gold is where a quote stands.
    """
    documents = load_documents(folder / "documents").documents
    questions = [q for q in read_jsonl(folder / "questions.jsonl", Question) if q.gold]
    gold = {q.id: frozenset(quote.doc_id for quote in q.gold) for q in questions}
    if passage_chars:
        passages = [
            passage
            for document in documents
            for passage in split_document(document, max_chars=passage_chars, overlap_chars=0)
        ]
        documents = [
            _document(p.passage_id, "\n".join([p.title, p.heading]).strip(), p.text) for p in passages
        ]
        gold = {q.id: quoted_passages(q, passages) for q in questions}
    asks = [Ask(q.id, q.question, gold[q.id], q.about) for q in questions if q.split == "exam" and gold[q.id]]
    rows = [
        Row(q.id, q.question, "\n".join([*(quote.quote for quote in q.gold), f"Answer: {q.answer}"]), q.about)
        for q in questions
        if q.split == "seed"
    ]
    return Case(folder.name, documents, asks, documents, rows, gold)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in iter_json_lines(path)]


def _document(name: str, title: str, text: str) -> Document:
    return Document(doc_id=name, title=title, text=text, source=name)


def _plain(text: str) -> str:
    return " ".join(words(text))


def _synonyms(row: dict[str, Any]) -> Iterable[str]:
    return (_plain(name) for name in row.get("synonyms") or [])
