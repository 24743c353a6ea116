from __future__ import annotations

import pytest

from domains.records import Answer
from pipeline.abstention import Case, ask_cases, measure_abstention, selective_numbers
from serve.confidence import Calibration, Level
from serve.signals import LIKELIHOOD
from tests.small_serving import ABSTAIN, scripted_assistant

CASES = [
    Case("What is the dose of Brenzal?", frozenset({"brenzal"})),
    Case("Who must not take Pelidor?", frozenset({"pelidor"})),
    Case("What does Brenzal cost?", frozenset()),
    Case("Who makes Brenzal?", frozenset()),
]


def reply(prompt: str) -> str:
    question = prompt.rpartition("Question: ")[2]
    if "makes" in question:
        return f"Answer: {ABSTAIN}"
    wrong = "cost" in question
    return '"The adult dose of Brenzal is 40 mg once a day." [1]\nAnswer: ' + (
        "9 9 9 9" if wrong else "aeiou"
    )


def responses() -> list[Answer | None]:
    assistant, _, _ = scripted_assistant(reply, "Brenzal", signals=True)
    return ask_cases(CASES, assistant)


def test_right_is_a_citation_into_the_gold_document_or_silence_where_it_is_due() -> None:
    report = measure_abstention(CASES, responses(), resamples=50)
    as_is = report["as_is"]
    assert (report["n"], report["answerable"], as_is["given"]) == (4, 2, 3)
    assert as_is["right"]["mean"] == pytest.approx(2 / 4)  # Brenzal's dose, and the silence about its maker
    assert as_is["abstained_when_due"]["mean"] == pytest.approx(1 / 2)
    assert as_is["abstained_wrongly"]["mean"] == 0
    assert as_is["wrong_of_given"]["mean"] == pytest.approx(2 / 3)
    assert report["ranked_by"] == "likelihood"
    assert report["selective"]["answers"] == 3


def test_a_bound_silences_the_unsure_answers() -> None:
    calibration = Calibration(
        signals=[LIKELIHOOD],
        means=[0.0],
        scales=[1.0],
        weights=[2.0],
        bias=1.0,
        levels=[
            Level(threshold=0.3, coverage=0.5, answered=90, wrong=0, upper=0.05),
            Level(threshold=0.0, coverage=1.0, answered=180, wrong=90, upper=0.6),
        ],
    )
    report = measure_abstention(CASES, responses(), calibration, bounds=(0.05, 0.01), resamples=50)
    strict = report["max_wrong=0.05"]
    assert strict["promised"]
    assert strict["given"] == 2  # the digits of the invented price were improbable
    assert strict["abstained_when_due"]["mean"] == 1
    assert not report["max_wrong=0.01"]["promised"]
    assert 0 <= report["selective"]["calibration_error"] <= 1


def test_numbers_of_bare_rows() -> None:
    found = selective_numbers([(0.9, True), (0.1, False)], probabilities=True, resamples=20)
    assert found["aurc"]["mean"] == found["oracle"] == pytest.approx(0.25)
    assert "reliability" not in selective_numbers([(1.0, True)], probabilities=False, resamples=5)
    assert selective_numbers([], probabilities=True) == {}
