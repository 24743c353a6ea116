"""The assistant behind OpenAI's chat protocol, for this machine only.

    POST /v1/chat/completions   ask; ``stream`` sends the answer in pieces
    GET  /v1/models             the models that are served: one for each domain
    GET  /healthz               no token needed

A request's ``model`` chooses among the domains that were opened at the start, by name. A domain's system prompt
is fixed: a client's system messages are accepted and not used. There is no route that takes a path, a file or a URL.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from ipaddress import ip_address
from typing import Any, Protocol

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Send

from domains.errors import ConfigError, PreceptorError
from domains.records import Answer
from serve.assistant import Asked, Assistant
from serve.guard import Guard
from serve.http_errors import Refused, explain, on_error
from serve.openai_schema import ChatRequest, chunk, completion, evidence, finish_reason, usage
from serve.turns import retrieval_query, sources_text


class Served(Protocol):
    """What is needed of a bundle."""

    @property
    def assistant(self) -> Assistant:
        """Answers."""

    @property
    def name(self) -> str:
        """The model's name on the wire."""


def create_app(bundles: Sequence[Served], *, token: str) -> FastAPI:
    """The service as an ASGI application. Every path but ``/healthz`` wants ``token``.

    Raises:
        ConfigError: two of the bundles have the same name.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    assistants = _by_name(bundles)
    chats = _Chats(assistants)
    card = {"object": "model", "created": int(time.time()), "owned_by": "preceptor"}
    cards = [{"id": name, **card} for name in assistants]
    app.add_api_route("/v1/chat/completions", chats.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": cards}, methods=["GET"])
    app.add_api_route("/healthz", lambda: {"status": "ok", "models": [*assistants]}, methods=["GET"])
    for kind in (RequestValidationError, HTTPException, Refused, PreceptorError, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_middleware(Guard, token=token)
    return app


def _by_name(bundles: Sequence[Served]) -> dict[str, Assistant]:
    found: dict[str, Assistant] = {}
    for bundle in bundles:
        if bundle.name in found:
            raise ConfigError(
                f"two of the domains to serve are called {bundle.name!r}",
                expected="different names: a request chooses by them",
                next_step="name each domain once, or set another [domain] name in its domain.toml",
            )
        found[bundle.name] = bundle.assistant
    return found


def serve_bundles(
    bundles: Sequence[Served],
    *,
    host: str = "127.0.0.1",
    port: int,
    token: str,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until the process is told to stop (Ctrl-C).

    Args:
        bundles: what answers; requests choose by name.
        host: a loopback address or ``localhost``.
        port: 0 takes a free one.
        token: see `serve.secrets.service_token`.
        on_ready: called with the address (``http://127.0.0.1:8080``) once requests are taken.

    Raises:
        ConfigError: the host is not this machine's loopback, the port is taken, or two bundles have one name.
    """
    listener = _listen(host, port)
    address = listener.getsockname()
    name = f"[{address[0]}]" if ":" in address[0] else address[0]
    try:
        make_server(bundles, token=token, on_ready=lambda: on_ready(f"http://{name}:{address[1]}")).run(
            sockets=[listener]
        )
    finally:
        listener.close()


