"""Trains what a rounded network has left to train: block scales and norms, its codes frozen.

A Q4_0 matrix keeps one float16 number for every 32 weights, and norms are float32 in the file. Both are tuned end to end on
the KL to the full-precision network (the second phase of EfficientQAT, arXiv 2407.11062, with ggml's grids and
a teacher). The forward pass computes with scales as float16 holds them, so the tuned network is the served one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domains.errors import ModelError
from pipeline.grids import BLOCK, Blocks, decode, decode_values, round_scales
from pipeline.next_token_kl import next_token_kl

if TYPE_CHECKING:
    import torch

_WARM_UP = 0.1  # share of the steps


def tune_scales(
    network: Any,
    reference: Any,
    rounded: Mapping[str, Blocks],
    batches: Sequence[torch.Tensor],
    *,
    steps: int,
    learning_rate: float = 2e-3,
    norms: bool = True,
    bfloat16: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Blocks]:
    """Better scales for the same codes; the network's weights (and norms) become the tuned ones.

    Args:
        network: a ``LlamaForCausalLM`` in float32 whose weights are ``rounded`` decoded.
        reference: the full-precision network; its basis may differ (rotated or not).
        rounded: parameter name → blocks, of `pipeline.gptq.collect_and_round`.
        batches: token ids [rows, length]; one a step, over and over.
        steps: of Adam.
        learning_rate: relative to each number's own size; falls to 0 along a cosine.
        norms: tune the norms' gains too.
        bfloat16: multiply matrices in bfloat16, for CPUs where that is fast.
        on_step: called with the number of finished steps and the loss before the last of them.

    Raises:
        ModelError: there is no text, or the loss is no number.
    """
    import torch

    if not batches:
        raise ModelError(
            "there is no text to tune scales on",
            expected="at least one batch of token ids",
            next_step="preceptor curate DOMAIN",
        )
    layers = {name: _Layer.of(network, name, blocks) for name, blocks in rounded.items()}
    gains = _gains(network) if norms else []
    frozen = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.requires_grad_(requires_grad=False)
    masters = [scale for layer in layers.values() for scale in layer.masters()]
    optimizer = torch.optim.Adam(
        [*masters, *(gain.factor for gain in gains)], betas=(0.9, 0.95), foreach=True
    )
    try:
        with _tuning(layers.values(), gains), torch.enable_grad():
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * _schedule(step, steps)
                loss = _loss(network, reference, batches[step % len(batches)], bfloat16=bfloat16)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                _report(step, float(loss.detach()), on_step)
    finally:
        for parameter, required in frozen:
            parameter.requires_grad_(required)
    with torch.no_grad():
        for gain in gains:
            gain.norm.weight.copy_(gain.norm.weight * gain.factor)
        return {name: layer.finish() for name, layer in layers.items()}


def _schedule(step: int, steps: int) -> float:
    warm = max(1, round(_WARM_UP * steps))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _report(step: int, loss: float, on_step: Callable[[int, float], None] | None) -> None:
    if not math.isfinite(loss):
        raise ModelError(
            f"tuning the scales diverged: the loss of step {step + 1} is {loss}",
            expected="a finite KL",
            next_step="use a lower learning rate",
        )
    if on_step:
        on_step(step + 1, loss)


def _loss(network: Any, reference: Any, ids: torch.Tensor, *, bfloat16: bool) -> torch.Tensor:
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        with torch.no_grad():
            target = reference.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = network.model(input_ids=ids, use_cache=False).last_hidden_state
        return next_token_kl(reference.lm_head, target, network.lm_head, hidden)


@dataclass(frozen=True)
class _Gain:
    """One norm; its gains are multiplied by a trained factor."""

    norm: Any
    factor: torch.Tensor


def _gains(network: Any) -> list[_Gain]:
    import torch

    norms = [network.model.norm]
    for layer in network.model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    return [_Gain(norm, torch.ones_like(norm.weight).requires_grad_()) for norm in norms]


@dataclass(frozen=True)
class _Layer:
    """One linear layer: frozen steps, trained scales as factors of what GPTQ chose."""

    linear: Any
    blocks: Blocks
    steps: torch.Tensor  # bfloat16 [out, in / 32, 32]; whole numbers, held exactly
    scale: torch.Tensor
    offset: torch.Tensor | None

    @classmethod
    def of(cls, network: Any, name: str, blocks: Blocks) -> _Layer:
        import torch

        linear = network.get_submodule(name.removesuffix(".weight"))
        one = torch.ones((), dtype=torch.float16)
        steps = decode_values(blocks.codes, one, None, blocks.grid).to(torch.bfloat16)
        offset = (
            None if blocks.m is None else torch.zeros_like(blocks.m, dtype=torch.float32).requires_grad_()
        )
        scale = torch.ones_like(blocks.d, dtype=torch.float32).requires_grad_()
        return cls(linear, blocks, steps.reshape(*blocks.d.shape, BLOCK), scale, offset)

    def masters(self) -> list[torch.Tensor]:
        return [self.scale] if self.offset is None else [self.scale, self.offset]

    def d(self) -> torch.Tensor:
        return round_scales(self.blocks.d.float() * self.scale)

    def m(self) -> torch.Tensor | None:
        if self.blocks.m is None or self.offset is None:
            return None
        # An offset may be near 0 itself: it moves by shares of its block's step.
        return round_scales(self.blocks.m.float() + self.blocks.d.float() * self.offset)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        import torch

        weight, m = self.steps * self.d()[..., None], self.m()
        if m is not None:
            weight = weight + m[..., None]
        return torch.nn.functional.linear(inputs, weight.flatten(1), self.linear.bias)

    def finish(self) -> Blocks:
        m = self.m()
        tuned = Blocks(
            self.blocks.grid,
            self.blocks.codes,
            self.d().detach().half(),
            None if m is None else m.detach().half(),
        )
        self.linear.weight.copy_(decode(tuned))
        return tuned


@contextmanager
def _tuning(layers: Any, gains: Sequence[_Gain]) -> Iterator[None]:
    """Linear layers and norms compute with the trained numbers."""
    handles = [
        gain.norm.register_forward_hook(lambda _m, _i, out, factor=gain.factor: out * factor)
        for gain in gains
    ]
    for layer in layers:
        layer.linear.forward = layer.forward
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            del layer.linear.forward
