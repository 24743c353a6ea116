"""SAIL's verdicts: what is written is read back, and nothing else is taken for one."""

from __future__ import annotations

from itertools import product

import pytest

from rag.answers import parse_reply
from rag.verdicts import NOTHING_FOUND, format_verdict, split_verdict

REPLY = '"Take it at noon." [2]\nAnswer: At noon.'


@pytest.mark.parametrize("count", range(5))
def test_every_verdict_is_read_back(count: int) -> None:
    texts = set()
    for verdict in product([True, False], repeat=count):
        text = format_verdict(verdict)
        texts.add(text)
        assert "\n" not in text
        assert split_verdict(f"{text}\n{REPLY}", count) == (list(verdict), REPLY)
        assert split_verdict(f"{text}\n{REPLY}", count + 1)[0] != list(verdict)
    assert len(texts) == 2**count


def test_the_wording() -> None:
    assert format_verdict([]) == NOTHING_FOUND
    assert format_verdict([True]) == "The passage is informative."
    assert format_verdict([False, False]) == "Both passages are distracting."
    assert format_verdict([True, False, True]) == (
        "Passages [1] and [3] are informative, passage [2] is distracting."
    )
    assert format_verdict([False, True, False, False]) == (
        "Passage [2] is informative, passages [1], [3] and [4] are distracting."
    )


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        (REPLY, 2),
        ("", 1),
        ("Passage [1] is informative.\nAnswer: x", 2),  # says nothing of the second
        ("Passage [1] is informative, passages [1] and [2] are distracting.\nAnswer: x", 2),
        ("Passage [9] is informative, passage [1] is distracting.\nAnswer: x", 2),
        ("No passages were found.\nAnswer: x", 1),
        ("The passage is distracting.\nAnswer: x", 3),  # says it of one
        ("Both passages are informative.\nAnswer: x", 3),
        ("All 2 passages are distracting.\nAnswer: x", 3),
        ("All 2 passages are distracting.\nAnswer: x", 0),
        ("Answer: passage 1 was informative.", 1),
    ],
)
def test_what_is_no_verdict_about_these_passages_stays(text: str, passages: int) -> None:
    assert split_verdict(text, passages) == (None, text)


def test_a_verdict_that_names_no_number_is_about_all() -> None:
    assert split_verdict("The passages are informative.\nAnswer: x", 3) == ([True] * 3, "Answer: x")


def test_the_reply_after_a_verdict_is_an_ordinary_one() -> None:
    text = f"{format_verdict([False, True])}\n{REPLY}"
    reply = parse_reply(split_verdict(text, 2)[1])
    assert reply.quotes == (("Take it at noon.", 2),)
    assert (reply.answer, reply.rationale) == ("At noon.", "")
