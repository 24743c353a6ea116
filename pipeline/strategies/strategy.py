"""What a strategy is: a plain function with what the driver must know about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline.strategies.context import Ctx
from pipeline.strategies.row import Kind, Row


class Strategy(Protocol):
    """``strategy(rows, ctx)``: gives a row for every proposal, with its status and reason."""

    def __call__(self, rows: Iterable[Row], ctx: Ctx) -> Iterator[Row]:
        """Rows in, rows out."""


@dataclass(frozen=True)
class Cost:
    """What a step will take: requests, tokens of their prompts, most tokens of their replies, rows it gives."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    rows: int


@dataclass(frozen=True)
class Entry:
    """A strategy in the registry.

    Attributes:
        name: as ``use`` in ``domain.toml``.
        run: the function.
        needs: the kind of rows it takes.
        gives: the kind it makes. Rows of the kind that it needs replace those; others are added.
        scope: ``row``: what becomes of a row depends on it alone; ``pool``: on those before it too.
        version: raised when the same input may give other rows.
        estimate: rows in, the step's options and ``[elicit] samples`` to what it costs at most.
        prompts: a step's options to its built-in prompts by name; the domain's own files take
            their place, and must be there where None is.
        choose: which of the rows it works on, decided before the pilot: sampling, or what fits it at all.
        pilot: whether the first rows run alone, to stop in time.
    """

    name: str
    run: Strategy
    needs: Kind
    gives: Kind
    scope: Literal["row", "pool"]
    version: int
    estimate: Callable[[int, Any, int], Cost]
    prompts: Callable[[Any], Mapping[str, str | None]] = lambda _options: {}
    choose: Callable[[Sequence[Row], Ctx], list[Row]] = lambda rows, _ctx: list(rows)
    pilot: bool = True
