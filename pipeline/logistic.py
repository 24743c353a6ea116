"""Multinomial logistic regression with a ridge, by gradient descent: fits in a second, the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_RIDGE, _STEPS, _RATE = 1e-2, 600, 0.5


@dataclass(frozen=True)
class Fit:
    """A fitted model. ``weights`` [1 + features, labels]; features are centred by ``mean``, scaled by ``scale``."""

    labels: tuple[str, ...]
    mean: Floats
    scale: Floats
    weights: Floats

    def probabilities(self, rows: Floats) -> Floats:
        """[rows, labels], from features [rows, features]."""
        return _softmax(_with_one((rows - self.mean) / self.scale) @ self.weights)


def fit_labels(rows: Floats, labels: Sequence[str]) -> Fit:
    """The model that tells the labels by the features; the classes weigh as often as they occur.

    Args:
        rows: [examples, features].
        labels: one each.
    """
    names = tuple(sorted(set(labels)))
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    x = _with_one((rows - mean) / scale)
    wanted = np.array([[label == name for name in names] for label in labels], dtype=np.float64)
    weights = np.zeros((x.shape[1], len(names)))
    ridge = np.full((x.shape[1], 1), _RIDGE)
    ridge[0] = 0.0
    for _ in range(_STEPS):
        weights -= _RATE * (x.T @ (_softmax(x @ weights) - wanted) / len(x) + ridge * weights)
    return Fit(names, mean, scale, weights)


def _with_one(rows: Floats) -> Floats:
    return np.concatenate([np.ones((len(rows), 1)), rows], axis=1)


def _softmax(scores: Floats) -> Floats:
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: Floats = shifted / shifted.sum(axis=1, keepdims=True)
    return result
