"""The ledger and asking through it: killed processes, two processes, the hard cap, damaged files."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from domains.errors import BudgetExceeded, DataError, StageError
from domains.records import Message
from pipeline.asking import CANARY, Answers, answer_all, estimate
from pipeline.ledger import Ledger
from pipeline.progress import Silent
from pipeline.teacher import Failure, Outcome, Reply, Request, ScriptedTeacher, highest_price
from pipeline.teacher_endpoint import EndpointTeacher
from tests.openai_server import Act, OpenAIServer, status

ROOT = Path(__file__).parent.parent
MAX_COST = 1000.0
# What the child processes do: ask the server N questions through the ledger, 4 at a time.
CHILD = """
import sys
from pathlib import Path
from pipeline.asking import answer_all
from pipeline.ledger import Ledger
from pipeline.progress import Silent
from tests.test_ledger import endpoint, requests
path, url, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with Ledger(path) as ledger:
    answers = answer_all(requests(count), endpoint(url), ledger, max_cost=1000.0, currency="USD", progress=Silent())
    print(len(answers.entries), answers.cached)
"""


def requests(count: int, *, text: str = "question") -> list[Request]:
    return [
        Request(
            model="m1",
            messages=(Message(role="user", content=f"{text} {number}"),),
            temperature=0.7,
            max_tokens=50,
            sample=0,
        )
        for number in range(count)
    ]


def endpoint(url: str, *, concurrency: int = 4) -> EndpointTeacher:
    return EndpointTeacher(
        base_url=url,
        model="m1",
        api_key_env="",
        concurrency=concurrency,
        timeout_s=30.0,
        max_retries=0,
        price_prompt=1.0,
        price_completion=2.0,
    )


def ask(
    ledger: Ledger, teacher: ScriptedTeacher | EndpointTeacher, count: int, *, max_cost: float = MAX_COST
) -> Answers:
    return answer_all(requests(count), teacher, ledger, max_cost=max_cost, currency="USD", progress=Silent())


def start_child(ledger: Path, server: OpenAIServer, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(ledger), server.base_url, str(count)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    while not condition():
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)


def keys_in(path: Path) -> set[str]:
    with sqlite3.connect(path) as db:
        found = {key for (key,) in db.execute("SELECT key FROM answers")}
    db.close()
    return found


def put(ledger: Ledger, key: str, text: str = "text", *, cost: float = 1.0, finish: str = "stop") -> None:
    ledger.put(
        key,
        text,
        finish=finish,
        prompt_tokens=10,
        completion_tokens=5,
        cost=cost,
        currency="USD",
        model="m1",
    )


def test_an_answer_comes_back_after_reopening(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite", now=lambda: "2025-01-01T00:00:00+00:00") as ledger:
        assert ledger.get("k") is None
        put(ledger, "k", "first", finish="length")
        put(ledger, "k", "second")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        entry = ledger.get("k")
        assert entry is not None
        assert (entry.text, entry.truncated, entry.created) == ("first", True, "2025-01-01T00:00:00+00:00")


def test_totals_add_up(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        put(ledger, "a", cost=1.0)
        put(ledger, "b", cost=2.0, finish="length")
        ledger.fail("c", "500", cost=0.0, currency="USD")
        ledger.fail("c", "no reply", cost=4.0, currency="USD")
        ledger.fail("d", "no reply", cost=8.0, currency="EUR")
        totals = ledger.totals("USD")
        assert (totals.answers, totals.truncated, totals.failed_attempts) == (2, 1, 3)
        assert (totals.prompt_tokens, totals.completion_tokens) == (20, 10)
        assert (totals.cost, totals.lost_cost) == (7.0, 4.0)
        assert ledger.spent("USD") == 7.0
        assert ledger.spent("EUR") == 8.0
        assert ledger.failures() == {"c": ["500", "no reply"], "d": ["no reply"]}


def test_reservations_count_until_they_are_settled(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with ledger.asking():
            assert ledger.reserve("a", cost=3.0, currency="USD", max_cost=5.0)
            assert not ledger.reserve("b", cost=3.0, currency="USD", max_cost=5.0)
            assert ledger.reserve("a", cost=4.0, currency="USD", max_cost=5.0), "its own one is replaced"
            assert ledger.spent("USD") == 4.0
            put(ledger, "a", cost=1.0)
            assert ledger.reserve("b", cost=3.0, currency="USD", max_cost=5.0)
        assert ledger.failures() == {"b": ["interrupted before the reply arrived"]}
        assert ledger.spent("USD") == 4.0


@pytest.mark.parametrize("damage", ["no database", "a page overwritten"])
def test_a_damaged_file_is_an_error_that_keeps_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.sqlite"
    if damage == "no database":
        path.write_bytes(b"these are not the bytes of a database " * 200)
    else:
        with Ledger(path) as ledger:
            for number in range(200):
                put(ledger, f"k{number}", "text " * 50)
        data = bytearray(path.read_bytes())
        data[4096:12288] = b"\xff" * 8192
        path.write_bytes(data)
    before = path.read_bytes()
    with pytest.raises(DataError, match="damaged") as caught:
        Ledger(path)
    assert f"mv {path}" in caught.value.next_step
    assert path.read_bytes() == before


def test_another_database_and_an_unwritable_place_are_errors(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.sqlite") as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(DataError, match="no ledger"):
        Ledger(tmp_path / "other.sqlite")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't write the ledger"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    teacher = ScriptedTeacher(lambda request: f"re: {request.messages[0].content}")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first = ask(ledger, teacher, 5)
        more = answer_all(
            requests(8) + requests(8), teacher, ledger, max_cost=0.0, currency="USD", progress=Silent()
        )
    assert (len(first.entries), first.cached) == (5, 0)
    assert (len(more.entries), more.cached, teacher.calls) == (8, 5, 8)


def test_the_estimate_asks_nothing_and_is_an_upper_bound(tmp_path: Path) -> None:
    teacher = ScriptedTeacher(lambda _: "short", price_prompt=1.0, price_completion=2.0)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ask(ledger, teacher, 2)
        calls, before = teacher.calls, ledger.spent("USD")
        found = estimate(requests(10), teacher, ledger, currency="USD")
        assert teacher.calls == calls
        assert (found.requests, found.cached, found.max_completion_tokens) == (10, 2, 8 * 50)
        ask(ledger, teacher, 10)
        assert 0 < ledger.spent("USD") - before <= found.max_cost


@pytest.mark.parametrize("fits", [0, 1, 7])
def test_the_cap_is_never_passed_and_every_answer_is_kept(tmp_path: Path, fits: int) -> None:
    dear = Reply("long " * 10, "length", prompt_tokens=10, completion_tokens=50)
    teacher = ScriptedTeacher(lambda _: dear, price_prompt=0.0, price_completion=1e6)
    cap = 50.0 * fits + 49
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(BudgetExceeded, match=f"{fits} of 20 are done") as caught:
            ask(ledger, teacher, 20, max_cost=cap)
        assert teacher.calls == fits
        assert ledger.spent("USD") == 50.0 * fits
        assert "max_cost" in caught.value.next_step
        done = ask(ledger, teacher, 20)
    assert done.cached == fits
    assert teacher.calls == 20


def test_the_cap_holds_for_requests_in_flight(tmp_path: Path) -> None:
    one = highest_price(endpoint("http://127.0.0.1:9/v1"), requests(1)[0])
    with OpenAIServer([Act(delay_s=0.02)]) as server, Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(BudgetExceeded):
            ask(ledger, endpoint(server.base_url), 40, max_cost=10 * one)
        assert ledger.spent("USD") <= 10 * one
        # 100 + 20 tokens are billed a call, so at least as many calls as fit were made.
        assert len(server.calls) == ledger.totals("USD").answers >= 1


def test_attempts_that_may_be_billed_count_towards_the_cap(tmp_path: Path) -> None:
    said: list[Outcome] = [Failure("no reply", final=False, may_be_billed=True)] * 100
    teacher = ScriptedTeacher(lambda _: said.pop(0), price_prompt=0.0, price_completion=1e6)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(BudgetExceeded):
            ask(ledger, teacher, 3, max_cost=230.0)
        assert teacher.calls == 4
        assert ledger.spent("USD") == ledger.totals("USD").lost_cost == 200.0


def test_failures_are_counted_and_asked_again_next_time(tmp_path: Path) -> None:
    broken = {"question 1", "question 3"}

    def script(request: Request) -> str | Outcome:
        return Failure("400: too long") if request.messages[0].content in broken else "yes"

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        answers = ask(ledger, ScriptedTeacher(script), 6)
        assert (len(answers.entries), len(answers.failures)) == (4, 2)
        assert set(answers.failures.values()) == {"400: too long"}
        broken.clear()
        assert len(ask(ledger, ScriptedTeacher(script), 6).entries) == 6


def test_a_teacher_that_answers_nothing_is_given_up_early(tmp_path: Path) -> None:
    with OpenAIServer([status(500)]) as server, Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(StageError, match=f"{CANARY} x 500"):
            ask(ledger, endpoint(server.base_url, concurrency=1), 100)
        assert len(server.calls) == CANARY


def test_an_interrupt_keeps_what_was_answered(tmp_path: Path) -> None:
    def script(request: Request) -> str:
        if request.messages[0].content == "question 3":
            raise KeyboardInterrupt
        return "yes"

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(KeyboardInterrupt):
            ask(ledger, ScriptedTeacher(script), 6)
        assert ledger.totals("USD").answers == 3
        teacher = ScriptedTeacher(lambda _: "yes")
        assert ask(ledger, teacher, 6).cached == 3
        assert teacher.calls == 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_loses_only_what_was_in_flight(tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "ledger.sqlite"
    with OpenAIServer([Act(delay_s=0.05)]) as server:
        child = start_child(path, server, 60)
        wait_until(lambda: sum(server.answered.values()) >= 12, child)
        os.kill(child.pid, how)
        child.communicate(timeout=60)
        assert child.returncode != 0
        kept, asked_before = keys_in(path), server.asked()
        assert len(kept) >= 8
        with Ledger(path) as ledger:
            answers = ask(ledger, endpoint(server.base_url), 60)
            lost = ledger.totals("USD").failed_attempts
            lost_cost = ledger.totals("USD").lost_cost
        asked = server.asked()
    assert answers.cached == len(kept)
    assert len(answers.entries) == 60
    for request in requests(60):
        text = request.messages[0].content
        assert asked[text] == (asked_before[text] if request.key in kept else asked_before[text] + 1)
    twice = [text for text, count in asked.items() if count > 1]
    assert len(twice) <= 4
    assert len(twice) <= lost <= 4
    assert (lost_cost > 0) == (lost > 0)


def test_those_that_begin_a_ledger_at_once_wait_for_each_other(tmp_path: Path) -> None:
    def begin(path: Path, together: Barrier) -> None:
        together.wait()
        Ledger(path).close()

    with ThreadPoolExecutor(4) as pool:
        for number in range(60):
            path, together = tmp_path / str(number) / "ledger.sqlite", Barrier(4)
            assert list(pool.map(begin, [path] * 4, [together] * 4)) == [None] * 4


def test_two_processes_share_a_ledger_and_pay_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with OpenAIServer([Act(delay_s=0.01)]) as server:
        children = [start_child(path, server, 30) for _ in range(2)]
        printed = [child.communicate(timeout=120) for child in children]
        assert [child.returncode for child in children] == [0, 0], printed
        assert server.asked() == {f"question {number}": 1 for number in range(30)}
    counts = sorted(json.loads(f"[{out.strip().replace(' ', ',')}]") for out, _ in printed)
    assert counts == [[30, 0], [30, 30]]
