"""Rounds a network's linear layers onto a GGUF grid, each on the inputs that the rounded layers before it give.

Layer by layer: {q, k, v} → {o} → {gate, up} → {down}. What a layer is rounded towards is what it gave on the inputs of the
unrounded network, so that later layers make up for errors of earlier ones (`pipeline.aim`). The channels between gate/up and down are sorted by
the strength of down's inputs: GPTQ's act-order with blocks that stay contiguous, and free, since rows of gate and up and
columns of down move together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from domains.errors import ModelError
from pipeline.aim import Inputs, aim, measure_inputs
from pipeline.compensate import curvature, round_compensated
from pipeline.grids import Blocks, GridName, decode
from pipeline.layer_inputs import Stream, activated, attended
from pipeline.one_thread import one_thread

if TYPE_CHECKING:
    import torch

SWEEPS = 2
DAMP = 0.01
MLP_DAMP = 0.1
"""The MLP's layers, down_proj above all, seem to want more damping than attention's. Evidence: output error on
unseen text of SmolLM2-135M's first two layers only (14,000 to 16,000 tokens of calibration; 0.1 against 0.01: down -14 %,
gate -3 %, but q +4 % and o +8 %). The whole network's KL has not been compared."""


def collect_and_round(
    network: Any,
    batches: Sequence[torch.Tensor],
    *,
    grid: GridName,
    damp: float = DAMP,
    mlp_damp: float = MLP_DAMP,
    permute_intermediate: bool = True,
    sweeps: int = SWEEPS,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[str, Blocks]:
    """Sequential GPTQ over the linear layers inside the blocks; the network's weights become the rounded ones.

    Embedding, output matrix and norms stay as they are. Memory beside the network: the stream of the rounded
    and of the unrounded network and two more of that size (tokens × width, float32), what reaches one ``down_proj`` in
    both (tokens × its inputs), and about ten float64 matrices [in, in] of the widest input (5 GB where ``down_proj``
    has 8,192 inputs, by counting).

    Args:
        network: a ``LlamaForCausalLM`` in float32, in eval mode; changed in place.
        batches: token ids, each [rows, length], without padding.
        grid: the target of all these layers.
        damp: share of the mean diagonal that is added to the second moments of q, k, v and o.
        mlp_damp: the same for gate, up and down.
        permute_intermediate: sort the channels between gate/up and down.
        sweeps: of coordinate descent after each matrix (`pipeline.compensate`).
        on_layer: called with the number of finished layers, and of all.

    Returns:
        Parameter name → what the file holds; `decode` of it is the network's weight.

    Raises:
        ModelError: no calibration text, a network in another type, or a width that has no whole blocks.
    """
    import torch

    if network.model.embed_tokens.weight.dtype != torch.float32:
        raise ModelError(
            f"calibrating a network in {network.model.embed_tokens.weight.dtype}",
            expected="float32 weights",
            next_step="load it with dtype=torch.float32",
        )
    rounded: dict[str, Blocks] = {}
    with torch.no_grad():
        stream = Stream(network, batches)
        exact = stream.fork()
        total = len(network.model.layers)
        for index, layer in enumerate(network.model.layers):
            rounding = _Rounder(layer, grid, sweeps)
            _round_attention(layer, stream, exact, rounding, damp)
            _round_mlp(layer, stream, exact, rounding, mlp_damp, permute=permute_intermediate)
            for name, blocks in rounding.done.items():
                rounded[f"model.layers.{index}.{name}.weight"] = blocks
            if on_layer:
                on_layer(index + 1, total)
    return rounded


class _Rounder:
    """Rounds linear layers of one decoder layer and remembers the results by their place in it."""

    def __init__(self, layer: Any, grid: GridName, sweeps: int) -> None:
        self.grid, self.sweeps = grid, sweeps
        self.names = {module: name for name, module in layer.named_modules()}
        self.done: dict[str, Blocks] = {}

    def round(self, linears: Sequence[Any], inputs: Inputs, damp: float) -> None:
        """Linear layers that share their inputs, in one go: rows don't depend on each other."""
        import torch

        curved = curvature(inputs.all_moments(), damp=damp)
        weight = aim(torch.cat([linear.weight for linear in linears]), inputs, curved, damp=damp)
        blocks = round_compensated(weight, curved, self.grid, sweeps=self.sweeps)
        begin = 0
        for linear in linears:
            rows = slice(begin, begin + len(linear.weight))
            self.keep(linear, _rows(blocks, rows))
            begin = rows.stop

    def keep(self, linear: Any, blocks: Blocks) -> None:
        self.done[self.names[linear]] = blocks
        with one_thread():
            linear.weight.copy_(decode(blocks))

    def reorder_rows(self, linear: Any, order: torch.Tensor) -> None:
        self.keep(linear, _rows(self.done[self.names[linear]], order))
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[order])


def _rows(blocks: Blocks, rows: slice | torch.Tensor) -> Blocks:
    m = None if blocks.m is None else blocks.m[rows]
    return Blocks(blocks.grid, blocks.codes[rows], blocks.d[rows], m)


def _round_attention(layer: Any, stream: Stream, exact: Stream, rounder: _Rounder, damp: float) -> None:
    attention, norm = layer.self_attn, layer.input_layernorm
    wanted = [norm(rows) for rows in exact.hidden]
    wanted_heads = list(attended(layer, exact))
    for index, rows in enumerate(wanted_heads):
        exact.hidden[index] = exact.hidden[index] + attention.o_proj(rows)
    inputs = measure_inputs([norm(rows) for rows in stream.hidden], wanted)
    rounder.round([attention.q_proj, attention.k_proj, attention.v_proj], inputs, damp)
    heads = list(attended(layer, stream))
    rounder.round([attention.o_proj], measure_inputs(heads, wanted_heads), damp)
    for index, rows in enumerate(heads):
        stream.hidden[index] = stream.hidden[index] + attention.o_proj(rows)


def _round_mlp(
    layer: Any, stream: Stream, exact: Stream, rounder: _Rounder, damp: float, *, permute: bool
) -> None:
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    wanted = [norm(rows) for rows in exact.hidden]
    wanted_middle = [activated(layer, rows) for rows in exact.hidden]
    for index, rows in enumerate(wanted_middle):
        exact.hidden[index] = exact.hidden[index] + mlp.down_proj(rows)
    inputs = measure_inputs([norm(rows) for rows in stream.hidden], wanted)
    rounder.round([mlp.gate_proj, mlp.up_proj], inputs, damp)
    middle = [activated(layer, rows) for rows in stream.hidden]
    inputs = measure_inputs(middle, wanted_middle)
    del wanted_middle
    order = None
    if permute:
        order = _strongest_first(inputs.all_moments().diagonal())
        rounder.reorder_rows(mlp.gate_proj, order)
        rounder.reorder_rows(mlp.up_proj, order)
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
        inputs = inputs.reordered(order)
    rounder.round([mlp.down_proj], inputs, damp)
    for index, rows in enumerate(middle):
        reaching = rows if order is None else rows[..., order]
        stream.hidden[index] = stream.hidden[index] + mlp.down_proj(reaching)


def _strongest_first(strength: torch.Tensor) -> torch.Tensor:
    """Channels from the strongest to the weakest; equals in their old order."""
    order: torch.Tensor = strength.argsort(descending=True, stable=True)
    return order
