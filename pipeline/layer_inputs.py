"""What reaches each linear layer of a network on calibration text, one decoder layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from domains.errors import ModelError

if TYPE_CHECKING:
    import torch


class _Stop(Exception):
    """Ends a forward pass once the first layer's inputs are known."""


class Stream:
    """The residual stream of all calibration batches, and what attention needs beside it."""

    def __init__(self, network: Any, batches: Sequence[torch.Tensor]) -> None:
        self.hidden: list[torch.Tensor] = []
        self.arguments: list[dict[str, Any]] = []
        handle = network.model.layers[0].register_forward_pre_hook(self._take, with_kwargs=True)
        try:
            for batch in batches:
                try:
                    network.model(input_ids=batch, use_cache=False)
                except _Stop:
                    continue
        finally:
            handle.remove()
        if not self.hidden:
            raise ModelError(
                "there is no calibration text",
                expected="at least one batch of token ids",
                next_step="preceptor curate DOMAIN",
            )

    def fork(self) -> Stream:
        """The same stream, which can go through other layers from here."""
        other = copy.copy(self)
        other.hidden = list(self.hidden)
        return other

    def _take(self, _layer: Any, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        given = dict(arguments)
        self.hidden.append(inputs[0] if inputs else given.pop("hidden_states"))
        self.arguments.append(given)
        raise _Stop


def attended(layer: Any, stream: Stream) -> Iterator[torch.Tensor]:
    """What reaches ``o_proj``, batch by batch."""
    caught: list[torch.Tensor] = []
    handle = layer.self_attn.o_proj.register_forward_pre_hook(
        lambda _module, inputs: caught.append(inputs[0])
    )
    try:
        for rows, arguments in zip(stream.hidden, stream.arguments, strict=True):
            layer.self_attn(hidden_states=layer.input_layernorm(rows), **arguments)
            yield caught.pop()
    finally:
        handle.remove()


def activated(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """What reaches ``down_proj``."""
    mlp, normed = layer.mlp, layer.post_attention_layernorm(rows)
    activated: torch.Tensor = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    return activated


class Moments:
    """E[y xᵀ] over tokens, float64 [in, in]: products in float32 per batch, summed in float64; ``count`` tokens."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self.count = 0

    def add(self, rows: torch.Tensor, other: torch.Tensor | None = None) -> None:
        """Count a batch of x [..., in]; y is x itself unless ``other`` is given."""
        flat = rows.reshape(-1, rows.shape[-1])
        left = flat if other is None else other.reshape(-1, other.shape[-1])
        product = (left.T @ flat).double()
        self._total = product if self._total is None else self._total.add_(product)
        self.count += len(flat)

    def mean(self) -> torch.Tensor:
        """Of all that was added."""
        assert self._total is not None
        return self._total / self.count


def second_moments(inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """`Moments` of all batches."""
    moments = Moments()
    for rows in inputs:
        moments.add(rows)
    return moments.mean()
