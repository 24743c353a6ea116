"""Teachers: an endpoint over a real socket, well- and ill-behaved; the scripted one; the request's key."""

from __future__ import annotations

import email.utils
import logging
import socket
from collections.abc import Iterable

import pytest

from domains.errors import TeacherError
from domains.records import Message
from pipeline.teacher import (
    Failure,
    Outcome,
    Reply,
    Request,
    ScriptedTeacher,
    estimate_prompt_tokens,
    highest_price,
)
from pipeline.teacher_endpoint import EndpointTeacher
from tests.openai_server import Act, Call, OpenAIServer, Script, status

KEY = "sk-test-0123456789abcdef"


def request(text: str = "Why?", *, sample: int = 0, model: str = "m1") -> Request:
    return Request(
        model=model,
        messages=(Message(role="user", content=text),),
        temperature=0.7,
        max_tokens=50,
        sample=sample,
    )


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)


class Heard:
    """Keeps outcomes; ``go_on`` is the reply to failures that are not final."""

    def __init__(self, *, go_on: bool = True) -> None:
        self.outcomes: list[tuple[str, Outcome]] = []
        self.go_on = go_on

    def __call__(self, asked: Request, outcome: Outcome) -> bool:
        self.outcomes.append((asked.messages[-1].content, outcome))
        return self.go_on

    def failures(self) -> list[Failure]:
        return [outcome for _, outcome in self.outcomes if isinstance(outcome, Failure)]

    def replies(self) -> list[Reply]:
        return [outcome for _, outcome in self.outcomes if isinstance(outcome, Reply)]


class Asking:
    """An `EndpointTeacher` at a server, with waits that are noted instead of waited."""

    def __init__(self, server_url: str, **options: object) -> None:
        self.waits: list[float] = []

        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)

        settings: dict[str, object] = {
            "base_url": server_url,
            "model": "m1",
            "api_key_env": "TEST_TEACHER_KEY",
            "concurrency": 1,
            "timeout_s": 10.0,
            "max_retries": 3,
            "price_prompt": 1.0,
            "price_completion": 2.0,
            "sleep": sleep,
            "now": lambda: 1_000_000.0,
        }
        self.teacher = EndpointTeacher(**(settings | options))  # type: ignore[arg-type]
        self.heard = Heard()

    def ask(self, requests: Iterable[Request]) -> Heard:
        self.teacher.ask_many(requests, self.heard)
        return self.heard


def ask(
    script: Script, requests: Iterable[Request] = (request(),), **options: object
) -> tuple[Heard, Asking]:
    with OpenAIServer(script) as server:
        asking = Asking(server.base_url, **options)
        return asking.ask(requests), asking


def test_a_normal_reply_and_what_was_sent() -> None:
    with OpenAIServer() as server:
        heard = Asking(server.base_url).ask([request("Why is it so?")])
        [call] = server.calls
    [reply] = heard.replies()
    assert reply == Reply(Act().text, "stop", 100, 20)
    assert call.body == {
        "model": "m1",
        "messages": [{"role": "user", "content": "Why is it so?"}],
        "temperature": 0.7,
        "max_tokens": 50,
    }
    assert call.headers["authorization"] == f"Bearer {KEY}"


def test_concurrent_requests_are_all_answered_and_taken_only_when_sent() -> None:
    most, taken, done = 0, 0, 0

    def hand_out() -> Iterable[Request]:
        nonlocal most, taken
        for number in range(20):
            taken += 1
            most = max(most, taken - done)
            yield request(f"q{number}")

    with OpenAIServer() as server:
        asking = Asking(server.base_url, concurrency=4)

        def hear(asked: Request, outcome: Outcome) -> bool:
            nonlocal done
            done += 1
            return asking.heard(asked, outcome)

        asking.teacher.ask_many(hand_out(), hear)
        assert server.asked() == {f"q{number}": 1 for number in range(20)}
    assert len(asking.heard.replies()) == 20
    assert most <= 4


