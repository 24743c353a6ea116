"""A linear layer whose adapter lies inside its blocks, and the network made of such layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.grids.blocks import Blocks, Packed
from pipeline.grids.rounding import decode
from pipeline.methods.rules import Rule
from pipeline.one_thread import one_thread


class BlockLinear(nn.Module):
    """y = x Ŵᵀ, Ŵ being what the blocks decode to; ``a`` and ``b`` are trained through `Rule.gradients`.

    Ŵ is made anew when the adapter has changed, so once per optimizer step and not once per pack. It is kept in the
    arithmetic's type; the blocks are float16 scales and codes whatever that is.

    Args:
        rule: how the adapter moves the blocks.
        rank: of the adapter.
        scaling: of B A.
        dtype: of the arithmetic.
        device: of the adapter.
    """

    def __init__(
        self, rule: Rule, *, rank: int, scaling: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.rule, self.scaling, self.dtype, self.enabled = rule, scaling, dtype, True
        self.out_features = rule.rows
        self.a = nn.Parameter(torch.empty(rank, rule.width, device=device))
        self.b = nn.Parameter(torch.zeros(rule.rows, rank, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # LoRA's own
        self._made: tuple[tuple[int, int, bool], torch.Tensor] | None = None

    def blocks(self) -> Blocks:
        """The blocks as they are now: what the next forward pass computes with, and what is exported."""
        with torch.no_grad():
            delta = (self.b @ self.a * self.scaling).cpu()  # where the base's blocks lie
            return self.rule.blocks(delta if self.enabled else torch.zeros_like(delta))

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] in the arithmetic's type; no gradient goes here."""
        state = (self.a._version, self.b._version, self.enabled)
        made = self._made  # once: another thread may set it meanwhile
        if made is None or made[0] != state:
            self._made = made = None  # the old one goes before the new one is made
            with one_thread():
                made = (state, decode(self.blocks()).to(self.b.device, self.dtype))
            self._made = made
        return made[1]

    def gradients(self, dy: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``a`` and ``b``, of ``dy`` [tokens, out]; ``kept`` is `Rule.keep` of the input."""
        d_a, d_b = self.rule.gradients(dy, kept, self.a.detach(), self.b.detach())
        return d_a.to(self.a.dtype).mul_(self.scaling), d_b.to(self.b.dtype).mul_(self.scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of inputs [..., in]."""
        result: torch.Tensor = _Through.apply(x, self.a, self.b, self)  # type: ignore[no-untyped-call]
        return result


class _Through(torch.autograd.Function):
    """Straight through the rounding; no gradient of the weight's size is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, _a: torch.Tensor, _b: torch.Tensor, layer: BlockLinear
    ) -> torch.Tensor:
        weight = layer.weight
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(layer.rule.keep(flat))
        ctx.weight, ctx.layer = weight, layer
        return (flat @ weight.T).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        (kept,) = ctx.saved_tensors
        d_a, d_b = ctx.layer.gradients(dy, kept)
        return (dy @ ctx.weight).view(*grads[0].shape[:-1], -1), d_a, d_b, None


class BlockNetwork(nn.Module):
    """A ``LlamaForCausalLM`` whose block layers are `BlockLinear`; nothing else in it is trained.

    ``fixed`` are the other matrices as the served file will hold them: embedding, head, and frozen layers.
    """

    def __init__(self, network: Any, fixed: Mapping[str, Packed]) -> None:
        super().__init__()
        self.network, self.fixed = network, fixed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's."""
        return self.network(*args, **kwargs)

    def get_base_model(self) -> Any:
        """The network inside."""
        return self.network

    def linears(self) -> Iterator[tuple[str, BlockLinear]]:
        """The adapted layers by parameter name."""
        for path, module in self.network.named_modules():
            if isinstance(module, BlockLinear):
                yield f"{path}.weight", module

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A while without the adapter: the base's own blocks."""
        layers = [layer for _, layer in self.linears()]
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.enabled = True
