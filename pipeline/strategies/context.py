"""What a strategy may touch: the teacher through the ledger, chance by key, the domain's material, its tally."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from domains.records import Message, Passage, Question
from domains.steps import RoundsStep, StepOptions
from pipeline.strategies.row import Made, Row
from pipeline.strategies.templates import Template

ROUND = 50
O = TypeVar("O", bound=StepOptions)  # noqa: E741  (options)
Role = Literal["teacher", "judge"]


@dataclass(frozen=True)
class Ask:
    """A request before it has a teacher. ``temperature`` and ``max_tokens``: the role's own where None.

    ``n`` samples; at temperature 0 there is one, the others would be copies.
    """

    messages: tuple[Message, ...]
    n: int = 1
    temperature: float | None = None
    max_tokens: int | None = None
    role: Role = "teacher"


@dataclass(frozen=True)
class Said:
    """What came back: a reply, or why there is none (``error``).

    ``call`` is the ledger key, ``teacher`` the model's name for provenance.
    """

    text: str
    call: str
    teacher: str
    sample: int = 0
    truncated: bool = False
    error: str = ""


class Asker(Protocol):
    """Puts requests through the ledger; see `pipeline.strategies.desk.Desk`."""

    def ask(self, asks: Sequence[Ask], *, tell: bool) -> list[list[Said]]:
        """The replies to each request, in order, one per sample."""


@dataclass(frozen=True)
class Material:
    """The domain's own things that strategies work with.

    Attributes:
        questions: all seed and exam questions, with those that earlier steps made.
        passages: all passages of the index by id.
        evidence: a question to the passages that the teacher sees for it.
        instruction: the domain's teacher prompt.
        seed: of ``[elicit]``.
        samples: of ``[elicit]``.
    """

    questions: Sequence[Question]
    passages: Mapping[str, Passage]
    evidence: Callable[[Question], list[Passage]]
    instruction: str
    seed: int = 0
    samples: int = 1

    def shown(self, row: Row) -> list[Passage]:
        """The passages of a row, in the order of their numbers."""
        return [self.passages[each] for each in row.passages if each in self.passages]


@dataclass
class Tally:
    """Counts of one step: ``proposed`` is told before the outcome is known, the others one by one."""

    proposed: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=ROUND))
    attempted: int = 0
    skipped: int = 0
    stopped: str = ""

    def hear(self, row: Row) -> None:
        """Book a row that the strategy gave."""
        self.statuses[row.status] += 1
        self.recent.append(row.status == "kept")
        if row.status != "kept":
            self.reasons[row.reason] += 1

    @property
    def balanced(self) -> bool:
        """Whether proposed = kept + rejected + unparsed + error."""
        return self.proposed == self.statuses.total()

    @property
    def parse_rate(self) -> float:
        """Share of the answered proposals that could be read, in [0, 1]; 1 where there are none."""
        answered = self.statuses.total() - self.statuses["error"]
        return 1 - self.statuses["unparsed"] / answered if answered else 1.0

    @property
    def keep_rate(self) -> float:
        """Share of the proposals that was kept, in [0, 1]; 1 where there are none."""
        return self.statuses["kept"] / self.statuses.total() if self.statuses.total() else 1.0


@dataclass
class Ctx:
    """Everything a strategy may touch. A step has one; its pilot has another.

    Attributes:
        name: of the strategy.
        version: of the strategy.
        options: the step's table in ``domain.toml``.
        material: the domain's questions, passages and prompt.
        templates: the strategy's prompts by name.
        tally: counts; a strategy calls `propose` before it asks.
        calls_per_row: the most requests that one row takes.
        facts: measurements that the report shows (a histogram, warnings).
        calls: keys of the requests so far, those answered from the ledger too: a budget that is used up in one run
            is used up in the same place when the run is repeated.
    """

    name: str
    version: int
    options: StepOptions
    material: Material
    templates: Mapping[str, Template]
    asker: Asker
    calls_per_row: int = 1
    tally: Tally = field(default_factory=Tally)
    facts: dict[str, Any] = field(default_factory=dict)
    calls: set[str] = field(default_factory=set)

    def ask(self, asks: Sequence[Ask], *, tell: bool = False) -> list[list[Said]]:
        """Put requests through the ledger, several at a time; nothing is asked twice, none again for what it says.

        Args:
            asks: repeated ones are asked once.
            tell: say the estimate and the progress line by line.

        Returns:
            For each ask its samples, in order; a request that failed for good has ``error``.

        Raises:
            BudgetExceeded: the cap would be passed; what was answered is in the ledger.
            StageError: the teacher answers none of the first requests.
            TeacherError: the teacher can't be asked.
        """
        heard = self.asker.ask(asks, tell=tell)
        self.calls.update(said.call for replies in heard for said in replies)
        return heard

    def options_as(self, kind: type[O]) -> O:
        """The step's options with their own type."""
        assert isinstance(self.options, kind)
        return self.options

    def rng(self, key: str) -> random.Random:
        """Chance that depends on the run's seed, the strategy and ``key`` only."""
        text = f"{self.material.seed}:{self.name}:{key}"
        return random.Random(hashlib.sha256(text.encode()).digest())  # noqa: S311  (no secret)

    def propose(self, count: int = 1) -> None:
        """Announce ``count`` rows that will be given, whatever becomes of them."""
        self.tally.proposed += count

    def rounds(self, rows: Iterable[Row], *, size: int = ROUND) -> Iterator[list[Row]]:
        """Rows in rounds: the requests of a round run side by side, its outcomes are given before the next.

        Ends early where the last `ROUND` proposals were hardly ever kept (``min_yield``), or where the budget has
        no room for another row.
        """
        waiting = iter(rows)
        while batch := list(itertools.islice(waiting, max(1, self._room(size)))):
            if stopped := self._low_yield() or self._used_up():
                self._end(stopped, skipped=len(batch) + sum(1 for _ in waiting))
                return
            self.tally.attempted += len(batch)
            yield batch

    def affordable(self, rows: Iterable[Row]) -> list[Row]:
        """The first rows that the budget has room for, where all are asked at once; the others are booked as not tried."""
        given = list(rows)
        taken = given[: self._room(len(given))]
        if skipped := len(given) - len(taken):
            self._end(self._used_up(after=len(taken)), skipped=skipped)
        return taken

    def _room(self, rows: int) -> int:
        """How many of so many rows the budget has room for."""
        most = self.options.budget.calls
        return rows if most is None else min(rows, (most - len(self.calls)) // self.calls_per_row)

    def _low_yield(self) -> str:
        recent, min_yield = self.tally.recent, self.options_as(RoundsStep).min_yield
        if len(recent) == recent.maxlen and sum(recent) < min_yield * len(recent):
            return f"{sum(recent)} of the last {len(recent)} proposals were kept"
        return ""

    def _used_up(self, *, after: int = 0) -> str:
        """Why no row can follow the next ``after`` ones; empty where one can."""
        if self._room(after + 1) > after:
            return ""
        most, per_row = self.options.budget.calls, self.calls_per_row
        used = len(self.calls) + after * per_row
        return f"the budget is {most} calls, {used} are used and the next row may take {per_row}"

    def _end(self, why: str, *, skipped: int) -> None:
        self.tally.stopped = why
        self.tally.skipped += skipped

    def made(self, *said: Said, op: str = "", prompt: str = "", writer: Row | Said | None = None) -> Made:
        """Provenance of a row that rests on these replies.

        Args:
            said: all replies, in order.
            op: the variant that was chosen.
            prompt: name of the template, if the strategy has one.
            writer: whose text the row has: a reply (the last one if None), or a row that it was taken from.
        """
        author = writer or (said[-1] if said else Said("", "", ""))
        by = author.made if isinstance(author, Row) else author
        return Made(
            strategy=self.name,
            version=self.version,
            op=op,
            sample=by.sample,
            teacher=by.teacher,
            call=by.call,
            prompt=self.templates[prompt].sha if prompt else "",
            calls=[each.call for each in said],
        )
