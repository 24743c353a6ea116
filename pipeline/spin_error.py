"""The error that GPTQ will leave after a rotation, predicted from second moments, without a forward pass.

Error feedback leaves of column j what later columns can't make up for: the conditional variance c_j = 1/U_jj²
of its input (H⁻¹ = UᵀU; `pipeline.compensate`). A block's step d follows its largest weight. Hence, up to a constant,

    error(R) = Σ over blocks b of  Σ_{j in b} c_j(RᵀHR) · Σ_rows max_{j in b} |(W R)_j|²,

with a smooth maximum. The product of all c_j is det H, which no rotation changes; their sum is least where they are
equal. So the rotation is asked for channels that are equally hard to predict, and for weights without peaks.
The loss is the mean over a network's matrices of error(R) / tr(W H Wᵀ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.grids import BLOCK
from pipeline.layer_inputs import Stream, activated, attended, second_moments
from pipeline.rotate import per_kv_head, rotated_output_columns, rotated_value_rows

if TYPE_CHECKING:
    import torch

_PEAK = 8  # exponent of the smooth maximum


@dataclass(frozen=True)
class LayerMoments:
    """Of one layer: damped moments before qkv, before o, before gate/up; conditional variances before down."""

    attention: torch.Tensor
    heads: torch.Tensor
    mlp: torch.Tensor
    down: torch.Tensor  # [F / 32], summed in each block
    order: torch.Tensor  # of the intermediate channels
    powers: tuple[float, float, float, float]  # tr(W H Wᵀ) of qkv, o, gate/up, down


def collect_moments(
    network: Any, batches: Sequence[torch.Tensor], *, damp: float, mlp_damp: float
) -> list[LayerMoments]:
    """One forward pass of the unrounded network; the dampings are those that GPTQ will use."""
    import torch

    found = []
    with torch.no_grad():
        stream = Stream(network, batches)
        for layer in network.model.layers:
            found.append(_layer_moments(layer, stream, damp, mlp_damp))
    return found


def predicted_error(
    network: Any,
    moments: Sequence[LayerMoments],
    layers: Sequence[int],
    r1: torch.Tensor | None,
    r2s: Sequence[torch.Tensor] | None,
) -> torch.Tensor:
    """The loss over some layers, a scalar with gradients in R1 and these layers' R2."""
    import torch

    errors = []
    for index in layers:
        r2 = None if r2s is None else per_kv_head(network, r2s[index])
        errors.append(_layer_error(network.model.layers[index], moments[index], r1, r2))
    return torch.stack(errors).mean()


def _layer_moments(layer: Any, stream: Stream, damp: float, mlp_damp: float) -> LayerMoments:
    attention, mlp, hidden = layer.self_attn, layer.mlp, stream.hidden
    before_attention = second_moments(layer.input_layernorm(rows) for rows in hidden)
    heads = list(attended(layer, stream))
    before_output = second_moments(heads)
    for index, rows in enumerate(heads):
        hidden[index] = hidden[index] + attention.o_proj(rows)
    before_mlp = second_moments(layer.post_attention_layernorm(rows) for rows in hidden)
    inner = second_moments(activated(layer, rows) for rows in hidden)
    for index, rows in enumerate(hidden):
        hidden[index] = rows + mlp.down_proj(activated(layer, rows))
    order = inner.diagonal().argsort(descending=True, stable=True)
    powers = (
        sum(_power(linear, before_attention) for linear in _readers(attention)),
        _power(attention.o_proj, before_output),
        sum(_power(linear, before_mlp) for linear in (mlp.gate_proj, mlp.up_proj)),
        _power(mlp.down_proj, inner),
    )
    down = conditional_variances(_damped(inner[order][:, order], mlp_damp)).float()
    return LayerMoments(
        _damped(before_attention, damp).float(),
        _damped(before_output, damp).float(),
        _damped(before_mlp, mlp_damp).float(),
        down.reshape(-1, BLOCK).sum(1),
        order,
        powers,
    )


def _readers(attention: Any) -> list[Any]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _power(linear: Any, moments: torch.Tensor) -> float:
    weight = linear.weight.double()
    return float(((weight @ moments) * weight).sum())


def _damped(moments: torch.Tensor, damp: float) -> torch.Tensor:
    damped = moments.clone()
    diagonal = damped.diagonal()
    diagonal += damp * diagonal.mean()
    return damped


def conditional_variances(moments: torch.Tensor) -> torch.Tensor:
    """Of each column given those after it: 1/U_jj² with H⁻¹ = UᵀU; moments [n, n] positive definite."""
    import torch

    lower = torch.linalg.cholesky(moments.flip(0, 1))
    variances: torch.Tensor = lower.diagonal().flip(0).square()
    return variances


def _peaks(weight: torch.Tensor) -> torch.Tensor:
    """Σ over rows of the squared smooth maximum of each block: [in / 32]."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scale = blocks.detach().abs().amax(-1, keepdim=True).clamp_min(1e-12)
    smooth: torch.Tensor = (blocks / scale).pow(_PEAK).sum(-1).pow(2 / _PEAK) * scale[..., 0].square()
    return smooth.sum(0)


def _layer_error(
    layer: Any, moments: LayerMoments, r1: torch.Tensor | None, r2: torch.Tensor | None
) -> torch.Tensor:
    import torch

    attention, mlp = layer.self_attn, layer.mlp
    query, key, value = (_read(linear.weight, r1) for linear in _readers(attention))
    output, before_output = attention.o_proj.weight, moments.heads
    if r2 is not None:
        value = rotated_value_rows(value, r2)
        output = rotated_output_columns(output, r2)
        before_output = rotated_output_columns(rotated_output_columns(before_output, r2).T, r2)
    wide = torch.cat([_read(mlp.gate_proj.weight, r1), _read(mlp.up_proj.weight, r1)])
    down = _write(mlp.down_proj.weight[:, moments.order], r1)
    qkv, o, gate_up, inner = moments.powers
    return (
        _error(torch.cat([query, key, value]), _turned(moments.attention, r1)) / qkv
        + _error(_write(output, r1), before_output) / o
        + _error(wide, _turned(moments.mlp, r1)) / gate_up
        + (moments.down * _peaks(down)).sum() / inner
    ) / 4


def _error(weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    variances = conditional_variances(moments).reshape(-1, BLOCK).sum(1)
    return (variances * _peaks(weight)).sum()


def _read(weight: torch.Tensor, r1: torch.Tensor | None) -> torch.Tensor:
    return weight if r1 is None else weight @ r1


def _write(weight: torch.Tensor, r1: torch.Tensor | None) -> torch.Tensor:
    return weight if r1 is None else r1.T @ weight


def _turned(moments: torch.Tensor, r1: torch.Tensor | None) -> torch.Tensor:
    return moments if r1 is None else r1.T @ moments @ r1
