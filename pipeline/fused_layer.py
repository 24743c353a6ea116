"""A Llama decoder layer with LoRA whose backward pass is written down instead of recorded.

Autograd keeps every intermediate result of a layer. Here the normed inputs and the gated product are computed again,
which costs a few elementwise passes; projections that read the same input are one product; and the frozen weights take
no gradient. The formulas are those of transformers' ``LlamaDecoderLayer``, each result rounded where that rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from pipeline.linear_group import state_of
from pipeline.methods.block_group import group_of, groupable
from pipeline.row_attention import Span, Weights, attend, attend_backward

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Reading:
    """What a layer reads besides hidden states.

    Attributes:
        cos, sin: rotary embedding, [tokens, head width].
        spans: who attends to whom.
        tokens: [queries], those that go on to the next step; None for all.
        checkpoint: compute the forward pass again in the backward pass.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    spans: Sequence[Span]
    tokens: torch.Tensor | None = None
    checkpoint: bool = False


def fusable(layer: Any) -> bool:
    """Whether `run_layer` computes what this decoder layer does, on this device."""
    if type(layer).__name__ != "LlamaDecoderLayer":
        return False
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
    own = (layer, attention, mlp, norm, layer.post_attention_layernorm)
    if any("forward" in vars(module) for module in own):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules()):
        return False
    if norm.weight.requires_grad or norm.weight.device.type != "cpu" or attention.attention_dropout:
        return False
    if attention.config.hidden_act != "silu":
        return False
    return groupable(_linears(layer))


def run_layer(layer: Any, hidden: torch.Tensor, reading: Reading) -> torch.Tensor:
    """The layer's result for hidden states [tokens, width]: [queries, width]."""
    parts = _parts_of(layer, hidden.dtype)
    result: torch.Tensor = _Layer.apply(hidden, parts, reading, *parts.parameters)  # type: ignore[no-untyped-call]
    return result


def prepare_layers(layers: Iterable[Any], dtype: torch.dtype) -> None:
    """Make what `run_layer` makes of weights that have changed, before several threads run the layers at once."""
    for layer in layers:
        if fusable(layer):
            _parts_of(layer, dtype)


# Per layer what its groups were made of, and the groups: these hold weights only that lie in memory anyway.
_made: WeakKeyDictionary[Any, tuple[object, _Parts]] = WeakKeyDictionary()


def _parts_of(layer: Any, dtype: torch.dtype) -> _Parts:
    """The layer's groups, made anew when a weight or the switch of an adapter has changed: once an optimizer step."""
    found = _made.get(layer)
    if found is not None and found[0] == state_of(_linears(layer), dtype):
        return found[1]
    parts = _Parts(layer, dtype)
    state = state_of(_linears(layer), dtype)  # after joining, which moves weights
    if state is None:
        _made.pop(layer, None)
    else:
        _made[layer] = state, parts
    return parts


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    linears = [getattr(attention, name, None) for name in _PROJECTIONS]
    return linears + [getattr(mlp, name, None) for name in _GATED]


