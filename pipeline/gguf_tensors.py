"""Reads a GGUF file's matrices back as the bytes they are, under transformers' names and row order.

To check that a written file holds exactly the trained blocks, and to train on a GGUF base's own blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from domains.errors import ModelError
from pipeline.gguf_names import parameter_name, restore_rows, turned_heads
from pipeline.grids.blocks import Packed
from serve.gguf_check import GgufFacts, check_gguf

_NOT_PARAMETERS = {"rope_freqs.weight"}  # follows from the config


def read_packed(path: Path, config: Any) -> dict[str, Packed]:
    """Every parameter of a Llama GGUF file, of whatever type, by its ``LlamaForCausalLM`` name.

    Rows stay in the file (memory-mapped, private) until they are touched; those of q and k are copied, because
    their order changes. A vector (a norm's gains) is one row.

    Args:
        path: the file.
        config: the model's ``LlamaConfig``; its heads say how rows of q and k were reordered.

    Raises:
        ModelError: not a usable GGUF file of a Llama model, one of another shape than ``config``, or one with
            a tensor that ``LlamaForCausalLM`` has no place for.
    """
    facts = check_gguf(path)
    _check_heads(facts, config)
    data = np.asarray(np.memmap(path, mode="c"))
    found = {}
    for tensor in facts.tensors:
        if tensor.name in _NOT_PARAMETERS:
            continue
        name = parameter_name(tensor.name)
        if name is None:
            raise ModelError(
                f"the tensor {tensor.name!r} of {path} has no place in LlamaForCausalLM",
                expected="the tensors of a Llama model without biases",
                next_step="use a Llama 3.x or SmolLM2 file",
            )
        rows = data[tensor.offset : tensor.offset + tensor.size_bytes]
        rows = rows.reshape(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1)
        heads = turned_heads(tensor.name, config)
        found[name] = Packed(tensor.kind, rows if heads is None else restore_rows(rows, heads))
    return found


def _check_heads(facts: GgufFacts, config: Any) -> None:
    for key, wanted in {
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
    }.items():
        # A file without grouped queries may leave out the second.
        stated = facts.metadata.get(key, facts.metadata.get(key.removesuffix("_kv")))
        if stated != wanted:
            raise ModelError(
                f"{key} of {facts.path} is {stated!r}, the model's config says {wanted!r}",
                expected="a file of the same model",
                next_step="check [student] base and the path of the file",
            )
