"""``adapter/`` of a method that trains blocks: the adapter, and the very blocks that it led to.

adapter_model.safetensors   per matrix ``NAME.lora_A`` and ``NAME.lora_B``, float32
adapter_config.json         what it is
blocks.safetensors          the matrices as the served file holds them, uint8 [rows, bytes]: what was trained is
                            kept, not computed again from the adapter, which another machine may round otherwise
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from domains.errors import ModelError
from domains.jsonl import write_text_atomic
from pipeline.grids.blocks import Packed

BLOCKS = "blocks.safetensors"


def save_adapter(folder: Path, weights: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write the adapter's tensors and what they are."""
    from safetensors.torch import save_file as save_tensors

    tensors = {name: weight.detach().cpu().contiguous() for name, weight in sorted(weights.items())}
    save_tensors(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    text = json.dumps(about, indent=2, sort_keys=True) + "\n"
    write_text_atomic(folder / "adapter_config.json", text)


def save_blocks(folder: Path, packed: Mapping[str, Packed]) -> None:
    """Write the matrices; their formats stand in the file's metadata."""
    _write(folder / BLOCKS, packed)


def load_blocks(folder: Path) -> dict[str, Packed]:
    """The matrices again.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        return _read(folder / BLOCKS)[0]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"can't read {folder / BLOCKS}: {error}",
            expected="the blocks that the train stage wrote",
            next_step="preceptor train DOMAIN --force",
        ) from None


def keep_blocks(path: Path, key: str, make: Callable[[], dict[str, Packed]]) -> dict[str, Packed]:
    """Matrices that were made once: read from ``path`` if they were made for ``key``, else made and written there."""
    try:
        packed, made_for = _read(path)
        if made_for == key:
            return packed
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        pass  # there are none, or damaged ones: both are made anew
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(temporary, made, key=key)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return made


def _write(path: Path, packed: Mapping[str, Packed], *, key: str = "") -> None:
    tensors = {name: np.ascontiguousarray(matrix.rows) for name, matrix in sorted(packed.items())}
    kinds = {name: matrix.kind for name, matrix in sorted(packed.items())}
    about = {"kinds": json.dumps(kinds)} | (
        {"key": key} if key else {}
    )  # of two, the order in the file is not fixed
    save_file(tensors, str(path), metadata=about)


def _read(path: Path) -> tuple[dict[str, Packed], str]:
    with safe_open(str(path), framework="np") as file:
        about = file.metadata()
        packed = {
            name: Packed(kind, file.get_tensor(name)) for name, kind in json.loads(about["kinds"]).items()
        }
        return packed, about.get("key", "")
