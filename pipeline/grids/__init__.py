"""The grids on which llama.cpp stores a matrix, and how weights get onto them.

A grid's numbers are ``d * (code - 8)`` (Q4_0), ``d * code + m`` (Q4_1) or ``d * code`` (Q8_0), with one
float16 ``d`` (and ``m``) for every 32 neighbouring in-features. `encode` rounds as ggml does, `fit` searches
better scales, and whatever `Blocks` hold is what the served file holds: `pack` writes codes, it rounds nothing.
"""

from pipeline.grids.blocks import BLOCK, Blocks, GridName, Packed
from pipeline.grids.layout import pack, unpack
from pipeline.grids.library import ggml_decode, ggml_encode, ggml_needs_importance
from pipeline.grids.rounding import decode, decode_values, encode, round_to, round_values
from pipeline.grids.search import fit, fit_scales
from pipeline.grids.straight_through import fake_quantize, round_scales

__all__ = [
    "BLOCK",
    "Blocks",
    "GridName",
    "Packed",
    "decode",
    "decode_values",
    "encode",
    "fake_quantize",
    "fit",
    "fit_scales",
    "ggml_decode",
    "ggml_encode",
    "ggml_needs_importance",
    "pack",
    "round_scales",
    "round_to",
    "round_values",
    "unpack",
]
