"""A matrix on one of ggml's grids, and the checks that every way onto a grid shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from domains.errors import ModelError

GridName = Literal["Q4_0", "Q4_1", "Q8_0"]

BLOCK = 32  # in-features that share a scale, on all three grids
# Lowest and highest code as stored, and the code that stands for 0 * d.
LIMITS: dict[GridName, tuple[int, int, int]] = {
    "Q4_0": (0, 15, 8),
    "Q4_1": (0, 15, 0),
    "Q8_0": (-128, 127, 0),
}
# Work goes by so many weights at a time: small enough for a core's cache, and memory stays flat on 8192 x 2048.
_PIECE = 1 << 17


@dataclass(frozen=True)
class Blocks:
    """A matrix on a grid; the numbers it stands for are `pipeline.grids.decode`'s.

    Attributes:
        grid: which one.
        codes: [out, in]; uint8 in 0..15 for Q4_0 and Q4_1, int8 for Q8_0.
        d: the scales, float16 [out, in / 32]; may be negative on Q4_0.
        m: the offsets, float16 [out, in / 32]; Q4_1 only.
    """

    grid: GridName
    codes: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """A matrix as the bytes of a GGUF file.

    Attributes:
        kind: the name of its ``GGMLQuantizationType``.
        rows: uint8 [out, bytes per row], rows in transformers' order.
    """

    kind: str
    rows: NDArray[np.uint8]


def checked(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` as float32, if it can go onto a grid.

    Raises:
        ModelError: not a matrix, a width that is no multiple of 32, or numbers that are not finite.
    """
    if weight.dim() != 2 or weight.shape[1] % BLOCK or not weight.numel():
        raise ModelError(
            f"a weight of shape {tuple(weight.shape)} can't be cut into blocks of {BLOCK} in-features",
            expected=f"a matrix [out, in] whose width is a multiple of {BLOCK}",
            next_step="keep that matrix in F16, or use a base whose widths are multiples of 32",
        )
    weight = weight.detach().float()
    # One sum tells in most cases; where it overflowed, every number is looked at.
    if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
        raise ModelError(
            f"a weight of shape {tuple(weight.shape)} holds numbers that are not finite",
            expected="finite weights",
            next_step="train again with a lower [train] learning_rate",
        )
    return weight


def check_scales(d: torch.Tensor, m: torch.Tensor | None = None) -> None:
    """Refuse scales that overflowed float16; ggml would store infinity there and the network would answer NaN.

    Raises:
        ModelError: a scale or offset is not finite.
    """
    for values in (d, m):
        if values is not None and not torch.isfinite(values).all():
            raise ModelError(
                "a block's scale or offset is beyond float16's 65504",
                expected="weights of ordinary size (far below 1e5)",
                next_step="train again with a lower [train] learning_rate",
            )


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Consecutive runs of rows, about `_PIECE` weights each."""
    step = max(1, _PIECE // width)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))
