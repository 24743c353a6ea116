"""The calibrated "I don't know": signals, fit, bounds, and what serving makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.errors import DataError
from domains.records import Answer, JudgedSegment, Reflection
from serve.chat import explain, verdict_text
from serve.confidence import (
    Calibration,
    Level,
    describe_choice,
    fit_logistic,
    read_calibration,
    risk_levels,
    sigmoid,
    upper_limit,
)
from serve.engine import Completion, LogProbs
from serve.signals import LIKELIHOOD, SIGNALS, likelihood_of, measure
from tests.small_serving import ABSTAIN, scripted_assistant

QUOTE = '"The adult dose of Brenzal is 40 mg once a day." [1]\n'


# -- the fit -----------------------------------------------------------------------------------------


def test_a_planted_signal_is_recovered_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3000, 3))
    right = (rng.random(3000) < sigmoid(2 * table[:, 0] - 1 * table[:, 1] + 0.5)).tolist()
    weights, bias = fit_logistic(table, right, l2=1.0)
    assert weights == pytest.approx([2, -1, 0], abs=0.2)
    assert bias == pytest.approx(0.5, abs=0.15)
    again, same = fit_logistic(table, right, l2=1.0)
    assert (weights == again).all()
    assert bias == same


def test_the_fit_is_where_the_gradient_vanishes() -> None:
    rng = np.random.default_rng(1)
    table, right = rng.normal(size=(40, 5)), rng.random(40) < 0.3
    weights, bias = fit_logistic(table, right.tolist(), l2=2.0)
    rest = right - sigmoid(table @ weights + bias)
    assert table.T @ rest - 2.0 * weights == pytest.approx(0, abs=1e-8)
    assert rest.sum() == pytest.approx(0, abs=1e-8)


def test_separable_answers_do_not_break_it_and_one_outcome_is_refused() -> None:
    weights, _ = fit_logistic(np.array([[-1.0], [-2.0], [1.0], [2.0]]), [False, False, True, True], l2=0.1)
    assert 0 < weights[0] < 100
    with pytest.raises(ValueError, match="right and wrong"):
        fit_logistic(np.zeros((3, 1)), [True, True, True], l2=1.0)


# -- bounds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "n", "doubt", "limit"),
    [
        (0, 59, 0.05, 1 - 0.05 ** (1 / 59)),  # the rule of three, exactly
        (0, 10, 0.05, 0.2589),
        (1, 10, 0.05, 0.3942),
        (5, 20, 0.025, 0.4910),
        (10, 10, 0.05, 1.0),
    ],
)
def test_limits_of_clopper_and_pearson(wrong: int, n: int, doubt: float, limit: float) -> None:
    assert upper_limit(wrong, n, doubt=doubt) == pytest.approx(limit, abs=1e-4)


@given(st.integers(1, 60), st.data())
def test_a_limit_rises_with_mistakes_and_falls_with_answers_and_doubt(n: int, data: Any) -> None:
    wrong = data.draw(st.integers(0, n - 1))
    limit = upper_limit(wrong, n, doubt=0.1)
    assert wrong / n < limit <= upper_limit(wrong + 1, n, doubt=0.1)
    assert upper_limit(wrong, n + 1, doubt=0.1) <= limit <= upper_limit(wrong, n, doubt=0.01)


def test_levels_are_tenths_and_ties_stay_together() -> None:
    confidences = [1 - i / 100 for i in range(100)]
    right = [i < 60 for i in range(100)]
    levels = risk_levels(confidences, right, doubt=0.1)
    assert [level.answered for level in levels] == list(range(10, 101, 10))
    assert [level.wrong for level in levels] == [0] * 6 + [10, 20, 30, 40]
    assert levels[5].upper == pytest.approx(upper_limit(0, 60, doubt=0.01))
    (only,) = risk_levels([0.5] * 20, [True] * 20, doubt=0.1)
    assert (only.answered, only.coverage, only.threshold) == (20, 1.0, 0.5)


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=80))
def test_a_looser_bound_never_answers_less(table: list[tuple[int, bool]]) -> None:
    levels = risk_levels([value / 20 for value, _ in table], [outcome for _, outcome in table], doubt=0.1)
    calibration = Calibration(levels=levels)
    choices = [calibration.choose(bound / 10) for bound in range(11)]
    kept = [choice.level.answered if choice and choice.kept else 0 for choice in choices]
    assert kept == sorted(kept)
    assert kept[-1] == len(table)


def test_a_bound_that_nothing_keeps_is_said_and_the_safest_level_taken() -> None:
    levels = risk_levels([1 - i / 30 for i in range(30)], [i % 2 == 0 for i in range(30)], doubt=0.1)
    choice = Calibration(levels=levels).choose(0.05)
    assert choice is not None
    assert not choice.kept
    assert choice.level.upper == min(level.upper for level in levels)
    assert "can't be promised" in describe_choice(choice, 0.05)
    good = Calibration(
        levels=[Level(threshold=0.7, coverage=0.5, answered=100, wrong=0, upper=0.045)]
    ).choose(0.05)
    assert good is not None
    assert good.kept
    assert describe_choice(good, 0.05).startswith("At most 5 % wrong: ")


# -- signals -----------------------------------------------------------------------------------------


def test_likelihood_is_that_of_the_answer_and_of_the_whole_reply() -> None:
    reply = "abc\nAnswer: xy"
    taken = [-1.0] * (len(reply) - 2) + [-2.0, -4.0, -0.5]
    watched = np.arange(len(taken), dtype=np.float32)[:, None] * -0.25
    done = Completion(
        reply, [ord(c) for c in reply], 9, "stop", LogProbs(np.array(taken, dtype=np.float32), watched)
    )
    found = likelihood_of(done, reply=reply, answer="xy", detokenize=lambda ids: "".join(map(chr, ids)))
    assert found[LIKELIHOOD] == pytest.approx((-2 - 4 - 0.5) / 3)
    assert found["answer_min_log_prob"] == -4
    assert found["reply_mean_log_prob"] == pytest.approx(sum(taken) / len(taken))
    assert found["abstain_log_prob"] == pytest.approx(-0.25 * (len(reply) - 2))
    nothing = likelihood_of(Completion("", [], 9, "stop"), reply="", answer="", detokenize=lambda _: "")
    assert nothing[LIKELIHOOD] < -10  # nothing recorded is no certainty


def test_what_a_reply_repeats_does_not_count() -> None:
    whole = "Answer: xy\nAnswer: zz"
    taken = np.array([-1.0] * 10 + [-9.0] * 12, dtype=np.float32)
    done = Completion(whole, [ord(c) for c in whole], 9, "length", LogProbs(taken, np.zeros((22, 0))))
    found = likelihood_of(
        done, reply="Answer: xy", answer="xy", detokenize=lambda ids: "".join(map(chr, ids))
    )
    assert found["reply_min_log_prob"] == -9  # the token behind it: going on was a choice
    assert found[LIKELIHOOD] == pytest.approx((-1 - 1 - 9) / 3)


def test_every_signal_is_measured_and_reflection_is_neutral_where_there_is_none() -> None:
    assistant, _, _ = scripted_assistant(QUOTE + "Answer: 40 mg.", "Brenzal", "Corvane", signals=True)
    answer = assistant.ask("What is the adult dose of Brenzal?")
    assert list(answer.signals) == list(SIGNALS)
    assert answer.signals["quotes_standing"] == 1
    assert answer.signals["question_coverage"] == 1
    assert answer.signals["both_lists"] == 1
    assert answer.signals["fused_margin"] == pytest.approx(1 / 61 - 1 / 62, abs=1e-6)
    assert answer.signals["abstain_log_prob"] == -7
    assert (answer.signals["reflected"], answer.signals["reflected_support"]) == (0, 0.5)
    assert answer.confidence is None
    segments = [
        JudgedSegment(decision="retrieve", text="a", relevance=0.8, support=0.9, utility=0.5),
        JudgedSegment(decision="retrieve", text="b", relevance=0.6),
    ]
    judged = measure(
        question="q", answer="a", hits=[], citations=[], rejected=0, likelihood={},
        reflection=Reflection(backend="tokens", retrieved=True, segments=segments),
    )  # fmt: skip
    assert judged["reflected"] == 1
    assert judged["reflected_relevance"] == pytest.approx(0.7)
    assert (judged["reflected_support"], judged["reflected_utility"]) == (0.9, 0.75)


# -- serving -----------------------------------------------------------------------------------------


def by_likelihood(**changes: Any) -> Calibration:
    """Sure where the model was sure: e^0 gives 0.5."""
    facts = {
        "signals": [LIKELIHOOD],
        "means": [0.0],
        "scales": [1.0],
        "weights": [2.0],
        "bias": 1.0,
        **changes,
    }
    return Calibration.model_validate(facts)


SURE = QUOTE + "Answer: Aa ee ii."
UNSURE = QUOTE + "Answer: 40 404 40 404 mg."


def test_an_unsure_answer_is_withheld_and_the_confidence_said() -> None:
    answers = []
    for reply in (SURE, UNSURE):
        assistant, _, _ = scripted_assistant(reply, "Brenzal", calibration=by_likelihood(), threshold=0.2)
        asked = assistant.prepare("What is the dose?")
        *pieces, answer = assistant.stream(asked)
        assert isinstance(answer, Answer)
        assert answer == assistant.ask_many([asked])[0]
        # Nothing is shown before it is known whether the answer stands.
        assert pieces[:-1] == [""] * (len(pieces) - 1)
        assert pieces[-1] == answer.text
        answers.append((asked, answer))
    (_, sure), (asked, unsure) = answers
    assert sure.confidence is not None
    assert unsure.confidence is not None
    assert sure.confidence > 0.2 > unsure.confidence
    assert (sure.text, sure.support) == ("Aa ee ii.", "supported")
    assert (unsure.text, unsure.support, unsure.withheld) == (ABSTAIN, "abstained", "unsure")
    assert unsure.citations == []
    lines = "\n".join(explain(asked, unsure, context=1000))
    assert "too unsure to be shown" in lines
    assert "404" in lines  # what the model wrote is told when asked why
    assert "Not sure enough" in verdict_text(unsure)


def test_without_a_threshold_the_same_answer_is_given_while_it_is_written() -> None:
    long = QUOTE + "Answer: " + "The adult dose of Brenzal is 40 mg once a day. " * 8
    plain, _, _ = scripted_assistant(long, "Brenzal")
    told, _, _ = scripted_assistant(long, "Brenzal", calibration=by_likelihood())
    one, other = (assistant.ask("What is the dose?") for assistant in (plain, told))
    assert other.confidence is not None
    assert one == other.model_copy(update={"confidence": None, "signals": {}})
    pieces = [
        piece for piece in told.stream(told.prepare("What is the dose?")) if isinstance(piece, str) and piece
    ]
    assert len(pieces) > 5


def test_an_abstention_has_no_confidence_and_no_model_withholds_nothing() -> None:
    silent, _, _ = scripted_assistant(
        f"Answer: {ABSTAIN}", "Brenzal", calibration=by_likelihood(), threshold=0.9
    )
    assert silent.ask("Why?").confidence is None
    unfitted, _, _ = scripted_assistant(
        UNSURE, "Brenzal", calibration=Calibration(reason="too few"), threshold=0.9
    )
    answer = unfitted.ask("Why?")
    assert answer.support == "supported"
    assert answer.confidence is None


def test_a_signal_that_is_missing_counts_as_the_mean() -> None:
    calibration = by_likelihood(
        signals=[LIKELIHOOD, "other"], means=[0.0, 3.0], scales=[1.0, 2.0], weights=[1.0, 5.0]
    )
    assert calibration.confidence({LIKELIHOOD: 0.0}) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)


def test_a_calibration_comes_back_as_written_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibration = by_likelihood(
        levels=risk_levels([0.9, 0.5, 0.1], [True, True, False], doubt=0.1), sources={"student.gguf": "ab"}
    )
    path.write_text(calibration.model_dump_json(), encoding="utf-8")
    assert read_calibration(path) == calibration
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "wieghts": []}), encoding="utf-8")
    with pytest.raises(DataError, match=r"calibration\.json"):
        read_calibration(path)
    with pytest.raises(DataError, match="No such file"):
        read_calibration(tmp_path / "none.json")
