import pytest

from pipeline.verdict import give_verdict, points

NOTHING = (0.0, -0.03, 0.03)
HELPED, HURT = (0.11, 0.04, 0.18), (-0.06, -0.11, -0.01)
BIG = (0.25, 0.15, 0.35)


def _numbers(values):
    return dict(zip(("mean", "low", "high"), values, strict=True))


def _verdict(training=NOTHING, retrieval=NOTHING, export=NOTHING, answerable=None, arms=None, n=60):
    differences = {
        "tuned_rag-base_rag": {"score": _numbers(training)},
        "base_rag-base": {"score": _numbers(retrieval)},
        "exported_rag-tuned_rag": {"score": _numbers(export)},
        "tuned_rag-tuned": {"score": _numbers(retrieval)},
    }
    if answerable:
        differences["tuned_rag-base_rag"]["score_answerable"] = _numbers(answerable)
    return give_verdict(differences=differences, arms=arms or {}, n_questions=n)


def test_where_no_bit_differs_the_export_is_not_to_blame():
    differences = {
        "tuned_rag-base_rag": {"score": {"mean": 0.0, "low": -0.1, "high": 0.1}},
        "base_rag-base": {"score": {"mean": 0.0, "low": -0.1, "high": 0.1}},
        "exported_rag-tuned_rag": {"score": {"mean": -0.03, "low": -0.05, "high": -0.01}},
    }
    text = give_verdict(differences=differences, arms={}, n_questions=60, bits_equal=True).text
    assert "bit for bit, and scored 3 points below the same network written in F16" in text
    assert "Exporting cost" not in text


@pytest.mark.parametrize(
    ("training", "retrieval", "code", "says"),
    [
        (
            HELPED,
            BIG,
            "helped",
            "Training helped: +11 points over the untrained model with the same retrieval (95 % interval 4 to 18).",
        ),
        (HELPED, NOTHING, "helped", "Retrieval alone makes no difference that can be seen (0 points"),
        (HURT, BIG, "hurt", "Training hurt: −6 points"),
        (HURT, BIG, "hurt", "Serve the untrained model with retrieval instead."),
        ((0.01, -0.05, 0.07), BIG, "do_not_fine_tune", "Do not fine-tune: retrieval alone already gives it."),
        ((-0.04, -0.1, 0.02), BIG, "do_not_fine_tune", "60 questions"),
        ((0.06, -0.03, 0.15), BIG, "no_difference", "No difference can be seen with 60 questions: +6 points"),
        (NOTHING, NOTHING, "no_difference", "No difference can be seen with 60 questions: 0 points"),
        (NOTHING, HURT, "no_difference", "Retrieval hurts the untrained model (−6 points"),
        ((0.05, 0.0, 0.1), NOTHING, "no_difference", "interval 0 to 10"),  # touching 0 is not above it
    ],
)
def test_training(training, retrieval, code, says):
    verdict = _verdict(training, retrieval)
    assert verdict.code == code
    assert says in verdict.text


def test_no_difference_says_how_many_questions_would_show_one():
    # Half-width 0.09 at 60 questions; 0.06 needs (0.09 / 0.06)² as many.
    text = _verdict((0.06, -0.03, 0.15)).text
    assert "about 140 questions would show it" in text
    assert "would show" not in _verdict(NOTHING).text


@pytest.mark.parametrize(
    ("export", "says"),
    [
        (NOTHING, "Exporting cost nothing that can be measured (0 points, 95 % interval −3 to 3)."),
        ((0.0, 0.0, 0.0), "Exporting changed no score."),
        ((-0.03, -0.05, -0.01), "Exporting cost 3 points (95 % interval −5 to −1)."),
        ((0.03, 0.01, 0.05), "The exported file scores higher than the student it was made of"),
    ],
)
def test_export(export, says):
    assert says in _verdict(export=export).text


@pytest.mark.parametrize(
    ("answerable", "says"),
    [
        ((0.1, 0.02, 0.2), None),
        ((0.0, -0.1, 0.1), "On the questions that the documents answer, no gain can be seen"),
        ((-0.1, -0.2, -0.02), "But it answers worse where the documents do answer"),
    ],
)
def test_a_gain_from_abstaining_only_is_said_to_be_one(answerable, says):
    text = _verdict(HELPED, answerable=answerable).text
    if says:
        assert says in text
    else:
        assert "documents answer" not in text
        assert "do answer" not in text


def test_abstention_of_the_served_student_beside_the_untrained_one():
    arms = {
        "exported_rag": {
            "abstention_recall": _numbers((0.7, 0.5, 0.9)),
            "false_abstention": _numbers((0.12, 0, 0.2)),
        },
        "base_rag": {"abstention_recall": _numbers((0.1, 0, 0.2)), "false_abstention": _numbers((0.03, 0, 0.1))},
    }  # fmt: skip
    text = _verdict(arms=arms).text
    assert (
        "says that it does not know on 70 % of the questions that the documents do not answer (untrained: 10 %), "
        "and wrongly on 12 % of the others (untrained: 3 %)."
    ) in text
    assert "Careful" not in text


def test_a_student_that_abstains_from_most_is_called_so():
    arms = {"exported_rag": {"false_abstention": _numbers((0.6, 0.5, 0.7))}}
    text = _verdict(arms=arms).text
    assert "does not know wrongly on 60 %" in text
    assert "Careful: it abstains on most questions that it should answer." in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.114, "+11"),
        (-0.114, "−11"),
        (0.004, "+0.4"),
        (-0.0004, "−0.04"),
        (0.000001, "0"),
        (0, "0"),
        (0.0096, "+1"),
        (1, "+100"),
    ],
)
def test_points(value, text):
    assert points(value) == text


def test_what_users_are_served_is_part_of_the_verdict():
    differences = {
        name: {"score": _numbers(NOTHING)}
        for name in ("tuned_rag-base_rag", "base_rag-base", "exported_rag-tuned_rag")
    }
    differences["tuned_rag-base_rag"]["score_served"] = _numbers((0.02, -0.04, 0.08))
    arms = {
        "exported_rag": {"withdrawn": _numbers((0.7, 0.6, 0.8))},
        "base_rag": {"withdrawn": _numbers((0.8, 0.7, 0.9))},
    }
    text = give_verdict(differences=differences, arms=arms, n_questions=60).text
    assert "As served, 70 % of its answers are replaced by that sentence" in text
    assert "(untrained: 80 %)" in text
    assert "+2 points (95 % interval −4 to 8)" in text


def test_a_handful_of_questions_gives_no_verdict():
    verdict = _verdict(BIG, n=2)
    assert verdict.code == "no_difference"
    assert (
        verdict.text
        == "2 questions cannot tell whether training helped (+25 points): write at least 20 exam questions."
    )
