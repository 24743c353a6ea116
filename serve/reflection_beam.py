"""Beam search over segments (arXiv 2310.11511 §3.3): hypotheses are values, so siblings can't touch each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from domains.records import Hit
from serve.reflection_run import Decision, Stretch
from serve.reflection_scores import mean_score


@dataclass(frozen=True)
class Opening:
    """How a segment begins: its decision, the tokens with its passage if any.

    ``bare`` opens it once its passage had to leave the context.
    """

    decision: Decision
    tokens: tuple[int, ...]
    bare: tuple[int, ...]
    hit: Hit | None = None


@dataclass(frozen=True)
class Step:
    """One written segment of a hypothesis."""

    opening: Opening
    stretch: Stretch
    score: float


@dataclass(frozen=True)
class Hypothesis:
    """An answer as far as it is written. ``wants`` is how it goes on; None: it is finished."""

    steps: tuple[Step, ...] = ()
    wants: Decision | None = None

    @property
    def score(self) -> float:
        """The mean of the segments' scores."""
        return mean_score([step.score for step in self.steps])

    @property
    def silent(self) -> bool:
        """Whether none of its segments says anything."""
        return all(step.stretch.silent for step in self.steps)

    def with_step(self, step: Step) -> Hypothesis:
        """This hypothesis and one segment more."""
        return Hypothesis((*self.steps, step), step.stretch.next_decision)


Expand = Callable[[Sequence[Hypothesis]], list[list[Hypothesis]]]


def search(root: Hypothesis, expand: Expand, *, beam: int, depth: int) -> Hypothesis | None:
    """The best finished hypothesis, None where none is left.

    Every level expands the ``beam`` best open hypotheses; finished ones wait until the end and compete there. One
    whose continuations were all dropped ends with the segments it has.

    Args:
        root: nothing written yet.
        expand: the children of each hypothesis, those that are dropped left out.
        beam: open hypotheses that are kept.
        depth: most segments.
    """
    open_: list[Hypothesis] = [root]
    finished: list[Hypothesis] = []
    for _ in range(depth):
        children: list[Hypothesis] = []
        for parent, found in zip(open_, expand(open_), strict=True):
            children += found
            if not found and parent.steps:
                finished.append(replace(parent, wants=None))
        finished += [child for child in children if child.wants is None]
        waiting = [child for child in children if child.wants is not None]
        open_ = sorted(waiting, key=_rank, reverse=True)[:beam]  # stable: the first of equals
        if not open_:
            break
    finished += [replace(hypothesis, wants=None) for hypothesis in open_ if hypothesis.steps]
    return max(finished, key=_rank, default=None)


def _rank(hypothesis: Hypothesis) -> tuple[bool, float]:
    """As in the short form, what says nothing wins only over its like (`serve.reflection_scores.may_win`)."""
    return not hypothesis.silent, hypothesis.score


def context_tokens(prompt: Sequence[int], hypothesis: Hypothesis, *, without_passages: int) -> list[int]:
    """The tokens of a hypothesis: passages stay in line, but for those of the first ``without_passages`` steps."""
    tokens = list(prompt)
    for at, step in enumerate(hypothesis.steps):
        if at < without_passages:
            tokens += [*step.opening.bare, *step.stretch.plain]
        else:
            tokens += [*step.opening.tokens, *step.stretch.written]
    return tokens
