from __future__ import annotations

import math

import pytest

from serve.reflection_scores import (
    RELEVANCE_WEIGHTS,
    SUPPORT_WEIGHTS,
    UTILITY_WEIGHTS,
    Parts,
    Weights,
    best,
    first_of,
    group_mean,
    logsumexp,
    mean_score,
    p_retrieve,
    segment_score,
    sequence_score,
    vote,
    wants_retrieval,
)

NEVER = -math.inf


def logs(*values: float) -> list[float]:
    return [math.log(value) if value else NEVER for value in values]


@pytest.mark.parametrize(
    ("retrieve", "no_retrieval", "expected", "wanted"),
    [
        (0.95, 0.01, 0.95 / 0.96, True),  # the release computes 0.011 here and does not retrieve
        (0.01, 0.95, 0.01 / 0.96, False),  # … and 0.99 here, and retrieves
        (0.2, 0.8, 0.2, False),  # not above the threshold
        (0.21, 0.79, 0.21, True),
        (1e-9, 3e-9, 0.25, True),  # opens with plain text: the ratio still counts
        (0.0, 0.5, 0.0, False),
    ],
)
def test_retrieval_is_decided_by_probabilities_not_by_their_logarithms(
    retrieve: float, no_retrieval: float, expected: float, wanted: bool
) -> None:
    probability = p_retrieve(*logs(retrieve, no_retrieval))
    assert probability == pytest.approx(expected)
    assert wants_retrieval(probability, 0.2) is wanted


def test_a_model_that_says_nothing_about_retrieval_gets_evidence() -> None:
    assert p_retrieve(NEVER, NEVER) is None
    assert wants_retrieval(None, 1.0)


def test_groups_are_normalised_and_weighted_as_published() -> None:
    assert group_mean(logs(0.6, 0.2), RELEVANCE_WEIGHTS) == pytest.approx(0.75)
    assert group_mean(logs(0.3, 0.2, 0.5), SUPPORT_WEIGHTS) == pytest.approx(0.4)
    assert group_mean(logs(0.1, 0.1, 0.1, 0.1, 0.1), UTILITY_WEIGHTS) == pytest.approx(0)
    assert group_mean(logs(0, 0, 0, 0.01, 0.03), UTILITY_WEIGHTS) == pytest.approx(0.875)
    assert group_mean(logs(0.05, 0, 0, 0, 0), UTILITY_WEIGHTS) == pytest.approx(-1)


def test_tiny_probabilities_do_not_underflow_and_missing_ids_are_not_minus_a_hundred() -> None:
    assert group_mean([-2000.0, -2000.0 - math.log(3)], RELEVANCE_WEIGHTS) == pytest.approx(0.75)
    assert group_mean([-5.0, NEVER], RELEVANCE_WEIGHTS) == pytest.approx(1)
    assert group_mean([NEVER, NEVER], RELEVANCE_WEIGHTS) is None
    assert logsumexp([]) == NEVER
    assert logsumexp([0.0, 0.0]) == pytest.approx(math.log(2))


def test_a_segments_score_is_the_weighted_sum_and_missing_groups_are_neutral() -> None:
    parts = Parts(relevance=0.8, support=0.9, utility=0.5, sequence=0.6)
    assert segment_score(parts, Weights()) == pytest.approx(0.8 + 0.9 + 0.25)
    assert segment_score(parts, Weights(2, 0.5, 0, 1)) == pytest.approx(1.6 + 0.45 + 0.6)
    assert segment_score(Parts(None, None, None, None), Weights(1, 1, 1, 1)) == pytest.approx(0.5)


def test_the_sequence_score_is_the_geometric_mean() -> None:
    assert sequence_score(logs(0.5, 0.125)) == pytest.approx(0.25)
    assert sequence_score([]) is None


def test_a_hypothesis_is_worth_the_mean_of_its_segments_whatever_its_length() -> None:
    assert mean_score([1.5]) == mean_score([1.5, 1.5, 1.5]) == pytest.approx(1.5)
    assert mean_score([2.0, 1.0]) > mean_score([1.4])
    assert mean_score([]) == NEVER


def test_the_first_position_of_a_group() -> None:
    assert first_of([5, 7, 9, 7], (9, 7)) == 1
    assert first_of([5], (9,)) is None


def test_closed_answers_add_up_and_open_ones_do_not() -> None:
    keys, scores = ["A", "B", "A", None], [1.0, 1.6, 0.9, 5.0]
    assert vote(keys, scores) == "A"
    assert best(keys, scores, closed=True) == 0  # the best of those that say A
    assert best(keys, scores, closed=False) == 3
    assert vote([None, None], [1, 2]) is None
    assert best([None, None], [1, 2], closed=True) == 1
    assert best(["A", "B"], [-0.5, -0.2], closed=True) == 1
