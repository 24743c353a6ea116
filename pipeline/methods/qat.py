"""Quantization-aware training with LoRA: every step rounds base plus adapter to the grid that is served.

Meta's Llama 3.2 recipe trains the base so, and then an adapter beside it that stays in 16 bits. Here the adapter
itself lies inside the rounding, so that one file without an adapter is exactly what was trained.
"""

from __future__ import annotations

from functools import partial

from domains.routes import Grid
from pipeline.methods.grid_base import block_linears, check_linear
from pipeline.methods.inside import Inside
from pipeline.methods.rules import Rounded, Rule
from pipeline.student import Base


def qat(grid: Grid) -> Inside:
    """On Q4_0 or Q4_1."""
    return Inside("qat", grid, partial(_rules, grid=grid))


def _rules(base: Base, grid: Grid) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for path, linear in block_linears(base.model):
        check_linear(path, linear)
        rules[f"{path}.weight"] = Rounded(linear.weight.detach().float(), grid)
    return rules
