"""Putting requests to a teacher through the ledger: nothing twice, never past the cap, nothing lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from domains.errors import BudgetExceeded, StageError
from pipeline.ledger import Entry, Ledger
from pipeline.progress import Progress
from pipeline.teacher import (
    Failure,
    Outcome,
    Request,
    Teacher,
    estimate_prompt_tokens,
    highest_price,
    price,
)

# A teacher that answers none of the first requests will not answer the others either.
CANARY = 10
_TOLD_TIMES = 10


@dataclass(frozen=True)
class Estimate:
    """What asking will take at most. ``requests`` includes the ``cached`` ones, which cost nothing."""

    requests: int
    cached: int
    prompt_tokens: int
    max_completion_tokens: int
    max_cost: float
    currency: str


@dataclass
class Answers:
    """What came of the requests: every key is in ``entries`` or in ``failures``."""

    entries: dict[str, Entry] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    cached: int = 0


def estimate(requests: Sequence[Request], teacher: Teacher, ledger: Ledger, *, currency: str) -> Estimate:
    """Tokens and cost of what is not in the ledger yet; asks nothing."""
    unique = {request.key: request for request in requests}
    new = [request for key, request in unique.items() if ledger.get(key) is None]
    return Estimate(
        requests=len(unique),
        cached=len(unique) - len(new),
        prompt_tokens=sum(estimate_prompt_tokens(request.messages) for request in new),
        max_completion_tokens=sum(request.max_tokens for request in new),
        max_cost=sum(highest_price(teacher, request) for request in new),
        currency=currency,
    )


def answer_all(
    requests: Sequence[Request],
    teacher: Teacher,
    ledger: Ledger,
    *,
    max_cost: float,
    currency: str,
    progress: Progress,
) -> Answers:
    """Answer every request from the ledger or by the teacher; answers are committed one by one.

    Args:
        requests: repeated ones are asked once.
        teacher: who answers what is not in the ledger.
        ledger: shared by all runs of the domain.
        max_cost: hard cap on what the whole ledger may have cost, in ``currency``.
        currency: of the teacher's prices.
        progress: one unit per request.

    Raises:
        BudgetExceeded: the next request could pass the cap; what was answered is in the ledger.
        StageError: none of the first requests was answered.
        TeacherError: the teacher can't be asked at all.
    """
    desk = _Desk(requests, teacher, ledger, max_cost, currency, progress)

    def tell_waiting() -> None:
        progress.say("Another run asks this domain's teacher; waiting until it is done.")

    with ledger.asking(on_wait=tell_waiting):
        desk.work()
    return desk.answers


class _Desk:
    """One round of asking: hands requests out when their highest price fits, and books the outcomes."""

    def __init__(
        self,
        requests: Sequence[Request],
        teacher: Teacher,
        ledger: Ledger,
        max_cost: float,
        currency: str,
        progress: Progress,
    ) -> None:
        unique = {request.key: request for request in requests}
        self._total = len(unique)
        self._waiting = list(reversed(unique.items()))
        self._teacher = teacher
        self._ledger = ledger
        self._max_cost = max_cost
        self._currency = currency
        self._progress = progress
        self._tokens = 0
        self._new = 0
        self._refused: dict[str, Request] = {}
        self.answers = Answers()

    def work(self) -> None:
        self._progress.start(f"asking {self._teacher.name}", self._total)
        before = -1
        # Near the cap requests in flight hold back others until they are settled: ask in rounds.
        while len(self._waiting) + len(self._refused) not in {0, before}:
            before = len(self._waiting) + len(self._refused)
            self._waiting += [(key, request) for key, request in self._refused.items()]
            self._refused.clear()
            self._teacher.ask_many(self._hand_out(), self._hear)
        if left := len(self._waiting) + len(self._refused):
            self._give_up(left)
        self._tell()

    def _hand_out(self) -> Iterator[Request]:
        while self._waiting:
            key, request = self._waiting[-1]
            if entry := self._ledger.get(key):
                self._waiting.pop()
                self.answers.entries[key] = entry
                self.answers.cached += 1
                self._progress.advance()
                continue
            if not self._reserve(key, request):
                return
            self._waiting.pop()
            yield request

    def _reserve(self, key: str, request: Request) -> bool:
        cost = highest_price(self._teacher, request)
        return self._ledger.reserve(key, cost=cost, currency=self._currency, max_cost=self._max_cost)

    def _hear(self, request: Request, outcome: Outcome) -> bool:
        key = request.key
        if isinstance(outcome, Failure):
            return self._book_failure(key, request, outcome)
        self.answers.entries[key] = self._ledger.put(
            key,
            outcome.text,
            finish=outcome.finish,
            prompt_tokens=outcome.prompt_tokens,
            completion_tokens=outcome.completion_tokens,
            cost=price(
                self._teacher,
                prompt_tokens=outcome.prompt_tokens,
                completion_tokens=outcome.completion_tokens,
            ),
            currency=self._currency,
            model=self._teacher.name,
        )
        self._new += 1
        self._tokens += outcome.prompt_tokens + outcome.completion_tokens
        self._done()
        return True

    def _book_failure(self, key: str, request: Request, failure: Failure) -> bool:
        cost = highest_price(self._teacher, request) if failure.may_be_billed else 0.0
        self._ledger.fail(key, failure.reason, cost=cost, currency=self._currency)
        if not failure.final:
            if self._reserve(key, request):
                return True
            self._refused[key] = request
            return False
        self.answers.failures[key] = failure.reason
        self._done()
        if not self.answers.entries and len(self.answers.failures) >= CANARY:
            raise_for_failures(self.answers, total=self._total)
        return False

    def _done(self) -> None:
        self._progress.advance()
        done = len(self.answers.entries) + len(self.answers.failures)
        if self._total >= _TOLD_TIMES and done % max(1, self._total // _TOLD_TIMES) == 0:
            self._tell()

    def _tell(self) -> None:
        done = len(self.answers.entries) + len(self.answers.failures)
        spent = self._ledger.spent(self._currency)
        self._progress.say(
            f"{done} of {self._total} done ({self.answers.cached} from the ledger, "
            f"{len(self.answers.failures)} failed), {self._tokens:,} tokens now, "
            f"{spent:.4f} {self._currency} of {self._max_cost:g} spent for this domain"
        )

    def _give_up(self, left: int) -> None:
        _, request = self._waiting[-1] if self._waiting else next(iter(self._refused.items()))
        done = self._total - left
        raise BudgetExceeded(
            f"the teacher has cost up to {self._ledger.spent(self._currency):.4f} {self._currency} and the next "
            f"request may cost {highest_price(self._teacher, request):.4f}; {done} of {self._total} are done",
            expected=f"at most {self._max_cost:g} {self._currency} in all ([teacher] max_cost)",
            next_step="raise [teacher] max_cost and run the same command: what is answered is not asked again",
        )


def raise_for_failures(answers: Answers, *, total: int) -> None:
    """Stop a stage whose teacher fails.

    Raises:
        StageError: always; names the commonest reasons.
    """
    reasons = Counter(answers.failures.values()).most_common(3)
    raise StageError(
        f"the teacher failed on {len(answers.failures)} of {total} requests: "
        + "; ".join(f"{count} x {reason}" for reason, count in reasons),
        expected="answers to at least half of them",
        next_step="mend the cause and run the same command: what is answered is not asked again",
    )
