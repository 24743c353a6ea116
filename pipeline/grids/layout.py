"""Codes and scales to the bytes of a GGUF tensor and back (block layouts of ggml-common.h, little-endian)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from domains.errors import ModelError
from pipeline.grids.blocks import BLOCK, Blocks, GridName

BLOCK_BYTES: dict[GridName, int] = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_HALF = BLOCK // 2


def pack(blocks: Blocks) -> NDArray[np.uint8]:
    """The bytes of a matrix, uint8 [out, bytes per row]."""
    rows, width = blocks.codes.shape
    count = width // BLOCK
    packed = np.empty((rows, count, BLOCK_BYTES[blocks.grid]), dtype=np.uint8)
    packed[..., 0:2] = _half_bytes(blocks.d)
    codes = blocks.codes.cpu().numpy().reshape(rows, count, BLOCK)
    if blocks.grid == "Q8_0":
        packed[..., 2:] = codes.view(np.uint8)
        return packed.reshape(rows, -1)
    if blocks.m is not None:
        packed[..., 2:4] = _half_bytes(blocks.m)
    # A byte holds the codes of weights j (low) and j + 16 (high).
    np.bitwise_or(codes[..., :_HALF], codes[..., _HALF:] << 4, out=packed[..., -_HALF:])
    return packed.reshape(rows, -1)


def unpack(rows: NDArray[np.uint8], grid: GridName) -> Blocks:
    """The codes and scales in packed bytes, uint8 [out, bytes per row].

    Raises:
        ModelError: rows that are not whole blocks.
    """
    size = BLOCK_BYTES[grid]
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] % size or not rows.size:
        raise ModelError(
            f"{rows.dtype} rows of shape {rows.shape} are not whole {grid} blocks",
            expected=f"uint8 [out, n * {size}]",
            next_step="check the tensor's type",
        )
    count = rows.shape[1] // size
    packed = rows.reshape(len(rows), count, size)
    d = _halves(packed[..., 0:2])
    if grid == "Q8_0":
        codes = np.ascontiguousarray(packed[..., 2:]).view(np.int8)
        return Blocks(grid, torch.from_numpy(codes.reshape(len(rows), -1)), d)
    codes = np.empty((len(rows), count, BLOCK), dtype=np.uint8)
    np.bitwise_and(packed[..., -_HALF:], 15, out=codes[..., :_HALF])
    np.right_shift(packed[..., -_HALF:], 4, out=codes[..., _HALF:])
    m = _halves(packed[..., 2:4]) if grid == "Q4_1" else None
    return Blocks(grid, torch.from_numpy(codes.reshape(len(rows), -1)), d, m)


def _half_bytes(values: torch.Tensor) -> NDArray[np.uint8]:
    halves = np.ascontiguousarray(values.cpu().numpy().astype("<f2"))
    return halves.view(np.uint8).reshape(*halves.shape, 2)


def _halves(data: NDArray[np.uint8]) -> torch.Tensor:
    halves = np.ascontiguousarray(data).view("<f2")[..., 0]
    return torch.from_numpy(halves.astype(np.float16))
