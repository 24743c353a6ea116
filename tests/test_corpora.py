"""The shipped corpora keep what they promise: size, kinds, splits by document, literal quotes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from domains.jsonl import read_jsonl
from domains.records import Document, Question
from rag.load import load_documents

CORPORA = Path(__file__).parent.parent / "corpora"
MINIMUM = {"medical": 60, "product_requirements": 50}


@pytest.fixture(scope="module", params=sorted(MINIMUM))
def corpus(request: pytest.FixtureRequest) -> tuple[str, dict[str, Document], list[Question]]:
    folder = CORPORA / request.param
    loaded = load_documents(folder / "documents")
    assert loaded.skipped == []
    documents = {document.doc_id: document for document in loaded.documents}
    return request.param, documents, read_jsonl(folder / "questions.jsonl", Question)


def test_size(corpus: tuple[str, dict[str, Document], list[Question]]) -> None:
    name, documents, questions = corpus
    assert len(documents) >= MINIMUM[name]
    assert len(questions) >= 400
    assert len({question.id for question in questions}) == len(questions)
    assert len({question.question.lower() for question in questions}) == len(questions)


def test_every_gold_quote_stands_in_its_document(
    corpus: tuple[str, dict[str, Document], list[Question]],
) -> None:
    _, documents, questions = corpus
    missing = [q.id for q in questions for gold in q.gold if gold.quote not in documents[gold.doc_id].text]
    assert missing == []
    assert all(question.gold for question in questions if question.kind != "unanswerable")


def test_kinds(corpus: tuple[str, dict[str, Document], list[Question]]) -> None:
    _, _, questions = corpus
    for split in ("seed", "exam"):
        kinds = Counter(question.kind for question in questions if question.split == split)
        total = sum(kinds.values())
        assert kinds["unanswerable"] >= 0.15 * total
        assert min(kinds.values()) >= 0.1 * total
    letters = Counter(q.answer for q in questions if q.kind == "options")
    assert max(letters.values()) <= 0.35 * sum(letters.values()), "guessing one letter must not pay"
    said = Counter(q.answer for q in questions if q.kind == "yes_no")
    assert max(said.values()) <= 0.55 * sum(said.values())
    assert set(said) == {"yes", "no", "maybe"}


def test_split_is_by_document(corpus: tuple[str, dict[str, Document], list[Question]]) -> None:
    _, documents, questions = corpus
    sides: dict[str, set[str]] = {}
    for question in questions:
        for doc_id in {question.about, *(gold.doc_id for gold in question.gold)}:
            assert doc_id in documents
            sides.setdefault(doc_id, set()).add(question.split)
    assert all(len(side) == 1 for side in sides.values())
    assert {"seed", "exam"} == {next(iter(side)) for side in sides.values()}
    assert set(sides) == set(documents), "every document is asked about"


def test_versions_stay_on_one_side() -> None:
    documents = load_documents(CORPORA / "product_requirements" / "documents").documents
    split = {
        q.about: q.split for q in read_jsonl(CORPORA / "product_requirements" / "questions.jsonl", Question)
    }
    pairs = [(d.doc_id, d.meta["supersedes"]) for d in documents if d.meta.get("supersedes")]
    assert len(pairs) >= 6
    assert all(split[new] == split[old] for new, old in pairs if old in split)
