"""The one gate in front of the HTTP service: every request passes it, whatever its route.

It answers only to loopback names (a web page can point its own name at 127.0.0.1: DNS rebinding), wants
the token on every path but the health check, known or not, takes no body above a limit and only so many
requests at a time. There is no CORS header anywhere, so a browser gives no answer of ours to another
site's script.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/healthz"})
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_BODY_BYTES = 256 * 1024
MAX_REQUESTS = 64  # running and waiting; one more is told to come back
_HEADERS = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]


def error_body(
    message: str, *, code: str, kind: str = "invalid_request_error", param: str | None = None
) -> bytes:
    """An error as OpenAI's API words it, in JSON."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: what is guarded.
        token: the bearer token that a request must carry.
    """

    def __init__(self, app: App, *, token: str) -> None:
        self._app = app
        self._token = token.encode()
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with the reason why not."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} connections are served")
        if refusal := self._refusal(scope):
            await _refuse(send, *refusal)
            return
        self._inside += 1
        try:
            await self._pass_on(scope, receive, send)
        finally:
            self._inside -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive)
        if body is None:
            return
        if len(body) > MAX_BODY_BYTES:
            message = f"the request's body has more than {MAX_BODY_BYTES} bytes"
            await _refuse(send, 413, error_body(message, code="request_too_large"))
            return
        await self._app(scope, _replay(body, receive), _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, bytes] | None:
        """Status and body of the answer to a request that may not pass."""
        hosts = [value for key, value in scope["headers"] if key == b"host"]
        if len(hosts) != 1 or _host_name(hosts[0]) not in LOOPBACK_NAMES:
            message = f"the Host header must be one of {', '.join(sorted(LOOPBACK_NAMES))}"
            return 421, error_body(message, code="misdirected_request")
        if scope["path"] not in OPEN_PATHS and not self._authorised(scope):
            message = "this service wants its token: 'Authorization: Bearer …' (preceptor serve prints it)"
            return 401, error_body(message, code="invalid_api_key", kind="authentication_error")
        if self._inside >= MAX_REQUESTS:
            message = f"{MAX_REQUESTS} requests are under way"
            return 503, error_body(message, code="overloaded", kind="server_error")
        return None

    def _authorised(self, scope: Scope) -> bool:
        given = [value for key, value in scope["headers"] if key == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Compared in any case, in constant time.
        same = secrets.compare_digest(token.strip(), self._token)
        return same and scheme.lower() == b"bearer"


def _host_name(host: bytes) -> str:
    text = host.decode("latin-1").lower()
    name, colon, port = text.rpartition(":")
    return name if colon and (port.isdigit() or not port) else text


async def _read_body(receive: Receive) -> bytes | None:
    """The body, or a little more than the limit of it; None when the client has gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False) or len(body) > MAX_BODY_BYTES:
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send: Send) -> Send:
    async def wrapped(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        await send(message)

    return wrapped


async def _refuse(send: Send, status: int, body: bytes) -> None:
    extra = {
        401: (b"www-authenticate", b"Bearer"),
        413: (b"connection", b"close"),
        503: (b"retry-after", b"1"),
    }
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *_HEADERS,
    ]
    if status in extra:
        headers.append(extra[status])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
