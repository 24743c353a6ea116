"""OpenAI's chat completions as records: what a request may say, and what a reply looks like.

A field of OpenAI's that can't change an answer of ours is accepted and named in the reply's
``preceptor.ignored``. One that asks for something this service can't do, and an unknown field, is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from domains.records import Answer, Message, Record, Reflection
from serve.turns import sources_text, without_sources

# Accepted whatever they say: they tune sampling, billing or caching of a service that is not this one.
_IGNORED = (
    "top_p", "presence_penalty", "frequency_penalty", "user", "metadata", "store", "service_tier",
    "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls",
    "reasoning_effort", "verbosity",
)  # fmt: skip


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"no valid text: half a surrogate pair at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Nothing = Annotated[list[Any] | dict[str, Any], Field(max_length=0)]


class TextPart(Record):
    """A piece of a message; other kinds (images, audio) are an error."""

    type: Literal["text"]
    text: Text


class ChatMessage(Record):
    """One message of a request. ``system`` and ``developer`` messages are accepted and not used."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: list[Any] | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Record):
    """``include_usage`` asks for one more chunk, with the token counts."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(Record):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(Record):
    """The body of POST /v1/chat/completions.

    ``max_tokens`` (or its new name ``max_completion_tokens``) can lower the assistant's own limit, not
    raise it. ``temperature`` is 0 (greedy) unless given.
    """

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    seed: int | None = None
    # Accepted at the value that asks for nothing.
    n: Literal[1] | None = None
    stop: Nothing | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    logit_bias: Nothing | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    modalities: list[Literal["text"]] | None = None
    response_format: ResponseFormat | None = None
    # Accepted and named in the reply.
    top_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def reply_limit(self) -> int | None:
        """The most tokens the client wants."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def ignored(self) -> list[str]:
        """Names of what was given and has no effect."""
        names = [name for name in _IGNORED if getattr(self, name) is not None]
        if any(message.role in {"system", "developer"} for message in self.messages):
            names.append("messages.system")
        return names

    def turns(self) -> list[Message]:
        """The messages of user and assistant; sources put behind an earlier answer are taken off."""
        return [
            Message(role=message.role, content=without_sources(message.text))
            if message.role == "assistant"
            else Message(role="user", content=message.text)
            for message in self.messages
            if message.role in {"user", "assistant"}
        ]


def evidence(answer: Answer, ignored: list[str]) -> dict[str, Any]:
    """The extension field ``preceptor`` of a reply; sentences that were dropped are not in it."""
    return {
        "support": answer.support,
        "citations": [citation.model_dump() for citation in answer.citations],
        "rejected_quotes": answer.rejected_quotes,
        "statements": [item.model_dump() for item in answer.statements if item.text in answer.text],
        "withheld": answer.withheld,
        "confidence": answer.confidence,
        **({"reflection": _judgements(answer.reflection)} if answer.reflection else {}),
        "ignored": ignored,
    }


def _judgements(reflection: Reflection) -> dict[str, Any]:
    """Numbers only: the texts that were weighed may be what was withdrawn."""
    return reflection.model_dump(exclude={"candidates": True, "segments": {"__all__": {"text"}}})


def usage(answer: Answer) -> dict[str, int]:
    """Token counts of a reply; the sources behind the answer cost none."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def finish_reason(answer: Answer, *, max_tokens: int) -> Literal["stop", "length"]:
    """``length`` where the limit cut the reply."""
    return "length" if answer.completion_tokens >= max_tokens else "stop"


def completion(head: dict[str, Any], answer: Answer, finish: str, ignored: list[str]) -> dict[str, Any]:
    """A whole reply. ``head`` has id, created and model."""
    message = {"role": "assistant", "content": answer.text + sources_text(answer), "refusal": None}
    return {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": usage(answer),
        "preceptor": evidence(answer, ignored),
    }


def chunk(
    head: dict[str, Any], delta: dict[str, str], *, finish: str | None = None, **more: Any
) -> dict[str, Any]:
    """One piece of a streamed reply."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**head, "object": "chat.completion.chunk", "choices": [choice], **more}