class _Parts:
    """A layer's weights as groups."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.query = group_of([attention.q_proj], dtype)
        self.key_value = group_of([attention.k_proj, attention.v_proj], dtype)
        self.output = group_of([attention.o_proj], dtype)
        self.gate_up = group_of([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = group_of([mlp.down_proj], dtype)
        self.first, self.second = layer.input_layernorm, layer.post_attention_layernorm
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.key_heads = attention.k_proj.out_features // self.width

    @property
    def parameters(self) -> list[torch.Tensor]:
        """In the order in which `_backward` gives their gradients."""
        groups = (self.query, self.key_value, self.output, self.gate_up, self.down)
        return [parameter for group in groups for parameter in group.parameters]


@dataclass
class _Kept:
    """What the backward pass needs; ``low_*`` are x Aᵀ of the groups."""

    hidden: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    weights: Weights
    attended: torch.Tensor
    middle: torch.Tensor
    gate_up: torch.Tensor
    low: list[torch.Tensor | None]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, parts: _Parts, reading: Reading, *_: torch.Tensor
    ) -> torch.Tensor:
        out, kept = _forward(parts, hidden, reading)
        ctx.parts, ctx.reading = parts, reading  # no weight read back from NF4: see `LinearGroup`
        ctx.kept = hidden if reading.checkpoint else kept
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, None  # frees it layer by layer
        if isinstance(kept, torch.Tensor):
            kept = _forward(ctx.parts, kept, ctx.reading)[1]
        d_hidden, found = _backward(ctx.parts, kept, ctx.reading, grads[0], need_dx=ctx.needs_input_grad[0])
        return d_hidden, None, None, *found


def _forward(parts: _Parts, hidden: torch.Tensor, reading: Reading) -> tuple[torch.Tensor, _Kept]:
    width, heads = parts.width, parts.key_heads
    normed = _normed(hidden, parts.first)
    asking = normed if reading.tokens is None else normed[reading.tokens]
    flat_query, low_query = parts.query.forward(asking)
    key_value, low_key_value = parts.key_value.forward(normed)
    key, value = key_value.view(len(hidden), 2, heads, width).unbind(1)
    cos, sin = _chosen(reading)
    query = _rotated(flat_query.view(len(asking), -1, width), cos, sin)
    query = query.view(heads, -1, len(asking), width)
    key = _rotated(key, reading.cos, reading.sin)
    value = value.transpose(0, 1).contiguous()
    attended, weights = attend(query, key, value, reading.spans, parts.scaling)
    attended = attended.view(len(asking), -1)
    middle, low_output = parts.output.forward(attended)
    middle += hidden if reading.tokens is None else hidden[reading.tokens]
    gate_up, low_gate_up = parts.gate_up.forward(_normed(middle, parts.second))
    out, low_down = parts.down.forward(_gated(gate_up))
    out += middle
    low = [low_query, low_key_value, low_output, low_gate_up, low_down]
    return out, _Kept(hidden, query, key, value, weights, attended, middle, gate_up, low)


def _backward(
    parts: _Parts, kept: _Kept, reading: Reading, grad: torch.Tensor, *, need_dx: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The gradient of the hidden states and those of `_Parts.parameters`."""
    low_query, low_key_value, low_output, low_gate_up, low_down = kept.low
    gate, up = kept.gate_up.chunk(2, dim=-1)
    opened = torch.nn.functional.silu(gate)
    d_gated, of_down = parts.down.backward(grad, opened * up, low_down)
    assert d_gated is not None
    d_gate_up = torch.empty_like(kept.gate_up)
    torch.mul(d_gated, opened, out=d_gate_up[:, gate.shape[1] :])
    d_gate_up[:, : gate.shape[1]] = torch.ops.aten.silu_backward(d_gated.mul_(up), gate)
    d_normed, of_gate_up = parts.gate_up.backward(d_gate_up, _normed(kept.middle, parts.second), low_gate_up)
    assert d_normed is not None
    d_middle = grad + _normed_backward(d_normed, kept.middle, parts.second)
    d_attended, of_output = parts.output.backward(d_middle, kept.attended, low_output)
    assert d_attended is not None
    heads, group, queries, width = kept.query.shape
    d_query, d_key, d_value = attend_backward(
        d_attended.view(queries, heads, group, width),
        *(kept.query, kept.key, kept.value, reading.spans, parts.scaling, kept.weights),
    )
    cos, sin = _chosen(reading)
    d_flat = _turned_back(d_query.view(heads * group, queries, width), cos, sin)
    d_key_value = torch.stack(
        [
            _turned_back(d_key.to(grad.dtype), reading.cos, reading.sin),
            d_value.to(grad.dtype).transpose(0, 1),
        ],
        dim=1,
    ).view(len(kept.hidden), -1)
    normed = _normed(kept.hidden, parts.first)
    asking = normed if reading.tokens is None else normed[reading.tokens]
    d_asking, of_query = parts.query.backward(d_flat.view(queries, -1), asking, low_query, need_dx=need_dx)
    d_input, of_key_value = parts.key_value.backward(d_key_value, normed, low_key_value, need_dx=need_dx)
    found = [*of_query, *of_key_value, *of_output, *of_gate_up, *of_down]
    if d_input is None or d_asking is None:
        return None, found
    if reading.tokens is None:
        return _normed_backward(d_input.add_(d_asking), kept.hidden, parts.first).add_(d_middle), found
    d_input.index_add_(0, reading.tokens, d_asking)
    d_hidden = _normed_backward(d_input, kept.hidden, parts.first)
    return d_hidden.index_add_(0, reading.tokens, d_middle), found


def _chosen(reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    if reading.tokens is None:
        return reading.cos, reading.sin
    return reading.cos[reading.tokens], reading.sin[reading.tokens]


def _scale(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """1 / root mean square, float32 [tokens, 1]."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(length.square_().div_(x.shape[-1]).add_(norm.variance_epsilon))


def _normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """RMSNorm (arXiv 1910.07467)."""
    result: torch.Tensor = (x * _scale(x, norm)).to(x.dtype).mul_(norm.weight)
    return result


def _normed_backward(grad: torch.Tensor, x: torch.Tensor, norm: Any) -> torch.Tensor:
    scale = _scale(x, norm)
    unit = x * scale  # float32
    d_unit = (grad * norm.weight).float()
    shared = (d_unit * unit).mean(dim=-1, keepdim=True)
    result: torch.Tensor = d_unit.sub_(unit.mul_(shared)).mul_(scale).to(x.dtype)
    return result


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU (arXiv 2002.05202): silu(gate) · up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of [tokens, heads, width]: [heads, tokens, width]."""
    out = x.new_empty(x.shape[1], x.shape[0], x.shape[2])
    _turn(x.transpose(0, 1), cos, sin, out)
    return out


def _turned_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`_rotated`'s gradient: [heads, tokens, width] -> [tokens, heads, width]."""
    out = grad.new_empty(grad.shape[1], grad.shape[0], grad.shape[2])
    _turn(grad, cos, -sin, out.transpose(0, 1))
    return out


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    half = x.shape[-1] // 2
    cos, sin = cos[:, :half], sin[:, :half]
    low, high = x.chunk(2, dim=-1)
    torch.mul(low, cos, out=out[..., :half])
    torch.mul(high, cos, out=out[..., half:])
    out[..., :half] -= high * sin
    out[..., half:] += low * sin
