"""``preceptor status``: what a run folder holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from domains.domain import Domain
from pipeline.run_folder import Run
from pipeline.stages import STAGES, is_done


@dataclass(frozen=True)
class StageRow:
    """One stage: ``stale`` means that an input, the config or the code changed since it finished."""

    stage: str
    summary: str
    state: Literal["done", "stale", "missing"]
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


def stage_rows(domain: Domain, run: Run) -> list[StageRow]:
    """Every stage in order."""
    finished = run.finished()
    rows = []
    for stage in STAGES:
        entry = finished.get(stage.name)
        if entry is None:
            rows.append(StageRow(stage.name, stage.summary, "missing"))
            continue
        state: Literal["done", "stale"] = "done" if is_done(stage, domain, run) else "stale"
        rows.append(StageRow(stage.name, stage.summary, state, entry.seconds, entry.counts))
    return rows
