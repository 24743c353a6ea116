"""Rotations that a Llama network does not notice, but a quantizer does (SpinQuant, arXiv 2405.16406).

R1 turns the residual stream, R2 the values of each layer's heads; both merge into the weights, so stock llama.cpp
runs the result. Differences from the paper:

* The embedding's rows keep their mean. Subtracting it is a habit from LayerNorm; with RMSNorm it changes the
  network.
* A norm keeps the root mean square of its gains as one scalar instead of 1. Scalars commute with rotations, and
  the weights keep their magnitude, so that float16 block scales stay out of the subnormal range.
* R3 (queries and keys after RoPE) is not merged: llama.cpp does it by itself when the KV cache is quantized.
  R4 (the input of ``down_proj``) can't be: SiLU does not commute with it, and stock llama.cpp has no such step.

Row-vector convention: a linear layer is y = x·Wᵀ with W [out, in], and the stream becomes h·R1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domains.errors import ModelError
from pipeline.hadamard import random_rotation

if TYPE_CHECKING:
    import torch

ORTHOGONALITY = 1e-4
"""How far R·Rᵀ may be from the identity, in the largest entry."""


@dataclass(frozen=True)
class Rotations:
    """What `rotate` merges: ``r1`` [D, D] or None; ``r2s`` one per layer, each [hd, hd] or [kv heads, hd, hd]."""

    r1: torch.Tensor | None
    r2s: Sequence[torch.Tensor] | None


def head_dim(config: Any) -> int:
    """Numbers per attention head, also where the width is no multiple of the number of heads."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def is_tied(network: Any) -> bool:
    """Whether embedding and output matrix are one tensor."""
    return network.lm_head.weight is network.model.embed_tokens.weight


def untie(network: Any) -> int:
    """Give the output matrix weights of its own, in place.

    Returns:
        How many numbers the network holds more than before: vocabulary times width, or 0 if it was untied.
    """
    import torch

    if not is_tied(network):
        network.config.tie_word_embeddings = False
        return 0
    shared = network.model.embed_tokens.weight
    network.lm_head.weight = torch.nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    network.config.tie_word_embeddings = False
    return int(shared.numel())


