"""Frozen linear layers that read the same input, each with its LoRA, as one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.qlora import base_weight, is_plain_lora


@dataclass(frozen=True)
class Lora:
    """A (float32 [rank, in]) and B (float32 [out, rank]) as trained, and the scaling of their product."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class LinearGroup:
    """y = x Wᵀ + s x Aᵀ Bᵀ for the stacked outputs of ``layers``.

    Keeps the layers' own weights, no others: what must be read back from NF4 (or cast) first is read back at every
    use, in the forward and in the backward pass. A group lives from the one to the other, in every layer and every
    pack that runs; kept there, the weights would lie in memory as if they were not quantized, once per pack.

    Args:
        layers: linear layers or LoRA layers around such; see `groupable`.
        dtype: of the arithmetic.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        self.loras = [lora_of(layer) for layer in layers]
        bases = [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers]
        self.sizes = [base.out_features for base in bases]
        self._bases, self._dtype = bases, dtype
        in_memory = all(type(base) is nn.Linear and base.weight.dtype == dtype for base in bases)
        self._weight = _joined(bases) if in_memory else None
        self._stacked = self._stack(dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The layers' weights below each other, [out, in]."""
        if self._weight is not None:
            return self._weight
        if len(self._bases) == 1:
            return base_weight(self._bases[0], self._dtype).detach()
        shape, device = (sum(self.sizes), self._bases[0].in_features), self._bases[0].weight.device
        made = torch.empty(shape, dtype=self._dtype, device=device)
        for part, base in zip(torch.split(made, self.sizes), self._bases, strict=True):
            part.copy_(base_weight(base, self._dtype).detach())  # one at a time: less than all and their copy
        return made

    @property
    def parameters(self) -> list[torch.Tensor]:
        """A and B of every layer that has them."""
        return [matrix for lora in self.loras if lora for matrix in (lora.a, lora.b)]

    def _stack(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All A below each other [ranks, in]; all s B on a block diagonal [out, ranks]."""
        present = [lora for lora in self.loras if lora]
        if not present:
            return None
        a = torch.cat([lora.a.detach() for lora in present]).to(dtype)
        b = a.new_zeros(sum(self.sizes), a.shape[0])
        for lora, rows, columns in self._places():
            torch.mul(lora.b.detach(), lora.scaling, out=b[rows, columns])
        return a, b

    def _places(self) -> list[tuple[Lora, slice, slice]]:
        found, row, column = [], 0, 0
        for lora, size in zip(self.loras, self.sizes, strict=True):
            if lora:
                rank = lora.a.shape[0]
                found.append((lora, slice(row, row + size), slice(column, column + rank)))
                column += rank
            row += size
        return found

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of inputs [tokens, in]: the outputs [tokens, out], and x Aᵀ [tokens, ranks] for the backward pass."""
        y = x @ self.weight.T
        if self._stacked is None:
            return y, None
        a, b = self._stacked
        low = x @ a.T
        return y.addmm_(low, b.T), low

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None, *, need_dx: bool = True
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of x (if needed) and of `parameters`, of ``dy`` [tokens, out]."""
        dx = dy @ self.weight if need_dx else None
        if self._stacked is None or low is None:
            return dx, []
        a, b = self._stacked
        d_low = dy @ b
        if dx is not None:
            dx.addmm_(d_low, a)
        d_a, d_b = d_low.T @ x, dy.T @ low
        grads = []
        for lora, rows, columns in self._places():
            grads.append(d_a[columns].to(lora.a.dtype))
            grads.append(d_b[rows, columns].to(lora.b.dtype).mul_(lora.scaling))
        return dx, grads


def groupable(layer: Any) -> bool:
    """Whether a layer computes what `LinearGroup` does: nothing else acts on its input, weight or output."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if not _is_plain(base) or base.bias is not None:
        return False
    if nn.utils.parametrize.is_parametrized(base) or base.weight.requires_grad:
        return False
    return (layer is base and "forward" not in vars(layer)) or is_plain_lora(layer)


def state_of(layers: Sequence[Any], dtype: torch.dtype) -> object | None:
    """What a `LinearGroup` of ``layers`` was made of: equal while it holds.

    None for layers of another kind; groups of these are made anew at every use.
    """
    found: list[object] = [dtype]
    for layer in layers:
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        if not _is_plain(base):
            return None
        found += [base.weight.data_ptr(), base.weight._version]
        lora = lora_of(layer)
        if lora:
            found += [id(lora.a), lora.a._version, id(lora.b), lora.b._version, lora.scaling]
    return found


def _is_plain(base: Any) -> bool:
    return type(base) is nn.Linear or type(base).__name__ == "Linear4bit"


def lora_of(layer: Any) -> Lora | None:
    """The adapter that acts in a layer now."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return None
    (name,) = layer.active_adapters
    return Lora(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _joined(bases: Sequence[nn.Linear]) -> torch.Tensor:
    """The weights below each other, without a copy from the second time on."""
    weights = [base.weight for base in bases]
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    size = sum(weight.shape[0] for weight in weights)
    place = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != place:
            break
        place += weight.numel() * weight.element_size()
    else:
        if all(weight.is_contiguous() for weight in weights):
            room = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
            if room >= size * first.shape[1]:
                return first.detach().as_strided((size, first.shape[1]), (first.shape[1], 1))
    joined = torch.cat([weight.detach() for weight in weights])
    start = 0
    for base in bases:  # the layers' own weights become parts of the joined one: no memory is lost
        base.weight.data = joined[start : start + base.out_features]
        start += base.out_features
    return joined
