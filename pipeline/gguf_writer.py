"""Writes a Llama model as GGUF: names, row order, rotary factors and vocabulary as llama.cpp expects them.

The model's weights go in as they are (F16 or F32); `pipeline.quantize` makes the smaller formats of that file.
Tensors are converted one at a time, so memory holds one of them beside the model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from domains.errors import ModelError
from pipeline.gguf_vocabulary import copy_vocabulary, write_vocabulary

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

FileType = Literal["F16", "F32"]
Array = NDArray[Any]

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
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


def write_llama_gguf(
    path: Path,
    *,
    state: Mapping[str, Array | torch.Tensor],
    config: Any,
    tokenizer: Any,
    template: str,
    name: str,
    licence: str,
    file_type: FileType = "F16",
    end_of_turn: int | None = None,
    copy_tokenizer_from: Path | None = None,
) -> None:
    """Write a model; the file appears whole or not at all, and the same input gives the same bytes.

    Args:
        path: where to write.
        state: parameters by their ``LlamaForCausalLM`` names; read one at a time.
        config: the model's ``LlamaConfig``.
        tokenizer: its fast tokenizer (byte-level BPE); not used with ``copy_tokenizer_from``.
        template: the chat template, jinja2 source.
        name: ``general.name``.
        licence: ``general.license``.
        file_type: of the matrices; vectors are always F32.
        end_of_turn: the token that ends a reply, where the tokenizer's EOS is another.
        copy_tokenizer_from: a GGUF file of the same vocabulary, whose tokenizer keys are taken over.

    Raises:
        ModelError: llama.cpp's Llama graph or vocabulary has no place for something in the model.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(None, "llama")
    _write_facts(writer, config, name=name, licence=licence, file_type=file_type)
    if copy_tokenizer_from is not None:
        copy_vocabulary(
            writer, copy_tokenizer_from, template=template, size=config.vocab_size, tokenizer=tokenizer
        )
    else:
        write_vocabulary(
            writer, tokenizer, template=template, size=config.vocab_size, end_of_turn=end_of_turn
        )
    plan = _plan(state, config, file_type)
    for target, (shape, dtype, _) in plan.items():
        writer.add_tensor_info(target, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    _write_file(writer, path, (load() for _, _, load in plan.values()))


def _write_facts(writer: GGUFWriter, config: Any, *, name: str, licence: str, file_type: FileType) -> None:
    head_dim = _head_dim(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_license(licence)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type({"F32": 0, "F16": 1}[file_type])
    writer.add_quantization_version(2)


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in {"default", "llama3"}:
        _unsuitable(f"its rotary scaling {kind!r}", "'default' or 'llama3'")
    return {"rope_theta": 10000.0, **rope}


def _head_dim(config: Any) -> int:
    return int(config.head_dim or config.hidden_size // config.num_attention_heads)


def _unsuitable(what: str, expected: str) -> NoReturn:
    raise ModelError(
        f"can't write the model as GGUF: {what} has no place there",
        expected=expected,
        next_step="use a Llama 3.x or SmolLM2 base in [student]",
    )


Plan = dict[str, tuple[tuple[int, ...], "np.dtype[Any]", Callable[[], Array]]]


def _plan(state: Mapping[str, Array | torch.Tensor], config: Any, file_type: FileType) -> Plan:
    """Shape, type and loader of every tensor, in the order of the model's layers."""
    matrix = np.dtype(np.float16 if file_type == "F16" else np.float32)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    sources: dict[str, str] = {}
    for source in state:
        target = gguf_name(source)
        if source.endswith("rotary_emb.inv_freq") or (
            target == "output.weight" and config.tie_word_embeddings
        ):
            continue
        if target is None:
            _unsuitable(f"the parameter {source!r}", "the parameters of LlamaForCausalLM without biases")
        sources[target] = source
    _check_complete(sources, config)
    plan: Plan = {}
    if _rope(config).get("rope_type") == "llama3":
        factors = llama3_rope_factors(_rope(config), _head_dim(config))
        plan["rope_freqs.weight"] = (factors.shape, factors.dtype, lambda: factors)
    for target in sorted(sources, key=_order):
        shape = tuple(state[sources[target]].shape)
        dtype = matrix if len(shape) > 1 else np.dtype(np.float32)
        load = _loader(state, sources[target], dtype, heads.get(target.split(".")[-2]))
        plan[target] = (shape, dtype, load)
    return plan


def _order(target: str) -> tuple[int, int, str]:
    parts = target.split(".")
    if parts[0] == "blk":
        return 1, int(parts[1]), target
    return (0 if parts[0] == "token_embd" else 2), 0, target


def _check_complete(sources: dict[str, str], config: Any) -> None:
    wanted = {"token_embd.weight", "output_norm.weight"}
    wanted |= {
        f"blk.{n}.{kind}.weight" for n in range(config.num_hidden_layers) for kind in _IN_LAYER.values()
    }
    if not config.tie_word_embeddings:
        wanted.add("output.weight")
    if missing := sorted(wanted - set(sources), key=_order):
        raise ModelError(
            f"the model lacks {len(missing)} of {len(wanted)} tensors, first {missing[0]!r}",
            expected="every parameter of its LlamaConfig",
            next_step="train the student again: preceptor train DOMAIN",
        )


def _loader(
    state: Mapping[str, Array | torch.Tensor], source: str, dtype: np.dtype[Any], heads: int | None
) -> Callable[[], Array]:
    def load() -> Array:
        value = state[source]
        array: Array = value if isinstance(value, np.ndarray) else value.detach().float().cpu().numpy()
        if not np.isfinite(array).all() or np.abs(array).max(initial=0) > np.finfo(dtype).max:
            raise ModelError(
                f"{source!r} holds numbers that {dtype} can't ({np.abs(array).max():.3g} at most)",
                expected="finite weights",
                next_step="train again with a lower [train] learning_rate",
            )
        if heads is not None:
            array = permute_rows(array, heads)
        return np.ascontiguousarray(array.astype(dtype))

    return load


def _write_file(writer: GGUFWriter, path: Path, tensors: Iterator[Array]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor)
        writer.close()
        temporary.replace(path)
    finally:
        if writer.fout is not None:
            writer.close()
        temporary.unlink(missing_ok=True)