def test_retry_after_in_seconds_and_as_a_date_is_respected() -> None:
    date = email.utils.formatdate(1_000_000.0 + 40, usegmt=True)
    script = [status(429, retry_after="7"), status(429, retry_after=date), Act()]
    heard, asking = ask(script)
    assert [failure.final for failure in heard.failures()] == [False, False]
    assert not any(failure.may_be_billed for failure in heard.failures())
    assert len(heard.replies()) == 1
    assert 7 <= asking.waits[0] + 1e-9 < 8.5
    assert 40 <= asking.waits[1] + 1e-9 < 41.5


def test_backoff_grows_and_depends_on_the_request_only() -> None:
    first, one = ask([status(500), status(503), status(500), Act()])
    _, two = ask([status(500), status(503), status(500), Act()])
    _, other = ask([status(500), Act()], [request("another")])
    assert len(first.replies()) == 1
    assert one.waits == two.waits
    assert one.waits[0] != other.waits[0]
    assert [2**n * 0.5 <= wait < 2**n * 1.5 for n, wait in enumerate(one.waits)] == [True] * 3


def test_retries_are_bounded() -> None:
    heard, asking = ask([status(500)], max_retries=2)
    assert [failure.final for failure in heard.failures()] == [False, False, True]
    assert "500" in heard.failures()[-1].reason
    assert len(asking.waits) == 2


def test_a_refused_retry_is_not_made() -> None:
    with OpenAIServer([status(500)]) as server:
        asking = Asking(server.base_url)
        asking.heard.go_on = False
        asking.ask([request()])
        assert len(server.calls) == 1


@pytest.mark.parametrize("kind", ["truncated", "malformed", "empty_choices"])
def test_a_spoilt_reply_may_be_billed_and_is_asked_again(kind: str) -> None:
    heard, _ = ask([Act(kind), Act()])  # type: ignore[arg-type]
    [failure] = heard.failures()
    assert not failure.final
    assert failure.may_be_billed
    assert len(heard.replies()) == 1


@pytest.mark.parametrize("body", [[], {}, {"choices": None}, {"choices": [{}]}, "text", 3])
def test_any_other_json_is_a_failure_and_no_crash(body: object) -> None:
    heard, _ = ask([Act("raw", body=body)], max_retries=1)
    assert heard.failures()[-1].final
    assert not heard.replies()


def test_a_hanging_server_times_out_and_the_next_attempt_works() -> None:
    heard, _ = ask([Act("hang"), Act()], timeout_s=0.3)
    [failure] = heard.failures()
    assert failure.reason == "no reply within 0.3 s"
    assert failure.may_be_billed
    assert len(heard.replies()) == 1


def test_a_server_that_is_down_costs_nothing() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    heard = Asking(url, max_retries=1).ask([request()])
    assert [failure.may_be_billed for failure in heard.failures()] == [False, False]
    assert "can't connect: 127.0.0.1" in heard.failures()[-1].reason


def test_replies_without_usage_are_counted_by_estimate() -> None:
    heard, _ = ask([Act(usage=False, text="abcdef")])
    [reply] = heard.replies()
    assert reply.prompt_tokens == estimate_prompt_tokens(request().messages)
    assert reply.completion_tokens == 2


def test_truncated_answers_are_flagged_and_empty_ones_are_failures() -> None:
    heard, _ = ask(
        [Act(finish="length"), Act(text="  "), Act(finish="content_filter")],
        [request("a"), request("b"), request("c")],
    )
    assert [reply.finish for reply in heard.replies()] == ["length"]
    assert [failure.final for failure in heard.failures()] == [True, True]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (status(401), ["TEST_TEACHER_KEY", "401"]),
        (status(403), ["TEST_TEACHER_KEY", "403"]),
        (status(404), ["'m1'", "[teacher] model"]),
        (status(429, code="insufficient_quota"), ["quota"]),
        (status(429, retry_after="86400"), ["86400 s", "later"]),
        (status(400, param="temperature"), ["temperature"]),
    ],
)
def test_what_can_not_succeed_stops_at_once(act: Act, words: list[str]) -> None:
    with OpenAIServer([Act(), act]) as server:
        asking = Asking(server.base_url)
        with pytest.raises(TeacherError) as caught:
            asking.ask([request(f"q{number}") for number in range(5)])
        assert len(server.calls) == 2
    assert all(word in str(caught.value) for word in words)
    assert len(asking.heard.replies()) == 1
    assert [failure.final for failure in asking.heard.failures()] == [True]


