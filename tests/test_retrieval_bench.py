"""Retrieval tests leak nothing of what they report, and measure what the product's own retriever finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rerank_train import CARE, THINGS

from domains.config import RerankSection
from domains.jsonl import write_jsonl
from domains.records import Question, Quote
from pipeline.progress import Silent
from pipeline.rerank_pools import Row
from pipeline.retrieval_bench import RememberingEmbedder, measure_case, take_groups
from pipeline.retrieval_cases import Case, corpus_case, medquad_case, prd_case
from rag.embed import MiniLMEmbedder

pytestmark = pytest.mark.usefixtures("on_one_thread")
RECIPE = RerankSection(epochs=1, dimensions=16, batch=24, candidates=20, development_share=0.2)


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row(thing: str, what: str, **more: Any) -> dict[str, Any]:
    made = {
        "id": f"m-{thing}-{what}", "question": f"How is the {thing} {what}?", "answer": f"{thing}: {CARE[what]}",
        "qtype": what, "focus": thing, "cui": [f"C-{thing}"], "synonyms": [], "doc": f"{thing}.xml", "link_list": False,
    }  # fmt: skip
    return made | more


@pytest.fixture
def medquad(tmp_path: Path) -> tuple[Path, Path]:
    """Questions about the first four things, of which the fourth has no document; rows about all, and traps."""
    asked = [row(thing, what) for thing in THINGS[:4] for what in CARE]
    for split, chosen in (("dev", asked), ("hidden", asked[:3])):
        lines(
            tmp_path / "beir" / f"{split}_corpus.jsonl",
            [
                {"doc_id": each["id"], "title": f"{each['focus']} — {each['qtype']}", "text": each["answer"], "url": "u"}
                for each in chosen if each["focus"] != THINGS[3]
            ],
        )  # fmt: skip
        lines(
            tmp_path / "beir" / f"{split}_questions.jsonl",
            [
                {
                    "id": f"ans-{each['id']}", "question": each["question"], "answerable": each["focus"] != THINGS[3],
                    "gold_doc_ids": [each["id"]] if each["focus"] != THINGS[3] else [],
                    "answer": each["answer"] if each["focus"] != THINGS[3] else None, "focus": each["focus"].title(),
                }
                for each in chosen
            ],
        )  # fmt: skip
    traps = [
        row("pompe", "stored", synonyms=["Pump"]),
        row("pumps", "stored", cui=["C-pump"]),
        row("hose", "stored", doc="valve.xml"),
        row("other", "stored", question="How is the SAW stored?"),
        row("another", "stored", answer=f"pump:  {CARE['stored']}"),
        row("listed", "stored", link_list=True),
    ]
    lines(tmp_path / "medquad.jsonl", [row(thing, what) for thing in THINGS for what in CARE] + traps)
    return tmp_path / "beir", tmp_path / "medquad.jsonl"


def test_no_row_is_about_a_disease_that_is_asked_for(medquad: tuple[Path, Path]) -> None:
    case = medquad_case(*medquad)
    assert len(case.documents) == 9
    assert len(case.asks) == 9
    assert {each.group for each in case.rows} == set(THINGS[4:])
    assert len(case.rows) == len(case.train_documents) == 8 * 3
    assert all(case.gold[each.item_id] == {each.item_id} for each in case.rows)
    assert case.documents[0].title == "pump — cleaned"
    assert {document.title for document in medquad_case(*medquad, titles=False).documents} == {""}


def test_the_other_half_is_one_argument_away(medquad: tuple[Path, Path]) -> None:
    case = medquad_case(*medquad, split="hidden")
    assert (len(case.documents), len(case.asks)) == (3, 3)
    assert {each.group for each in case.rows} == {*THINGS[1:], "hose", "other"}  # no traps here


def test_prd_questions_learn_from_other_documents(tmp_path: Path) -> None:
    passages = [
        {
            "doc_id": f"d{i}",
            "passage_id": f"d{i}#{j}",
            "title": f"T{i}",
            "heading": "H",
            "text": f"text {i} {j}",
        }
        for i in range(4)
        for j in range(2)
    ]
    questions = [
        {"id": f"q{i}", "doc_id": f"d{i}", "question_in_context": f"T{i}: what?", "answer": "a", "gold_passage_ids": gold}
        for i, gold in enumerate([["d0#0"], ["d1#1"], ["d2#0"], []])
    ]  # fmt: skip
    lines(tmp_path / "dev_passages.jsonl", passages)
    lines(tmp_path / "dev_questions.jsonl", questions)
    case = prd_case(tmp_path, learn_share=0.01)
    assert [each.id for each in case.asks] == ["q1", "q2"]
    assert [each.item_id for each in case.rows] == ["q0"]
    assert [document.doc_id for document in case.train_documents] == ["d0#0", "d0#1"]
    assert {document.title for document in case.documents} == {"T0", "T1", "T2", "T3"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    documents = tmp_path / "shelf" / "documents"
    documents.mkdir(parents=True)
    for thing in THINGS:
        text = "\n\n".join(f"## {what.title()}\n{text}" for what, text in CARE.items())
        (documents / f"{thing}.md").write_text(f"# {thing.title()}\n\n{text}\n", encoding="utf-8")
    write_jsonl(
        tmp_path / "shelf" / "questions.jsonl",
        [
            Question(
                id=f"{thing}-{what}", kind="open", question=f"How is the {thing} {what}?", answer=text, about=thing,
                gold=[Quote(doc_id=thing, quote=text)], split="exam" if i < 4 else "seed",
            )
            for i, thing in enumerate(THINGS) for what, text in CARE.items()
        ],
    )  # fmt: skip
    return tmp_path / "shelf"


def test_a_corpus_is_asked_by_document_or_by_passage(corpus: Path) -> None:
    whole = corpus_case(corpus)
    assert (len(whole.documents), len(whole.asks), len(whole.rows)) == (12, 12, 24)
    assert {each.group for each in whole.rows}.isdisjoint(each.group for each in whole.asks)
    parts = corpus_case(corpus, passage_chars=300)
    assert len(parts.documents) == 36
    assert all(len(each.gold) == 1 for each in parts.asks)
    cleaned = next(document for document in parts.documents if document.doc_id in parts.asks[0].gold)
    assert (cleaned.title, cleaned.text) == ("Pump\nCleaned", CARE["cleaned"])


def check(result: dict[str, Any], case: Case) -> None:
    assert result["questions"] == len(case.asks)
    for name in ("bm25", "dense", "hybrid", "reranked"):
        for measure in ("hit@1", "ndcg@10"):
            low, high = result[name][f"{measure}_interval"]
            assert 0 <= low <= result[name][measure] <= high <= 1
    assert result["rerank_ms_50"] > 0
    assert result["bytes_per_passage"] > 16


def test_a_case_is_measured(medquad: tuple[Path, Path], tmp_path: Path) -> None:
    case = medquad_case(*medquad)
    (tmp_path / "work").mkdir()
    result = measure_case(case, tmp_path / "work", Silent(), rerank=RECIPE, rows=15)
    check(result, case)
    assert 15 <= result["rows"] < 24
    assert result["bm25"]["hit@1"] == 1.0  # each document names its thing and what is done with it


def test_a_corpus_is_measured_on_one_index(corpus: Path, tmp_path: Path) -> None:
    case = corpus_case(corpus)
    (tmp_path / "work").mkdir()
    check(measure_case(case, tmp_path / "work", Silent(), rerank=RECIPE), case)
    assert not (tmp_path / "work" / "learn").exists()


def test_whole_groups_are_taken() -> None:
    rows = [Row(f"{i}", "q", "r", group=f"g{i % 5}") for i in range(20)]
    taken = take_groups(rows, count=7, seed=0)
    assert len(taken) == 8
    assert len({each.group for each in taken}) == 2
    assert take_groups(rows, count=0, seed=0) == take_groups(rows, count=50, seed=0) == rows


def test_remembering_changes_no_vector() -> None:
    plain, remembering = MiniLMEmbedder(), RememberingEmbedder()
    texts = ["A pump.", "A much longer text about a valve and a boiler.", "A pump."]
    assert np.abs(remembering.embed(texts) - plain.embed(texts)).max() < 1e-3
    assert remembering.embed([]).shape == (0, 384)
