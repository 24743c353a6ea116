"""Several replies and the one that is taken."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from serve.assistant import Assistant
from serve.engine import Completion
from serve.vote import Votes, elect

ABSTAIN = "I don't know: the documents do not say."
OPTIONS = "Which?\nA. one\nB. two\nC. three\nAnswer with the letter of the right option."


def closed(text: str = "Is it?") -> str:
    from domains.records import Question
    from rag.prompt import render_question

    return render_question(
        Question(id="q", kind="yes_no", question=text, answer="yes", about="d", split="exam")
    )


@pytest.mark.parametrize(
    ("replies", "place"),
    [
        (["Answer: no", "Answer: yes", "Because.\nAnswer: Yes."], 1),  # two against one
        (["Answer: no", "Answer: yes"], 0),  # the greedy one decides
        (["no idea at all", "Answer: yes", "whatever"], 1),  # what can't be read has no vote
        (["no idea at all", "whatever"], 0),
        ([f"Answer: {ABSTAIN}", "Answer: yes", f"Answer: {ABSTAIN}"], 0),
    ],
)
def test_a_closed_question_is_voted_on(replies: list[str], place: int) -> None:
    replies = [reply.replace("no idea", "perhaps an idea") for reply in replies]
    assert elect(replies, question=closed(), abstain=ABSTAIN) == place


def test_an_open_answer_is_the_one_most_like_the_others() -> None:
    replies = [
        "Answer: in the cellar",
        "Answer: 5 mg once daily",
        "Answer: 5 mg daily",
        "Answer: 5 mg twice daily",
    ]
    assert elect(replies, question="How much?", abstain=ABSTAIN) == 2
    silent = f"Answer: {ABSTAIN}"
    assert elect([replies[0], silent, silent], question="How much?", abstain=ABSTAIN) == 1
    assert elect([silent, replies[1], replies[2]], question="How much?", abstain=ABSTAIN) == 1
    assert elect([silent], question="How much?", abstain=ABSTAIN) == 0


class Scripted:
    """An engine that answers greedily "no", and "yes" to most of what is drawn."""

    adds_bos = False

    def __init__(self) -> None:
        self.calls: Counter[float] = Counter()

    def render(self, messages: Any) -> str:
        return str(messages[-1].content)

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def check_fits(self, *_: Any) -> None:
        pass

    def generate(self, prompts: Any, *, temperature: float = 0.0, **_: Any) -> list[Completion]:
        self.calls[temperature] += len(prompts)
        return [
            Completion("Answer: yes" if temperature and at % 3 else "Answer: no", [1], 1, "stop")
            for at, _ in enumerate(prompts)
        ]


@pytest.mark.parametrize(("count", "text"), [(1, "no"), (4, "no"), (7, "yes")])
def test_the_assistant_takes_the_elected_reply(count: int, text: str) -> None:
    engine: Any = Scripted()
    assistant = Assistant(
        engine, None, system="s", abstain=ABSTAIN, top_k=1, max_tokens=4, unsupported="keep",
        votes=Votes(count, 0.5),
    )  # fmt: skip
    assert assistant.ask(closed()).text == text
    assert engine.calls == ({0.0: 1, 0.5: count - 1} if count > 1 else {0.0: 1})
    if count > 1:  # several replies are weighed before anything is shown
        *pieces, _ = assistant.stream(assistant.prepare(closed()), temperature=0.9)
        assert pieces == [text]
