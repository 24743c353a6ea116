"""Learns the rotations R1 and R2 (SpinQuant, arXiv 2405.16406), from signed Hadamard matrices on.

Three losses. ``kl`` and ``ce`` run the network with its weights rounded on the fly; they fit what is then rounded
without error compensation. ``error`` predicts what GPTQ will leave (`pipeline.spin_error`); it needs no forward
pass after one over the calibration text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from domains.errors import ModelError
from pipeline.cayley import CayleyDescent
from pipeline.grids import GridName
from pipeline.rotate import Rotations, check_folded, random_rotations

if TYPE_CHECKING:
    import torch

RotationLoss = Literal["kl", "ce", "error"]
_LAYERS_A_STEP = 8  # of `error`: enough for a direction, and memory stays flat


def learn_rotations(
    network: Any,
    batches: Sequence[torch.Tensor],
    *,
    grid: GridName,
    loss: RotationLoss,
    steps: int,
    learning_rate: float = 1.0,
    seed: int = 0,
    r1: bool = True,
    r2: bool = True,
    bfloat16: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> Rotations:
    """Rotations after ``steps`` of Cayley descent, for `pipeline.rotate.rotate`; the network is not changed.

    Args:
        network: a ``LlamaForCausalLM`` in float32; norms folded where R1 is learned.
        batches: token ids [rows, length]; one a step, over and over, or all at once before ``error``.
        grid: onto which ``kl`` and ``ce`` round.
        loss: see above.
        steps: of descent.
        learning_rate: of the first step, as a share of the largest safe step; falls to 0 along a cosine.
        seed: of the first rotations and of the order of layers.
        r1: learn R1, else there is none.
        r2: learn one R2 per layer, else there are none.
        bfloat16: run ``kl`` and ``ce`` under autocast, for CPUs with fast bfloat16.
        on_step: called with the number of finished steps and the loss before the last of them.

    Raises:
        ModelError: norms are not folded, ``kl`` or ``ce`` of a network with biases, or the descent broke down.
    """
    import torch

    _check(network, batches, loss, r1=r1)
    start = random_rotations(network, r1=r1, r2=r2, seed=seed)
    first = None if start.r1 is None else start.r1.float().requires_grad_()
    seconds = None if start.r2s is None else [r2.float().requires_grad_() for r2 in start.r2s]
    learned = [matrix for matrix in [first, *(seconds or [])] if matrix is not None]
    if not learned or not steps:
        return start
    trainable = [p for p in network.parameters() if p.requires_grad]
    network.requires_grad_(requires_grad=False)
    try:
        measure = _measure(network, batches, loss, grid, first, seconds, seed=seed, bfloat16=bfloat16)
        descent = CayleyDescent(learned)
        for step in range(steps):
            with torch.enable_grad():
                value = measure(step)
                value.backward()  # type: ignore[no-untyped-call]
            descent.step(learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps)))
            if on_step:
                on_step(step + 1, float(value.detach()))
    finally:
        for parameter in trainable:
            parameter.requires_grad_(requires_grad=True)
    return Rotations(
        None if first is None else first.detach().double(),
        None if seconds is None else [r2.detach().double() for r2 in seconds],
    )


def _check(network: Any, batches: Sequence[torch.Tensor], loss: RotationLoss, *, r1: bool) -> None:
    if not batches:
        raise ModelError(
            "there is no text to learn rotations on",
            expected="at least one batch of token ids",
            next_step="preceptor curate DOMAIN",
        )
    if loss != "error" and any(name.endswith(".bias") for name, _ in network.model.layers.named_parameters()):
        raise ModelError(
            f"rotations of a network with biases can't be learned by {loss!r}, which leaves biases out",
            expected="linear layers without biases, as Llama's",
            next_step='set [export] rounding = "learned-gptq"',
        )
    if r1:
        check_folded(network)


def _measure(
    network: Any,
    batches: Sequence[torch.Tensor],
    loss: RotationLoss,
    grid: GridName,
    r1: torch.Tensor | None,
    r2s: Sequence[torch.Tensor] | None,
    *,
    seed: int,
    bfloat16: bool,
) -> Callable[[int], torch.Tensor]:
    """The loss of a step, with gradients."""
    import torch

    from pipeline.gptq import DAMP, MLP_DAMP
    from pipeline.spin_error import collect_moments, predicted_error
    from pipeline.spin_forward import SpunNetwork

    if loss == "error":
        moments = collect_moments(network, batches, damp=DAMP, mlp_damp=MLP_DAMP)
        generator = torch.Generator().manual_seed(seed)
        some = min(_LAYERS_A_STEP, len(moments))

        def predicted(_step: int) -> torch.Tensor:
            layers = torch.randperm(len(moments), generator=generator)[:some].tolist()
            return predicted_error(network, moments, layers, r1, r2s)

        return predicted
    spun = SpunNetwork(network, grid, r1, r2s)

    def forward(step: int) -> torch.Tensor:
        ids = batches[step % len(batches)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            return spun.kl(ids) if loss == "kl" else spun.cross_entropy(ids)

    return forward
