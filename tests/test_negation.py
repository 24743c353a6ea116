"""Negation: the opposite of an answer is recognised, and the answer itself is never taken for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.jsonl import read_jsonl
from domains.records import Question
from pipeline.negation import opposed

CORPORA = Path(__file__).parent.parent / "corpora"
SAFE = "Brenzal is safe in pregnancy."
_AUXILIARY = re.compile(r"\b(?:is|are|was|were|can|may|should|must|will|could|has|have)\b")
_NEGATED = re.compile(r"\b(?:no|not|never|none|neither|nor|without|cannot)\b|n't\b", re.IGNORECASE)


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (SAFE, "Brenzal is not safe in pregnancy."),
        (SAFE, "Brenzal isn’t safe in pregnancy."),
        (SAFE, "Not safe."),
        (SAFE, "No."),
        (SAFE, "It cannot usually be considered safe in pregnancy."),
        (SAFE, "It is no longer safe in pregnancy."),
        (SAFE, "Many take Brenzal. In pregnancy, as the note says, Brenzal is never safe."),
        (SAFE, "There is no evidence that Brenzal is safe in pregnancy."),
        ("It is used for migraine.", "It is not used for asthma, gout or migraine."),
        ("Take it with food.", "Take it without food."),
        ("Antibiotics are needed.", "No antibiotics are needed."),
        ("Patients can drive.", "Patients can't drive."),
        ("Adults, not children.", "Children, not adults."),
        ("Safe in pregnancy but not in breastfeeding.", "Safe in breastfeeding but not in pregnancy."),
        ("It raises the risk.", "No, it does not raise the risk."),
        ("These bacteria have no cell wall.", "Because of its cell wall."),
        ("It helps.", "Nothing helps."),
        ("They can do this.", "They can not."),
        ("No.", "Yes, it is."),
    ],
)
def test_the_opposite_is_seen_from_both_sides(reference: str, text: str) -> None:
    assert opposed(reference, text)
    assert opposed(text, reference)


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (SAFE, "Yes, Brenzal is safe in pregnancy, but not after birth."),
        (SAFE, "It is not a tablet. Brenzal is safe in pregnancy."),
        (SAFE, "Brenzal is safe in pregnancy, not only in its first weeks."),
        ("Take it with food.", "Do not take it without food."),
        ("It must never be stopped suddenly.", "Do not stop it suddenly."),
        ("Antibiotics are not needed.", "No antibiotics are needed."),
        ("At most 4 g a day.", "No more than 4 g a day."),
        ("See a doctor.", "If the tablets do not help, see a doctor."),
        ("P waves are absent.", "It shows no P waves."),
        ("For appointments that were moved.", "The undo does not work for moved appointments."),
        ("Between 21:00 and 08:00.", "No offers are sent between 21:00 and 08:00."),
        ("Adults only, as it has not been tested in children.", "Adults only."),
        ("No.", "No, it is safe to drive."),
        ("Ten minutes.", ""),
        ("", "It is not."),
    ],
)
def test_what_says_the_same_is_not_opposed(reference: str, text: str) -> None:
    assert not opposed(reference, text)
    assert not opposed(text, reference)


@given(
    st.text()
    | st.lists(st.sampled_from(["not", "no", "safe", "used", ",", ".", "but", "isn't"])).map(" ".join)
)
def test_nothing_is_its_own_opposite(text: str) -> None:
    assert not opposed(text, text)


def references() -> list[Question]:
    files = sorted(CORPORA.glob("*/questions.jsonl"))
    assert len(files) == 2
    return [item for file in files for item in read_jsonl(file, Question) if item.kind == "open"]


def test_no_gold_quote_is_opposed_to_its_answer() -> None:
    asked = references()
    assert len(asked) > 400
    found = [
        item.id for item in asked if opposed(item.answer or "", " ".join(gold.quote for gold in item.gold))
    ]
    assert found == []


def test_answers_with_a_not_put_in_are_opposed() -> None:
    """The one that is missed: "can not only be seen", which is no denial."""
    seen = []
    for item in references():
        answer = item.answer or ""
        if (verb := _AUXILIARY.search(answer)) and not _NEGATED.search(answer):
            seen.append(opposed(answer, f"{answer[: verb.end()]} not{answer[verb.end() :]}"))
    assert len(seen) > 100
    assert seen.count(False) == 1
