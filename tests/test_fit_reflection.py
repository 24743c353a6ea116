"""Threshold and weights: chosen from cached answers, on a development set that holds no exam question."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from domains.config import ReflectSection
from domains.errors import DataError
from domains.records import Answer, Instruction, JudgedSegment, Question, Reflection
from pipeline.fit_reflection import fit, outcome, retrieval_reliability
from pipeline.metrics import mark_answer
from pipeline.plots import plot_reliability
from pipeline.progress import Silent
from pipeline.reflection_cases import CachedAnswer, Case, collect, development_questions, general_questions
from pipeline.reflection_report import describe_reflection
from serve.reflection_run import Vocabulary
from serve.reflection_scores import Weights
from serve.reflection_tokens import Settings, TokenReflector
from tests.reflection_engine import ReflectingEngine
from tests.small_serving import ABSTAIN, FixedRetriever
from tests.test_reflection_tokens import BAD, FIVE, FULL, GOOD, LOOK, NONE, Assistant


def candidate(outcome: float, *, relevance: float = 0.5, support: float = 0.0, **more: Any) -> CachedAnswer:
    facts = {"utility": 0.0, "sequence": 0.5, "unsupported": False, "key": None, **more}
    return CachedAnswer(relevance=relevance, support=support, outcome=outcome, **facts)


def case(
    p_retrieve: float, closed: float, *candidates: CachedAnswer, is_closed: bool = False, about: str = "d"
) -> Case:
    return Case(
        question_id="q",
        about=about,
        is_closed=is_closed,
        p_retrieve=p_retrieve,
        closed=candidate(closed),
        candidates=list(candidates),
        nothing=0.25,
    )


def test_the_threshold_is_put_where_retrieval_begins_to_help() -> None:
    helped = [case(p, 0, candidate(1)) for p in (0.65, 0.75, 0.95)]
    harmed = [case(p, 1, candidate(0)) for p in (0.05, 0.22, 0.55)]
    found = fit([*helped, *harmed], ReflectSection())
    assert (found.threshold, found.score, found.retrieval_rate) == (0.6, 1.0, 0.5)
    assert (found.before, found.always, found.never) == (pytest.approx(4 / 6), 0.5, 0.5)
    assert found.weights == Weights()  # nothing to gain: what is configured stays
    assert "threshold = 0.6\n" in found.toml()


def test_the_weights_are_those_that_pick_the_right_passage() -> None:
    cases = [
        case(0.9, 0, candidate(0, relevance=0.9, support=0.1), candidate(1, relevance=0.1, support=0.7))
        for _ in range(3)
    ]
    found = fit(cases, ReflectSection())
    assert found.before == 0
    assert found.score == 1
    assert found.weights.support > found.weights.relevance


def test_a_gain_that_other_documents_show_too_is_kept() -> None:
    """Passages hurt up to p = 0.5 in every document, so does every fit to some of them say."""
    cases = [
        each
        for number in range(12)
        for each in (
            case(0.9, 0, candidate(1), about=f"d{number}"),
            case(0.4, 1, candidate(0), about=f"d{number}"),
        )
    ]
    found = fit(cases, ReflectSection())
    assert (found.before, found.score, found.out_of_fold, found.threshold) == (0.5, 1.0, 1.0, 0.4)
    assert found.gain == (0.5, 0.5, 0.5)
    assert found.refusal() == ""
    assert found.settings().gain == [0.5, 0.5, 0.5]


def test_the_best_of_many_settings_by_chance_is_not_kept() -> None:
    """Outcomes are drawn without regard to any judgement: one of 3,000 settings looks good all the same."""
    rng = np.random.default_rng(0)

    def drawn() -> CachedAnswer:
        return candidate(
            float(rng.random() < 0.5), relevance=float(rng.random()), support=float(rng.random())
        )

    cases = [
        case(
            float(rng.random()),
            float(rng.random() < 0.5),
            *[drawn() for _ in range(4)],
            about=f"d{number // 2}",
        )
        for number in range(60)
    ]
    found = fit(cases, ReflectSection())
    assert found.score > found.before
    assert found.out_of_fold < found.before
    assert found.gain[0] == pytest.approx(found.out_of_fold - found.before)
    assert found.gain[1] < 0 < found.gain[2]
    assert "not certainly better" in found.refusal()


def test_too_few_documents_keep_nothing() -> None:
    cases = [case(0.9, 1, candidate(0), about=f"d{number}") for number in range(9)]
    cases += [case(0.9, 1, candidate(0), about="") for _ in range(5)]  # instructions are about none
    assert "about 9 documents, and 10 are needed" in fit(cases, ReflectSection()).refusal()


def test_instructions_of_no_training_row_say_how_often_it_looks_in_vain() -> None:
    general = [Instruction(id=f"g{number}", instruction=f"Add {number}.", answer="3") for number in range(9)]
    seen = {"g1", "g4"}
    drawn = general_questions(general, count=0, seed=0, trained_on=seen)
    assert {item.id for item in drawn} == {f"g{number}" for number in range(9)} - seen
    assert {(item.kind, item.about) for item in drawn} == {("open", "")}
    assert general_questions(general, count=3, seed=0, trained_on=seen) == drawn[:3]
    cases = [
        case(0.9, 0, candidate(1)),
        case(0.9, 1, candidate(1), about=""),
        case(0.1, 1, candidate(1), about=""),
    ]
    assert fit(cases, ReflectSection()).retrieval_rate_general == 0.5
    assert fit(cases[:1], ReflectSection()).retrieval_rate_general is None


def test_settings_are_worth_what_serving_would_have_said() -> None:
    good, bad = candidate(1, support=0.2, key="A"), candidate(0, support=0.9, unsupported=True, key="B")
    open_question = case(0.5, 0.4, good, bad)

    def worth(item: Case, threshold: float = 0.2, drop: bool = False) -> tuple[float, bool]:
        return outcome(item, threshold=threshold, weights=Weights(), drop_unsupported=drop)

    assert worth(open_question) == (0, True)
    assert worth(open_question, drop=True) == (1, True)
    assert worth(open_question, threshold=0.5) == (0.4, False)
    assert worth(case(0.5, 0.4, bad), drop=True) == (0.25, True)  # nothing is left: the abstention
    vote = case(
        0.5, 0, good, candidate(1, support=0.3, key="A"), candidate(0, support=1, key="B"), is_closed=True
    )
    assert worth(vote) == (1, True)


def test_what_says_nothing_is_not_counted_as_given() -> None:
    """As in serving: the silent candidate has the better score, the other one is given."""
    both = case(0.9, 0, candidate(0, relevance=0.9, silent=True), candidate(1, relevance=0.1))
    assert outcome(both, threshold=0.2, weights=Weights(), drop_unsupported=True) == (1, True)


def test_retrieval_reliability_is_over_questions_where_it_makes_a_difference() -> None:
    cases = [case(0.9, 0, candidate(1)), case(0.1, 1, candidate(0)), case(0.7, 1, candidate(1))]
    table, error = retrieval_reliability(cases)
    assert [(each.confidence, each.right, each.answers) for each in table] == [(0.1, 0, 1), (0.9, 1, 1)]
    assert error == pytest.approx(0.1)
    assert retrieval_reliability([case(0.7, 1, candidate(1))]) == ([], 0.0)
    svg = plot_reliability([asdict(each) for each in table], event="it helped")
    assert "it helped" in svg
    assert plot_reliability([], event="it helped") == ""


def question(name: str, split: Any, about: str) -> Question:
    return Question(
        id=name, kind="open", question=f"What is {name}?", answer="40 mg", about=about, split=split
    )


def test_development_is_by_document_and_never_from_the_exam() -> None:
    pool = [
        question(f"q{number}", "exam" if number % 3 == 0 else "seed", f"doc{number // 2}")
        for number in range(200)
    ]
    drawn = development_questions(pool, count=40, seed=0)
    assert len(drawn) == 40
    assert {item.split for item in drawn} == {"seed"}
    assert drawn == development_questions(pool, count=40, seed=0)
    assert len(development_questions(pool, count=0, seed=0)) == sum(item.split == "seed" for item in pool)
    documents = [item.about for item in drawn]
    assert len(set(documents)) < len(documents)  # questions of a document come together
    seen = {item.id for item in drawn[3:]}
    assert development_questions(pool, count=3, seed=0, trained_on=seen) == drawn[:3]
    assert not seen & {item.id for item in development_questions(pool, count=40, seed=0, trained_on=seen)}
    with pytest.raises(DataError):
        development_questions(pool[:1], count=0, seed=0)


def test_every_way_of_answering_is_collected_once() -> None:
    def script(prompt: str) -> str:
        if prompt.endswith("[No Retrieval]"):
            return "30 mg" + FIVE
        if prompt.endswith("</paragraph>"):
            return (
                GOOD + "40 mg" + FULL + FIVE
                if "<paragraph>Brenzal" in prompt
                else BAD + "50 mg" + NONE + FIVE
            )
        return LOOK

    engine: Any = ReflectingEngine(script)
    reflector = TokenReflector(Vocabulary.of(engine), Settings())
    assistant = Assistant(
        engine,
        FixedRetriever("Corvane", "Brenzal"),
        system="Be brief.",
        abstain=ABSTAIN,
        top_k=2,
        max_tokens=50,
        unsupported="keep",
        reflector=reflector,
    )
    questions = [question(f"q{number}", "seed", "brenzal") for number in range(10)]
    cases = collect(
        assistant,
        reflector,
        questions,
        value=lambda asked, text, _: float(text == asked.answer),
        progress=Silent(),
    )
    assert len(cases) == 10
    first = cases[0]
    assert first.closed.outcome == 0
    assert [item.outcome for item in first.candidates] == [0, 1]
    assert [item.unsupported for item in first.candidates] == [True, False]
    assert first.candidates[1].relevance == pytest.approx(0.9)
    assert first.p_retrieve == pytest.approx(0.95 / 0.96)
    assert fit(cases, ReflectSection()).score == 1


# -- the exam's part ---------------------------------------------------------------------------------


def answer(*, retrieved: bool, p: float | None = 0.5, support: float = 0.9, supported: bool = True) -> Answer:
    return Answer(
        question="Why?",
        text="So.",
        raw="So.",
        support="supported" if supported else "unsupported",
        citations=[],
        reflection=Reflection(
            backend="tokens",
            retrieved=retrieved,
            p_retrieve=p,
            segments=[JudgedSegment(decision="no_retrieval", text="So.", support=support)],
            expected={"relevance": 2, "utility": 1},
            missing={"utility": 1},
            unparsed=1,
            passes=3,
        ),
    )


def test_the_exam_marks_retrieval_missing_groups_and_what_could_not_be_read() -> None:
    marks = mark_answer(
        question("q", "exam", "d"), answer(retrieved=True), gold=[], abstain=ABSTAIN, seconds=1
    )
    assert marks["retrieval_rate"] == (1, 1)
    assert marks["group_missing"] == (1, 3)
    assert marks["judgement_unparsed"] == (1, 1)
    assert marks["passes_per_question"] == (3, 1)
    plain = answer(retrieved=True).model_copy(update={"reflection": None})
    assert "retrieval_rate" not in mark_answer(
        question("q", "exam", "d"), plain, gold=[], abstain=ABSTAIN, seconds=1
    )


@pytest.mark.parametrize(
    ("retrieved", "said"), [([True, True], "all of 2"), ([False, False], "none of 2"), ([True, False], "")]
)
def test_always_or_never_retrieving_is_a_warning(retrieved: list[bool], said: str) -> None:
    report = describe_reflection(
        {"exported_rag": [answer(retrieved=each) for each in retrieved], "base_rag": []}
    )
    assert report is not None
    assert [said in line for line in report["warnings"]] == ([True] if said else [])
    assert report["arms"]["exported_rag"]["retrieval_rate"] == sum(retrieved) / 2


def test_a_back_end_that_does_not_decide_is_not_warned_of() -> None:
    report = describe_reflection({"exported_rag": [answer(retrieved=True, p=None)]})
    assert report is not None
    assert report["warnings"] == []
    assert describe_reflection({"base_rag": []}) is None


def test_the_students_support_is_held_against_what_stands_in_the_passages() -> None:
    answers = [answer(retrieved=True, support=0.9), answer(retrieved=False, support=0.1, supported=False)]
    report = describe_reflection({"exported_rag": answers})
    assert report is not None
    facts = report["arms"]["exported_rag"]
    assert [(each["confidence"], each["right"]) for each in facts["support_reliability"]] == [
        (0.1, 0),
        (0.9, 1),
    ]
    assert facts["support_calibration_error"] == pytest.approx(0.1)
