"""QA-LoRA (arXiv 2309.14717) on ggml's grids: the adapter is constant inside a block, and merging it is exact."""

from __future__ import annotations

from functools import partial

from domains.routes import Grid
from pipeline.methods.grid_base import Calibration, base_blocks
from pipeline.methods.inside import Inside
from pipeline.methods.rules import Minima, Rule, Scales
from pipeline.student import Base


def qalora(grid: Grid, calibration: Calibration | None = None) -> Inside:
    """On Q4_1 it moves the minima; on Q4_0, which has none, the scales. The base is rounded as the paper does, by GPTQ, where there is a ``calibration``."""
    return Inside("qalora", grid, partial(_rules, grid=grid, calibration=calibration))


def _rules(base: Base, grid: Grid, calibration: Calibration | None) -> dict[str, Rule]:
    kind = Minima if grid == "Q4_1" else Scales
    return {name: kind(blocks) for name, blocks in base_blocks(base, grid, calibration).items()}
