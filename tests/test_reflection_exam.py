"""The exam, and an opened bundle, use the back-end that domain.toml names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

import pytest

from domains.config import ReflectSection
from domains.jsonl import read_jsonl
from pipeline.arms import Conditions, Row
from tests.exam_example import ABSTAIN, make_run, take_exam
from tests.reflection_engine import ReflectingEngine
from tests.test_reflection_tokens import BAD, FIVE, FULL, GOOD, KNOW, LOOK


def script(prompt: str) -> str:
    """Looks for a fee, not for a founder; finds it in the passage of the right club."""
    asked = prompt.rpartition("Question: ")[2]
    club = re.search(r"(\w+) club", asked)
    assert club
    if prompt.endswith("[No Retrieval]"):
        return f"{ABSTAIN}{FIVE}"
    if prompt.endswith("</paragraph>"):
        fact = re.search(rf"Members of the {club[1]} club pay (\d+) euros\.", prompt)
        return f"{GOOD}{fact[0]}{FULL}{FIVE}" if fact else f"{BAD}Who knows.{FIVE}"
    if prompt.endswith("\n") and "Passages:" not in prompt:
        return KNOW if "founded" in asked else LOOK
    return "Answer: That is rather complicated to tell."


class Student(ReflectingEngine):
    opened: list[str] = []

    def __init__(self, gguf: Path) -> None:
        super().__init__(script, lacks="" if gguf.name.startswith("student") else "[Retrieval]")
        Student.opened.append(gguf.name)

    def render(self, messages: Any) -> str:
        return "".join(f"{message.content}\n" for message in messages)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def conditions(**reflect: Any) -> Conditions:
    return Conditions(
        system="You answer from the passages.",
        abstain=ABSTAIN,
        top_k=3,
        max_tokens=100,
        context=20_000,
        reflect=ReflectSection(**reflect),
    )


def test_trained_arms_reflect_and_untrained_ones_do_not(tmp_path: Path) -> None:
    run, models = make_run(tmp_path)
    report, progress = take_exam(run, models, conditions=conditions(backend="tokens"), open_engine=Student)
    rows = {arm: read_jsonl(run.exam / f"{arm}.jsonl", Row) for arm in ("base_rag", "tuned", "exported_rag")}
    assert all(row.answer and row.answer.reflection is None for row in rows["base_rag"])
    closed = [row.answer.reflection for row in rows["tuned"] if row.answer]
    assert all(found and not found.retrieved and found.p_retrieve is None for found in closed)
    served = [row.answer for row in rows["exported_rag"] if row.answer]
    looked = {answer.question: answer.reflection and answer.reflection.retrieved for answer in served}
    assert {text for text, found in looked.items() if not found} == {t for t in looked if "founded" in t}
    arms = report["arms"]
    assert arms["exported_rag"]["retrieval_rate"]["mean"] == 0.75
    assert arms["tuned"]["retrieval_rate"]["mean"] == 0
    assert "retrieval_rate" not in arms["base_rag"]
    assert arms["exported_rag"]["group_missing"]["mean"] == 0
    assert arms["exported_rag"]["citation_precision"]["mean"] > 0.9
    assert arms["exported_rag"]["abstention_recall"]["mean"] == 1
    assert report["reflection"]["warnings"] == []
    page = (run.bundle / "report.html").read_text("utf-8")
    assert "Looks it up" in page
    assert "<h2>Reflection</h2>" in page
    assert not any("tells nothing apart" in line for line in progress.lines)


def test_a_student_that_always_looks_is_warned_of(tmp_path: Path) -> None:
    run, models = make_run(tmp_path)
    report, progress = take_exam(
        run, models, conditions=conditions(backend="tokens", threshold=0.0), open_engine=Student
    )
    assert report["arms"]["exported_rag"]["retrieval_rate"]["mean"] == 1
    assert [line.split(":")[0] for line in report["reflection"]["warnings"]] == ["tuned_rag", "exported_rag"]
    assert set(report["reflection"]["warnings"]) <= set(progress.lines)


def test_other_settings_ask_again_and_the_same_do_not(tmp_path: Path) -> None:
    run, models = make_run(tmp_path)
    Student.opened.clear()
    take_exam(run, models, conditions=conditions(backend="tokens"), open_engine=Student)
    assert len(Student.opened) == 3
    take_exam(run, models, conditions=conditions(backend="tokens"), open_engine=Student)
    assert len(Student.opened) == 3
    take_exam(run, models, conditions=conditions(backend="tokens", threshold=0.5), open_engine=Student)
    assert len(Student.opened) == 5  # the untrained arms keep their rows


@pytest.mark.parametrize("backend", ["text", "grader"])
def test_the_other_back_ends_are_examined_too(tmp_path: Path, backend: Any) -> None:
    run, models = make_run(tmp_path)
    report, _ = take_exam(run, models, conditions=conditions(backend=backend), open_engine=Student)
    assert report["reflection"]["arms"]["exported_rag"]["backend"] == backend
    assert "retrieval_rate" in report["arms"]["exported_rag"]
