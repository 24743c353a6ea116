"""Questions with options that the documents answer, not the model."""

from __future__ import annotations

from typing import Any

from domains.records import Hit, Passage, Question
from rag.prompt import render_question
from serve.assistant import Assistant
from serve.confidence import Calibration
from serve.options import pick_option
from tests.test_vote import ABSTAIN, Scripted

TEXTS = {
    "dose": "The adult dose of Brenzal is 40 mg once a day.",
    "milk": "Moltrex must not be taken with milk, because milk binds it.",
    "store": "Sanivar drops are kept in the cellar.",
}


def hit(name: str, lexical: float) -> Hit:
    passage = Passage(
        passage_id=name, doc_id=name, title=name, heading="", text=TEXTS[name], start=0, end=len(TEXTS[name])
    )
    return Hit(passage=passage, score=1.0, scores={"lexical": lexical})


class Words:
    """Finds passages by the words they share with the query."""

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        words = set(query.lower().replace("?", "").split())
        hits = [hit(name, len(words & set(text.lower().strip(".").split()))) for name, text in TEXTS.items()]
        return sorted(hits, key=lambda each: -each.score)[:top_k]


def asked(**options: str) -> str:
    return render_question(
        Question(
            id="q", kind="options", question="What is the adult dose of Brenzal?", answer="B", options=options,
            about="dose", split="exam",
        )
    )  # fmt: skip


def find(query: str, count: int) -> list[Hit]:
    return Words().retrieve(query, top_k=count)


def assistant(options: Any, retriever: Any, **settings: Any) -> Assistant:
    engine: Any = Scripted()
    return Assistant(
        engine, retriever, system="s", abstain=ABSTAIN, top_k=2, max_tokens=4, unsupported="drop", options=options,
        **settings,
    )  # fmt: skip


QUESTION = asked(A="7 drops", B="40 mg once a day", C="a cellar")


def test_the_option_that_finds_the_best_passage_is_taken() -> None:
    picked = pick_option(QUESTION, find, [hit("milk", 1.0), hit("store", 1.0)])
    assert picked is not None
    assert picked.reply == "Answer: B. 40 mg once a day"
    assert [each.passage.passage_id for each in picked.hits] == ["dose", "milk"]


def test_nothing_is_picked_without_options_or_without_a_difference() -> None:
    assert pick_option("What is the adult dose of Brenzal?", find, []) is None
    assert pick_option(asked(A="zzz", B="qqq"), find, []) is None
    assert pick_option(QUESTION, lambda _query, _count: [], []) is None


def test_the_answer_cites_the_passage_and_no_model_is_asked() -> None:
    helper = assistant("evidence", Words())
    answer = helper.ask(QUESTION)
    assert answer.text.startswith("B. 40 mg")
    assert answer.support == "supported"
    assert [each.doc_id for each in answer.citations] == ["dose"]
    assert not helper.engine.calls  # type: ignore[attr-defined]
    *pieces, last = helper.stream(helper.prepare(QUESTION))
    assert (pieces, last) == ([answer.text], answer)


def test_a_bound_on_wrong_answers_leaves_options_to_the_model() -> None:
    helper = assistant("evidence", Words())
    assert helper._picks
    helper = assistant("evidence", Words(), calibration=Calibration(signals=["margin"]), threshold=0.5)
    assert not helper._picks


def test_the_model_answers_the_rest() -> None:
    for helper in (assistant("student", Words()), assistant("evidence", None)):
        helper.ask(QUESTION)
        assert helper.engine.calls == {0.0: 1}  # type: ignore[attr-defined]
    both = assistant("evidence", Words())
    made = both.ask_many([both.prepare(text) for text in (QUESTION, "Is it?", QUESTION)])
    assert [each.question for each in made] == [QUESTION, "Is it?", QUESTION]
    assert both.engine.calls == {0.0: 1}  # type: ignore[attr-defined]