def make_server(bundles: Sequence[Served], *, token: str, on_ready: Callable[[], None]) -> Any:
    """A ``uvicorn.Server``; setting its ``should_exit`` stops it."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    config = uvicorn.Config(
        create_app(bundles, token=token),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        ws="none",
    )
    return Server(config)


def _listen(host: str, port: int) -> socket.socket:
    if host == "localhost":
        host = "127.0.0.1"
    try:
        loopback = ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"host {host!r} is not this machine's loopback",
            expected="127.0.0.1, ::1 or localhost: this version serves one machine only",
            next_step="preceptor serve DOMAIN   (reach it from elsewhere by an SSH tunnel)",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"can't listen on {host}:{port}: {error.strerror}",
            expected="a free port",
            next_step="preceptor serve DOMAIN --port 0   (takes a free one)",
        ) from None
    return listener


class _Chats:
    """The one route that works: from a request to the model and back."""

    def __init__(self, assistants: dict[str, Assistant]) -> None:
        self._assistants = assistants

    async def complete(self, body: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        name = self._chosen(body.model)
        assistant = self._assistants[name]
        asked = await run_sync(self._prepare, assistant, body)
        pieces = self._pieces(assistant, asked, body)
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": name,
        }
        if body.stream:
            events = _events(pieces, head, body, asked.max_tokens)
            return _EventStream(events, media_type="text/event-stream")
        answer = await _last(pieces, request)
        if answer is None:
            return Response(status_code=499)  # the client has gone: nobody reads this
        finish = finish_reason(answer, max_tokens=asked.max_tokens)
        reply = completion(head, answer, finish, body.ignored)
        return Response(json.dumps(reply, ensure_ascii=False), media_type="application/json")

    def _chosen(self, model: str | None) -> str:
        names = ", ".join(map(repr, self._assistants))
        if model is None and len(self._assistants) > 1:
            raise Refused(400, f"say which model: one of {names}", code="missing_parameter", param="model")
        if model is not None and model not in self._assistants:
            message = f"no model {model!r} here; this service has {names}"
            raise Refused(404, message, code="model_not_found", param="model")
        return model if model is not None else next(iter(self._assistants))

    @staticmethod
    def _prepare(assistant: Assistant, body: ChatRequest) -> Asked:
        turns = body.turns()
        if not turns or turns[-1].role != "user" or not turns[-1].content.strip():
            message = "the last message must be the user's question, and not empty"
            raise Refused(400, message, code="invalid_value", param="messages")
        *history, last = turns
        return assistant.prepare(
            last.content,
            query=retrieval_query(last.content, history),
            history=history,
            max_tokens=body.reply_limit,
        )

    @staticmethod
    async def _pieces(assistant: Assistant, asked: Asked, body: ChatRequest) -> AsyncIterator[str | Answer]:
        """The assistant's stream, each step on a worker thread; closing it stops the model."""
        stream: Iterator[str | Answer] = assistant.stream(
            asked, temperature=body.temperature or 0.0, seed=body.seed or 0
        )
        try:
            while (piece := await run_sync(next, stream, None)) is not None:
                yield piece
        finally:
            stream.close()  # type: ignore[attr-defined]  # a generator


class _EventStream(StreamingResponse):
    """Closes its source at once when the client goes, not when the garbage collector comes by."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]  # an async generator
            await super().stream_response(send)


async def _events(
    pieces: AsyncIterator[str | Answer], head: dict[str, Any], body: ChatRequest, max_tokens: int
) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's chunk format."""
    yield _event(chunk(head, {"role": "assistant", "content": ""}))
    try:
        async with aclosing(pieces):  # type: ignore[type-var]
            async for piece in pieces:
                if isinstance(piece, Answer):
                    finish = finish_reason(piece, max_tokens=max_tokens)
                    if sources := sources_text(piece):
                        yield _event(chunk(head, {"content": sources}))
                    found = evidence(piece, body.ignored)
                    yield _event(chunk(head, {}, finish=finish, preceptor=found))
                    if body.stream_options and body.stream_options.include_usage:
                        yield _event({**chunk(head, {}), "choices": [], "usage": usage(piece)})
                elif piece:
                    yield _event(chunk(head, {"content": piece}))
    except Exception as error:
        yield f"data: {explain(error)[1].decode()}\n\n"
        return
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _last(pieces: AsyncIterator[str | Answer], request: Request) -> Answer | None:
    """The answer at the end of the pieces, or None when the client goes first."""
    async with aclosing(pieces):  # type: ignore[type-var]
        async for piece in pieces:
            if await request.is_disconnected():
                return None
            if isinstance(piece, Answer):
                return piece
    return None
