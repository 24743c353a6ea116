from __future__ import annotations

import http.client
import json
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.routing import APIRoute

from domains.errors import ConfigError, ModelError
from serve.assistant import Assistant
from serve.bundle import OpenBundle, open_base
from serve.guard import MAX_BODY_BYTES
from serve.http import create_app, make_server, serve_bundles
from serve.secrets import service_token, stored_token
from tests.small_serving import ABSTAIN, scripted_assistant, write_domain, write_index

TOKEN = "a-token-of-the-tests-0123456789"
DOSE = '"The adult dose of Brenzal is 40 mg once a day." [1]\nAnswer: 40 mg once a day.'
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "What is the dose?"}]}


@dataclass
class Scripted:
    assistant: Assistant
    name: str = "shelf"


@contextmanager
def running(*bundles: Any) -> Iterator[int]:
    """A real server on a free loopback port; gives the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    ready = threading.Event()
    server = make_server(bundles, token=TOKEN, on_ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(30)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def send(
    port: int, method: str, path: str, body: Any = None, *, token: str | None = TOKEN, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | {
            key.replace("_", "-"): value for key, value in headers.items()
        }
        if token is not None:
            sent["authorization"] = f"Bearer {token}"
        connection.request(method, path, body=data, headers=sent)
        reply = connection.getresponse()
        text = reply.read().decode()
        kind = reply.headers.get("content-type", "")
        parsed = json.loads(text) if text and kind == "application/json" else text
        return reply.status, parsed, {key.lower(): value for key, value in reply.headers.items()}
    finally:
        connection.close()


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def scripted() -> Iterator[int]:
    assistant, _, _ = scripted_assistant(DOSE, "Brenzal", "Corvane", context=2000, max_tokens=500)
    with running(Scripted(assistant)) as port:
        yield port


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBundle]:
    root = tmp_path_factory.mktemp("serving")
    write_index(root / "index")
    with open_base(write_domain(root / "domain"), root / "index") as opened:
        yield opened


@pytest.fixture(scope="module")
def real(bundle: OpenBundle) -> Iterator[int]:
    with running(bundle) as port:
        yield port


def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0, timeout=120)


# -- the protocol, with the real client ------------------------------------------------------------


def test_a_reply_carries_answer_evidence_and_usage(scripted: int) -> None:
    with client(scripted) as api:
        assert [model.id for model in api.models.list()] == ["shelf"]
        reply = api.chat.completions.create(model="shelf", **ASK)
    assert reply.choices[0].message.content == (
        '40 mg once a day.\n\nSources:\n[1] Brenzal: "The adult dose of Brenzal is 40 mg once a day."'
    )
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(DOSE)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + len(DOSE)
    evidence: Any = reply.model_dump()["preceptor"]
    assert evidence["support"] == "supported"
    assert evidence["citations"][0]["doc_id"] == "brenzal"
    assert evidence["ignored"] == []


def test_a_stream_is_the_reply_in_pieces_and_ends_with_done(scripted: int) -> None:
    with client(scripted) as api:
        whole = api.chat.completions.create(model="shelf", **ASK)
        chunks = list(
            api.chat.completions.create(
                model="shelf", stream=True, stream_options={"include_usage": True}, **ASK
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-2].model_dump()["preceptor"]["support"] == "supported"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    status, raw, headers = send(scripted, "POST", "/v1/chat/completions", {**ASK, "stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert raw.endswith("}\n\ndata: [DONE]\n\n")


def test_a_limit_of_the_client_cuts_and_says_so(scripted: int) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        _, reply, _ = send(scripted, "POST", "/v1/chat/completions", {**ASK, name: 10})
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == 10


def test_four_clients_stream_at_once_from_the_real_model(bundle: OpenBundle, real: int) -> None:
    most = 0
    take = bundle.engine._take

    def watching(slot: Any, token: int) -> None:
        nonlocal most
        most = max(most, bundle.engine.running)
        take(slot, token)

    bundle.engine._take = watching  # type: ignore[method-assign]
    questions = ["Dose of Brenzal?", "Where are Corvane drops kept?", "Moltrex with milk?", "Sanivar doses?"]
    seen: dict[str, tuple[str, str, Any]] = {}

    def follow(question: str) -> None:
        with client(real) as api:
            chunks = list(
                api.chat.completions.create(
                    model="shelf", messages=[{"role": "user", "content": question}], stream=True
                )
            )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        seen[question] = text, str(chunks[-1].choices[0].finish_reason), chunks[-1].model_dump()["preceptor"]

    threads = [threading.Thread(target=follow, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    del bundle.engine._take
    assert sorted(seen) == sorted(questions)
    assert most > 1  # they shared forward passes
    for text, finish, evidence in seen.values():
        assert text
        assert finish in {"stop", "length"}
        assert evidence["support"] in {"supported", "unsupported", "abstained"}
        assert ("Sources:" in text) == bool(evidence["citations"])


async def _ask_async(port: int) -> tuple[str, str]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0
    ) as api:
        whole = await api.chat.completions.create(model="shelf", **ASK)
        stream = await api.chat.completions.create(model="shelf", stream=True, **ASK)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    return str(whole.choices[0].message.content), "".join(pieces)


def test_the_async_client_gets_the_same(scripted: int) -> None:
    import asyncio

    whole, streamed = asyncio.run(_ask_async(scripted))
    assert whole == streamed


def test_the_real_model_answers_whole_with_honest_counts(bundle: OpenBundle, real: int) -> None:
    with client(real) as api:
        reply = api.chat.completions.create(model="shelf", max_tokens=4, **ASK)
    assert reply.usage is not None
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (4, "length")
    assert reply.usage.prompt_tokens == len(bundle.assistant.prepare("What is the dose?").tokens)
    assert reply.choices[0].message.content


def test_the_conversation_goes_along_without_sources_and_without_system_messages() -> None:
    assistant, engine, retriever = scripted_assistant(DOSE, "Brenzal")
    with running(Scripted(assistant)) as port, client(port) as api:
        messages: list[Any] = [
            {"role": "system", "content": "You are a pirate."},
            {"role": "user", "content": "What is the adult dose of Brenzal?"},
        ]
        first = api.chat.completions.create(model="shelf", messages=messages)
        messages += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": [{"type": "text", "text": "And at night?"}]},
        ]
        reply = api.chat.completions.create(model="shelf", messages=messages, top_p=0.9, user="me")
    assert "pirate" not in "".join(engine.prompts)
    assert engine.prompts[1].count("Sources:") == 0
    assert "<assistant>40 mg once a day.\n" in engine.prompts[1]
    assert retriever.queries[1] == "What is the adult dose of Brenzal?\nAnd at night?"
    extra: Any = reply.model_dump()["preceptor"]
    assert extra["ignored"] == ["top_p", "user", "messages.system"]


def test_a_dropped_sentence_never_leaves_the_server() -> None:
    reply = "Answer: The adult dose of Brenzal is 40 mg once a day. It cures headaches at once."
    assistant, _, _ = scripted_assistant(reply, "Brenzal", unsupported="drop")
    with running(Scripted(assistant)) as port:
        for stream in (False, True):
            _, body, _ = send(port, "POST", "/v1/chat/completions", {**ASK, "stream": stream})
            assert "headache" not in json.dumps(body)
            assert "40 mg" in json.dumps(body)


def test_a_withdrawn_answer_never_leaves_the_server() -> None:
    assistant, _, _ = scripted_assistant("Answer: It cures headaches at once. " * 20, "Brenzal")
    with running(Scripted(assistant)) as port:
        for stream in (False, True):
            _, reply, _ = send(port, "POST", "/v1/chat/completions", {**ASK, "stream": stream})
            assert "headache" not in json.dumps(reply)
            assert ABSTAIN in json.dumps(reply)


# -- what is refused -------------------------------------------------------------------------------

BAD: list[tuple[Any, str, str | None]] = [
    ({**ASK, "n": 2}, "unsupported_value", "n"),
    ({**ASK, "stop": ["\n"]}, "unsupported_value", "stop"),
    ({**ASK, "tools": [{"type": "function"}]}, "unsupported_value", "tools"),
    ({**ASK, "response_format": {"type": "json_object"}}, "unsupported_value", "response_format"),
    ({**ASK, "temperature": 3}, "unsupported_value", "temperature"),
    ({**ASK, "max_tokens": 0}, "unsupported_value", "max_tokens"),
    ({**ASK, "grammar": "root ::= x"}, "unknown_parameter", "grammar"),
    ({**ASK, "n_discard": -1}, "unknown_parameter", "n_discard"),
    ({"messages": []}, "unsupported_value", "messages"),
    ({"messages": [{"role": "user", "content": "  "}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "invalid_value", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unsupported_value", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_value", "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "unsupported_value", "messages"),
    ({**ASK, "\ud800": 1}, "unsupported_value", None),
    ({**ASK, "model": "\ud800"}, "model_not_found", "model"),
    (b"{not json", "invalid_json", None),
    (b"", "unsupported_value", None),
    (b"[]", "unsupported_value", None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "param"), BAD)
def test_a_request_that_asks_for_something_else_is_an_error_in_openais_words(
    scripted: int, body: Any, code: str, param: str | None
) -> None:
    status, reply, _ = send(scripted, "POST", "/v1/chat/completions", body)
    assert status == (404 if code == "model_not_found" else 400)
    assert reply["error"]["code"] == code
    assert reply["error"]["param"] == param
    assert reply["error"]["message"]


def test_fields_that_ask_for_nothing_are_fine(scripted: int) -> None:
    nothing = {"n": 1, "stop": None, "tools": [], "logprobs": False, "logit_bias": {}, "presence_penalty": 0}
    status, reply, _ = send(scripted, "POST", "/v1/chat/completions", {**ASK, **nothing})
    assert status == 200
    assert reply["preceptor"]["ignored"] == ["presence_penalty"]


def test_the_client_raises_openais_own_exceptions(scripted: int) -> None:
    with client(scripted) as api:
        with pytest.raises(openai.NotFoundError, match="'shelf'"):
            api.chat.completions.create(model="gpt-4o", **ASK)
        with pytest.raises(openai.BadRequestError) as caught:
            api.chat.completions.create(
                model="shelf", messages=[{"role": "user", "content": "Why? " * 1000}], stream=True
            )
        assert caught.value.code == "context_length_exceeded"
        assert "at most 2000" in str(caught.value)
        with pytest.raises(openai.AuthenticationError):
            api.with_options(api_key="wrong-token-0123456789").models.list()


def test_a_failure_inside_says_nothing_of_this_machine() -> None:
    def fail(_prompt: str) -> str:
        raise ModelError("llama.cpp can't read /home/somebody/student.gguf")

    def break_down(_prompt: str) -> str:
        raise ZeroDivisionError("/home/somebody/code.py")

    for reply, status in ((fail, 503), (break_down, 500)):
        assistant, engine, _ = scripted_assistant(reply, "Brenzal")
        with running(Scripted(assistant)) as port:
            got, body, _ = send(port, "POST", "/v1/chat/completions", ASK)
            assert got == status
            assert "somebody" not in json.dumps(body)
            assert body["error"]["type"] == "server_error"
            with client(port) as api, pytest.raises(openai.APIError, match="can't answer"):
                list(api.chat.completions.create(model="shelf", stream=True, **ASK))
            engine.reply = lambda _prompt: DOSE
            assert send(port, "POST", "/v1/chat/completions", ASK)[0] == 200


# -- who may ask -----------------------------------------------------------------------------------


def test_every_route_wants_the_token_but_the_health_check(scripted: int) -> None:
    assistant, _, _ = scripted_assistant(DOSE, "Brenzal")
    app = create_app([Scripted(assistant)], token=TOKEN)
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) == len(app.routes) == 3
    for route in routes:
        (method,) = route.methods
        for token in (None, "", "wrong", TOKEN[:-1], TOKEN + "x", "é"):
            status, reply, headers = send(scripted, method, route.path, ASK, token=token)
            if route.path == "/healthz":
                assert (status, reply) == (200, {"status": "ok", "models": ["shelf"]})
            else:
                assert status == 401
                assert headers["www-authenticate"] == "Bearer"
                assert TOKEN not in json.dumps(reply)
        assert send(scripted, method, route.path, ASK)[0] == 200


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/redoc", "/v1/files", "/healthz/", "//healthz", "/v1/../healthz"]
)
def test_there_is_nothing_else(scripted: int, path: str) -> None:
    assert send(scripted, "GET", path, token=None)[0] == 401
    assert send(scripted, "GET", path)[0] == 404


def test_other_headers_give_no_access_and_other_methods_nothing(scripted: int) -> None:
    assert send(scripted, "GET", "/v1/models", token=None, x_api_key=TOKEN)[0] == 401
    assert send(scripted, "GET", "/v1/models", token=None, authorization=f"Basic {TOKEN}")[0] == 401
    assert send(scripted, "GET", f"/v1/models?token={TOKEN}", token=None)[0] == 401
    assert send(scripted, "GET", "/v1/models", token=None, authorization=f"bearer {TOKEN}")[0] == 200
    assert send(scripted, "DELETE", "/v1/models")[0] == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1234", 200), ("127.0.0.1", 200), ("LOCALHOST", 200), ("[::1]:8080", 200),
        ("evil.example", 421), ("evil.example:8080", 421), ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421), ("0.0.0.0", 421), ("", 421), ("localhost:80:80", 421),
    ],
)  # fmt: skip
def test_only_loopback_names_are_answered(scripted: int, host: str, status: int) -> None:
    assert send(scripted, "GET", "/v1/models", host=host)[0] == status
    assert send(scripted, "GET", "/healthz", host=host)[0] == status


def test_no_page_of_another_site_gets_an_answer(scripted: int) -> None:
    asking = {"origin": "https://evil.example", "access_control_request_method": "POST"}
    status, _, headers = send(scripted, "OPTIONS", "/v1/chat/completions", token=None, **asking)
    assert status == 401
    _, _, headers2 = send(scripted, "GET", "/v1/models", origin="https://evil.example")
    for got in (headers, headers2):
        assert not [name for name in got if name.startswith("access-control")]
        assert got["cache-control"] == "no-store"
        assert "server" not in got


def test_a_body_above_the_limit_is_refused_told_or_counted(scripted: int) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * MAX_BODY_BYTES}]}).encode()
    assert send(scripted, "POST", "/v1/chat/completions", body)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", scripted, timeout=60)
    pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
    connection.request(
        "POST", "/v1/chat/completions", body=iter(pieces), headers={"authorization": f"Bearer {TOKEN}"}
    )
    assert connection.getresponse().status == 413
    connection.close()


# -- clients that go, and the server's own life ----------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_stops_the_model(stream: bool) -> None:
    assistant, engine, _ = scripted_assistant(DOSE, "Brenzal")
    asked = threading.Event()

    def endless(*_: Any, **__: Any) -> Any:
        engine.streams_open += 1
        try:
            while True:
                asked.set()
                time.sleep(0.01)
                yield ""
        finally:
            engine.streams_open -= 1

    engine.stream = endless
    with running(Scripted(assistant)) as port:
        body = json.dumps({**ASK, "stream": stream}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(
            "POST",
            "/v1/chat/completions",
            body,
            {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"},
        )
        assert asked.wait(30)
        assert engine.streams_open == 1
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        assert eventually(lambda: engine.streams_open == 0)


def test_one_request_too_many_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.guard.MAX_REQUESTS", 1)
    inside, leave = threading.Event(), threading.Event()

    def slow(_prompt: str) -> str:
        inside.set()
        leave.wait(30)
        return DOSE

    assistant, _, _ = scripted_assistant(slow, "Brenzal")
    with running(Scripted(assistant)) as port:
        statuses: list[int] = []
        first = threading.Thread(
            target=lambda: statuses.append(send(port, "POST", "/v1/chat/completions", ASK)[0])
        )
        first.start()
        assert inside.wait(30)
        status, reply, headers = send(port, "POST", "/v1/chat/completions", ASK)
        assert (status, reply["error"]["code"], headers["retry-after"]) == (503, "overloaded", "1")
        leave.set()
        first.join(30)
        assert statuses == [200]
        assert send(port, "POST", "/v1/chat/completions", ASK)[0] == 200


def test_serving_tells_its_address_and_ends_with_an_interrupt() -> None:
    assistant, _, _ = scripted_assistant(DOSE, "Brenzal")
    answers: list[str | None] = []

    def use(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as api:
            answers.append(api.chat.completions.create(model="shelf", **ASK).choices[0].message.content)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        serve_bundles(
            [Scripted(assistant)],
            host="localhost",
            port=0,
            token=TOKEN,
            on_ready=lambda url: threading.Thread(target=use, args=(url,)).start(),
        )
    assert str(answers[0]).startswith("40 mg once a day.")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_hosts_beyond_this_machine_are_refused(host: str) -> None:
    assistant, _, _ = scripted_assistant(DOSE)
    with pytest.raises(ConfigError, match="loopback"):
        serve_bundles([Scripted(assistant)], host=host, port=0, token=TOKEN, on_ready=lambda _: None)


def test_a_taken_port_is_named(scripted: int) -> None:
    assistant, _, _ = scripted_assistant(DOSE)
    with pytest.raises(ConfigError, match=str(scripted)):
        serve_bundles([Scripted(assistant)], port=scripted, token=TOKEN, on_ready=lambda _: None)


# -- the token -------------------------------------------------------------------------------------


def test_the_token_is_made_once_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path))
    monkeypatch.delenv("PRECEPTOR_TOKEN", raising=False)
    token = service_token()
    assert len(token) >= 43  # 32 random bytes
    assert service_token() == token
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["token"]
    monkeypatch.setenv("PRECEPTOR_TOKEN", "given-by-the-environment")
    assert service_token() == "given-by-the-environment"
    for weak in ("short", "has blanks in it, many", "é" * 20):
        monkeypatch.setenv("PRECEPTOR_TOKEN", weak)
        with pytest.raises(ConfigError):
            service_token()


def test_processes_that_start_together_agree_on_one_token(tmp_path: Path) -> None:
    found: list[str] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        found.append(stored_token(tmp_path / "token"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    stored_token(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="0644"):
        stored_token(path)
    path.write_text("", encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(ConfigError):
        stored_token(path)
