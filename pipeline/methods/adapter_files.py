"""``adapter/`` of a method that trains blocks: the adapter, and the very blocks that it led to.

adapter_model.safetensors   per matrix ``NAME.lora_A`` and ``NAME.lora_B``, float32
adapter_config.json         what it is
blocks.safetensors          the matrices as the served file holds them, uint8 [rows, bytes]: what was trained is
                            kept, not computed again from the adapter, which another machine may round otherwise
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domains.errors import ModelError
from domains.jsonl import write_text_atomic
from pipeline.grids.blocks import Packed

BLOCKS = "blocks.safetensors"


def save_adapter(folder: Path, weights: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write the adapter's tensors and what they are."""
    from safetensors.torch import save_file

    tensors = {name: weight.detach().cpu().contiguous() for name, weight in sorted(weights.items())}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    text = json.dumps(about, indent=2, sort_keys=True) + "\n"
    write_text_atomic(folder / "adapter_config.json", text)


def save_blocks(folder: Path, packed: Mapping[str, Packed]) -> None:
    """Write the matrices; their formats stand in the file's metadata."""
    from safetensors.numpy import save_file

    tensors = {name: np.ascontiguousarray(matrix.rows) for name, matrix in sorted(packed.items())}
    kinds = {name: matrix.kind for name, matrix in sorted(packed.items())}
    save_file(tensors, str(folder / BLOCKS), metadata={"kinds": json.dumps(kinds)})


def load_blocks(folder: Path) -> dict[str, Packed]:
    """The matrices again.

    Raises:
        ModelError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / BLOCKS), framework="np") as file:
            kinds = json.loads(file.metadata()["kinds"])
            return {name: Packed(kind, file.get_tensor(name)) for name, kind in kinds.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"can't read {folder / BLOCKS}: {error}",
            expected="the blocks that the train stage wrote",
            next_step="preceptor train DOMAIN --force",
        ) from None
