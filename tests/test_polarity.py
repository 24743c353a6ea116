"""Cues of denial and affirmation are found where they stand, and near the question they weigh more."""

from __future__ import annotations

import math

import pytest

from rag.polarity import NAMES, polarity

QUESTION = "Does the walking programme improve balance?"


def cues(text: str, question: str = QUESTION) -> dict[str, float]:
    return dict(zip(NAMES, polarity(question, text), strict=True))


@pytest.mark.parametrize(
    "denial",
    [
        "There was no significant difference in balance.",
        "Balance did not improve.",
        "The programme was not associated with balance.",
        "Balance was similar in both groups.",
        "There was neither a clear effect nor a trend.",
    ],
)
def test_denied_findings_are_counted(denial: str) -> None:
    found = cues(denial)
    assert found["denied"] > 0
    assert found["denied_share"] == 1
    assert found["negative"] > 0


def test_affirmed_findings_are_not_denied() -> None:
    found = cues("Balance improved significantly and falls were lower (p < 0.001).")
    assert (found["denied"], found["negative"], found["p_above"]) == (0, 0, 0)
    assert min(found["significant"], found["affirmed"], found["p_below"]) > 0


def test_a_denied_significance_is_no_significance() -> None:
    assert cues("The change was not significant.")["significant"] == 0
    assert cues("The change was significant.")["significant"] > 0


@pytest.mark.parametrize(
    ("text", "below", "above"),
    [("p=0.04", 1, 0), ("P < .05", 1, 0), ("p = 0.34", 0, 1), ("p > 0.05", 0, 1), ("group 0.3", 0, 0)],
)
def test_p_values_fall_on_their_side_of_the_level(text: str, below: int, above: int) -> None:
    found = cues(text)
    assert (found["p_below"], found["p_above"]) == pytest.approx((math.log1p(below), math.log1p(above)))


def test_a_denial_near_the_question_weighs_more_than_one_elsewhere() -> None:
    near = cues("The walking programme did not improve balance. Appetite rose.")
    far = cues("The walking programme changed balance. Appetite did not rise.")
    assert near["denied"] == far["denied"]
    assert near["denied_near"] > far["denied_near"]
    assert near["denied_nearest"] > far["denied_nearest"]


def test_no_text_and_no_words_in_common_are_no_error() -> None:
    assert len(polarity("", "")) == len(polarity("Why?", "Rain.")) == len(NAMES)
