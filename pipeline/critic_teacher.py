"""The teacher as a critic, through the ledger: each label is asked and paid once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from domains.errors import StageError
from domains.records import Critique
from pipeline.asking import answer_all
from pipeline.critic import Ask
from pipeline.critic_prompts import MAX_TOKENS, critic_messages, parse_critique
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.teacher import Request, Teacher

_ENOUGH = 10  # judgements of one task before their unreadable share says anything


class TeacherCritic:
    """Asks for labels at temperature 0.

    ``counts`` has, per task, ``asked.*``, ``unparsed.*`` (a reply in another form) and ``failed.*`` (no reply).

    Args:
        teacher: who is asked.
        ledger: of the domain.
        max_cost: hard cap on what the ledger may have cost, in ``currency``.
        currency: of the teacher's prices.
        max_unparsed: the most that unreadable replies may be of a task's replies.
        progress: told of the asking.
    """

    def __init__(
        self,
        teacher: Teacher,
        ledger: Ledger,
        *,
        max_cost: float,
        currency: str,
        max_unparsed: float,
        progress: Progress,
    ) -> None:
        self.name = teacher.name
        self.counts: Counter[str] = Counter()
        self._teacher, self._ledger = teacher, ledger
        self._max_cost, self._currency = max_cost, currency
        self._max_unparsed, self._progress = max_unparsed, progress

    def judge(self, asks: Sequence[Ask]) -> list[Critique | None]:
        """See `pipeline.critic.Critic.judge`.

        Raises:
            StageError: more than ``max_unparsed`` of a task's replies can't be read.
            BudgetExceeded: as `pipeline.asking.answer_all`.
            TeacherError: the same.
        """
        requests = [
            Request(
                model=self._teacher.identity,
                messages=critic_messages(ask),
                temperature=0.0,
                max_tokens=MAX_TOKENS,
                sample=0,
            )
            for ask in asks
        ]
        if not requests:
            return []
        answers = answer_all(
            requests,
            self._teacher,
            self._ledger,
            max_cost=self._max_cost,
            currency=self._currency,
            progress=self._progress,
        )
        found: list[Critique | None] = []
        for ask, request in zip(asks, requests, strict=True):
            entry = answers.entries.get(request.key)
            parsed = parse_critique(ask, entry.text) if entry is not None else None
            self.counts[f"asked.{ask.task}"] += 1
            if entry is None:
                self.counts[f"failed.{ask.task}"] += 1
            elif parsed is None:
                self.counts[f"unparsed.{ask.task}"] += 1
            found.append(ask.labelled(*parsed, self.name) if parsed else None)
        self._check()
        return found

    def _check(self) -> None:
        for name in [key for key in self.counts if key.startswith("asked.")]:
            task = name.partition(".")[2]
            replies = self.counts[name] - self.counts[f"failed.{task}"]
            unread = self.counts[f"unparsed.{task}"]
            if replies >= _ENOUGH and unread > self._max_unparsed * replies:
                raise StageError(
                    f"{unread} of {replies} labels for {task!r} that {self.name} gave can't be read",
                    expected=f"at most {self._max_unparsed:.0%} ([reflect] max_unparsed): "
                    "a label, then a line with its explanation",
                    next_step='a stronger teacher ([teacher] kind = "endpoint"), or [reflect] critic = "rules"',
                )
