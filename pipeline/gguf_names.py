"""Between transformers' Llama and llama.cpp's: tensor names, the row order of q and k, rotary factors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.weight")
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str | None:
    """The GGUF name of a parameter of ``LlamaForCausalLM``, or None where GGUF has no place for it."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _LAYER.fullmatch(name)
    kind = _IN_LAYER.get(match[2]) if match else None
    return f"blk.{match[1]}.{kind}.weight" if match and kind else None


def parameter_name(target: str) -> str | None:
    """The inverse of `gguf_name`: a parameter's name in ``LlamaForCausalLM``, or None where it has none."""
    for name, theirs in _OUTSIDE.items():
        if theirs == target:
            return name
    match = _BLOCK.fullmatch(target)
    for name, theirs in _IN_LAYER.items():
        if match and theirs == match[2]:
            return f"model.layers.{match[1]}.{name}.weight"
    return None


def turned_heads(target: str, config: Any) -> int | None:
    """How many heads a GGUF tensor's rows are reordered by (q and k), or None where they stay."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(target.split(".")[-2])


def layer_tensors(layers: int) -> set[str]:
    """The GGUF names of what every Llama layer holds."""
    return {f"blk.{n}.{kind}.weight" for n in range(layers) for kind in _IN_LAYER.values()}


def permute_rows(weight: Array, heads: int) -> Array:
    """Rows of a q or k projection, [heads * d, in], in the order of llama.cpp's interleaved rotary embedding.

    transformers rotates the pair (i, i + d/2) of a head, llama.cpp's ``llama`` graph (2i, 2i + 1).
    """
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def restore_rows(weight: Array, heads: int) -> Array:
    """The inverse of `permute_rows`."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def llama3_rope_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """What ``rope_type = "llama3"`` divides each rotary frequency by, [head_dim / 2].

    Long wavelengths are stretched by ``factor``, short ones kept, those between blended (Llama 3.1).
    """
    frequency = float(rope["rope_theta"]) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * math.pi / frequency
    original, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    blend = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)
