"""From development answers to a calibration: weights, cross-validated confidences, and what may be promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.development import Row
from pipeline.selective import calibration_error, measure_selective, reliability
from serve.confidence import DOUBT, Calibration, fit_logistic, risk_levels, sigmoid
from serve.signals import LIKELIHOOD, SIGNALS

L2 = 1.0  # a standard normal prior on the weight of each standardised signal
MIN_OUTCOMES = 8  # right ones and wrong ones that a fit needs at least

Floats = npt.NDArray[np.float64]


def calibrate(
    rows: Sequence[Row], *, folds: int, sources: Mapping[str, str]
) -> tuple[Calibration, list[Row]]:
    """Fit to the given answers; the rows with their cross-validated confidences.

    The levels come from confidences of models that saw no answer about the same documents, else the
    student's knack for those would count as certainty about others.
    """
    given = [row for row in rows if row.given]
    right = [row.right for row in given]
    about = {
        "answers": len(given),
        "right": sum(right),
        "abstained": sum(row.answer is not None and not row.given for row in rows),
        "trained_on": sum(row.trained_on for row in given),
        "sources": dict(sources),
    }
    if min(sum(right), len(right) - sum(right)) < MIN_OUTCOMES:
        reason = f"{sum(right)} right and {len(right) - sum(right)} wrong answers to fit to"
        return Calibration(reason=f"{reason}; at least {MIN_OUTCOMES} of each are needed", **about), list(
            rows
        )
    table = np.array([[row.answer.signals[name] for name in SIGNALS] for row in given if row.answer])
    confidences = _cross_validated(table, right, [row.fold for row in given], folds)
    means, scales = _standard(table)
    weights, bias = fit_logistic((table - means) / scales, right, l2=L2)
    calibration = Calibration(
        signals=list(SIGNALS),
        means=_rounded(means),
        scales=_rounded(scales),
        weights=_rounded(weights),
        bias=round(bias, 8),
        l2=L2,
        doubt=DOUBT,
        levels=risk_levels(confidences, right, doubt=DOUBT),
        facts=_facts(given, right, confidences),
        **about,
    )
    known = iter(confidences)
    return calibration, [
        row.model_copy(update={"confidence": round(next(known), 6)}) if row.given else row for row in rows
    ]


def _cross_validated(table: Floats, right: Sequence[bool], fold: Sequence[int], folds: int) -> list[float]:
    """The confidence of each answer from a model fitted without its fold; the share of right ones where it can't be."""
    outcome, group = np.asarray(right, dtype=bool), np.asarray(fold)
    confidences = np.zeros(len(outcome))
    for number in range(folds):
        out = group == number
        rest = outcome[~out]
        if not out.any():
            continue
        if not 0 < rest.sum() < len(rest):
            confidences[out] = rest.mean() if len(rest) else 0.5
            continue
        means, scales = _standard(table[~out])
        weights, bias = fit_logistic((table[~out] - means) / scales, rest.tolist(), l2=L2)
        confidences[out] = sigmoid((table[out] - means) / scales @ weights + bias)
    return [float(value) for value in confidences]


def _standard(table: Floats) -> tuple[Floats, Floats]:
    """Mean and spread of each signal; 1 for one that never varies, which then weighs nothing."""
    spread = table.std(axis=0)
    return table.mean(axis=0), np.where(spread > 1e-9, spread, 1.0)


def _rounded(values: Floats) -> list[float]:
    return [round(float(value), 8) for value in values]


def _facts(given: Sequence[Row], right: Sequence[bool], confidences: Sequence[float]) -> dict[str, float]:
    """Cross-validated numbers; ``aurc_likelihood`` is what the model's own probability of its answer reaches."""
    own = [row.answer.signals[LIKELIHOOD] for row in given if row.answer]
    fitted, before = (measure_selective(values, right, resamples=0, seed=0) for values in (confidences, own))
    assert fitted is not None
    assert before is not None
    numbers = {
        "aurc": fitted.aurc.mean,
        "aurc_likelihood": before.aurc.mean,
        "aurc_random": fitted.random,
        "aurc_oracle": fitted.oracle,
        "calibration_error": calibration_error(reliability(confidences, right)),
    }
    return {name: round(value, 4) for name, value in numbers.items()}