def test_others_in_flight_are_booked_before_it_stops() -> None:
    def script(call: Call) -> Act:
        return status(401) if call.question == "bad" else Act(delay_s=0.3)

    with OpenAIServer(script) as server:
        asking = Asking(server.base_url, concurrency=2)
        with pytest.raises(TeacherError):
            asking.ask([request("good"), request("bad"), request("never")])
        assert set(server.asked()) == {"good", "bad"}
    assert [text for text, outcome in asking.heard.outcomes if isinstance(outcome, Reply)] == ["good"]


def test_a_context_error_fails_that_question_only() -> None:
    heard, _ = ask([status(400, code="context_length_exceeded"), Act()], [request("long"), request("short")])
    [failure] = heard.failures()
    assert failure.final
    assert not failure.may_be_billed
    assert len(heard.replies()) == 1


def test_models_that_know_only_max_completion_tokens() -> None:
    def script(call: Call) -> Act:
        if "max_tokens" in call.body:
            return status(
                400, param="max_tokens", message="'max_tokens' is not supported, use 'max_completion_tokens'"
            )
        return Act()

    with OpenAIServer(script) as server:
        heard = Asking(server.base_url).ask([request("a"), request("b")])
        assert [call.body.get("max_completion_tokens") for call in server.calls] == [None, 50, 50]
        together = Asking(server.base_url, concurrency=4).ask([request(f"q{number}") for number in range(4)])
    assert len(heard.replies()) == 2
    assert (len(together.replies()), len(together.failures())) == (4, 0)


def test_no_key_is_an_error_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_TEACHER_KEY")
    with OpenAIServer() as server:
        with pytest.raises(TeacherError, match="TEST_TEACHER_KEY is not set"):
            Asking(server.base_url).ask([request()])
        assert len(Asking(server.base_url, api_key_env="").ask([request()]).replies()) == 1
        assert len(server.calls) == 1


def test_the_key_is_in_no_message_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    heard, _ = ask([status(400, message=f"bad key {KEY}")])
    with OpenAIServer([status(401, message=f"Incorrect API key provided: {KEY}")]) as server:
        asking = Asking(server.base_url)
        with pytest.raises(TeacherError) as caught:
            asking.ask([request()])
    said = [failure.reason for failure in [*heard.failures(), *asking.heard.failures()]]
    assert "***" in str(caught.value)
    assert KEY not in repr(caught.value)
    assert KEY not in " ".join([*said, str(caught.value), caplog.text])


def test_an_error_of_the_listener_ends_the_asking() -> None:
    def hear(asked: Request, outcome: Outcome) -> bool:
        raise OSError("disk full")

    with OpenAIServer() as server:
        with pytest.raises(OSError, match="disk full"):
            Asking(server.base_url).teacher.ask_many([request("a"), request("b")], hear)
        assert len(server.calls) == 1


def test_the_key_of_a_request_is_its_content() -> None:
    assert request().key == request().key
    keys = {request().key, request(sample=1).key, request("Why not?").key, request(model="m2").key}
    assert len(keys) == 4
    assert len(request("\ud800 lone surrogate").key) == 64


def test_the_highest_price_covers_scripts_with_many_tokens_a_character() -> None:
    teacher = ScriptedTeacher(lambda _: "x", price_prompt=1e6, price_completion=2e6)
    assert highest_price(teacher, request("")) >= 2 * 50
    assert estimate_prompt_tokens([Message(role="user", content="为什么" * 100)]) >= 300


def test_the_scripted_teacher_tries_again_while_it_may() -> None:
    said: list[str | Outcome] = [Failure("busy", final=False), "yes"]
    teacher = ScriptedTeacher(lambda _: said.pop(0))
    heard = Heard()
    teacher.ask_many([request()], heard)
    assert teacher.calls == 2
    assert [reply.text for reply in heard.replies()] == ["yes"]
