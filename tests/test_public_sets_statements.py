"""K-QA: what must be said, and how much of it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.progress import Silent
from pipeline.public_sets_statements import completeness, kqa_consultations, measure_consultations
from tests.small_serving import ABSTAIN, FixedRetriever, ScriptedEngine, write_domain

ROWS = [
    {"question": "How is Brenzal taken?", "answer": "Brenzal: 40 mg once a day.",
     "must_have": ["The dose of Brenzal is 40 mg.", "Brenzal is taken once a day."]},
    {"question": "Is Moltrex taken with milk?", "answer": "Never with milk.", "must_have": ["Milk binds Moltrex."]},
    {"question": "Who sells it?", "answer": "Nobody.", "must_have": []},
]  # fmt: skip


def test_completeness_is_the_mean_share_of_each_statements_words() -> None:
    must = ["Milk binds Moltrex.", "Corvane is kept cold."]
    assert completeness("Milk binds Moltrex.", must) == 0.5
    assert completeness("Moltrex and milk; keep Corvane cold.", must) == pytest.approx(
        2 / 3
    )  # "keep" is not "kept" here
    assert completeness("I don't know.", must) == 0


def test_a_models_answers_stand_between_the_repeated_question_and_the_physician(tmp_path: Path) -> None:
    (tmp_path / "kqa").mkdir()
    (tmp_path / "kqa" / "dev.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8"
    )
    rows = kqa_consultations(tmp_path / "kqa", split="dev")
    assert len(rows) == 2  # nothing must be said to the third

    def reply(prompt: str) -> str:
        return "Answer: Brenzal is taken once a day." if "hay fever" in prompt else f"Answer: {ABSTAIN}"

    found = measure_consultations(
        rows,
        write_domain(tmp_path / "shelf"),
        {"closed_book": None, "passages": FixedRetriever("Brenzal")},
        Silent(),
        engine=ScriptedEngine(reply),  # type: ignore[arg-type]
        asked=0,
    )
    assert found["closed_book"]["accuracy"] == 0
    assert found["passages"]["n"] == 2
    assert 0 < found["passages"]["accuracy"] < 1
    assert 0 < found["question_repeated"]["accuracy"] < found["physician"]["accuracy"] <= 1
