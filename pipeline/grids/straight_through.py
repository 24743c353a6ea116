"""Rounding inside training: the forward pass computes with the served numbers, gradients pass unchanged.

The straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432): a block's scale counts as a constant.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.grids.blocks import GridName
from pipeline.grids.rounding import through


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, weight: torch.Tensor, grid: GridName) -> torch.Tensor:
        return through(weight, grid).to(weight.dtype)

    @staticmethod
    def backward(_context: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, values: torch.Tensor) -> torch.Tensor:
        return values.half().to(values.dtype)

    @staticmethod
    def backward(_context: Any, *gradients: Any) -> Any:
        return gradients[0]


def fake_quantize(weight: torch.Tensor, grid: GridName) -> torch.Tensor:
    """``decode(encode(weight))``, exactly what the exported blocks stand for; gradient of the identity.

    Give it the whole effective weight (base + adapter), in float32: bfloat16 can't hold all of the grid's
    numbers, and rounding base and adapter apart is not what a merged file holds.
    """
    return _OnGrid.apply(weight, grid)  # type: ignore[no-any-return,no-untyped-call]


def round_scales(values: torch.Tensor) -> torch.Tensor:
    """Scales or offsets as float16 holds them, in their own dtype; gradient of the identity."""
    return _Half.apply(values)  # type: ignore[no-any-return,no-untyped-call]
