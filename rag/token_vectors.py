"""Compressed token vectors of passages in eight bits, and the late interaction with a query's (ColBERT, arXiv 2004.12832)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TokenVectors:
    """Vectors of all tokens of some passages; a token's vector is ``codes`` times its ``scale``.

    ``codes`` int8 [tokens, dimensions], ``scales`` float16 [tokens], ``offsets`` int64 [passages + 1]: passage i has
    the tokens from ``offsets[i]`` up to ``offsets[i + 1]``, at least one.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    offsets: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Number of passages."""
        return len(self.offsets) - 1

    @property
    def size_bytes(self) -> int:
        """What the arrays take."""
        return self.codes.nbytes + self.scales.nbytes + self.offsets.nbytes

    def decode(self, passage: int) -> Floats:
        """A passage's vectors, [tokens, dimensions]."""
        span = slice(int(self.offsets[passage]), int(self.offsets[passage + 1]))
        decoded: Floats = self.codes[span].astype(np.float32) * self.scales[span, None].astype(np.float32)
        return decoded

    def late_interaction(self, query: Floats, passages: Sequence[int]) -> Floats:
        """Σ_i max_j <q_i, d_j> for each of the passages, [passages].

        Args:
            query: [query tokens, dimensions].
            passages: numbers of passages.
        """
        if not passages:
            return np.zeros(0, dtype=np.float32)
        spans = [slice(int(self.offsets[i]), int(self.offsets[i + 1])) for i in passages]
        codes = np.concatenate([self.codes[span] for span in spans]).astype(np.float32)
        products = query @ codes.T  # [query tokens, passage tokens]
        products *= np.concatenate([self.scales[span] for span in spans]).astype(np.float32)
        starts = np.cumsum([0, *(span.stop - span.start for span in spans[:-1])])
        scores: Floats = np.maximum.reduceat(products, starts, axis=1).sum(axis=0)
        return scores

    def joined(self, other: TokenVectors) -> TokenVectors:
        """These passages, then the other's."""
        return TokenVectors(
            codes=np.concatenate([self.codes, other.codes]),
            scales=np.concatenate([self.scales, other.scales]),
            offsets=np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]),
        )


def quantize(vectors: Sequence[Floats], *, dimensions: int) -> TokenVectors:
    """Eight bits a number, one scale a token: off by at most half a step, 1/254 of the token's largest number.

    Args:
        vectors: a passage each, [tokens, dimensions].
        dimensions: needed where there is no passage.
    """
    flat = np.concatenate([np.zeros((0, dimensions), dtype=np.float32), *vectors])
    # float16 may round the scale down: then the largest number would not fit.
    scales = np.nextafter((np.abs(flat).max(axis=1, initial=0) / 127).astype(np.float16), np.float16(np.inf))
    codes = np.rint(flat / scales[:, None].astype(np.float32)).astype(np.int8)
    offsets = np.cumsum([0, *(len(tokens) for tokens in vectors)], dtype=np.int64)
    return TokenVectors(codes=codes, scales=scales, offsets=offsets)
