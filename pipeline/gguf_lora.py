"""Writes a LoRA adapter as GGUF, to be served beside its base: nothing is merged, nothing is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from domains.errors import ModelError
from pipeline.gguf_names import gguf_name, permute_rows, turned_heads
from pipeline.gguf_writer import write_file


def write_lora_gguf(
    path: Path,
    adapter: Mapping[str, tuple[Any, Any]],
    *,
    alpha: float,
    config: Any,
    name: str,
    base_name: str,
    file_type: Literal["F32", "F16"] = "F32",
) -> None:
    """Write an adapter; the file appears whole or not at all, and the same input gives the same bytes.

    llama.cpp adds ``alpha / r * B (A x)`` to a matrix's output, r being the height of ``A``; keys and tensor
    names are those that its ``llama_adapter_lora_init`` looks for.

    Args:
        path: where to write.
        adapter: A [r, in] and B [out, r] (tensors or arrays) by the parameter that they adapt, such as
            "model.layers.0.self_attn.q_proj.weight".
        alpha: LoRA's alpha, > 0. (llama.cpp would read 0 as "don't scale".)
        config: the base's ``LlamaConfig``.
        name: ``general.name``.
        base_name: what the base is called in its own file.
        file_type: F32 serves the trained numbers; F16 halves the file.

    Raises:
        ModelError: there is nothing to write, a parameter can't be adapted there, shapes that don't fit, or
            numbers that are not finite.
    """
    from gguf import GGUFWriter, Keys

    if not adapter or not alpha > 0:
        _refuse(f"{len(adapter)} matrices with alpha {alpha}", "at least one matrix, and alpha above 0")
    dtype = np.dtype(np.float16 if file_type == "F16" else np.float32)
    tensors: dict[str, NDArray[Any]] = {}
    for source in sorted(adapter, key=_order):
        target = _target(source, config)
        a, b = (_array(source, matrix, dtype) for matrix in adapter[source])
        if (
            a.ndim != 2
            or b.ndim != 2
            or len(a) != b.shape[1]
            or (b.shape[0], a.shape[1]) != _shape(target, config)
        ):
            _refuse(
                f"A {a.shape} and B {b.shape} of {source!r}",
                f"[r, in] and [out, r] of a matrix {_shape(target, config)}",
            )
        heads = turned_heads(target, config)
        tensors[f"{target}.lora_a"] = a
        tensors[f"{target}.lora_b"] = b if heads is None else np.ascontiguousarray(permute_rows(b, heads))
    writer = GGUFWriter(None, "llama")
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_name)
    writer.add_file_type(int(file_type == "F16"))
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    for target, tensor in tensors.items():
        writer.add_tensor_info(target, tensor.shape, tensor.dtype, tensor.nbytes)
    write_file(writer, path, iter(tensors.values()))


def _order(source: str) -> tuple[int, str]:
    layer = source.removeprefix("model.layers.").split(".")[0]
    return (int(layer) if layer.isdigit() else 1 << 30), source


def _target(source: str, config: Any) -> str:
    target = gguf_name(source)
    adaptable = target is not None and target != "token_embd.weight" and not target.endswith("norm.weight")
    if target is None or not adaptable or (target == "output.weight" and config.tie_word_embeddings):
        _refuse(f"an adapter of {source!r}", "the linear layers of LlamaForCausalLM, and an untied lm_head")
    return target


def _shape(target: str, config: Any) -> tuple[int, int]:
    """Height and width of the matrix that is adapted."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "output": (config.vocab_size, hidden),
    }[target.split(".")[-2]]


def _array(source: str, matrix: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    array = matrix if isinstance(matrix, np.ndarray) else matrix.detach().float().cpu().numpy()
    if not np.isfinite(array).all() or np.abs(array).max(initial=0) > np.finfo(dtype).max:
        raise ModelError(
            f"the adapter of {source!r} holds numbers that {dtype} can't",
            expected="finite weights",
            next_step="train again with a lower [train] learning_rate",
        )
    return np.ascontiguousarray(array.astype(dtype))


def _refuse(what: str, expected: str) -> NoReturn:
    raise ModelError(
        f"can't write the adapter as GGUF: {what}",
        expected=expected,
        next_step="merge the adapter, or train it on other matrices ([train] in domain.toml)",
    )
