"""What the exam's report says of refusing."""

from __future__ import annotations

from pathlib import Path

import pytest
from exam_example import ActorEngine, make_run, take_exam

from domains.records import Answer, Citation, Question
from pipeline.report import render_report
from pipeline.selective_report import describe_selective
from serve.confidence import Calibration, risk_levels
from serve.signals import LIKELIHOOD, SIGNALS

SURE = Calibration(
    signals=[LIKELIHOOD],
    means=[0.0],
    scales=[1.0],
    weights=[1.0],
    bias=0.0,
    answers=30,
    right=20,
    trained_on=3,
    levels=risk_levels([i / 30 for i in range(30)], [i >= 10 for i in range(30)], doubt=0.1),
)


def question(number: int) -> Question:
    return Question(id=f"q{number}", kind="open", question="?", answer="a red fox", about="d", split="exam")


def answer(log_prob: float, *, right: bool) -> Answer:
    citation = Citation(
        number=1, passage_id="p", doc_id="d", title="D", quote="a red fox", start=0, end=9, by="model"
    )
    return Answer(
        question="?",
        text="a red fox" if right else "a blue hen",
        raw="",
        support="supported",
        citations=[citation],
        signals={**dict.fromkeys(SIGNALS, 0.0), LIKELIHOOD: log_prob},
    )


def test_arms_are_described_by_their_given_answers() -> None:
    silent = answer(-9, right=True).model_copy(update={"support": "abstained"})
    said = [*(answer(-i / 10, right=i < 6) for i in range(9)), silent, None]
    questions = [question(i) for i in range(len(said))]
    report = describe_selective(questions, {"exported_rag": said}, SURE, clusters=None, resamples=50, seed=0)
    assert report is not None
    served = report["arms"]["exported_rag"]
    assert (served["answers"], served["right"]) == (9, 6)
    assert served["excess"] == pytest.approx(0)
    assert served["wrong_at"]["0.67"] == 0
    assert served["curve"][-1] == [1, pytest.approx(3 / 9)]
    assert sum(item["answers"] for item in served["reliability"]) == 9
    assert "gave 9 answers to 11 questions; 33 % of them are wrong" in report["text"]
    assert "refuse the least certain third, it is wrong on 0 %" in report["text"]
    assert report["development"]["trained_on"] == 3


def test_without_a_calibration_answers_are_ranked_and_nothing_is_claimed() -> None:
    said = [answer(-i / 10, right=i % 2 == 0) for i in range(6)]
    questions = [question(i) for i in range(6)]
    report = describe_selective(
        questions, {"exported_rag": said}, Calibration(reason="too few"), clusters=None, resamples=50, seed=0
    )
    assert report is not None
    assert (report["ranked_by"], report["reason"]) == ("likelihood", "too few")
    assert report["arms"]["exported_rag"]["calibration_error"] is None
    assert report["arms"]["exported_rag"]["reliability"] == []
    assert "can't be seen with so few answers" in report["text"]
    assert (
        describe_selective(questions, {"base_rag": [None] * 6}, SURE, clusters=None, resamples=5, seed=0)
        is None
    )


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_page_shows_risk_promises_and_how_far_to_believe_them(
    tmp_path: Path, *, calibrated: bool
) -> None:
    ActorEngine.opened, ActorEngine.asked = [], 0
    run, models = make_run(tmp_path)
    if calibrated:
        (run.bundle / "calibration.json").write_text(SURE.model_dump_json(), encoding="utf-8")
    report, _ = take_exam(run, models)
    page = render_report(report)
    assert report["selective"]["ranked_by"] == ("calibration" if calibrated else "likelihood")
    assert list(report["selective"]["arms"]) == ["base_rag", "tuned_rag", "exported_rag"]
    assert report["selective"]["text"] in page.replace("\u00a0%", " %")
    assert "Share of wrong answers by share of answers given" in page
    assert ("What may be promised" in page) == calibrated
    assert ("Reliability: the answer is right" in page) == calibrated
    assert report["arms"]["exported_rag"]["alce_precision"]["mean"] == 1
    assert (
        report["arms"]["tuned_rag"]["alce_recall"]["mean"] > report["arms"]["base_rag"]["alce_recall"]["mean"]
    )
    assert "alce_recall" not in report["arms"]["base"]
