from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.config import OnUnsupported
from domains.records import Answer
from rag.answers import ABSTENTION_CHARS, one_reply
from serve.streaming import ReplyStream
from tests.small_serving import ABSTAIN, passage, scripted_assistant

QUOTE = '"The adult dose of Brenzal is 40 mg once a day." [1]\n'
LONG = "Adults take 40 mg of Brenzal once a day. " + "It is a tablet, and it is taken with water. " * 8


def stream_of(unsupported: OnUnsupported = "withdraw", **more: Any) -> ReplyStream:
    return ReplyStream(
        [passage("Brenzal")],
        question="What is the dose?",
        abstain=ABSTAIN,
        unsupported=unsupported,
        **more,
    )


def feed_all(stream: ReplyStream, text: str) -> list[str]:
    return [stream.feed(char) for char in text]


def test_a_quoted_answer_is_shown_while_it_is_written() -> None:
    stream = stream_of()
    shown = feed_all(stream, QUOTE + "Answer: " + LONG)
    assert len([piece for piece in shown if piece]) > 50
    assert LONG.startswith("".join(shown))
    assert "".join(shown) + stream.rest(LONG.strip()) == LONG.strip()


@pytest.mark.parametrize(
    "text",
    [
        "Answer: " + LONG,  # no quote: support is judged at the end
        '"The adult dose is 90 mg, taken at noon." [1]\nAnswer: ' + LONG,  # the quote stands nowhere
        QUOTE + LONG,  # no Answer line yet: these may be a rationale
        QUOTE + "Answer: " + LONG[:ABSTENTION_CHARS],  # may yet turn out an abstention
    ],
)
def test_nothing_is_shown_that_may_be_withdrawn(text: str) -> None:
    assert "".join(feed_all(stream_of(), text)) == ""


def test_without_withdrawal_an_unquoted_answer_is_shown() -> None:
    assert "".join(feed_all(stream_of("keep"), "Answer: " + LONG)) != ""


def test_a_second_answer_line_ends_the_reply_and_is_never_shown() -> None:
    stream = stream_of()
    shown = "".join(feed_all(stream, QUOTE + "Answer: " + LONG + "\nAnswer: something else"))
    assert stream.over
    assert stream.text.rstrip() == (QUOTE + "Answer: " + LONG).rstrip()
    assert "Answer" not in shown
    assert shown + stream.rest(LONG.strip()) == LONG.strip()


FRAGMENTS = st.sampled_from(
    [
        QUOTE,
        '"Children under six years must not be given Pelidor." [2]',
        '"Words that stand in no passage at all." [1] ',
        "Answer: ",
        "**Answer**: ",
        "\nAnswer:",
        " Answer: ",
        LONG,
        ABSTAIN,
        "The passages do not mention it.",
        "an answer. A",
        "Answers vary. Ans",
        "  \n\n",
        "40 mg",
        "Brenzal is a tablet against hay fever. ",
        "It cures gout within 2.5 days, e.g. at night. ",
        "\n- Children under six years must not be given Pelidor.\n- It tastes of mint.",
        "Take note:\n",
        "**",
        '"',
        "[1]",
    ]
)


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(FRAGMENTS, max_size=8).map("".join),
    st.integers(1, 40),
    st.sampled_from(["withdraw", "drop", "mark", "keep"]),
    st.sampled_from([{}, {"signals": True}]),
)
def test_streamed_pieces_are_exactly_the_checked_answer(
    text: str, piece: int, unsupported: OnUnsupported, more: dict[str, Any]
) -> None:
    assistant, engine, _ = scripted_assistant(
        text, "Brenzal", "Pelidor", piece=piece, unsupported=unsupported, **more
    )
    asked = assistant.prepare("What is the dose?")
    *pieces, answer = assistant.stream(asked)
    assert isinstance(answer, Answer)
    assert "".join(str(piece) for piece in pieces) == answer.text
    whole = assistant.ask_many([asked])[0]
    assert (answer.text, answer.support, answer.citations) == (whole.text, whole.support, whole.citations)
    assert answer.raw == whole.raw or answer.raw == one_reply(whole.raw)
    assert engine.streams_open == 0
