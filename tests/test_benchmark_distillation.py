"""The distillation benchmark: which parts run, and what its figures are made of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from domains.records import Answer, JudgedSegment, Question, Reflection
from pipeline.progress import Lines

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import distillation


def test_quick_leaves_out_the_sweep_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, parts in (
        (["--quick"], ["retrieval", "students", "abstention", "public"]),
        ([], list(distillation.PARTS)),
        (["--quick", "--parts", "sweep"], ["sweep"]),
    ):
        monkeypatch.setattr(sys, "argv", ["distillation.py", *words])
        options = distillation.parse_options()
        assert options.parts == parts
        assert options.profile == ("quick" if "--quick" in words else "full")


def test_the_last_line_is_one_object_with_what_every_part_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def measure(name: str) -> Any:
        def part(_options: Any, _work: Path, _progress: Lines) -> dict[str, Any]:
            seen.append(name)
            return {name: {"arm": {"metric": 1.0}}}

        return part

    monkeypatch.setattr(distillation, "MEASURES", {name: measure(name) for name in distillation.PARTS})
    monkeypatch.setattr(sys, "argv", ["distillation.py", "--quick", "--json"])
    distillation.main()
    assert seen == ["retrieval", "students", "abstention", "public"]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {*seen, "quick", "domain", "seconds"} == found.keys()
    assert found["students"]["arm"]["metric"] == 1.0


def answer(text: str, *, support: float, carried: bool) -> Answer:
    judged = JudgedSegment(decision="retrieve", text=text, number=1, relevance=1.0, support=support)
    return Answer(
        question="?", text=text, raw=text, support="supported" if carried else "unsupported", citations=[],
        reflection=Reflection(backend="tokens", retrieved=True, segments=[judged]),
    )  # fmt: skip


def test_support_precision_counts_what_a_passage_carries_of_what_is_called_supported() -> None:
    given = [
        answer("a", support=0.9, carried=True),
        answer("b", support=0.8, carried=False),
        answer("c", support=0.1, carried=False),
    ]
    assert distillation.support_precision([*given, None]) == 0.5
    assert distillation.support_precision([None]) is None


def test_answers_without_a_likelihood_have_no_risk_coverage_curve() -> None:
    question = Question(id="q", kind="open", question="?", answer="a", about="d", split="exam")
    assert distillation.abstention([question], [None])["abstention_aurc"] is None
