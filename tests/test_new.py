from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from domains.checks import load_checks
from domains.config import DomainConfig
from domains.domain import PROMPTS, available_domains, load_domain
from domains.errors import ConfigError, DataError
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Document, Question
from pipeline.decontaminate import ExamGuard
from pipeline.new import TEMPLATE, domain_files, new_domain, plain_name
from pipeline.starter_questions import starter_questions
from rag.load import load_documents

TOPICS = {
    "bread": {
        "Kneading": "Knead the dough for ten minutes.",
        "Baking": "Bake it at 230 degrees until it is brown.",
    },
    "soup": {
        "Stock": "Simmer the bones for three hours.",
        "Serving": "Serve the soup hot with parsley on top.",
    },
    "salad": {
        "Washing": "Wash the leaves twice in cold water.",
        "Dressing": "Mix oil and vinegar three to one.",
    },
    "rice": {
        "Rinsing": "Rinse the grains until the water is clear.",
        "Steaming": "Steam them under a lid until soft.",
    },
    "cake": {
        "Batter": "Beat eggs and sugar until the mass is pale.",
        "Icing": "Stir sugar with a little lemon juice.",
    },
}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, sections in TOPICS.items():
        parts = [
            f"## {heading}\n{first} This line is a second one of the section."
            for heading, first in sections.items()
        ]
        (folder / f"{name}.md").write_text(f"# Good {name}\n\n" + "\n\n".join(parts) + "\n")
    return folder


def test_a_new_domain_loads_and_points_to_its_documents(docs, tmp_path):
    folder = new_domain("kitchen", docs, into=tmp_path / "domains" / "kitchen", title='The "kitchen" helper')
    domain = load_domain(str(folder))
    assert domain.name == "kitchen"
    assert domain.config.domain.title == 'The "kitchen" helper'
    assert domain.documents == docs.resolve()
    assert set(domain.prompts) == set(PROMPTS)
    assert domain.config.domain.abstain in domain.prompts["system"]
    assert load_domain(str(folder), profile="quick").config.elicit.questions > 0
    assert "machine-made starter questions" in (folder / "README.md").read_text()
    assert f"preceptor run {folder}" in (folder / "README.md").read_text()
    assert not (tmp_path / "domains" / "docs").exists()


def test_starter_questions_quote_the_documents(docs):
    documents = load_documents(docs).documents
    texts = {document.doc_id: document.text for document in documents}
    questions = starter_questions(documents)
    answerable = [question for question in questions if question.kind == "open"]
    assert len(answerable) == 10
    for question in answerable:
        assert all(gold.quote in texts[gold.doc_id] for gold in question.gold)
        assert question.answer == question.gold[0].quote
    knead = next(question for question in answerable if "kneading" in question.question)
    assert knead.question == "What does Good bread say about kneading?"
    assert knead.gold[0].quote == "Knead the dough for ten minutes."
    missing = [question for question in questions if question.kind == "unanswerable"]
    assert 0.15 <= len(missing) / len(questions) <= 0.25
    for question in missing:
        topic = re.search(r"about (\w+)\?", question.question)[1]
        assert topic not in texts[question.about].lower()
    sides: dict[str, set[str]] = {}
    for question in questions:
        sides.setdefault(question.about, set()).add(question.split)
    assert all(len(side) == 1 for side in sides.values())
    assert {side for found in sides.values() for side in found} == {"seed", "exam"}
    assert starter_questions(documents) == questions


def test_starter_questions_of_seed_and_exam_do_not_contaminate_each_other(docs):
    questions = starter_questions(load_documents(docs).documents)
    guard = ExamGuard([q for q in questions if q.split == "exam"], ngram=8, near_duplicate=0.85)
    assert all(guard.check(q.question, q.answer or "").ok for q in questions if q.split == "seed")


def test_documents_without_headings_and_a_single_document():
    text = "Turnips like cool soil. Sow turnips in August at the latest.\n\n" + (
        "Beetles eat the leaves of young plants. Nets keep beetles away from them.\n\n"
        "Harvest begins when roots are as wide as a fist. Later roots taste of wood."
    )
    one = Document(doc_id="garden", title="Garden notes", text=text, source="x")
    questions = starter_questions([one])
    assert len(questions) == 3
    assert any("turnips" in question.question for question in questions)
    assert {question.split for question in questions} == {"seed", "exam"}


