"""Risk, coverage and calibration against tables made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.selective import (
    aurc,
    calibration_error,
    measure_selective,
    oracle_aurc,
    reliability,
    risk_coverage,
)

TABLE = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40)


def test_the_curve_of_a_table_made_by_hand() -> None:
    curve = risk_coverage([0.9, 0.8, 0.7, 0.6], [True, False, True, False])
    assert curve.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 2 / 4])
    assert aurc([0.9, 0.8, 0.7, 0.6], [True, False, True, False]) == pytest.approx(
        (1 / 2 + 1 / 3 + 1 / 2) / 4
    )


def test_equal_confidences_have_the_expected_risk_of_any_order() -> None:
    assert risk_coverage([1, 1, 0], [True, False, False]).tolist() == pytest.approx([1 / 2, 1 / 2, 2 / 3])


def test_perfect_inverse_and_uninformed_order() -> None:
    right = [True] * 6 + [False] * 4
    perfect = [1.0] * 6 + [0.0] * 4
    assert aurc(perfect, right) == pytest.approx(oracle_aurc(6, 10))
    assert oracle_aurc(6, 10) == pytest.approx((1 / 7 + 2 / 8 + 3 / 9 + 4 / 10) / 10)
    assert aurc([0.5] * 10, right) == pytest.approx(0.4)
    inverse = aurc([-value for value in perfect], right)
    assert inverse == pytest.approx((4 * 1 + 4 / 5 + 4 / 6 + 4 / 7 + 4 / 8 + 4 / 9 + 4 / 10) / 10)
    assert aurc(perfect, right) < 0.4 < inverse
    assert (oracle_aurc(5, 5), oracle_aurc(0, 3)) == (0, 1)


@given(TABLE)
def test_no_order_is_better_than_the_oracle_and_all_end_at_the_error_rate(
    table: list[tuple[int, bool]],
) -> None:
    confidences, right = [float(value) for value, _ in table], [outcome for _, outcome in table]
    found = measure_selective(confidences, right, resamples=0, seed=0)
    assert found is not None
    assert found.excess >= -1e-12
    assert found.wrong_at["1"] == pytest.approx(found.random)
    assert aurc([3 * value - 1 for value in confidences], right) == pytest.approx(found.aurc.mean)


def test_the_interval_holds_the_value_and_depends_on_the_seed_alone() -> None:
    confidences = [i / 40 for i in range(40)]
    right = [i % 3 > 0 if i > 20 else i % 3 == 0 for i in range(40)]
    clusters = [f"d{i // 4}" for i in range(40)]
    one = measure_selective(confidences, right, clusters=clusters, resamples=200, seed=1)
    assert one == measure_selective(confidences, right, clusters=clusters, resamples=200, seed=1)
    assert one is not None
    assert one.aurc.low < one.aurc.mean < one.aurc.high
    assert one.wrong_at["0.5"] < one.wrong_at["1"]
    assert measure_selective([], [], resamples=10, seed=0) is None


def test_bins_are_of_equal_size_and_equal_confidences_stay_together() -> None:
    bins = reliability([0.1, 0.2, 0.2, 0.2, 0.8, 0.9], [False, False, True, False, True, True], bins=3)
    assert [item.answers for item in bins] == [4, 2]  # the second edge would cut the 0.2s
    assert (bins[1].confidence, bins[1].right) == (pytest.approx(0.85), 1.0)
    assert calibration_error(bins) == pytest.approx((4 * abs(0.175 - 0.25) + 2 * abs(0.85 - 1)) / 6)
    assert calibration_error(reliability([0.25] * 8, [True, True] + [False] * 6)) == 0
    assert calibration_error([]) == 0


@given(TABLE, st.integers(1, 6))
def test_bins_hold_every_answer_once(table: list[tuple[int, bool]], count: int) -> None:
    bins = reliability([value / 5 for value, _ in table], [outcome for _, outcome in table], bins=count)
    assert sum(item.answers for item in bins) == len(table)
    assert 0 <= calibration_error(bins) <= 1


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="expected one each"):
        risk_coverage([0.5], [True, False])
