"""The four grammars of replies, on replies that broke other people's parsers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.strategies.parse import (
    Unparsed,
    fields,
    json_objects,
    json_value,
    labelled,
    numbered_list,
    score,
)
from pipeline.strategies.refusal import refusal


def reason(value: object) -> str:
    assert isinstance(value, Unparsed)
    return value.reason


def test_a_list_item_ends_at_the_next_number_only() -> None:
    text = (
        "Here they are:\n1. Prices rise by 3.5 percent\nin most years.\n2) Wages fell since 2008. Later they rose.\n"
        "2008. was a bad year.\n4. Slipped number.\n"
    )
    assert numbered_list(text) == [
        "Prices rise by 3.5 percent\nin most years.",
        "Wages fell since 2008. Later they rose.\n2008. was a bad year.",
        "Slipped number.",
    ]


def test_of_a_list_that_was_cut_the_last_item_is_lost_and_no_other() -> None:
    assert numbered_list("1. One.\n2. Two.\n3. Thr", truncated=True) == ["One.", "Two."]
    assert reason(numbered_list("1. On", truncated=True)) == "no_list"
    assert reason(numbered_list("No list here, only 3.5 percent.")) == "no_list"


def test_labelled_blocks_in_both_forms() -> None:
    assert labelled("Sure.\n**Reason:** It is right.\nIndeed.\nScore: 4", ["reason", "score"]) == {
        "reason": "It is right.\nIndeed.",
        "score": "4",
    }
    bracketed = "[Reason] why: because [End]\nprose\n[Score] 3 [End] tail"
    assert labelled(bracketed, ["reason", "score"]) == {"reason": "why: because", "score": "3"}
    assert labelled("[Better Answer] It melts.", ["better answer"]) == {"better answer": "It melts."}
    assert reason(labelled("Reason: one\nReason: two\nScore: 1", ["reason", "score"])) == "twice"
    assert reason(labelled("Reason:\nScore: 1", ["reason", "score"])) == "missing_block"


def test_the_open_block_of_a_cut_reply_is_discarded() -> None:
    text = "Score: 4\nReason: It is rig"
    assert reason(labelled(text, ["score", "reason"], truncated=True)) == "missing_block"
    assert labelled(text, ["score"], optional=["reason"], truncated=True) == {"score": "4", "reason": ""}
    closed = "[Score] 4 [End]"
    assert labelled(closed, ["score"], truncated=True) == {"score": "4"}


def test_json_is_found_among_prose_and_repaired_once() -> None:
    assert json_value('See [1] and {x}.\n```json\n{"a": [1, 2,], "b": "x,}",}\n```\n{"a": 2}') == {
        "a": [1, 2],
        "b": "x,}",
    }
    assert json_value('{"text": "a \\"quoted\\" } brace"}') == {"text": 'a "quoted" } brace'}
    assert json_value('{"text": "two\nlines"}') == {"text": "two\nlines"}
    assert reason(json_value("The range [0, 1) is half open.")) == "no_json"
    assert reason(json_value('{"a": "never closed')) == "broken_json"
    assert reason(json_value('{"a": nothing}')) == "broken_json"


@given(st.recursive(st.text() | st.integers() | st.none(), lambda each: st.dictionaries(st.text(), each)))
def test_every_object_comes_back(value: object) -> None:
    wrapped = {"value": value}
    assert json_value(f"Sure, [1]:\n{json.dumps(wrapped, ensure_ascii=False)}\nBye }}") == wrapped


def test_objects_of_an_array_that_was_cut() -> None:
    assert json_objects('[{"q": 1}, {"q": {"r": 2},}, {"q": ', truncated=True) == [{"q": 1}, {"q": {"r": 2}}]
    assert reason(json_objects('[{"q": 1}, {"q": ')) == "broken_json"
    assert reason(json_objects('["a", "b"]')) == "no_objects"
    assert json_objects('{"q": 1}') == [{"q": 1}]


def test_fields_take_json_or_labels() -> None:
    names = ("reason", "score")
    assert fields('{"Reason": "r", "score": 4.5}', names) == {"reason": "r", "score": "4.5"}
    assert fields("reason: r\nscore: 4", names) == {"reason": "r", "score": "4"}
    assert reason(fields('{"reason": "", "score": 4}', names)) == "missing_field"
    assert reason(fields('{"reason": "r", "score": ', names)) == "broken_json"
    assert fields('{"revise": false, "issues": []}', ["revise"], optional=["issues"]) == {
        "revise": "no",
        "issues": "",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Score: 4", 4.0),
        ("Good work.\n**Rating:** 4.5 because", 4.5),
        ("4.5\nIt is right.", 4.5),
        ("Score: 4/5", 4.0),
        ("3/5", 3.0),
        ("Score: 4/10", "other_scale"),
        ("Score: 4 out of 10", "other_scale"),
        ("Score: 4 of 10 points", "other_scale"),
        ("4 out of 5", 4.0),
        ("Score: 4 of the points hold", 4.0),
        ("Score: 4-5", "no_score"),
        ("Score: 3 – 4", "no_score"),
        ("Score: 4 - clear", 4.0),
        ("Score: 4.5-5", "no_score"),
        ("Score: 2.5 – 3.", "no_score"),
        ("Score: 4 to 5", "no_score"),
        ("Score: 4-5/5", "no_score"),
        ("Score: 4/5-5/5", "no_score"),
        ("Score: 4 - 5 stars", "no_score"),
        ("Score: 3-4 because it is good", "no_score"),
        ("Score: 3–4 (good)", "no_score"),
        ("Score: 4 of 10 because it is", "other_scale"),
        ("Score: 4/5 - 2 minor errors", 4.0),
        ("Score: 4 - 2 facts are missing", 4.0),
        ("Score: 3 of 4 facts hold", 3.0),
        ("Score: 4 out of 10 - 2 points lost", "other_scale"),
        ("Score: **4** out of 10", "other_scale"),
        ("Score: 4 (out of 10)", "other_scale"),
        ("Score: 4 (out of 5)", 4.0),
        ("4 of 5", 4.0),
        ("Score: 10", "out_of_range"),
        ("Score: 40 %", "out_of_range"),
        ("four", "no_score"),
        ("It scores 4 of 5.", "no_score"),
        ("", "no_score"),
        ("4 points are missing", "no_score"),
    ],
)
def test_scores(text: str, expected: float | str) -> None:
    found = score(text, low=1, high=5)
    assert (found.reason if isinstance(found, Unparsed) else found) == expected


@pytest.mark.parametrize(
    ("text", "declines"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I do not have opinions.", True),
        ("I cannot provide medical advice.", True),
        ("My knowledge cutoff is 2023.", True),
        ("It is impossible to give the vaccine to people who say: I cannot swallow.", False),
        ("I cannot rule out pneumonia before the X-ray.", False),
        ("x" * 201 + " I'm sorry.", False),
    ],
)
def test_refusals_are_about_the_model_and_stand_first(text: str, declines: bool) -> None:
    assert bool(refusal(text)) == declines