def test_versions_of_a_document_stay_on_one_side(docs):
    for name in TOPICS:
        text = (docs / f"{name}.md").read_text()
        (docs / f"{name}-v2.md").write_text(
            f"---\nsupersedes: {name}\n---\n" + text.replace("Good", "Better")
        )
    sides: dict[str, set[str]] = {}
    for question in starter_questions(load_documents(docs).documents):
        sides.setdefault(question.about.removesuffix("-v2"), set()).add(question.split)
    assert len(sides) == len(TOPICS)
    assert all(len(side) == 1 for side in sides.values())


def test_documents_that_give_no_question_are_an_error():
    empty = Document(doc_id="a", title="A", text="## Only\n\n?", source="x")
    with pytest.raises(DataError, match="none of the 1 documents"):
        starter_questions([empty])


def test_own_questions_are_copied(docs, tmp_path):
    own = Question(
        id="q1", kind="open", question="How hot?", answer="230 degrees.", about="bread", split="seed"
    )
    write_jsonl(tmp_path / "own.jsonl", [own])
    folder = new_domain("kitchen", docs, into=tmp_path / "kitchen", questions=tmp_path / "own.jsonl")
    assert read_jsonl(folder / "questions.jsonl", Question) == [own]
    (tmp_path / "own.jsonl").write_text('{"id": "q1"}\n')
    with pytest.raises(DataError, match=r"own.jsonl:1"):
        new_domain("other", docs, into=tmp_path / "other", questions=tmp_path / "own.jsonl")
    assert not (tmp_path / "other").exists()


def test_relative_documents_stay_relative(docs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = new_domain("kitchen", Path("docs"), into=Path("domains") / "kitchen")
    written = tomllib.loads((folder / "domain.toml").read_text())["corpus"]["documents"]
    assert written == "../../docs"
    assert load_domain("kitchen").documents == docs.resolve()


def test_a_folder_without_documents_says_what_to_do(tmp_path):
    folder = new_domain("bare", None, into=tmp_path / "bare")
    assert load_domain(str(folder)).questions is None
    assert "preceptor new" in (folder / "README.md").read_text()


def test_nothing_is_overwritten_and_nothing_half_written(docs, tmp_path):
    folder = new_domain("kitchen", docs, into=tmp_path / "kitchen")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="exists already"):
        new_domain("kitchen", docs, into=folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="does not exist"):
        new_domain("other", tmp_path / "nowhere", into=tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "kitchen"]


def test_a_bad_name_gets_a_proposal(docs, tmp_path):
    with pytest.raises(ConfigError, match="'My Team!'") as caught:
        new_domain("My Team!", docs, into=tmp_path / "x")
    assert "preceptor new my-team" in caught.value.next_step
    assert plain_name("Ä") == "domain-x"


def test_every_section_is_explained_and_every_value_is_the_default():
    text = domain_files("x1", documents="d", questions="q", title="T", path="p", note="")["domain.toml"]
    data = tomllib.loads(text)
    sections = set(DomainConfig.model_fields) - {"parity"}
    assert sections <= data.keys()
    defaults = DomainConfig.model_validate({key: data[key] for key in ("domain", "corpus")})
    for section in sections - {"domain", "corpus"}:
        for key, value in data[section].items():
            assert getattr(getattr(defaults, section), key) == value, f"{section}.{key}"


def test_the_example_check_works_and_the_template_is_no_domain(docs, tmp_path):
    folder = new_domain("kitchen", docs, into=tmp_path / "kitchen")
    assert set(load_checks(folder, ["checks:no_promises"])) == {"checks:no_promises"}
    assert TEMPLATE.is_dir()
    assert "template" not in available_domains()


def test_files_that_were_not_read_are_named_in_the_readme(docs, tmp_path):
    (docs / "empty.md").write_text("", encoding="utf-8")
    folder = new_domain("shelf", docs, into=tmp_path / "shelf")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "1 files were not read" in readme
    assert "empty.md" in readme
