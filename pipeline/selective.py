"""What would the answers be worth if the least certain ones were refused? Risk, coverage, calibration.

Answers are sorted by confidence, the surest first. The coverage is the share of answers that are given, the risk
the share of wrong ones among those given. AURC is the mean risk over all coverages 1/n, 2/n, … 1 (Geifman,
Uziel & El-Yaniv 2019, arXiv 1805.08206): 0 is perfect, the error rate is what a confidence without any
information reaches, and an oracle that puts every right answer before every wrong one sets the lower limit. The
excess over that limit (E-AURC) is what the confidence itself costs. Where confidences are equal, the expected
risk over all orders counts, so that no order has to be made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.bootstrap import LEVEL, Interval

Floats = npt.NDArray[np.float64]

BINS = 5  # of the reliability diagram; with a few dozen answers more would be empty


@dataclass(frozen=True)
class Selective:
    """The worth of a confidence.

    ``random`` and ``oracle`` are the AURC of an uninformed and of a perfect confidence for the same answers;
    ``excess`` is ``aurc`` minus ``oracle``. ``wrong_at`` maps "0.67" to the share of wrong answers where the surest
    two thirds are given.
    """

    answers: int
    right: int
    aurc: Interval
    excess: float
    random: float
    oracle: float
    wrong_at: dict[str, float]


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence: the mean of it, and the share that was right."""

    confidence: float
    right: float
    answers: int


def risk_coverage(confidences: Sequence[float], right: Sequence[bool]) -> Floats:
    """The expected share of wrong ones among the surest 1, 2, … n answers, [answers]."""
    confidence, wrong = np.asarray(confidences, dtype=np.float64), ~np.asarray(right, dtype=bool)
    if confidence.shape != wrong.shape or confidence.ndim != 1 or not len(confidence):
        raise ValueError(
            f"{confidence.shape} confidences, {wrong.shape} outcomes: expected one each, at least one"
        )
    _, group, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    share = np.bincount(group, weights=wrong) / size
    curve: Floats = np.cumsum(np.repeat(share, size)) / np.arange(1, len(wrong) + 1)
    return curve


def aurc(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """The area under the risk-coverage curve, in [0, 1]; lower is better."""
    return float(risk_coverage(confidences, right).mean())


def oracle_aurc(right: int, n: int) -> float:
    """The AURC of ``n`` answers, ``right`` of them right, all of which are surer than the wrong ones."""
    return sum((i - right) / i for i in range(right + 1, n + 1)) / n


def measure_selective(
    confidences: Sequence[float],
    right: Sequence[bool],
    *,
    clusters: Sequence[str] | None = None,
    resamples: int,
    seed: int,
) -> Selective | None:
    """All numbers of a confidence, or None without answers.

    Args:
        confidences: [answers]; only their order counts.
        right: [answers].
        clusters: [answers], whose members are drawn together (questions about one document); None draws
            single answers.
        resamples: bootstrap samples of the interval; 0 leaves it without a width.
        seed: of the bootstrap.
    """
    n = len(right)
    if not n:
        return None
    curve = risk_coverage(confidences, right)
    value, count = float(curve.mean()), int(sum(right))
    oracle = oracle_aurc(count, n)
    low, high = _interval(confidences, right, clusters, resamples, seed) if resamples else (value, value)
    return Selective(
        answers=n,
        right=count,
        aurc=Interval(value, low, high),
        excess=value - oracle,
        random=1 - count / n,
        oracle=oracle,
        wrong_at={
            f"{share:g}": float(curve[max(1, round(share * n)) - 1]) for share in (0.33, 0.5, 0.67, 1.0)
        },
    )


def _interval(
    confidences: Sequence[float],
    right: Sequence[bool],
    clusters: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % percentile bootstrap; a cluster's answers are drawn together."""
    confidence, outcome = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=bool)
    names = np.arange(len(outcome)) if clusters is None else np.asarray(clusters)
    _, member = np.unique(names, return_inverse=True)
    groups = [np.flatnonzero(member == i) for i in range(member.max() + 1)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        picked = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        drawn.append(aurc(confidence[picked].tolist(), outcome[picked].tolist()))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def reliability(confidences: Sequence[float], right: Sequence[bool], *, bins: int = BINS) -> list[Bin]:
    """Answers in bins of equal number, the least sure first; equal confidences stay together."""
    order = np.argsort(np.asarray(confidences, dtype=np.float64), kind="stable")
    values, outcome = (
        np.asarray(confidences, dtype=np.float64)[order],
        np.asarray(right, dtype=np.float64)[order],
    )
    edges = [0]
    for step in range(1, bins + 1):
        edge = round(step * len(values) / bins)
        while 0 < edge < len(values) and values[edge] == values[edge - 1]:
            edge += 1
        if edge > edges[-1]:
            edges.append(edge)
    return [Bin(float(values[a:b].mean()), float(outcome[a:b].mean()), b - a) for a, b in pairwise(edges)]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error (Naeini et al. 2015): how far confidence and share of right answers lie apart."""
    n = sum(item.answers for item in bins)
    return sum(item.answers * abs(item.confidence - item.right) for item in bins) / n if n else 0.0
