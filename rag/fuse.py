"""Weighted reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Fused:
    """One fused item: its score, and its rank (from 1) and own score in each list that names it."""

    item: str
    score: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def fuse(
    rankings: Mapping[str, Sequence[str] | Mapping[str, float]], *, weights: Mapping[str, float], k: int
) -> list[Fused]:
    """All items of the lists, best first: score = Σ weight / (k + rank); ties broken by the item.

    Args:
        rankings: list name to items, best first, none twice; with their own scores, where they are to be kept.
        weights: list name to its weight (not negative).
        k: damps the top ranks; 60 in the paper.
    """
    fused: dict[str, Fused] = {}
    for name, items in rankings.items():
        for rank, item in enumerate(items, start=1):
            entry = fused.setdefault(item, Fused(item))
            entry.score += weights[name] / (k + rank)
            entry.ranks[name] = rank
            if isinstance(items, Mapping):
                entry.scores[name] = items[item]
    return sorted(fused.values(), key=lambda entry: (-entry.score, entry.item))
