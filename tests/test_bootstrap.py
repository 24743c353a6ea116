import math

import numpy as np
import pytest

from pipeline.bootstrap import mcnemar, paired_difference, ratio_interval


def _ones(values):
    return values, [1.0] * len(values)


def test_mean_and_width_are_those_of_the_binomial_distribution():
    values = [1.0] * 120 + [0.0] * 280
    interval = ratio_interval(*_ones(values), resamples=4000, seed=0)
    assert interval.mean == pytest.approx(0.3)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert interval.low == pytest.approx(0.3 - half, abs=0.006)
    assert interval.high == pytest.approx(0.3 + half, abs=0.006)


def test_same_seed_same_interval_other_seed_other_interval():
    values = list(np.random.default_rng(3).random(50))
    first = ratio_interval(*_ones(values), resamples=500, seed=1)
    assert first == ratio_interval(*_ones(values), resamples=500, seed=1)
    assert first != ratio_interval(*_ones(values), resamples=500, seed=2)


def test_ratio_is_of_sums_not_the_mean_of_ratios():
    interval = ratio_interval([1, 3], [1, 9], resamples=200, seed=0)
    assert interval.mean == pytest.approx(0.4)
    assert (interval.low, interval.high) == (pytest.approx(1 / 3), pytest.approx(1.0))


def test_a_metric_that_no_question_speaks_of_has_no_interval():
    assert ratio_interval([0, 0], [0, 0], resamples=50, seed=0) is None
    assert paired_difference(([1], [1]), ([0], [0]), resamples=50, seed=0) is None


def test_samples_that_draw_nothing_the_metric_speaks_of_do_not_count():
    # One question of ten has the metric: a third of the samples miss it.
    interval = ratio_interval([0.5] + [0] * 9, [1] + [0] * 9, resamples=500, seed=0)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_questions_of_one_document_count_as_one_draw():
    values = [float(document % 2) for document in range(20) for _ in range(10)]
    clusters = [f"d{document}" for document in range(20) for _ in range(10)]
    single = ratio_interval(*_ones(values), resamples=3000, seed=0)
    clustered = ratio_interval(*_ones(values), clusters=clusters, resamples=3000, seed=0)
    assert single.mean == clustered.mean
    # 20 independent draws instead of 200: the width grows by sqrt(10).
    growth = (clustered.high - clustered.low) / (single.high - single.low)
    assert growth == pytest.approx(math.sqrt(10), rel=0.15)


def test_order_of_the_clusters_does_not_matter():
    values, clusters = [1.0, 0.0, 0.5, 0.25], ["b", "a", "b", "c"]
    back = ratio_interval(values[::-1], [1.0] * 4, clusters=clusters[::-1], resamples=300, seed=0)
    assert back == ratio_interval(values, [1.0] * 4, clusters=clusters, resamples=300, seed=0)


def test_pairing_takes_out_what_makes_a_question_hard_for_both():
    rng = np.random.default_rng(0)
    hardness = rng.random(60)
    one, other = list(hardness + 0.1 + 0.02 * rng.standard_normal(60)), list(hardness)
    difference = paired_difference(_ones(one), _ones(other), resamples=2000, seed=0)
    assert difference.mean == pytest.approx(0.1, abs=0.01)
    assert 0.08 < difference.low < difference.high < 0.12
    assert difference.p < 0.01
    single = ratio_interval(*_ones(one), resamples=2000, seed=0)
    assert single.high - single.low > 5 * (difference.high - difference.low)


def test_difference_changes_its_sign_with_the_order():
    rng = np.random.default_rng(1)
    one, other = _ones(list(rng.random(30))), _ones(list(rng.random(30)))
    forth = paired_difference(one, other, resamples=1000, seed=0)
    back = paired_difference(other, one, resamples=1000, seed=0)
    assert (back.mean, back.low, back.high) == pytest.approx((-forth.mean, -forth.high, -forth.low))
    assert back.p == forth.p


def test_equal_arms_differ_by_nothing():
    same = _ones([0.0, 1.0, 1.0])
    difference = paired_difference(same, same, resamples=100, seed=0)
    assert (difference.mean, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_p_is_rarely_small_where_there_is_no_difference():
    small = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        one, other = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
        p = paired_difference(_ones(one.tolist()), _ones(other.tolist()), resamples=400, seed=0).p
        small += p < 0.05
    assert small <= 22  # 10 expected; P(more than 22) < 0.001


def test_a_large_exam_is_drawn_in_parts_without_a_difference():
    values = [float(i % 3 == 0) for i in range(5000)]
    interval = ratio_interval(*_ones(values), resamples=1000, seed=0)
    assert interval.low < 1 / 3 < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(2 / 9 / 5000), rel=0.15)


@pytest.mark.parametrize(("clusters", "message"), [(["a"], "1 clusters for 2 questions")])
def test_clusters_must_fit(clusters, message):
    with pytest.raises(ValueError, match=message):
        ratio_interval([1, 0], [1, 1], clusters=clusters, resamples=10, seed=0)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (5, 0, 2 / 32),
        (4, 4, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(wins, losses, p):
    one = [True] * wins + [False] * losses + [True] * 30
    other = [False] * wins + [True] * losses + [True] * 30
    assert mcnemar(one, other) == pytest.approx(p)
