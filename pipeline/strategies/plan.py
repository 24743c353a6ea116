"""Before the first request: whether the steps can run, with which prompts, and what they may cost."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from domains.errors import ConfigError
from domains.steps import LabelStep, StepOptions
from pipeline.asking import Estimate
from pipeline.strategies import label
from pipeline.strategies.context import Ctx, Material
from pipeline.strategies.desk import Desk
from pipeline.strategies.orca import PREFIX
from pipeline.strategies.registry import PROMPT_NAMES, STRATEGIES
from pipeline.strategies.row import Row
from pipeline.strategies.strategy import Cost, Entry
from pipeline.strategies.templates import Template, own_or_default
from pipeline.teacher import price

NOT_OURS = {"system", "teacher"}


@dataclass(frozen=True)
class PreparedStep:
    """A step that can run. ``name`` is its file's: ``2-rate``."""

    name: str
    entry: Entry
    options: StepOptions
    templates: Mapping[str, Template]

    def context(self, material: Material, desk: Desk) -> Ctx:
        """A fresh context of the step."""
        entry = self.entry
        per_row = entry.estimate(1, self.options, material.samples).calls
        return Ctx(entry.name, entry.version, self.options, material, self.templates, desk, per_row)


@dataclass(frozen=True)
class PlannedStep:
    """What one step will take at most; ``cached`` requests were answered before. ``exact``: no guess in it."""

    step: str
    rows: int
    requests: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    exact: bool


@dataclass(frozen=True)
class Plan:
    """All steps, and their sum."""

    steps: list[PlannedStep]
    total: Estimate


def prepare(steps: Sequence[StepOptions], prompts: Mapping[str, str]) -> list[PreparedStep]:
    """The steps with their strategies and prompts.

    Args:
        steps: of ``[elicit]``.
        prompts: all prompts of the domain by name.

    Raises:
        ConfigError: a step needs what no step before it gives, nothing gives explained answers, or a prompt file is
            wrong.
    """
    there = {"seed", "doc"}
    prepared = []
    for number, options in enumerate(steps, 1):
        entry = STRATEGIES[options.use]  # type: ignore[attr-defined]  # every member of the union has it
        if entry.needs not in there:
            raise _wrong(
                f"step {number}, {entry.name}, needs explained answers and no step before it gives any"
            )
        there.add(entry.gives)
        templates = own_or_default(entry.prompts(options), prompts)
        prepared.append(PreparedStep(f"{number}-{entry.name}", entry, options, templates))
    if "task" not in there:
        raise _wrong("no step explains answers")
    _check_names(prompts)
    return prepared


def _wrong(what: str) -> ConfigError:
    givers = [entry.name for entry in STRATEGIES.values() if entry.gives == "task" != entry.needs]
    return ConfigError(
        f"[[elicit.steps]]: {what}",
        expected=f"one of {', '.join(givers)} first",
        next_step="mend the order of [[elicit.steps]] in domain.toml",
    )


def _check_names(prompts: Mapping[str, str]) -> None:
    """Refuse a file that is nearly named like a built-in prompt: it would be passed over silently."""
    for name in prompts.keys() - PROMPT_NAMES - NOT_OURS:
        if name.startswith(PREFIX):
            continue
        if close := difflib.get_close_matches(name, sorted(PROMPT_NAMES), n=1, cutoff=0.8):
            raise ConfigError(
                f"prompts/{name}.md is no prompt of any strategy",
                expected=f"did you mean {close[0]}.md?",
                next_step="rename the file, or move it out of prompts/",
            )


def plan_steps(
    steps: Sequence[PreparedStep], rows: Mapping[str, Sequence[Row]], material: Material, desk: Desk
) -> Plan:
    """What the steps will take: exactly for labelling the questions that are there, at most for the others.

    Args:
        steps: in order.
        rows: the rows of kinds ``seed`` and ``doc`` that are there.
        material: of the domain.
        desk: knows the ledger and the prices.
    """
    guessed = {"seed": 0, "doc": 0, "task": 0}
    planned = []
    for step in steps:
        entry = step.entry
        there = entry.choose(rows.get(entry.needs, ()), step.context(material, desk))
        more = guessed[entry.needs]
        cost = within_budget(entry.estimate(len(there) + more, step.options, material.samples), step.options)
        guessed[entry.gives] = cost.rows + (0 if entry.gives == entry.needs else guessed[entry.gives])
        planned.append(_planned(step, there, more, cost, material, desk))
    return Plan(planned, _total(planned, desk))


def within_budget(cost: Cost, options: StepOptions) -> Cost:
    """What is left of an estimate under the step's budget of calls."""
    most = options.budget.calls
    if most is None or cost.calls <= most:
        return cost
    share = most / cost.calls
    return Cost(
        most,
        math.ceil(cost.prompt_tokens * share),
        math.ceil(cost.completion_tokens * share),
        min(cost.rows, most),
    )


def _planned(
    step: PreparedStep, there: Sequence[Row], more: int, cost: Cost, material: Material, desk: Desk
) -> PlannedStep:
    if isinstance(step.options, LabelStep):
        there = step.context(material, desk).affordable(there)
        exact = desk.estimate([ask for ask, _ in label.asks(there, step.context(material, desk))])
        more = (cost.calls - len(there) * material.samples) // material.samples
        rest = step.entry.estimate(more, step.options, material.samples)
        return PlannedStep(
            step.name,
            len(there) + more,
            exact.requests + rest.calls,
            exact.cached,
            exact.prompt_tokens + rest.prompt_tokens,
            exact.max_completion_tokens + rest.completion_tokens,
            exact=not more,
        )
    return PlannedStep(
        step.name, len(there) + more, cost.calls, 0, cost.prompt_tokens, cost.completion_tokens, exact=False
    )


def _total(planned: Sequence[PlannedStep], desk: Desk) -> Estimate:
    prompt = sum(step.prompt_tokens for step in planned)
    completion = sum(step.completion_tokens for step in planned)
    costs = [
        price(voice.teacher, prompt_tokens=prompt, completion_tokens=completion)
        for voice in desk.voices.values()
    ]
    return Estimate(
        requests=sum(step.requests for step in planned),
        cached=sum(step.cached for step in planned),
        prompt_tokens=prompt,
        max_completion_tokens=completion,
        max_cost=max(costs),
        currency=desk.currency,
    )
