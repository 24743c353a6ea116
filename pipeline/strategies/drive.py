"""Runs one step: the first rows alone, then all; counts that add up; a refusal to go on where that is honest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domains.errors import StageError
from domains.jsonl import write_jsonl
from domains.steps import GuardedStep, StepOptions
from pipeline.asking import Answers, raise_for_failures
from pipeline.strategies.context import Ctx, Tally
from pipeline.strategies.row import Row
from pipeline.strategies.strategy import Entry

# A teacher that can't do it shows so on these, before the bill for the rest.
PILOT = 20


@dataclass(frozen=True)
class Outcome:
    """All rows that a step gave, in order, and what is to be told of it."""

    rows: list[Row]
    tally: Tally
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> list[Row]:
        """The rows that go on."""
        return [row for row in self.rows if row.status == "kept"]

    def counts(self) -> dict[str, int]:
        """``proposed = kept + rejected + unparsed + error``."""
        names = ("kept", "rejected", "unparsed", "error")
        return {"proposed": self.tally.proposed, **{name: self.tally.statuses[name] for name in names}}


def run_step(entry: Entry, rows: Sequence[Row], make_ctx: Callable[[], Ctx], *, file: Path) -> Outcome:
    """Run a strategy over the rows that it chooses among ``rows`` and write what it gives.

    Where the step's budget of calls is used up it ends as if there were no more rows; those left are in ``facts``.

    The first `PILOT` rows run alone before the others; their answers are in the ledger, so that the whole run
    does not pay for them again.

    Args:
        entry: the strategy.
        rows: of the kind that it needs.
        make_ctx: a fresh context, one for the pilot and one for the whole.
        file: where the rows go; those of a pilot that failed too.

    Raises:
        StageError: too many replies can't be read, too few rows are kept, or most requests failed.
        BudgetExceeded: the cap would be passed; what was answered is in the ledger.
    """
    ctx = make_ctx()
    chosen = entry.choose(rows, ctx)
    if entry.pilot and len(chosen) > PILOT:
        _refuse(_run(entry, chosen[:PILOT], make_ctx(), file), entry, ctx.options, file, few=True)
    outcome = _run(entry, chosen, make_ctx(), file)
    _refuse(outcome, entry, ctx.options, file, few=len(chosen) <= PILOT)
    return outcome


def _run(entry: Entry, chosen: Sequence[Row], ctx: Ctx, file: Path) -> Outcome:
    given = []
    for row in entry.run(chosen, ctx):
        ctx.tally.hear(row)
        given.append(row)
    assert ctx.tally.balanced, f"{entry.name}: {ctx.tally.proposed} proposed, {len(given)} given"
    write_jsonl(file, given)
    facts = dict(ctx.facts)
    if ctx.options.budget.calls is not None:
        facts["budget"] = {"calls": ctx.options.budget.calls, "used": len(ctx.calls)}
    if ctx.tally.skipped:
        facts["ended_early"] = f"{ctx.tally.stopped}; {ctx.tally.skipped} rows were not tried"
    facts["reasons"] = dict(ctx.tally.reasons.most_common())
    return Outcome(given, ctx.tally, facts)


def _refuse(outcome: Outcome, entry: Entry, options: StepOptions, file: Path, *, few: bool) -> None:
    """Stop where going on would waste what the teacher costs.

    Raises:
        StageError: see `run_step`.
    """
    tally = outcome.tally
    total = tally.statuses.total()
    if tally.statuses["error"] * 2 > total:
        failures = {
            f"{number}": row.reason for number, row in enumerate(outcome.rows) if row.status == "error"
        }
        raise_for_failures(Answers(failures=failures), total=total)
    if not isinstance(options, GuardedStep):
        return
    commonest = "; ".join(f"{count} x {reason}" for reason, count in tally.reasons.most_common(3))
    if tally.parse_rate < 1 - options.max_unparsed - 1e-9:
        raise StageError(
            f"{entry.name}: {tally.statuses['unparsed']} of {total} replies can't be read ({commonest}); "
            f"all are in {file}",
            expected=f"at most {options.max_unparsed:.0%}: this teacher can't play this part",
            next_step="take a stronger model ([teacher], or [elicit.judge] for grading), simplify the prompt "
            f"(prompts/), or take {entry.name} out of [[elicit.steps]]",
        )
    if few and tally.keep_rate < options.min_kept - 1e-9:
        raise StageError(
            f"{entry.name}: {tally.statuses['kept']} of the first {total} are kept ({commonest}); all are in {file}",
            expected=f"at least {options.min_kept:.0%}",
            next_step=f"look at {file}: a stronger model, another prompt, or {entry.name} taken out of "
            "[[elicit.steps]]",
        )
