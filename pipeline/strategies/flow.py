"""The steps in order: what each takes from those before it, and what is left at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from domains.records import Question, Rationale
from pipeline.progress import Progress
from pipeline.strategies.context import Material
from pipeline.strategies.desk import Desk
from pipeline.strategies.drive import Outcome, run_step
from pipeline.strategies.outcome import question_of, rationale_of
from pipeline.strategies.plan import PreparedStep
from pipeline.strategies.row import Row


class Flow:
    """Rows by kind on their way through the steps.

    A step takes all rows of the kind that it needs. Rows of another kind that it gives are added to those there
    are; rows of the same kind take their place.

    Attributes:
        rows: what is there now, by kind.
        told: per step its counts and facts, for the report.
    """

    def __init__(self, desk: Desk, material: Material, folder: Path, progress: Progress) -> None:
        self._desk = desk
        self._material = material
        self._folder = folder
        self._progress = progress
        self.rows: dict[str, list[Row]] = {"seed": [], "doc": [], "task": []}
        self.told: list[dict[str, Any]] = []

    def start(self, *, seed: Iterable[Row], doc: Iterable[Row]) -> None:
        """What the first step finds; files of an earlier run of the stage go away."""
        self.rows["seed"], self.rows["doc"] = list(seed), list(doc)
        for old in self._folder.glob("*.jsonl"):
            old.unlink()

    def run(self, step: PreparedStep) -> None:
        """Run one step and take over what it keeps.

        Raises:
            StageError: see `pipeline.strategies.drive.run_step`.
        """
        entry = step.entry
        if entry.pilot:
            self._progress.say(f"Step {step.name}: {len(self.rows[entry.needs])} rows")
        outcome = run_step(
            entry,
            self.rows[entry.needs],
            lambda: step.context(self._material, self._desk),
            file=self._folder / f"{step.name}.jsonl",
        )
        before = [] if entry.gives == entry.needs else self.rows[entry.gives]
        self.rows[entry.gives] = [*before, *outcome.kept]
        if entry.gives == "seed":
            new = [question_of(row) for row in outcome.kept]
            self._material = replace(self._material, questions=[*self._material.questions, *new])
        self._tell(step, outcome)

    def _tell(self, step: PreparedStep, outcome: Outcome) -> None:
        counts = outcome.counts()
        self.told.append({"step": step.name, **counts, **outcome.facts})
        if not step.entry.pilot:
            return
        said = ", ".join(f"{value} {name}" for name, value in counts.items())
        reasons = "; ".join(f"{count} x {reason}" for reason, count in outcome.tally.reasons.most_common(3))
        self._progress.say(f"Step {step.name}: {said}" + (f" ({reasons})" if reasons else ""))
        for name in ("warning", "ended_early"):
            if name in outcome.facts:
                self._progress.say(f"Step {step.name}: {outcome.facts[name]}")

    def generated(self) -> list[Question]:
        """The seed questions that steps made."""
        return [question_of(row) for row in self.rows["seed"] if row.made.strategy != "domain"]

    def counts(self) -> dict[str, int]:
        """What the steps left, where they do more than label."""
        if all(not told["step"].endswith("-label") for told in self.told) or len(self.told) > 1:
            return {"generated": len(self.generated()), "rationales": len(self.rows["task"])}
        return {}


def rationales_of(tasks: Sequence[Row]) -> Iterator[Rationale]:
    """Explained answers as curation reads them; samples of one question that came from several steps are renumbered."""
    used: defaultdict[str, set[int]] = defaultdict(set)
    for row in tasks:
        rationale = rationale_of(row)
        taken = used[rationale.question_id]
        sample = rationale.sample if rationale.sample not in taken else max(taken) + 1
        taken.add(sample)
        yield rationale.model_copy(update={"sample": sample})
