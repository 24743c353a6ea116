"""Writes a Llama model as GGUF: names, row order, rotary factors and vocabulary as llama.cpp expects them.

The model's weights go in as they are (F16 or F32), or as blocks of a grid that were rounded before (`Packed`);
`pipeline.quantize` makes llama.cpp's smaller formats of such a file. Tensors are converted one at a time, so
memory holds one of them beside the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from domains.errors import ModelError
from pipeline.gguf_names import gguf_name, layer_tensors, llama3_rope_factors, permute_rows, turned_heads
from pipeline.gguf_vocabulary import copy_vocabulary, write_vocabulary

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    from pipeline.grids import Packed

FileType = Literal["F16", "F32"]
Array = NDArray[Any]
State = Mapping[str, "Array | torch.Tensor"]


def write_llama_gguf(
    path: Path,
    *,
    state: State,
    config: Any,
    tokenizer: Any,
    template: str,
    name: str,
    licence: str,
    file_type: FileType = "F16",
    end_of_turn: int | None = None,
    copy_tokenizer_from: Path | None = None,
    packed: Mapping[str, Packed] | None = None,
    file_kind: str | None = None,
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
        packed: parameters that are written as these very bytes, in place of what ``state`` may hold of them.
        file_kind: the format that ``general.file_type`` names, such as "Q4_0"; without it ``file_type``.

    Raises:
        ModelError: llama.cpp's Llama graph or vocabulary has no place for something in the model, or packed
            rows don't have the parameter's shape.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(None, "llama")
    _write_facts(writer, config, name=name, licence=licence, kind=file_kind or file_type)
    if copy_tokenizer_from is not None:
        copy_vocabulary(
            writer, copy_tokenizer_from, template=template, size=config.vocab_size, tokenizer=tokenizer
        )
    else:
        write_vocabulary(
            writer, tokenizer, template=template, size=config.vocab_size, end_of_turn=end_of_turn
        )
    plan = _plan(state, packed or {}, config, file_type)
    for target, entry in plan.items():
        size = int(np.prod(entry.shape)) * entry.dtype.itemsize
        writer.add_tensor_info(target, entry.shape, entry.dtype, size, entry.kind)
    write_file(writer, path, (entry.load() for entry in plan.values()))


def _write_facts(writer: GGUFWriter, config: Any, *, name: str, licence: str, kind: str) -> None:
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
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(2)


def _file_type(kind: str) -> int:
    from gguf import LlamaFileType

    number = LlamaFileType.__members__.get("ALL_F32" if kind == "F32" else f"MOSTLY_{kind}")
    if number is None:
        _unsuitable(f"the file type {kind!r}", "a format's name, such as 'Q4_0' or 'Q4_K_M'")
    return int(number)


def check_rope(rope: Mapping[str, Any]) -> None:
    """Pass if a model's rotary scaling (its config.json's ``rope_parameters`` or ``rope_scaling``) has a place in the file.

    Raises:
        ModelError: it has none.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in {"default", "llama3"}:
        _unsuitable(f"its rotary scaling {kind!r}", "'default' or 'llama3'")


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    check_rope(rope)
    return {"rope_theta": 10000.0, **rope}


def _head_dim(config: Any) -> int:
    return int(config.head_dim or config.hidden_size // config.num_attention_heads)


def _unsuitable(what: str, expected: str) -> NoReturn:
    raise ModelError(
        f"can't write the model as GGUF: {what} has no place there",
        expected=expected,
        next_step="use a Llama 3.x or SmolLM2 base in [student]",
    )


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file; with a ``kind`` its shape is that of the bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]
    kind: GGMLQuantizationType | None = None


def _plan(state: State, packed: Mapping[str, Packed], config: Any, file_type: FileType) -> dict[str, _Entry]:
    """Shape, type and loader of every tensor, in the order of the model's layers."""
    matrix = np.dtype(np.float16 if file_type == "F16" else np.float32)
    sources = _sources(state, packed, config)
    plan: dict[str, _Entry] = {}
    if _rope(config).get("rope_type") == "llama3":
        factors = llama3_rope_factors(_rope(config), _head_dim(config))
        plan["rope_freqs.weight"] = _Entry(factors.shape, factors.dtype, lambda: factors)
    for target in sorted(sources, key=_order):
        source, heads = sources[target], turned_heads(target, config)
        if source in packed:
            plan[target] = _packed_entry(source, packed[source], state.get(source), heads)
            continue
        shape = tuple(state[source].shape)
        dtype = matrix if len(shape) > 1 else np.dtype(np.float32)
        plan[target] = _Entry(shape, dtype, _loader(state, source, dtype, heads))
    return plan


def _sources(state: State, packed: Mapping[str, Packed], config: Any) -> dict[str, str]:
    """The parameter behind each tensor. A tied output is written only where it was packed on its own."""
    sources: dict[str, str] = {}
    for source in dict.fromkeys([*state, *packed]):
        target = gguf_name(source)
        tied = target == "output.weight" and config.tie_word_embeddings and source not in packed
        if source.endswith("rotary_emb.inv_freq") or tied:
            continue
        if target is None:
            _unsuitable(f"the parameter {source!r}", "the parameters of LlamaForCausalLM without biases")
        sources[target] = source
    _check_complete(sources, config)
    return sources


def _packed_entry(
    source: str, packed: Packed, plain: Array | torch.Tensor | None, heads: int | None
) -> _Entry:
    from gguf import GGMLQuantizationType, quant_shape_from_byte_shape

    kind, rows = GGMLQuantizationType.__members__.get(packed.kind), packed.rows
    if kind is None or rows.dtype != np.uint8 or rows.ndim != 2:
        _unsuitable(f"{source!r} as {packed.kind} {rows.dtype}", "uint8 rows of one of ggml's types")
    vector = source.endswith("norm.weight")
    try:
        shape = quant_shape_from_byte_shape(rows.shape[vector:], kind)
    except ValueError as error:
        _unsuitable(f"{source!r} packed in rows of {rows.shape[1]} bytes", str(error))
    if plain is not None and shape != tuple(plain.shape):
        _unsuitable(f"{source!r} packed as {shape}", f"its shape {tuple(plain.shape)}")

    def load() -> Array:
        turned = rows if heads is None else permute_rows(rows, heads)
        return np.ascontiguousarray(turned).reshape(rows.shape[vector:])

    return _Entry(rows.shape[vector:], rows.dtype, load, kind)


def _order(target: str) -> tuple[int, int, str]:
    parts = target.split(".")
    if parts[0] == "blk":
        return 1, int(parts[1]), target
    return (0 if parts[0] == "token_embd" else 2), 0, target


def _check_complete(sources: dict[str, str], config: Any) -> None:
    wanted = {"token_embd.weight", "output_norm.weight"}
    wanted |= layer_tensors(config.num_hidden_layers)
    if not config.tie_word_embeddings:
        wanted.add("output.weight")
    if missing := sorted(wanted - set(sources), key=_order):
        raise ModelError(
            f"the model lacks {len(missing)} of {len(wanted)} tensors, first {missing[0]!r}",
            expected="every parameter of its LlamaConfig",
            next_step="train the student again: preceptor train DOMAIN",
        )


def _loader(state: State, source: str, dtype: np.dtype[Any], heads: int | None) -> Callable[[], Array]:
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


def write_file(writer: GGUFWriter, path: Path, tensors: Iterator[Array]) -> None:
    """Write what ``writer`` was told of, with its tensors in that order; the file appears whole or not at all."""
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
