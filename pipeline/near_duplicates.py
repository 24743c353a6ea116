"""Near-duplicates by word 3-grams: exact Jaccard similarity, with prefix filtering to stay fast.

Two sets with Jaccard similarity of at least t share one of their |x| - ⌈t·|x|⌉ + 1 rarest members
(Bayardo, Ma, Srikant 2007), so only those are looked up: nothing is missed, unlike with MinHash.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from rag.words import words

Gram = tuple[str, ...]


def grams(text: str, *, size: int = 3) -> frozenset[Gram]:
    """The distinct word n-grams of ``text``; a shorter text is one gram as a whole, an empty one none."""
    tokens = words(text)
    if len(tokens) < size:
        return frozenset({tuple(tokens)} if tokens else ())
    return frozenset(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))


def jaccard(first: frozenset[Gram], second: frozenset[Gram]) -> float:
    """Size of the intersection over size of the union, in [0, 1]; 0 where both are empty."""
    union = len(first | second)
    return len(first & second) / union if union else 0.0


class NearDuplicates:
    """Texts that were accepted so far, asked for one that nearly equals a new one.

    Args:
        corpus: gram sets that show which grams are rare (all texts that may come, or a part of them).
        threshold: Jaccard similarity from which two texts count as near-duplicates, in [0, 1].
    """

    def __init__(self, corpus: Sequence[frozenset[Gram]], *, threshold: float) -> None:
        self._threshold = threshold
        self._frequency = Counter(gram for item in corpus for gram in item)
        self._holders: defaultdict[Gram, list[int]] = defaultdict(list)
        self._items: list[frozenset[Gram]] = []

    def find(self, item: frozenset[Gram]) -> int | None:
        """The number (in order of `add`) of the most similar text at or above the threshold, or None."""
        candidates = {number for gram in self._prefix(item) for number in self._holders.get(gram, ())}
        scored = [(jaccard(item, self._items[number]), -number) for number in candidates]
        best, number = max(scored, default=(0.0, 0))
        return -number if scored and best >= self._threshold else None

    def add(self, item: frozenset[Gram]) -> None:
        """Accept a text: later ones are compared with it."""
        for gram in self._prefix(item):
            self._holders[gram].append(len(self._items))
        self._items.append(item)

    def _prefix(self, item: frozenset[Gram]) -> list[Gram]:
        length = len(item) - math.ceil(self._threshold * len(item) - 1e-9) + 1
        return sorted(item, key=lambda gram: (self._frequency[gram], gram))[: max(length, 1)]


def near_duplicates(texts: Sequence[str], *, threshold: float) -> dict[int, int]:
    """Which texts nearly equal an earlier one that was kept: index → index of the kept text."""
    sets = [grams(text) for text in texts]
    seen = NearDuplicates(sets, threshold=threshold)
    kept: list[int] = []
    duplicates: dict[int, int] = {}
    for index, item in enumerate(sets):
        twin = seen.find(item)
        if twin is None:
            seen.add(item)
            kept.append(index)
        else:
            duplicates[index] = kept[twin]
    return duplicates
