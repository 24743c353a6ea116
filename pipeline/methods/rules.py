"""How a low-rank adapter moves the blocks of one matrix: three rules, each with its backward pass.

``delta`` is scaling · B A, float32 [out, width]. Every rule is followed exactly by the served file: the forward pass
multiplies with the numbers that the blocks decode to, in training's arithmetic (a bfloat16 copy of them where that is
bfloat16). Rounding is straight-through: its gradient is that of the identity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from domains.routes import Grid
from pipeline.grids.blocks import BLOCK, Blocks, check_scales
from pipeline.grids.rounding import decode, encode

Gradients = tuple[torch.Tensor, torch.Tensor]


class Rule(Protocol):
    """From an adapter to blocks. ``width`` is the number of columns of A."""

    @property
    def width(self) -> int:
        """Columns of the adapter's A."""

    @property
    def rows(self) -> int:
        """Rows of the matrix, and of B."""

    def blocks(self, delta: torch.Tensor) -> Blocks:
        """The matrix with the adapter in it; ``delta`` is [rows, width]."""

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """What the backward pass needs of the input x [tokens, in]."""

    def gradients(self, dy: torch.Tensor, kept: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Gradients:
        """Of A and B, before the scaling; dy is [tokens, out], ``kept`` is `keep` of the input."""


def _low_rank(dy: torch.Tensor, features: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Gradients:
    """Gradients of B A features, without the dense [out, width] between them."""
    d_low = dy @ b.to(dy.dtype)
    low = features @ a.to(features.dtype).T
    return d_low.T @ features, dy.T @ low


@dataclass(frozen=True)
class Minima:
    """QA-LoRA (arXiv 2309.14717) on Q4_1: m' = f16(m + κ delta) with κ = 1/32; scales and codes stay.

    The same as base plus adapter on the means of 32 inputs: y = x Ŵᵀ + s · mean32(x) Aᵀ Bᵀ. (PEFT's own variant
    multiplies with in/32 besides, and can't be merged.)
    """

    base: Blocks

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.base.codes.shape[0]

    @property
    def width(self) -> int:
        """Blocks in a row."""
        return self.base.d.shape[1]

    def blocks(self, delta: torch.Tensor) -> Blocks:
        """Only the minima differ from the base's."""
        assert self.base.m is not None
        m = (self.base.m.float() + delta / BLOCK).half()
        check_scales(self.base.d, m)
        return replace(self.base, m=m)

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in / 32]: a thirty-second of what LoRA has to keep."""
        return x.view(x.shape[0], -1, BLOCK).mean(-1)

    def gradients(self, dy: torch.Tensor, kept: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Gradients:
        """LoRA's, with pooled inputs."""
        return _low_rank(dy, kept, a, b)


@dataclass(frozen=True)
class Scales:
    """The multiplicative form on Q4_0, which has no minimum: d' = f16(d (1 + delta)); codes stay.

    (Group-wise scales as in PEQA, arXiv 2305.14152, but of low rank.)
    """

    base: Blocks

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.base.codes.shape[0]

    @property
    def width(self) -> int:
        """Blocks in a row."""
        return self.base.d.shape[1]

    def blocks(self, delta: torch.Tensor) -> Blocks:
        """Only the scales differ from the base's."""
        d = (self.base.d.float() * (1 + delta)).half()
        check_scales(d)
        return replace(self.base, d=d)

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return x

    def gradients(self, dy: torch.Tensor, kept: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Gradients:
        """Through the whole weight's gradient: each block's is its inner product with the base's block.

        That product is no low-rank one, so one matrix of the weight's size lives for the length of this call.
        """
        dense = (dy.T @ kept).float() * decode(self.base).to(dy.device)
        of_delta = dense.view(*self.base.d.shape, BLOCK).sum(-1)
        return b.T @ of_delta, of_delta @ a.T


@dataclass(frozen=True)
class Rounded:
    """Quantization-aware training: Ŵ = round(W + delta) on the grid, with ggml's own rounding.

    Rounding the sum is what survives in a file; rounded base plus adapter is another network (spec of
    LoRA-QAT recipes: they serve the adapter beside it).
    """

    weight: torch.Tensor  # float32: a narrower one would lose updates below half a step of its own
    grid: Grid

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.weight.shape[1]

    def blocks(self, delta: torch.Tensor) -> Blocks:
        """Everything may differ from the base's."""
        return encode(self.weight + delta, self.grid)

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return x

    def gradients(self, dy: torch.Tensor, kept: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Gradients:
        """LoRA's: straight through the rounding."""
        return _low_rank(dy, kept, a, b)
