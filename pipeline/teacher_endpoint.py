"""A teacher behind an OpenAI-compatible endpoint: ChatGPT, or a server of one's own.

The client's own retries are off: here every attempt is told (and booked) as it happens, waits are bounded and
derived from the request, and nothing is tried again that can't succeed. The key stays in this object: it is
taken out of every message that leaves it.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from domains.errors import TeacherError
from pipeline.teacher import Failure, Hear, Outcome, Reply, Request, estimate_prompt_tokens, estimate_tokens

if TYPE_CHECKING:
    import openai

# Waits: 1, 2, 4, … s, each times 0.5 to 1.5; a provider may ask for more, but not for hours.
MAX_BACKOFF_S = 60.0
MAX_RETRY_AFTER_S = 600.0
_REASON_CHARS = 300


class _Wait(Exception):
    """An attempt failed in a way that may pass; ``seconds`` is what the provider asked for."""

    def __init__(self, reason: str, *, seconds: float | None = None, may_be_billed: bool = False) -> None:
        super().__init__(reason)
        self.seconds = seconds
        self.may_be_billed = may_be_billed


class EndpointTeacher:
    """A chat model behind an HTTP endpoint.

    Args:
        base_url: the API's root, e.g. ``https://api.openai.com/v1``.
        model: as the endpoint names it.
        api_key_env: environment variable with the key; empty for a server that needs none.
        concurrency: requests in flight.
        timeout_s: longest wait for one reply, in seconds.
        max_retries: further attempts after one that may pass.
        price_prompt: per million prompt tokens.
        price_completion: per million completion tokens.
        sleep: how to wait; tests don't.
        now: seconds since the epoch, for a Retry-After that is a date.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str,
        concurrency: int,
        timeout_s: float,
        max_retries: int,
        price_prompt: float,
        price_completion: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.name = model
        self.identity = model
        self.price_prompt = price_prompt
        self.price_completion = price_completion
        self.host = urlsplit(base_url).hostname or base_url
        self._base_url = base_url
        self._api_key_env = api_key_env
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._sleep = sleep
        self._now = now
        self._limit_name = "max_tokens"
        self._stopped = False

    def ask_many(self, requests: Iterable[Request], hear: Hear) -> None:
        """`Teacher.ask_many`, ``concurrency`` requests at a time.

        Raises:
            TeacherError: no key, key refused, unknown model, quota used up, or a parameter is refused.
        """
        key = self._key()
        self._stopped = False
        asyncio.run(self._ask_all(iter(requests), hear, key))

    def _key(self) -> str:
        if not self._api_key_env:
            return "none"
        key = os.environ.get(self._api_key_env, "").strip()
        if not key:
            raise TeacherError(
                f"the environment variable {self._api_key_env} is not set",
                expected=f"the key for {self.host}",
                next_step=f'export {self._api_key_env}=…, or set [teacher] kind = "local" '
                '(or api_key_env = "" for a server that needs no key)',
            )
        return key

    async def _ask_all(self, requests: Iterator[Request], hear: Hear, key: str) -> None:
        import openai

        client = openai.AsyncOpenAI(
            api_key=key, base_url=self._base_url, timeout=self._timeout_s, max_retries=0
        )
        async with client:
            workers = [
                asyncio.create_task(self._work(requests, hear, client, key)) for _ in range(self._concurrency)
            ]
            # A worker that fails stops the others after their present attempt: its answer is booked.
            results = await asyncio.gather(*workers, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _work(
        self, requests: Iterator[Request], hear: Hear, client: openai.AsyncOpenAI, key: str
    ) -> None:
        try:
            while not self._stopped and (request := next(requests, None)) is not None:
                await self._ask(request, hear, client, key)
        except BaseException:
            self._stopped = True
            raise

    async def _ask(self, request: Request, hear: Hear, client: openai.AsyncOpenAI, key: str) -> None:
        for attempt in range(self._max_retries + 1):
            try:
                outcome = await self._attempt(request, client)
            except _Wait as wait:
                reason = _clean(str(wait), key)
                final = attempt == self._max_retries
                go_on = hear(request, Failure(reason, final=final, may_be_billed=wait.may_be_billed))
                if final or not go_on:
                    return
                if self._stopped:
                    hear(request, Failure(f"{reason}; not tried again"))
                    return
                await self._sleep(_backoff(request, attempt, wait.seconds))
            except TeacherError as error:
                what = _clean(error.what, key)
                hear(request, Failure(what))
                raise TeacherError(what, expected=error.expected, next_step=error.next_step) from None
            else:
                if isinstance(outcome, Failure):
                    outcome = Failure(_clean(outcome.reason, key), outcome.final, outcome.may_be_billed)
                hear(request, outcome)
                return

    async def _attempt(self, request: Request, client: openai.AsyncOpenAI) -> Outcome:
        """One HTTP request.

        Raises:
            _Wait: it may work later.
            TeacherError: nothing will work.
        """
        import openai

        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._send(request, client)
        except (TimeoutError, openai.APITimeoutError):
            raise _Wait(f"no reply within {self._timeout_s:g} s", may_be_billed=True) from None
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APIConnectionError as error:
            sent = type(error.__cause__).__name__ != "ConnectError"
            what = "the connection broke" if sent else "can't connect"
            raise _Wait(f"{what}: {self.host}: {error.__cause__ or error}", may_be_billed=sent) from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            raise _Wait(f"unreadable reply: {type(error).__name__}: {error}", may_be_billed=True) from None
        return _read(request, reply)

    async def _send(self, request: Request, client: openai.AsyncOpenAI) -> Any:
        import openai

        arguments: dict[str, Any] = {
            "model": self.identity,
            "messages": [message.model_dump() for message in request.messages],
            "temperature": request.temperature,
        }
        limit = self._limit_name
        try:
            return await client.chat.completions.create(**(arguments | {limit: request.max_tokens}))
        except openai.BadRequestError as error:
            # Newer models refuse max_tokens, older servers know nothing else.
            if limit != "max_tokens" or "max_completion_tokens" not in str(error):
                raise
        self._limit_name = "max_completion_tokens"
        return await client.chat.completions.create(**arguments, max_completion_tokens=request.max_tokens)

    def _refused(self, error: openai.APIStatusError) -> Outcome:
        """What an HTTP error means: `Failure` of this request, `_Wait`, or `TeacherError`."""
        code, text = error.status_code, _said(error)
        if code in {401, 403}:
            raise TeacherError(
                f"{self.host} refuses the key ({code}): {text}",
                expected=f"a key in {self._api_key_env or '[teacher] api_key_env'} that may use {self.name!r}",
                next_step=f"export {self._api_key_env or 'KEY'}=… with a valid key, and run the same command",
            )
        if code == 404:
            raise TeacherError(
                f"{self.host} knows no model {self.name!r} at {urlsplit(self._base_url).path or '/'} (404): {text}",
                expected="a model that the endpoint serves",
                next_step="set [teacher] model and base_url in domain.toml",
            )
        if error.code == "insufficient_quota":
            raise TeacherError(
                f"the quota at {self.host} is used up ({code}): {text}",
                expected="credit left",
                next_step="raise the quota and run the same command: what is answered is not asked again",
            )
        if code == 400 and "temperature" in (error.param or ""):
            raise TeacherError(
                f"{self.name} refuses the temperature: {text}",
                expected="a temperature that the model takes",
                next_step="set [teacher] temperature = 1 in domain.toml",
            )
        if code in {408, 409, 425, 429} or code >= 500:
            raise _Wait(f"{code}: {text}", seconds=self._retry_after(error))
        return Failure(f"{code}: {text}")

    def _retry_after(self, error: openai.APIStatusError) -> float | None:
        """Seconds that the provider asks to wait, or None."""
        value = error.response.headers.get("retry-after", "").strip()
        if not value:
            return None
        try:
            seconds = float(value)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - self._now()
            except ValueError:
                return None
        if not seconds <= MAX_RETRY_AFTER_S:
            raise TeacherError(
                f"{self.host} asks to wait {seconds:.0f} s ({error.status_code}): {_said(error)}",
                expected=f"at most {MAX_RETRY_AFTER_S:.0f} s",
                next_step="run the same command later: what is answered is not asked again",
            )
        return max(0.0, seconds)


def _read(request: Request, reply: Any) -> Outcome:
    """A chat completion as an outcome; servers differ, so nothing about its shape is taken for granted."""
    choices = getattr(reply, "choices", None)
    if not choices:
        raise _Wait(f"a reply without choices: {_short(str(reply))}", may_be_billed=True)
    message = getattr(choices[0], "message", None)
    text = getattr(message, "content", None) or ""
    if not isinstance(text, str) or not text.strip():
        detail = getattr(message, "refusal", None) or getattr(choices[0], "finish_reason", None)
        return Failure(f"an empty answer ({detail})", may_be_billed=True)
    finish = getattr(choices[0], "finish_reason", None)
    if finish == "content_filter":
        return Failure("the provider's content filter cut the answer", may_be_billed=True)
    usage = getattr(reply, "usage", None)
    return Reply(
        text=text,
        finish="length" if finish == "length" else "stop",
        prompt_tokens=_count(usage, "prompt_tokens", estimate_prompt_tokens(request.messages)),
        completion_tokens=_count(usage, "completion_tokens", estimate_tokens(text)),
    )


def _count(usage: Any, name: str, guess: int) -> int:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and value >= 0 else guess


def _backoff(request: Request, attempt: int, asked_s: float | None) -> float:
    """Seconds to wait: exponential, with jitter that the request's key decides; never less than asked."""
    digest = hashlib.sha256(f"{request.key}:{attempt}".encode()).digest()
    jitter = 0.5 + int.from_bytes(digest[:4], "big") / 2**32
    own: float = min(MAX_BACKOFF_S, 2.0**attempt) * jitter
    return own if asked_s is None else asked_s + (jitter - 0.5)


def _said(error: openai.APIStatusError) -> str:
    """The provider's own words about an HTTP error."""
    body = error.body
    return _short(str((isinstance(body, dict) and body.get("message")) or error.message))


def _short(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _REASON_CHARS else f"{plain[:_REASON_CHARS]}…"


def _clean(text: str, key: str) -> str:
    """``text`` in one line, without the key."""
    return _short(text.replace(key, "***") if len(key) > 4 else text)
