"""From the name in ``[train] method`` to the method."""

from __future__ import annotations

from domains.routes import Grid
from pipeline.methods.grid_base import Calibration
from pipeline.methods.grid_lora import GridLora
from pipeline.methods.method import Method
from pipeline.methods.qalora import qalora
from pipeline.methods.qat import qat
from pipeline.methods.qlora import Qlora


def method_of(name: str, grid: Grid | None, calibration: Calibration | None = None) -> Method:
    """The method behind a name of ``[train] method``, on a grid that it knows (`domains.routes.GRIDS`).

    ``calibration`` is for those with a frozen base on the grid (`domains.routes.ON_BASE`): it is rounded by GPTQ.
    """
    if name == "qlora":
        return Qlora()
    assert grid is not None  # the configuration completes it
    if name == "qalora":
        return qalora(grid, calibration)
    if name == "qat":
        return qat(grid)
    assert name == "grid-lora", name
    return GridLora(grid, calibration)
