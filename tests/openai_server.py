"""A loopback server that speaks the OpenAI chat protocol, well or badly, and remembers what it was asked.

The openai client brings its own HTTP stack, so tests talk to a real socket. What the server does with the n-th
call is an `Act`; a script is a function from the call to an act, or a list of acts whose last one repeats.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self


@dataclass(frozen=True)
class Call:
    """One request: its number (from 0), body and headers (lower-case names)."""

    number: int
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def question(self) -> str:
        """Content of the last message."""
        return str(self.body["messages"][-1]["content"])


@dataclass(frozen=True)
class Act:
    """What the server does. ``kind`` says how the reply is spoilt, if at all."""

    kind: Literal["answer", "status", "hang", "truncated", "malformed", "empty_choices", "raw"] = "answer"
    text: str = 'The passage says so. "A quoted sentence." [1]\nAnswer: yes'
    finish: str = "stop"
    usage: bool = True
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    body: Any = None
    delay_s: float = 0.0


def status(http_code: int, *, retry_after: str = "", **error: Any) -> Act:
    """An HTTP error with OpenAI's error object."""
    return Act(
        "status", status=http_code, headers={"Retry-After": retry_after} if retry_after else {}, error=error
    )


Script = Callable[[Call], Act] | Sequence[Act]


class OpenAIServer:
    """Serves ``/v1/chat/completions`` while the context is open.

    Attributes:
        calls: every request in the order of arrival.
        answered: how often each last message got a whole answer.
    """

    def __init__(self, script: Script = (Act(),)) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.calls: list[Call] = []
        self.answered: Counter[str] = Counter()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._serve(self)

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients that are killed leave broken pipes behind

        self._http = Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def asked(self) -> Counter[str]:
        """How often each last message arrived."""
        with self._lock:
            return Counter(call.question for call in self.calls)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _serve(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self._lock:
            call = Call(len(self.calls), body, {name.lower(): value for name, value in http.headers.items()})
            self.calls.append(call)
            act = self._script(call) if callable(self._script) else self._next(call.number)
        if act.kind == "hang":
            self._closing.wait(30)
            http.close_connection = True
            return
        if act.delay_s:
            self._closing.wait(act.delay_s)
        code, payload = self._payload(call, act)
        http.send_response(code)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(payload)))
        for name, value in act.headers.items():
            http.send_header(name, value)
        http.end_headers()
        if act.kind == "truncated":
            payload = payload[: len(payload) // 2]
            http.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            http.wfile.write(payload)
            http.wfile.flush()
            if act.kind == "answer":
                with self._lock:
                    self.answered[call.question] += 1

    def _next(self, number: int) -> Act:
        assert not callable(self._script)
        return self._script[min(number, len(self._script) - 1)]

    @staticmethod
    def _payload(call: Call, act: Act) -> tuple[int, bytes]:
        if act.kind == "status":
            error = {"message": f"error {act.status}", "type": "error", "param": None, "code": None}
            return act.status, json.dumps({"error": error | act.error}).encode()
        if act.kind == "malformed":
            return 200, b'{"id": "x", "choices": [{'
        if act.kind == "raw":
            return 200, json.dumps(act.body).encode()
        message = {"role": "assistant", "content": act.text}
        choices = [{"index": 0, "message": message, "finish_reason": act.finish}]
        reply = {
            "id": f"chatcmpl-{call.number}",
            "object": "chat.completion",
            "created": 0,
            "model": call.body["model"],
            "choices": [] if act.kind == "empty_choices" else choices,
        }
        if act.usage:
            reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        return 200, json.dumps(reply).encode()