def fold_norms(network: Any, *, final: bool = True) -> int:
    """Move the gains of every RMSNorm into the linear layers behind it, in place; a norm keeps one scalar c.

    Args:
        network: a ``LlamaForCausalLM``.
        final: also fold the last norm into the output matrix, which R1 needs and which unties the
            embeddings. Without it a tied network stays tied.

    Returns:
        How many numbers untying added.
    """
    import torch

    added = 0
    with torch.no_grad():
        for layer in network.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            _fold(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
            _fold(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
        if final and not _is_scalar(network.model.norm):
            added = untie(network)
            _fold(network.model.norm, [network.lm_head])
    return added


def rotate(network: Any, r1: torch.Tensor | None, r2s: Sequence[torch.Tensor] | None) -> None:
    """Merge R1 and one R2 per layer into the weights, in place; computed in float64, kept in the weights' type.

    Args:
        network: a ``LlamaForCausalLM``; for R1 with folded norms (`fold_norms`). R2 needs neither folding nor
            untying.
        r1: [D, D] orthogonal, or None.
        r2s: per layer [hd, hd], the same for all key-value heads, or [kv heads, hd, hd]; or None.

    Raises:
        ModelError: a matrix is not orthogonal or of another size, or the norms are not folded.
    """
    import torch

    _check(network, r1, r2s)
    with torch.no_grad():
        if r1 is not None:
            _rotate_stream(network, r1.double())
        for layer, r2 in zip(network.model.layers, r2s or (), strict=False):
            _rotate_values(network, layer.self_attn, r2.double())


def random_rotations(network: Any, *, r1: bool, r2: bool, seed: int) -> Rotations:
    """Signed Hadamard matrices (random orthogonal ones where none exists), the same for the same seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    first = random_rotation(network.config.hidden_size, generator) if r1 else None
    width = head_dim(network.config)
    seconds = [random_rotation(width, generator) for _ in network.model.layers] if r2 else None
    return Rotations(first, seconds)


def check_folded(network: Any) -> None:
    """Refuse a network whose norms R1 can't pass.

    Raises:
        ModelError: the gains of a norm differ between channels.
    """
    norms = [network.model.norm]
    for layer in network.model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    if not all(map(_is_scalar, norms)):
        raise ModelError(
            "R1 can't pass a norm whose gains differ between channels",
            expected="norms whose gains were moved into the layers behind them",
            next_step="call pipeline.rotate.fold_norms(network) first",
        )


def per_kv_head(network: Any, r2: torch.Tensor) -> torch.Tensor:
    """One R2 per key-value head: [kv heads, hd, hd], whichever form was given."""
    heads: int = network.config.num_key_value_heads
    return r2 if r2.dim() == 3 else r2.expand(heads, *r2.shape)


def rotated_value_rows(weight: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    """``v_proj`` after R2: the rows of each key-value head times R2ᵀ; r2 [kv heads, hd, hd]."""
    heads, width, _ = r2.shape
    turned: torch.Tensor = r2.transpose(1, 2) @ weight.reshape(heads, width, -1)
    return turned.reshape(weight.shape)


def rotated_output_columns(weight: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    """``o_proj`` after R2: the columns of query head i times R2 of the key-value head that it reads."""
    heads, width, _ = r2.shape
    out = weight.shape[0]
    per_head = weight.reshape(out, heads, -1, width)  # [out, kv head, query head of its group, hd]
    turned: torch.Tensor = (per_head.permute(1, 0, 2, 3).reshape(heads, -1, width) @ r2).reshape(
        heads, out, -1, width
    )
    return turned.permute(1, 0, 2, 3).reshape(weight.shape)


def _fold(norm: Any, linears: Sequence[Any]) -> None:
    gains = norm.weight.double()
    scalar = float(gains.square().mean().sqrt()) or 1.0
    for linear in linears:
        linear.weight.copy_(linear.weight.double() * (gains / scalar))
    norm.weight.fill_(scalar)


def _is_scalar(norm: Any) -> bool:
    return bool((norm.weight == norm.weight[0]).all())


def _check(network: Any, r1: torch.Tensor | None, r2s: Sequence[torch.Tensor] | None) -> None:
    config = network.config
    layers = len(network.model.layers)
    if r1 is not None:
        _check_orthogonal(r1, (config.hidden_size, config.hidden_size), "R1")
        check_folded(network)
    if r2s is not None:
        if len(r2s) != layers:
            raise ModelError(
                f"{len(r2s)} matrices R2 for {layers} layers",
                expected="one R2 per layer",
                next_step="make them with pipeline.rotate.random_rotations",
            )
        width = head_dim(config)
        for index, r2 in enumerate(r2s):
            heads = (config.num_key_value_heads,) if r2.dim() == 3 else ()
            _check_orthogonal(r2, (*heads, width, width), f"R2 of layer {index}")


def _check_orthogonal(matrix: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    import torch

    if tuple(matrix.shape) != shape:
        raise ModelError(
            f"{name} has shape {tuple(matrix.shape)}",
            expected=f"{shape}",
            next_step="make it with pipeline.rotate.random_rotations",
        )
    wide = matrix.double()
    error = float((wide @ wide.mT - torch.eye(shape[-1], dtype=torch.float64)).abs().max())
    if not error <= ORTHOGONALITY:  # also catches what is no number
        raise ModelError(
            f"{name} is not orthogonal: R·Rᵀ is off by {error:.2g}",
            expected=f"at most {ORTHOGONALITY:g}",
            next_step="take its orthogonal factor: pipeline.hadamard.orthonormalized",
        )


def _rotate_stream(network: Any, r1: torch.Tensor) -> None:
    embedding = network.model.embed_tokens.weight
    embedding.copy_(embedding.double() @ r1)
    if not is_tied(network):
        network.lm_head.weight.copy_(network.lm_head.weight.double() @ r1)
    for layer in network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.copy_(reader.weight.double() @ r1)
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(r1.T @ writer.weight.double())
            if writer.bias is not None:
                writer.bias.copy_(writer.bias.double() @ r1)


def _rotate_values(network: Any, attention: Any, r2: torch.Tensor) -> None:
    r2 = per_kv_head(network, r2)
    value, output = attention.v_proj, attention.o_proj
    value.weight.copy_(rotated_value_rows(value.weight.double(), r2))
    if value.bias is not None:
        value.bias.copy_(rotated_value_rows(value.bias.double()[:, None], r2)[:, 0])
    output.weight.copy_(rotated_output_columns(output.weight.double(), r2))
