"""Self-RAG's scores as pure functions of log-probabilities (arXiv 2310.11511 §3.3, eq. 3 and 4).

Everything comes from natural-log probabilities of the few ids that matter; groups are normalised by logsumexp. The
released code compared raw log-probabilities in the decision to retrieve, which inverts the test: here probabilities
are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Weight of [Utility:1] … [Utility:5], and of fully / partially / not supported.
UTILITY_WEIGHTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
SUPPORT_WEIGHTS = (1.0, 0.5, 0.0)
RELEVANCE_WEIGHTS = (1.0, 0.0)
# What a group counts where the model said nothing of it.
NEUTRAL = {"relevance": 0.5, "support": 0.0, "utility": 0.0}


@dataclass(frozen=True)
class Weights:
    """Of the parts of a segment's score; the paper's defaults (sequence: not used)."""

    relevance: float = 1.0
    support: float = 1.0
    utility: float = 0.5
    sequence: float = 0.0


@dataclass(frozen=True)
class Parts:
    """What a segment's score is made of; None where the group is missing (then it counts as `NEUTRAL`).

    ``relevance`` and ``support`` in [0, 1], ``utility`` in [-1, 1], ``sequence`` in (0, 1].
    """

    relevance: float | None
    support: float | None
    utility: float | None
    sequence: float | None


def logsumexp(values: Sequence[float]) -> float:
    """The logarithm of Σ exp(v), -inf for nothing but -inf; no overflow."""
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(sum(math.exp(value - top) for value in values))


def group_mean(log_probs: Sequence[float], weights: Sequence[float]) -> float | None:
    """Σ w·p / Σ p over a group of ids, from their log-probabilities; None where the whole group is missing.

    Args:
        log_probs: one per id, -inf for an id that was not seen.
        weights: one per id.
    """
    total = logsumexp(log_probs)
    if total == -math.inf or math.isnan(total):
        return None
    return sum(w * math.exp(value - total) for w, value in zip(weights, log_probs, strict=True))


def p_retrieve(log_retrieve: float, log_no_retrieval: float) -> float | None:
    """p([Retrieval]) / (p([Retrieval]) + p([No Retrieval])); None where both are missing."""
    return group_mean((log_retrieve, log_no_retrieval), (1.0, 0.0))


def wants_retrieval(probability: float | None, threshold: float) -> bool:
    """Whether to retrieve; a model that says nothing of it is given evidence."""
    return probability is None or probability > threshold


def sequence_score(taken: Sequence[float]) -> float | None:
    """exp(mean log-probability of the tokens taken): their geometric mean; None for no token."""
    return math.exp(sum(taken) / len(taken)) if taken else None


def segment_score(parts: Parts, weights: Weights) -> float:
    """w_rel·rel + w_sup·sup + w_use·use + w_seq·seq, missing groups neutral."""
    return (
        weights.relevance * _or_neutral(parts.relevance, "relevance")
        + weights.support * _or_neutral(parts.support, "support")
        + weights.utility * _or_neutral(parts.utility, "utility")
        + weights.sequence * (parts.sequence or 0.0)
    )


def _or_neutral(value: float | None, group: str) -> float:
    return NEUTRAL[group] if value is None else value


def mean_score(scores: Sequence[float]) -> float:
    """Of a hypothesis: the mean of its segments' scores. A sum would favour length.

    Only the last segment has a utility, which so counts the less the more segments there are.
    """
    return sum(scores) / len(scores) if scores else -math.inf


def first_of(tokens: Sequence[int], group: Sequence[int]) -> int | None:
    """The first position whose token is one of the group."""
    members = frozenset(group)
    return next((at for at, token in enumerate(tokens) if token in members), None)


def vote(keys: Sequence[str | None], scores: Sequence[float]) -> str | None:
    """The answer with the largest sum of scores over its candidates; the first of equals; None without answers.

    Candidates whose answer could not be read (None) have no vote.
    """
    sums: dict[str, float] = {}
    for key, score in zip(keys, scores, strict=True):
        if key is not None:
            sums[key] = sums.get(key, 0.0) + score
    return max(sums, key=lambda key: sums[key]) if sums else None


def may_win(unsupported: Sequence[bool], silent: Sequence[bool], *, drop_unsupported: bool) -> list[int]:
    """The places of the candidates that compete.

    Args:
        unsupported: which were judged to contradict their passages.
        silent: which say nothing. Nothing written has nothing to be judged wrong by, and would win over answers that
            have: these compete only among themselves.
        drop_unsupported: leave the unsupported ones out.
    """
    allowed = [at for at, each in enumerate(unsupported) if not (drop_unsupported and each)]
    return [at for at in allowed if not silent[at]] or allowed


def best(keys: Sequence[str | None], scores: Sequence[float], *, closed: bool) -> int:
    """The candidate that wins: of the answer with most votes (closed) or of all, the best score; first of equals.

    Args:
        keys: the closed answer that each candidate gives.
        scores: one per candidate, at least one.
        closed: whether identical answers sum their scores.
    """
    chosen = vote(keys, scores) if closed else None
    places = [at for at in range(len(scores)) if chosen is None or keys[at] == chosen]
    return max(places, key=lambda at: scores[at])
