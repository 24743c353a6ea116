"""The assistant behind OpenAI's chat protocol, for this machine only.

    POST /v1/chat/completions   ask; ``stream`` sends the answer in pieces
    GET  /v1/models             the one model that is served
    GET  /healthz               no token needed

The domain's system prompt is fixed: a client's system messages are accepted and not used. There is no
route that takes a path, a file, a URL or a model.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from ipaddress import ip_address
from typing import Any, Protocol

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Send

from domains.errors import ConfigError, ContextOverflow, ModelError, PreceptorError
from domains.records import Answer
from serve.assistant import Asked, Assistant
from serve.guard import Guard, error_body
from serve.openai_schema import ChatRequest, chunk, completion, evidence, finish_reason, usage
from serve.turns import retrieval_query, sources_text

_log = logging.getLogger("preceptor.serve")


class Served(Protocol):
    """What is needed of a bundle."""

    @property
    def assistant(self) -> Assistant:
        """Answers."""

    @property
    def name(self) -> str:
        """The model's name on the wire."""


class _Refused(Exception):
    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def create_app(bundle: Served, *, token: str) -> FastAPI:
    """The service as an ASGI application. Every path but ``/healthz`` wants ``token``."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    chats = _Chats(bundle)
    card = {"id": bundle.name, "object": "model", "created": int(time.time()), "owned_by": "preceptor"}
    app.add_api_route("/v1/chat/completions", chats.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": [card]}, methods=["GET"])
    app.add_api_route("/healthz", lambda: {"status": "ok", "model": bundle.name}, methods=["GET"])
    for kind in (RequestValidationError, HTTPException, _Refused, PreceptorError, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(Guard, token=token)
    return app


def serve_bundle(
    bundle: Served, *, host: str = "127.0.0.1", port: int, token: str, on_ready: Callable[[str], None]
) -> None:
    """Serve until the process is told to stop (Ctrl-C).

    Args:
        bundle: what answers.
        host: a loopback address or ``localhost``.
        port: 0 takes a free one.
        token: see `serve.secrets.service_token`.
        on_ready: called with the address (``http://127.0.0.1:8080``) once requests are taken.

    Raises:
        ConfigError: the host is not this machine's loopback, or the port is taken.
    """
    listener = _listen(host, port)
    address = listener.getsockname()
    name = f"[{address[0]}]" if ":" in address[0] else address[0]
    try:
        make_server(bundle, token=token, on_ready=lambda: on_ready(f"http://{name}:{address[1]}")).run(
            sockets=[listener]
        )
    finally:
        listener.close()


def make_server(bundle: Served, *, token: str, on_ready: Callable[[], None]) -> Any:
    """A ``uvicorn.Server``; setting its ``should_exit`` stops it."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    config = uvicorn.Config(
        create_app(bundle, token=token),
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

    def __init__(self, bundle: Served) -> None:
        self._assistant = bundle.assistant
        self._name = bundle.name

    async def complete(self, body: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        if body.model not in {None, self._name}:
            message = f"no model {body.model!r} here; this service has {self._name!r}"
            raise _Refused(404, message, code="model_not_found", param="model")
        asked = await run_sync(self._prepare, body)
        pieces = self._pieces(asked, body)
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self._name,
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

    def _prepare(self, body: ChatRequest) -> Asked:
        turns = body.turns()
        if not turns or turns[-1].role != "user" or not turns[-1].content.strip():
            message = "the last message must be the user's question, and not empty"
            raise _Refused(400, message, code="invalid_value", param="messages")
        *history, last = turns
        return self._assistant.prepare(
            last.content,
            query=retrieval_query(last.content, history),
            history=history,
            max_tokens=body.reply_limit,
        )

    async def _pieces(self, asked: Asked, body: ChatRequest) -> AsyncIterator[str | Answer]:
        """The assistant's stream, each step on a worker thread; closing it stops the model."""
        stream: Iterator[str | Answer] = self._assistant.stream(
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
        yield f"data: {_explain(error)[1].decode()}\n\n"
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


async def _on_error(_request: Request, error: Exception) -> Response:
    status, body = _explain(error)
    return Response(body, status_code=status, media_type="application/json")


def _explain(error: Exception) -> tuple[int, bytes]:
    """Status and body for an error. What happened inside (paths!) goes to the log, not to the client."""
    if isinstance(error, _Refused):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        return error.status, error_body(str(error), code=error.code, param=error.param, kind=kind)
    if isinstance(error, ContextOverflow):
        message = f"{error.what}; expected {error.expected}. Nothing was cut."
        return 400, error_body(message, code="context_length_exceeded", param="messages")
    if isinstance(error, RequestValidationError):
        return 400, _explain_request(error)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return error.status_code, error_body(str(error.detail), code=code)
    _log.error("request failed: %s", error, exc_info=error)
    status = 503 if isinstance(error, ModelError) else 500
    message = f"the assistant can't answer ({type(error).__name__}); the server's log says why"
    return status, error_body(message, code="internal_error", kind="server_error")


def _explain_request(error: RequestValidationError) -> bytes:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    param = where[0] if where else None
    if first["type"] == "extra_forbidden":
        return error_body(f"unknown field {'.'.join(where)!r}", code="unknown_parameter", param=param)
    if first["type"] == "json_invalid":
        return error_body("the body is not valid JSON", code="invalid_json")
    message = f"{'.'.join(where) or 'the body'}: {first['msg']}"
    return error_body(message, code="unsupported_value", param=param)
