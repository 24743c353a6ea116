"""Weights to codes and back: ggml's reference rounding bit for bit, and nearest codes on given scales."""

from __future__ import annotations

import torch

from domains.errors import ModelError
from pipeline.grids.blocks import BLOCK, LIMITS, Blocks, GridName, check_scales, checked, pieces


def encode(weight: torch.Tensor, grid: GridName) -> Blocks:
    """The reference quantization of ggml (``quantize_row_*_ref`` of ggml-quants.c), to the bit.

    Products and sums are rounded one after the other, as gguf-py and x86 builds of ggml do. A compiler that
    fuses them (some builds for ARM) decides a few near-ties the other way, which is as near.

    Args:
        weight: [out, in], in a multiple of 32; computed in float32.
        grid: the target.

    Raises:
        ModelError: an unsuitable shape, numbers that are not finite, or a scale beyond float16.
    """
    weight = checked(weight)
    rows, width = weight.shape
    codes = torch.empty_like(weight, dtype=torch.int8 if grid == "Q8_0" else torch.uint8)
    d = weight.new_empty((rows, width // BLOCK), dtype=torch.float16)
    m = torch.empty_like(d) if grid == "Q4_1" else None
    for piece in pieces(rows, width):
        q, scale, offset = _ENCODERS[grid](weight[piece].reshape(-1, BLOCK))
        codes[piece] = q.reshape(-1, width)
        d[piece] = scale.half().reshape(-1, width // BLOCK)
        if m is not None and offset is not None:
            m[piece] = offset.half().reshape(-1, width // BLOCK)
    check_scales(d, m)
    return Blocks(grid, codes, d, m)


def through(weight: torch.Tensor, grid: GridName) -> torch.Tensor:
    """``decode(encode(weight, grid))`` to the bit, float32, without the codes in between.

    Raises:
        ModelError: as `encode`.
    """
    weight = checked(weight)
    rows, width = weight.shape
    values = torch.empty_like(weight)
    for piece in pieces(rows, width):
        q, scale, offset = _ENCODERS[grid](weight[piece].reshape(-1, BLOCK))
        d, m = scale.half(), None if offset is None else offset.half()
        check_scales(d, m)
        values[piece] = decode_values(q, d, m, grid).reshape(-1, width)
    return values


def extremes(blocks: torch.Tensor, *, dim: int = -1) -> torch.Tensor:
    """The number of largest magnitude of each block, with its sign, dimension kept; the first one of equals."""
    top, bottom = blocks.amax(dim, keepdim=True), blocks.amin(dim, keepdim=True)
    found = torch.where(top > -bottom, top, bottom)
    if (tied := top == -bottom).any():
        first = blocks.gather(dim, blocks.abs().argmax(dim, keepdim=True))
        found = torch.where(tied, first, found)
    return found.add_(0.0)  # a block of -0 counts as one of +0


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, torch.ones_like(scale) / scale)


# Codes (whole float32 numbers), scales and offsets of blocks [n, 32], the latter [n, 1] before float16.
_Encoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _encode_q4_0(blocks: torch.Tensor) -> _Encoded:
    scale = extremes(blocks) / -8
    inverse = _inverse(scale)
    shifted = (blocks * inverse).add_(8.5)
    if not torch.isfinite(inverse.sum()):  # |w| < 2e-38: the stored scale is 0; ggml's codes there are 0
        shifted = torch.where(torch.isfinite(inverse), shifted, 0.0)
    return shifted.floor_().clamp_(max=15), scale, None


def _encode_q4_1(blocks: torch.Tensor) -> _Encoded:
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = (high - low) / torch.full_like(low, 15.0)
    shifted = (blocks - low).mul_(_inverse(scale)).add_(0.5).nan_to_num_(nan=0.0, posinf=0.0)
    return shifted.floor_().clamp_(max=15), scale, low


def _encode_q8_0(blocks: torch.Tensor) -> _Encoded:
    highest = blocks.abs().amax(-1, keepdim=True)
    scale = highest / torch.full_like(highest, 127.0)
    scaled = (blocks * _inverse(scale)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    size = scaled.abs()
    whole = size.floor()
    whole.add_(size.sub_(whole).mul_(2.0).floor_())  # C's roundf: halves away from zero
    return whole.copysign_(scaled), scale, None


_ENCODERS = {"Q4_0": _encode_q4_0, "Q4_1": _encode_q4_1, "Q8_0": _encode_q8_0}


def round_values(
    values: torch.Tensor, d: torch.Tensor, m: torch.Tensor | None, grid: GridName
) -> torch.Tensor:
    """The nearest codes, element by element; ``d`` and ``m`` are broadcast against ``values``.

    For one column of a matrix: ``values`` [out] with the block's ``d`` [out]. A zero scale gives the code
    of zero. The result has the codes' stored form, uint8 (Q4_0, Q4_1) or int8 (Q8_0).
    """
    low, high, zero = LIMITS[grid]
    scale = d.float()
    safe = torch.where(scale == 0, 1.0, scale)
    offset = 0.0 if m is None else m.float()
    steps = ((values.float() - offset) / safe).round_().add_(zero).clamp_(low, high)
    steps = torch.where(scale == 0, float(zero), steps)
    return steps.to(torch.int8 if grid == "Q8_0" else torch.uint8)


def decode_values(
    codes: torch.Tensor, d: torch.Tensor, m: torch.Tensor | None, grid: GridName
) -> torch.Tensor:
    """What codes stand for, float32, element by element; the inverse of `round_values`."""
    zero = LIMITS[grid][2]
    steps = (codes.float() - zero if zero else codes.float()) * d.float()
    return steps if m is None else steps.add_(m.float())


def decode(blocks: Blocks) -> torch.Tensor:
    """The numbers that ggml dequantizes a matrix to, float32 [out, in], to the bit."""
    rows, width = blocks.codes.shape
    weight = torch.empty_like(blocks.codes, dtype=torch.float32)
    for piece in pieces(rows, width):
        codes = blocks.codes[piece].reshape(-1, width // BLOCK, BLOCK)
        m = None if blocks.m is None else blocks.m[piece][..., None]
        values = decode_values(codes, blocks.d[piece][..., None], m, blocks.grid)
        weight[piece] = values.reshape(-1, width)
    return weight


def round_to(weight: torch.Tensor, d: torch.Tensor, m: torch.Tensor | None, grid: GridName) -> torch.Tensor:
    """Nearest codes of a matrix [out, in] on given scales [out, in / 32]; halves go to the even step.

    Raises:
        ModelError: an unsuitable shape, or numbers that are not finite.
    """
    weight = checked(weight)
    rows, width = weight.shape
    if d.shape != (rows, width // BLOCK) or (m is None) is (grid == "Q4_1"):
        raise ModelError(
            f"scales of shape {tuple(d.shape)} don't fit a {grid} matrix of shape {(rows, width)}",
            expected=f"scales {(rows, width // BLOCK)}, and offsets for Q4_1 only",
            next_step="take the scales from fit_scales on the same matrix",
        )
    codes = torch.empty_like(weight, dtype=torch.int8 if grid == "Q8_0" else torch.uint8)
    for piece in pieces(rows, width):
        blocks = weight[piece].reshape(-1, width // BLOCK, BLOCK)
        offset = None if m is None else m[piece][..., None]
        codes[piece] = round_values(blocks, d[piece][..., None], offset, grid).reshape(-1, width)
    return codes
