"""The main job: run the stages in order, skip what is done, keep what a killed process finished."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from domains.domain import Domain
from domains.errors import StageError
from pipeline.preflight import check_owner, note_owner
from pipeline.progress import Progress
from pipeline.run_folder import Finished, Report, Run, disk_errors
from pipeline.stages import NAMES, STAGES, Stage, fingerprint, is_done, paths_of


@dataclass(frozen=True)
class Outcome:
    """What became of one stage in this call."""

    stage: str
    skipped: bool
    entry: Finished


def run_stage(name: str, domain: Domain, run: Run, progress: Progress, *, force: bool = False) -> Outcome:
    """Run one stage unless it is done; the caller holds the run's lock.

    Raises:
        StageError: an input is missing (names the stage that makes it), or the stage failed.
        PreceptorError: whatever else the stage raises.
    """
    stage = STAGES[NAMES.index(name)]
    _need_inputs(stage, domain, run)
    if not force and is_done(stage, domain, run):
        return Outcome(name, True, run.finished()[name])
    module = importlib.import_module(f"pipeline.{name}")
    start = time.monotonic()
    with disk_errors(run.folder):
        run.forget([name])
        before = fingerprint(stage, domain, run)
        report: Report = module.run(domain, run, progress)
        seconds = round(time.monotonic() - start, 1)
        entry = Finished(fingerprint=before, counts=report.counts, facts=report.facts, seconds=seconds)
        run.finish(name, entry)
    return Outcome(name, False, entry)


def run_job(
    domain: Domain,
    run: Run,
    progress: Progress,
    *,
    stages: Sequence[str] = NAMES,
    force: bool = False,
    after: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run ``stages`` in order under the run's lock.

    Args:
        domain: what to build.
        run: where.
        progress: told what happens.
        stages: names, in order.
        force: run them even when nothing changed.
        after: called when a stage is done or was skipped.

    Raises:
        ConfigError: the runs of this name belong to another domain's folder.
        RunLocked: another process works on this run.
        PreceptorError: a stage failed; what finished before is kept.
    """
    outcomes: list[Outcome] = []
    check_owner(domain, run)
    with run:
        for name in stages:
            outcome = run_stage(name, domain, run, progress, force=force)
            if not outcomes:
                note_owner(domain, run)
            outcomes.append(outcome)
            if after is not None:
                after(outcome)
        if NAMES[-1] in stages:
            run.point_latest()
    return outcomes


def _need_inputs(stage: Stage, domain: Domain, run: Run) -> None:
    writers = {what: other.name for other in STAGES for what in other.writes}
    for what in stage.reads:
        missing = [path for path in paths_of(what, domain, run) if not path.exists()]
        if not missing or what == "checks":
            continue
        if what in writers:
            raise StageError(
                f"{stage.name} needs {missing[0]}, which does not exist yet",
                expected=f"the {writers[what]} stage done",
                next_step=f"preceptor {writers[what]} {domain.argument}   "
                "(with the same --profile, --run and --runs, if any)",
            )
        raise StageError(
            f"{stage.name} needs {str(missing[0])!r}, which does not exist",
            expected=f"the path in [corpus] {what} of {domain.folder / 'domain.toml'}",
            next_step="mend that path",
        )
