"""Layers whose adapter lies inside their blocks, as `pipeline.fused_layer` wants its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.linear_group import LinearGroup
from pipeline.linear_group import groupable as groupable_linear
from pipeline.methods.block_linear import BlockLinear


class BlockGroup:
    """The stacked outputs of several `BlockLinear` that read the same input; see `LinearGroup`."""

    def __init__(self, layers: Sequence[BlockLinear]) -> None:
        self.layers = layers
        self.weights = [layer.weight for layer in layers]
        self.sizes = [layer.out_features for layer in layers]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """A and B of every layer."""
        return [matrix for layer in self.layers for matrix in (layer.a, layer.b)]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Of inputs [tokens, in]: the outputs [tokens, out]; nothing else is needed for the backward pass."""
        parts = [x @ weight.T for weight in self.weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        low: torch.Tensor | None,  # noqa: ARG002
        *,
        need_dx: bool = True,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of x (if needed) and of `parameters`, of ``dy`` [tokens, out]."""
        dx: torch.Tensor | None = None
        grads: list[torch.Tensor] = []
        for layer, weight, part in zip(
            self.layers, self.weights, torch.split(dy, self.sizes, dim=1), strict=True
        ):
            if need_dx:
                dx = part @ weight if dx is None else dx.addmm_(part, weight)
            grads += layer.gradients(part, layer.rule.keep(x))
        return dx, grads


def group_of(layers: Sequence[Any], dtype: torch.dtype) -> LinearGroup | BlockGroup:
    """The group of layers that are all of one kind; see `groupable`."""
    if all(isinstance(layer, BlockLinear) for layer in layers):
        return BlockGroup(layers)
    return LinearGroup(layers, dtype)


def groupable(layers: Sequence[Any]) -> bool:
    """Whether all layers compute what a group does."""
    if all(isinstance(layer, BlockLinear) for layer in layers):
        return True
    return all(layer is not None and groupable_linear(layer) for layer in layers)
