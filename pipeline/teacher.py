"""What a teacher is: something that answers many requests and tells of each outcome as it happens."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from domains.records import Message, Record


class Request(Record):
    """One request to a teacher. ``model`` is the teacher's `Teacher.identity`.

    ``sample`` tells apart repeated requests, so that each is answered (and paid) once.
    """

    model: str
    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int
    sample: int

    @property
    def key(self) -> str:
        """The ledger key: sha256 of the request as canonical JSON, in hex."""
        text = json.dumps(self.model_dump(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Reply:
    """An answer. ``finish`` is ``length`` where ``max_tokens`` cut it."""

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """An attempt without an answer.

    ``final``: the teacher gives this request up. ``may_be_billed``: the request reached the teacher, which
    may charge for it although no usable answer came back.
    """

    reason: str
    final: bool = True
    may_be_billed: bool = False


Outcome = Reply | Failure
# Told every outcome at once; False to a failure that is not final: don't try again.
Hear = Callable[[Request, Outcome], bool]


class Teacher(Protocol):
    """Answers requests. Prices are per million tokens, in the currency of the domain's config."""

    @property
    def name(self) -> str:
        """For people: the model's name."""

    @property
    def identity(self) -> str:
        """What decides the answers: the model's name at an endpoint, the digest of a local file."""

    @property
    def price_prompt(self) -> float:
        """Price of a million prompt tokens."""

    @property
    def price_completion(self) -> float:
        """Price of a million completion tokens."""

    def ask_many(self, requests: Iterable[Request], hear: Hear) -> None:
        """Put the requests, several at a time, and tell ``hear`` of every outcome on the caller's thread.

        A request is taken from ``requests`` only when it is about to be sent, and each one taken ends in
        a `Reply` or a final `Failure`, except where the call raises.

        Raises:
            TeacherError: no request can succeed (credentials, unknown model, …).
        """


def estimate_tokens(text: str) -> int:
    """An upper guess of the tokens in ``text``: a third of its UTF-8 bytes.

    English has about four characters to a token, Chinese about one (three bytes).
    """
    return math.ceil(len(text.encode("utf-8", errors="replace")) / 3)


def estimate_prompt_tokens(messages: Sequence[Message]) -> int:
    """`estimate_tokens` of a chat, with the marks between its turns."""
    return 4 + sum(estimate_tokens(message.content) + 6 for message in messages)


def price(teacher: Teacher, *, prompt_tokens: int, completion_tokens: int) -> float:
    """Cost of so many tokens."""
    return (prompt_tokens * teacher.price_prompt + completion_tokens * teacher.price_completion) / 1e6


def highest_price(teacher: Teacher, request: Request) -> float:
    """What a request may cost at most: the estimated prompt and a reply of ``max_tokens``."""
    prompt_tokens = estimate_prompt_tokens(request.messages)
    return price(teacher, prompt_tokens=prompt_tokens, completion_tokens=request.max_tokens)


class ScriptedTeacher:
    """A teacher for tests and rehearsals: a function from request to text, or to an `Outcome`.

    ``calls`` counts what was asked.
    """

    def __init__(
        self,
        script: Callable[[Request], str | Outcome],
        *,
        name: str = "scripted",
        price_prompt: float = 0.0,
        price_completion: float = 0.0,
    ) -> None:
        self.name = name
        self.identity = name
        self.price_prompt = price_prompt
        self.price_completion = price_completion
        self.calls = 0
        self._script = script

    def ask_many(self, requests: Iterable[Request], hear: Hear) -> None:
        """One after the other; a failure that is not final is tried again while ``hear`` allows it."""
        for request in requests:
            again = True
            while again:
                self.calls += 1
                said = self._script(request)
                outcome = _reply(request, said) if isinstance(said, str) else said
                go_on = hear(request, outcome)
                again = isinstance(outcome, Failure) and not outcome.final and go_on


def _reply(request: Request, text: str) -> Reply:
    return Reply(
        text=text,
        finish="stop",
        prompt_tokens=estimate_prompt_tokens(request.messages),
        completion_tokens=estimate_tokens(text),
    )
