"""How sure is a number from a few dozen questions? Percentile bootstrap (Efron 1979) and exact McNemar.

Every metric here is a ratio of sums over questions, Σ numerator / Σ denominator: a mean has denominators 1, the
precision of citations has their number, an F1 has 2 TP over 2 TP + FP + FN. Resampling questions and taking the
ratio of the resampled sums treats all of them alike.

Questions about one document share its wording and its retrieval, so they are drawn together (a cluster
bootstrap): intervals from single questions would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
_CELLS = 4_000_000  # weights held at a time, 32 MB


@dataclass(frozen=True)
class Interval:
    """A ratio with its 95 % percentile interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One ratio minus another on the same questions, its 95 % interval and two-sided p."""

    mean: float
    low: float
    high: float
    p: float


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    clusters: Sequence[str] | None = None,
    resamples: int,
    seed: int,
) -> Interval | None:
    """Σ numerators / Σ denominators with its interval, or None where the denominators sum to 0.

    Args:
        numerators: [questions].
        denominators: [questions], >= 0; 0 where the question says nothing about the metric.
        clusters: [questions], whose members are drawn together; None draws single questions.
        resamples: number of bootstrap samples.
        seed: same seed, same interval.
    """
    sums = _sums([numerators, denominators], clusters)
    total = sums.sum(axis=1)
    if total[1] <= 0:
        return None
    drawn = np.concatenate([
        _ratio(weights @ sums[0], weights @ sums[1])
        for weights in _weights(sums.shape[1], resamples, seed)
    ])  # fmt: skip
    low, high = _limits(drawn)
    return Interval(mean=float(total[0] / total[1]), low=low, high=high)


def paired_difference(
    one: tuple[Sequence[float], Sequence[float]],
    other: tuple[Sequence[float], Sequence[float]],
    *,
    clusters: Sequence[str] | None = None,
    resamples: int,
    seed: int,
) -> Difference | None:
    """Ratio of ``one`` minus ratio of ``other`` on the same questions, or None where one has no denominator.

    Both arms are resampled with the same draws, so what makes a question hard for both cancels out. p is
    twice the smaller share of resampled differences on either side of 0, counting the observed sample as
    one draw: below 0.05 about when the interval leaves out 0.

    Args:
        one: (numerators, denominators), each [questions].
        other: the same of the arm that is subtracted.
        clusters: as in `ratio_interval`.
        resamples: number of bootstrap samples.
        seed: same seed, same result.
    """
    sums = _sums([*one, *other], clusters)
    total = sums.sum(axis=1)
    if total[1] <= 0 or total[3] <= 0:
        return None
    drawn = np.concatenate([
        _ratio(weights @ sums[0], weights @ sums[1]) - _ratio(weights @ sums[2], weights @ sums[3])
        for weights in _weights(sums.shape[1], resamples, seed)
    ])  # fmt: skip
    low, high = _limits(drawn)
    valid = drawn[~np.isnan(drawn)]
    sides = [int((valid <= 1e-12).sum()), int((valid >= -1e-12).sum())]
    p = min(1.0, 2 * (min(sides) + 1) / (len(valid) + 1))
    return Difference(mean=float(total[0] / total[1] - total[2] / total[3]), low=low, high=high, p=p)


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Exact two-sided McNemar test of two arms' right and wrong answers to the same questions.

    Given the questions on which the arms differ, each arm is right on half of them by chance: the p value is
    binomial (McNemar 1947, exact form). 1 where they never differ.
    """
    pairs = list(zip(one, other, strict=True))
    wins = sum(a and not b for a, b in pairs)
    losses = sum(b and not a for a, b in pairs)
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**n))


def _sums(columns: Sequence[Sequence[float]], clusters: Sequence[str] | None) -> Floats:
    """Sums per cluster, [columns, clusters], in the order of the clusters' names."""
    values = np.asarray(columns, dtype=np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"columns of shape {values.shape}, expected [columns, questions > 0]")
    if clusters is None:
        return values
    names, member = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    if len(member) != values.shape[1]:
        raise ValueError(f"{len(member)} clusters for {values.shape[1]} questions")
    return np.stack([np.bincount(member, weights=row, minlength=len(names)) for row in values])


def _weights(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of ``n`` units is drawn, [some resamples, n] at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // n)
    for begin in range(0, resamples, step):
        size = min(step, resamples - begin)
        yield rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)


def _ratio(numerators: Floats, denominators: Floats) -> Floats:
    """Not a number where nothing was drawn that the metric speaks of."""
    empty = denominators <= 0
    ratio: Floats = np.where(empty, np.nan, numerators / np.where(empty, 1.0, denominators))
    return ratio


def _limits(drawn: Floats) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn[~np.isnan(drawn)], [tail, 100 - tail])
    return float(low), float(high)
