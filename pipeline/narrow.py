"""Cuts a Llama network down to widths that K-quants divide (256): the residual stream and the attention heads.

The stream is turned to its principal axes and the weakest are cut off, as in SliceGPT (arXiv 2401.15024), but with one
rotation for all layers, because a plain Llama file has no place for one between two layers. Each layer loses the query
heads that add least to the stream; the key-value heads are written out, one per query head that stays. What is left is a
trained network, somewhat worse: heal it with a little training.

Row-vector convention: a linear layer is y = x·Wᵀ with W [out, in], and the stream becomes h·Q with Q [D, width].
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from domains.errors import ModelError
from pipeline.layer_inputs import Moments
from pipeline.rotate import fold_norms, head_dim

if TYPE_CHECKING:
    import torch

MULTIPLE = 256
"""What the length of a row in K-quants is a multiple of."""


def narrow(network: Any, batches: Sequence[torch.Tensor]) -> Any:
    """A copy of a network whose stream and attention are the next multiple of `MULTIPLE` below.

    Args:
        network: a ``LlamaForCausalLM`` in float32 without biases; stays as it is.
        batches: text that decides what is cut, token ids each [rows, length].

    Returns:
        An untied ``LlamaForCausalLM``. Where nothing has to be cut it computes the same.

    Raises:
        ModelError: less than one multiple would be left, or the width of the MLP is no multiple.
    """
    import torch
    from transformers import LlamaForCausalLM

    before = network.config
    config = copy.deepcopy(before)
    config.head_dim = head_dim(before)
    config.hidden_size = _below(before.hidden_size, "stream")
    config.num_attention_heads = (
        _below(before.num_attention_heads * config.head_dim, "attention") // config.head_dim
    )
    config.num_key_value_heads = config.num_attention_heads
    config.tie_word_embeddings = False
    if before.intermediate_size % MULTIPLE:
        raise ModelError(
            f"an MLP {before.intermediate_size} wide can't be stored in K-quants",
            expected=f"a multiple of {MULTIPLE}",
            next_step="take another base",
        )  # fmt: skip
    network = copy.deepcopy(network)
    fold_norms(network)
    stream, attended = _moments(network, batches)
    axes = torch.linalg.eigh(stream).eigenvectors[:, -config.hidden_size :].flip(1)
    narrowed = LlamaForCausalLM(config)
    with torch.no_grad():
        _cut(network, narrowed, axes, attended)
    return narrowed.eval()


def _below(width: int, name: str) -> int:
    left = width // MULTIPLE * MULTIPLE
    if not left:
        raise ModelError(
            f"the {name} is {width} wide", expected=f"at least {MULTIPLE}", next_step="take a larger base"
        )
    return left


def _moments(network: Any, batches: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """E[x xᵀ] of the normed stream over all norms [D, D], and of what reaches each ``o_proj``; float64."""
    import torch

    stream = Moments()
    attended = [Moments() for _ in network.model.layers]
    handles = [
        network.model.norm.register_forward_hook(lambda _norm, _in, out: stream.add(out / _norm.weight))
    ]
    for layer, of_layer in zip(network.model.layers, attended, strict=True):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            handles.append(norm.register_forward_hook(lambda _norm, _in, out: stream.add(out / _norm.weight)))
        handles.append(
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _module, inputs, each=of_layer: each.add(inputs[0])
            )
        )
    try:
        with torch.no_grad():
            for batch in batches:
                network.model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return stream.mean(), [each.mean() for each in attended]


def _cut(network: Any, narrowed: Any, axes: torch.Tensor, attended: Sequence[torch.Tensor]) -> None:
    """Fill ``narrowed`` from the folded network."""
    # |h·Q| is nearly |h|, but its mean is over fewer numbers: the gains give that back.
    gain = (axes.shape[0] / axes.shape[1]) ** 0.5
    narrowed.model.embed_tokens.weight.copy_(network.model.embed_tokens.weight.double() @ axes)
    narrowed.lm_head.weight.copy_(network.lm_head.weight.double() @ axes)
    narrowed.model.norm.weight.fill_(float(network.model.norm.weight[0]) * gain)
    for old, new, moments in zip(network.model.layers, narrowed.model.layers, attended, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(new, name).weight.fill_(float(getattr(old, name).weight[0]) * gain)
        _cut_attention(old.self_attn, new.self_attn, network.config, narrowed.config, axes, moments)
        for name in ("gate_proj", "up_proj"):
            getattr(new.mlp, name).weight.copy_(getattr(old.mlp, name).weight.double() @ axes)
        new.mlp.down_proj.weight.copy_(axes.T @ old.mlp.down_proj.weight.double())


def _cut_attention(
    old: Any, new: Any, before: Any, after: Any, axes: torch.Tensor, moments: torch.Tensor
) -> None:
    """Keep the query heads that add most to the stream, each with a copy of its key-value head."""
    import torch

    width, heads = after.head_dim, before.num_attention_heads
    output = axes.T @ old.o_proj.weight.double()
    pieces = output.reshape(len(output), heads, width)
    own = moments.reshape(heads, width, heads, width)
    power = [float(torch.trace(pieces[:, i] @ own[i, :, i] @ pieces[:, i].T)) for i in range(heads)]
    kept = sorted(sorted(range(heads), key=lambda i: -power[i])[: after.num_attention_heads])
    read = [i * before.num_key_value_heads // heads for i in kept]
    for name, chosen in (("q_proj", kept), ("k_proj", read), ("v_proj", read)):
        rows = getattr(old, name).weight.double() @ axes
        rows = rows.reshape(-1, width, axes.shape[1])[chosen]
        getattr(new, name).weight.copy_(rows.reshape(-1, axes.shape[1]))
    new.o_proj.weight.copy_(pieces[:, kept].reshape(len(output), -1))
