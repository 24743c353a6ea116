"""How sure is an answer? A logistic model over what serving knows anyway: the calibrated "I don't know".

The weights of its signals (`serve.signals`) are fitted to the
student's answers to seed questions (`pipeline.calibrate`) and travel in the bundle as ``calibration.json``.

A probability alone promises nothing, so the threshold for "at most 5 % wrong" comes from a bound that counts
mistakes: Clopper and Pearson's exact upper limit of the share of wrong answers among those given, as in
selective classification with guaranteed risk (Geifman & El-Yaniv 2017, arXiv 1705.08500). Several thresholds
are tried, so each gets its part of the allowed doubt (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from domains.errors import DataError
from domains.records import Record

DOUBT = 0.1  # the chance that a limit of wrong answers is too low
Floats = npt.NDArray[np.float64]

# -- the model ---------------------------------------------------------------------------------------


def fit_logistic(signals: Floats, right: Sequence[bool], *, l2: float) -> tuple[Floats, float]:
    """Weights and bias that maximise the log-likelihood minus l2/2 |weights|²; the bias is free.

    Newton's method (iteratively reweighted least squares): no step size, no seed, the same result every time.

    Args:
        signals: [answers, signals], standardised.
        right: [answers]; both outcomes must occur.
        l2: strength of the penalty, > 0.
    """
    outcome = np.asarray(right, dtype=np.float64)
    if not 0 < outcome.sum() < len(outcome):
        raise ValueError("a logistic model needs right and wrong answers")
    design = np.column_stack([signals, np.ones(len(outcome))])
    penalty = np.full(design.shape[1], l2)
    penalty[-1] = 0.0
    weights = np.zeros(design.shape[1])
    weights[-1] = math.log(outcome.mean() / (1 - outcome.mean()))
    for _ in range(100):
        expected = sigmoid(design @ weights)
        gradient = design.T @ (outcome - expected) - penalty * weights
        curvature = (design * (expected * (1 - expected) + 1e-12)[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights += step * min(1.0, 5 / (np.abs(step).max() + 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return weights[:-1], float(weights[-1])


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + e^-x) without overflow."""
    halves: Floats = 0.5 * (1 + np.tanh(0.5 * values))
    return halves


# -- how much may be wrong ---------------------------------------------------------------------------


def upper_limit(wrong: int, n: int, *, doubt: float) -> float:
    """Clopper and Pearson's (1934) upper limit of a share of which ``wrong`` in ``n`` were seen.

    The true share exceeds it with a probability of at most ``doubt``.
    """
    if not 0 <= wrong <= n or not 0 < doubt < 1:
        raise ValueError(f"{wrong} of {n}, doubt {doubt}")
    if wrong == n:
        return 1.0
    low, high = wrong / n, 1.0
    for _ in range(60):  # the chance of so few falls as the share grows
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(wrong, n, middle) > doubt else (low, middle)
    return high


def _at_most(k: int, n: int, p: float) -> float:
    """P(X <= k), X binomial."""
    if p <= 0 or p >= 1:
        return float(p <= 0)
    logs = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(p)
        + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    top = max(logs)
    return math.exp(top) * sum(math.exp(value - top) for value in logs)


class Level(Record):
    """What answering only at ``threshold`` or above came to.

    ``coverage`` is the share of the student's answers that are given, ``upper`` the limit that the share of
    wrong ones keeps with the calibration's confidence, at all levels together.
    """

    threshold: float
    coverage: float
    answered: int
    wrong: int
    upper: float


class Choice(Record):
    """The threshold for a bound; ``kept`` is False where no level keeps it and the safest one was taken."""

    level: Level
    kept: bool


class Calibration(Record):
    """``calibration.json``. ``reason`` says why there is no model where ``signals`` is empty.

    ``answers`` were given by the student to seed questions, ``right`` of them right and supported;
    ``abstained`` more it withheld itself. ``trained_on`` counts answers to questions of its training.
    ``sources`` are the sha256 of what was fitted to.
    """

    schema_version: Literal[1] = 1
    reason: str = ""
    signals: list[str] = []
    means: list[float] = []
    scales: list[float] = []
    weights: list[float] = []
    bias: float = 0.0
    l2: float = 0.0
    answers: int = Field(default=0, ge=0)
    right: int = Field(default=0, ge=0)
    abstained: int = Field(default=0, ge=0)
    trained_on: int = Field(default=0, ge=0)
    doubt: float = DOUBT
    levels: list[Level] = []
    facts: dict[str, float] = {}
    sources: dict[str, str] = {}

    def confidence(self, signals: Mapping[str, float]) -> float | None:
        """The probability that the answer with these signals is right and supported; None without a model."""
        if not self.signals:
            return None
        values = np.array(
            [signals.get(name, mean) for name, mean in zip(self.signals, self.means, strict=True)]
        )
        standard = (values - np.array(self.means)) / np.array(self.scales)
        return round(float(sigmoid(standard @ np.array(self.weights) + self.bias)), 6)

    def choose(self, max_wrong: float) -> Choice | None:
        """The level that answers most while at most ``max_wrong`` of its answers are wrong; None without levels.

        Where no level keeps the bound, the one with the lowest limit.
        """
        if not self.levels:
            return None
        kept = [level for level in self.levels if level.upper <= max_wrong]
        if kept:
            return Choice(level=max(kept, key=lambda level: level.answered), kept=True)
        return Choice(level=min(self.levels, key=lambda level: (level.upper, -level.answered)), kept=False)


def risk_levels(
    confidences: Sequence[float], right: Sequence[bool], *, doubt: float, count: int = 10
) -> list[Level]:
    """What answering the surest tenth, two tenths, … of all answers comes to; equal confidences stay together.

    Args:
        confidences: [answers], of a model that did not see the answer.
        right: [answers].
        doubt: the chance that any of the limits is too low.
        count: how many levels.
    """
    n = len(confidences)
    order = np.sort(np.asarray(confidences, dtype=np.float64))[::-1]
    outcome = np.asarray(right, dtype=bool)
    levels: dict[int, Level] = {}
    for step in range(1, count + 1):
        threshold = float(order[max(1, math.ceil(step * n / count)) - 1])
        given = np.asarray(confidences) >= threshold
        answered, wrong = int(given.sum()), int((given & ~outcome).sum())
        upper = upper_limit(wrong, answered, doubt=doubt / count)
        levels[answered] = Level(
            threshold=threshold, coverage=answered / n, answered=answered, wrong=wrong, upper=upper
        )
    return list(levels.values())


def read_calibration(path: Path) -> Calibration:
    """A bundle's calibration.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        detail = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise DataError(
            f"can't read {str(path)!r}: {detail}",
            expected="a calibration of schema version 1",
            next_step="preceptor calibrate DOMAIN",
        ) from None


def describe_choice(choice: Choice, max_wrong: float) -> str:
    """The threshold in plain words: what it keeps, or that nothing does."""
    level = choice.level
    gives = f"it gives {100 * level.coverage:.0f} % of its answers ({level.answered})"
    seen = f"of which {level.wrong} were wrong: at most {100 * level.upper:.0f} % with {100 * (1 - DOUBT):.0f} % confidence"
    if choice.kept:
        return f"At most {100 * max_wrong:g} % wrong: on the development questions {gives}, {seen}."
    return (
        f"At most {100 * max_wrong:g} % wrong can't be promised. At the safest level {gives}, {seen}. "
        "It abstains on all that are less sure."
    )
