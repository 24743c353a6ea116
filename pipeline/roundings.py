"""The ways from a full-precision student onto a GGUF grid, all of which stock llama.cpp runs.

    rtn            ggml's own rounding, to the nearest
    mse            block scales searched for the least squared error
    gptq           norm gains folded into the layers behind them, then GPTQ on the grid (`pipeline.gptq`)
    r2-gptq        the values of each layer's heads rotated by a Hadamard matrix, then GPTQ
    r1r2-gptq      the residual stream rotated too: embeddings are untied, then GPTQ
    learned-gptq   both rotations learned by Cayley descent (SpinQuant, arXiv 2405.16406) on the error that GPTQ is
                   predicted to leave, then GPTQ
    learned-kl-gptq, learned-ce-gptq   the same, learned on the KL or the cross-entropy of the rounded network
    tuned-gptq     learned-gptq, then block scales and norms tuned on the KL (`pipeline.tune_scales`)

Embedding and output matrix are Q8_0 in all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from domains.config import Rounding
from pipeline.grids import Blocks, GridName, Packed, encode, fit, pack
from pipeline.qlora import BLOCK_LINEARS, training_dtype
from pipeline.spin import RotationLoss

if TYPE_CHECKING:
    import torch

ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
LOSSES: Mapping[str, RotationLoss] = {
    "learned-gptq": "error", "learned-kl-gptq": "kl", "learned-ce-gptq": "ce", "tuned-gptq": "error",
}  # fmt: skip
"""On what a rounding learns its rotations, where it does."""
ROTATING: frozenset[str] = frozenset({"r2-gptq", "r1r2-gptq", *LOSSES})


@dataclass(frozen=True)
class Learning:
    """How rotations are learned (`pipeline.spin.learn_rotations`) and scales tuned (`pipeline.tune_scales`).

    ``bf16`` computes in bfloat16 where the machine multiplies it.
    """

    steps: int = 24
    learning_rate: float = 1.0
    tuning_steps: int = 24
    sweeps: int = 2
    bf16: bool = True


@dataclass(frozen=True)
class Rounded:
    """A student on a grid. ``network`` computes with the rounded weights; ``untied`` counts the numbers that untying added."""

    network: Any
    packed: dict[str, Packed]
    untied: int


def round_student(
    network: Any,
    rounding: Rounding,
    grid: GridName,
    batches: Sequence[torch.Tensor],
    *,
    seed: int,
    learning: Learning | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Rounded:
    """Put a student onto a grid by a rounding; the network given stays as it is.

    Args:
        network: a merged ``LlamaForCausalLM`` in float32.
        rounding: see above.
        grid: of the linear layers inside the blocks.
        batches: calibration text, token ids each [rows, length]; not used by ``rtn`` and ``mse``.
        seed: of the rotations.
        learning: how the roundings that learn do.
        on_layer: told of finished layers, and of all.
    """
    if rounding in {"rtn", "mse"}:
        network = copy.deepcopy(network)
        blocks = {
            name: encode(weight, grid) if rounding == "rtn" else fit(weight, grid)
            for name, weight in _block_weights(network).items()
        }
        _put(network, blocks)
        return Rounded(network, _packed(network, blocks), 0)
    from pipeline.gptq import collect_and_round
    from pipeline.rotate import fold_norms

    untied, reference = 0, network
    learning = learning or Learning()
    network = copy.deepcopy(network)
    if rounding in ROTATING:
        untied = _rotate(network, rounding, grid, batches, seed, learning)
    else:
        fold_norms(network, final=False)
    blocks = collect_and_round(network, batches, grid=grid, sweeps=learning.sweeps, on_layer=on_layer)
    if rounding == "tuned-gptq":
        from pipeline.tune_scales import tune_scales

        blocks = tune_scales(
            network, reference, blocks, batches, steps=learning.tuning_steps, bfloat16=_bfloat16(learning)
        )
    return Rounded(network, _packed(network, blocks), untied)


def _rotate(
    network: Any,
    rounding: str,
    grid: GridName,
    batches: Sequence[torch.Tensor],
    seed: int,
    learning: Learning,
) -> int:
    from pipeline.rotate import fold_norms, random_rotations, rotate

    turns_stream = rounding != "r2-gptq"
    untied = fold_norms(network, final=turns_stream)
    if rounding in LOSSES:
        from pipeline.spin import learn_rotations

        rotations = learn_rotations(
            network, batches, grid=grid, loss=LOSSES[rounding], steps=learning.steps,
            learning_rate=learning.learning_rate, seed=seed, r1=True, r2=True, bfloat16=_bfloat16(learning),
        )  # fmt: skip
    else:
        rotations = random_rotations(network, r1=turns_stream, r2=True, seed=seed)
    rotate(network, rotations.r1, rotations.r2s)
    return untied


def _bfloat16(learning: Learning) -> bool:
    import torch

    return training_dtype(bf16=learning.bf16) == torch.bfloat16


def _block_weights(network: Any) -> dict[str, torch.Tensor]:
    return {
        name: weight
        for name, weight in network.state_dict().items()
        if name.split(".")[-2] in BLOCK_LINEARS and name.endswith(".weight")
    }


def _put(network: Any, blocks: Mapping[str, Blocks]) -> None:
    import torch

    from pipeline.grids import decode

    with torch.no_grad():
        for name, each in blocks.items():
            network.get_parameter(name).copy_(decode(each))


def _packed(network: Any, blocks: Mapping[str, Blocks]) -> dict[str, Packed]:
    """The bytes of every matrix: the blocks' as given, embedding and output matrix in Q8_0."""
    packed = {name: Packed(each.grid, pack(each)) for name, each in blocks.items()}
    outer = ["model.embed_tokens.weight"]
    if not network.config.tie_word_embeddings:
        outer.append("lm_head.weight")
    for name in outer:
        packed[name] = Packed("Q8_0", pack(encode(network.get_parameter(name).detach(), "Q8_0")))
    return packed
