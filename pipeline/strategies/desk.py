"""Asks of all steps, through one ledger and under one cap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.asking import Estimate, answer_all, estimate
from pipeline.ledger import Entry, Ledger
from pipeline.progress import Progress
from pipeline.strategies.context import Ask, Role, Said
from pipeline.teacher import Request, Teacher
from pipeline.teacher_endpoint import EndpointTeacher

TERMS = (
    "Note: the terms of many providers, OpenAI among them, restrict training models that compete with theirs "
    "on the outputs of their models. Read the terms of {host} before you go on."
)


@dataclass(frozen=True)
class Voice:
    """Who plays a role, and how it is asked where a request does not say."""

    teacher: Teacher
    temperature: float
    max_tokens: int


class _Bars:
    """Progress that draws but does not speak: a step with many rounds would repeat itself."""

    def __init__(self, progress: Progress) -> None:
        self.start = progress.start
        self.advance = progress.advance

    def say(self, text: str) -> None:
        """Says nothing."""


@dataclass
class Desk:
    """Puts the requests of a stage; remembers what failed, so that a stage asks it once.

    Attributes:
        voices: who plays which role.
        ledger: open.
        max_cost: hard cap on what the ledger may have cost.
        currency: of all prices.
        progress: told of every request.
        entries: what was answered, by key.
        failures: what was not, with the reason.
        cached: how many were in the ledger before.
    """

    voices: dict[Role, Voice]
    ledger: Ledger
    max_cost: float
    currency: str
    progress: Progress
    entries: dict[str, Entry] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    cached: int = 0
    _warned: set[str] = field(default_factory=set)

    def counts(self) -> dict[str, int]:
        """``requests = answered + failed`` over all steps; each request counts once."""
        return {
            "requests": len(self.entries) + len(self.failures),
            "cached": self.cached,
            "answered": len(self.entries),
            "failed": len(self.failures),
            "truncated": sum(entry.truncated for entry in self.entries.values()),
        }

    def requests(self, ask: Ask) -> list[Request]:
        """The requests that an ask stands for, one per sample."""
        voice = self.voices[ask.role]
        temperature = voice.temperature if ask.temperature is None else ask.temperature
        return [
            Request(
                model=voice.teacher.identity,
                messages=ask.messages,
                temperature=temperature,
                max_tokens=ask.max_tokens or voice.max_tokens,
                sample=sample,
            )
            for sample in range(ask.n if temperature > 0 else 1)
        ]

    def estimate(self, asks: Sequence[Ask]) -> Estimate:
        """What the asks of the teacher's role would take; asks nothing."""
        requests = [request for ask in asks for request in self.requests(ask)]
        return estimate(requests, self.voices["teacher"].teacher, self.ledger, currency=self.currency)

    def ask(self, asks: Sequence[Ask], *, tell: bool = False) -> list[list[Said]]:
        """See `pipeline.strategies.context.Ctx.ask`."""
        grouped = [(ask.role, self.requests(ask)) for ask in asks]
        for role in self.voices:
            wanted = [request for each, requests in grouped if each == role for request in requests]
            self._put(role, [request for request in wanted if not self._known(request.key)], tell)
        return [[self._said(role, request) for request in requests] for role, requests in grouped]

    def _known(self, key: str) -> bool:
        return key in self.entries or key in self.failures

    def _put(self, role: Role, requests: list[Request], tell: bool) -> None:
        if not requests:
            return
        teacher = self.voices[role].teacher
        before = estimate(requests, teacher, self.ledger, currency=self.currency)
        if tell:
            self.progress.say(describe(before, teacher.name))
        if before.cached < before.requests:
            self._warn(teacher)
        answers = answer_all(
            requests,
            teacher,
            self.ledger,
            max_cost=self.max_cost,
            currency=self.currency,
            progress=self.progress if tell else _Bars(self.progress),
        )
        self.entries |= answers.entries
        self.failures |= answers.failures
        self.cached += answers.cached

    def _warn(self, teacher: Teacher) -> None:
        if isinstance(teacher, EndpointTeacher) and teacher.host not in self._warned:
            self._warned.add(teacher.host)
            self.progress.say(TERMS.format(host=teacher.host))

    def _said(self, role: Role, request: Request) -> Said:
        name = self.voices[role].teacher.name
        entry = self.entries.get(request.key)
        if entry is None:
            return Said("", request.key, name, request.sample, error=self.failures[request.key])
        return Said(entry.text, request.key, name, request.sample, truncated=entry.truncated)


def describe(estimate: Estimate, teacher: str) -> str:
    """An estimate in one line."""
    new = estimate.requests - estimate.cached
    return (
        f"{estimate.requests} requests to {teacher}, {estimate.cached} of them answered before. "
        f"The other {new}: about {estimate.prompt_tokens:,} tokens of prompts, at most "
        f"{estimate.max_completion_tokens:,} of replies, at most {estimate.max_cost:.4f} {estimate.currency}."
    )
