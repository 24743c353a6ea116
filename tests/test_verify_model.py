from __future__ import annotations

from collections.abc import Iterator

import pytest

from domains.records import Question, Rationale, Verification
from pipeline.progress import Silent
from pipeline.rows import Kept
from pipeline.verify_model import REASON, hide_letters, predict, verify_by_model
from serve.engine import Engine
from serve.models import inference_gguf

METALS = {"A": "copper", "B": "iron", "C": "mercury", "D": "gold"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(inference_gguf("smollm2-135m"), context=512, parallel=2) as engine:
        yield engine


def options(answer: str) -> Question:
    return Question(
        id=f"metal-{answer}",
        kind="options",
        question="Which metal is in the old thermometer?",
        answer=answer,
        options=METALS,
        about="metals",
        split="seed",
    )


def rationale(question: Question, text: str) -> Rationale:
    return Rationale(
        question_id=question.id, sample=0, text=text, answer="", passages=[], teacher="t", request="r"
    )


@pytest.mark.parametrize("letter", METALS)
def test_the_answer_that_the_rationale_speaks_for_is_found_whatever_its_letter(
    engine: Engine, letter: str
) -> None:
    text = f"The old thermometer holds a column of {METALS[letter]}, and {METALS[letter]} expands when warm."
    assert predict(engine, options("A"), text) == letter


def test_yes_and_no_have_words_of_their_own(engine: Engine) -> None:
    question = Question(
        id="q", kind="yes_no", question="Is tea safe?", answer="yes", about="tea", split="seed"
    )
    assert predict(engine, question, "Yes, yes: the answer is yes.") == "yes"
    assert predict(engine, question, "No, no: the answer is no.") == "no"


def test_a_rationale_for_another_answer_is_rejected_and_open_questions_pass(engine: Engine) -> None:
    closed = options("C")
    free = Question(id="o", kind="open", question="Why?", answer="Because.", about="metals", split="seed")
    said = ["It holds mercury; mercury is liquid.", "It holds gold; gold is shiny."]
    items = [Kept(closed, rationale(closed, text), []) for text in said]
    items.append(Kept(free, rationale(free, "Because."), []))
    kept, rejected = verify_by_model(engine, items, Silent())
    assert [item.rationale.text for item in kept] == [said[0], "Because."]
    assert kept[0].verifier == Verification(pred="C", ok=True, method="model")
    assert kept[1] == items[2]  # what the rules said of it stays
    assert [(item.reason, item.text) for item in rejected] == [(REASON, said[1])]
    assert "predicts D, gold is C" in rejected[0].detail


def test_letters_are_hidden_and_words_stay() -> None:
    assert (
        hide_letters("Option C is right (C), as vitamin C helps.\nAnswer: C")
        == "is right , as vitamin C helps."
    )


def test_of_two_options_the_one_that_the_rationale_speaks_for_is_found(engine: Engine) -> None:
    for letter, right, wrong in (("A", "iron", "gold"), ("B", "gold", "iron")):
        question = Question(
            id="two",
            kind="options",
            question="Which metal is the old bridge made of?",
            answer=letter,
            options={"A": "iron", "B": "gold"},
            about="metals",
            split="seed",
        )
        text = f"The old bridge was built of {right}, and {right} carries the load, which {wrong} cannot."
        assert predict(engine, question, text) == letter
