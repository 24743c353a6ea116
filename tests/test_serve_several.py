"""Several domains in one service: each with its own index, prompt and adapter, on one base in memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from domains.errors import ConfigError, DataError
from serve.bundle import OpenBundle, open_bundle
from serve.http import create_app
from serve.manifest import read_manifest
from serve.shared_models import SharedModels
from tests.small_adapters import random_factors, write_adapter, write_base, write_bundle
from tests.test_http import TOKEN, client, running, send

ROOT = Path(__file__).parent.parent
QUESTIONS = ["What is the dose of Brenzal?", "Where are Corvane drops kept?", "What of Moltrex and milk?"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``one`` and ``two`` on one base, each with its adapter; ``plain``, another student without one."""
    folder = tmp_path_factory.mktemp("bundles")
    base = write_base(folder / "base.gguf")
    shelves = {"one": ["Brenzal", "Corvane"], "two": ["Moltrex", "Pelidor"], "plain": ["Sanivar"]}
    for seed, name in enumerate(("one", "two")):
        adapter = write_adapter(folder / f"{name}.gguf", random_factors(seed))
        write_bundle(folder / name, base, adapter, name=name, documents=shelves[name])
    other = write_base(folder / "other.gguf", random_state())
    write_bundle(folder / "plain", other, None, name="plain", documents=shelves["plain"])
    return folder


def random_state() -> dict[str, Any]:
    from tests.small_adapters import merged_state

    return merged_state(random_factors(7))


@pytest.fixture(scope="module")
def alone(bundles: Path) -> dict[str, list[str]]:
    """What each domain answers when it is served by itself, greedily, one question at a time."""
    found = {}
    for name in ("one", "two", "plain"):
        with open_bundle(bundles / name) as opened:
            found[name] = [fresh_answer(opened, question) for question in QUESTIONS]
    return found


def fresh_answer(opened: OpenBundle, question: str) -> str:
    opened.engine.forget()
    return opened.assistant.ask(question).raw


@pytest.fixture(scope="module")
def opened(bundles: Path) -> Iterator[dict[str, OpenBundle]]:
    with SharedModels() as shared, ExitStack() as stack:
        yield {
            name: stack.enter_context(open_bundle(bundles / name, shared=shared))
            for name in ("one", "two", "plain")
        }


@pytest.fixture(scope="module")
def port(opened: dict[str, OpenBundle]) -> Iterator[int]:
    with running(*opened.values()) as port:
        yield port


# -- in memory -------------------------------------------------------------------------------------


def test_bundles_with_the_same_student_file_share_one_model_and_keep_all_else(
    opened: dict[str, OpenBundle], alone: dict[str, list[str]]
) -> None:
    assert opened["one"].engine.model is opened["two"].engine.model
    assert opened["plain"].engine.model is not opened["one"].engine.model
    for name, bundle in opened.items():
        assert [fresh_answer(bundle, question) for question in QUESTIONS] == alone[name]
    assert len({tuple(answers) for answers in alone.values()}) == 3
    assert opened["one"].assistant.prepare("Brenzal?").hits[0].passage.doc_id == "brenzal"
    assert opened["two"].assistant.prepare("Brenzal?").hits[0].passage.doc_id in {"moltrex", "pelidor"}
    prompt = opened["two"].engine.detokenize(opened["two"].assistant.prepare("Brenzal?").tokens)
    assert "You answer for two." in prompt


def test_shared_models_are_freed_with_their_last_user(bundles: Path) -> None:
    shared = SharedModels()
    one = open_bundle(bundles / "one", shared=shared)
    two = open_bundle(bundles / "two", shared=shared)
    model = one.engine.model
    assert len(shared) == 1
    one.close()
    shared.close()
    assert model.handle is not None
    assert two.assistant.ask(QUESTIONS[0]).raw
    two.close()
    assert model.handle is None
    shared.close()
    assert len(shared) == 0


# -- over HTTP -------------------------------------------------------------------------------------


def answer_of(port: int, name: str, question: str, *, stream: bool = False) -> str:
    messages: list[Any] = [{"role": "user", "content": question}]
    with client(port) as api:
        if stream:
            chunks = api.chat.completions.create(model=name, messages=messages, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reply = api.chat.completions.create(model=name, messages=messages)
        assert reply.model == name
        return str(reply.choices[0].message.content)


@pytest.fixture(scope="module")
def texts_alone(bundles: Path) -> dict[tuple[str, str], str]:
    """Texts over HTTP of each domain by itself."""
    found = {}
    for name in ("one", "two", "plain"):
        with open_bundle(bundles / name) as bundle, running(bundle) as port:
            for question in QUESTIONS:
                bundle.engine.forget()
                found[name, question] = answer_of(port, name, question)
    return found


def test_the_requests_model_chooses_the_domain(
    port: int, opened: dict[str, OpenBundle], texts_alone: dict[tuple[str, str], str]
) -> None:
    with client(port) as api:
        assert [model.id for model in api.models.list()] == ["one", "two", "plain"]
    assert send(port, "GET", "/healthz")[1] == {"status": "ok", "models": ["one", "two", "plain"]}
    for (name, question), expected in texts_alone.items():
        for stream in (False, True):
            opened[name].engine.forget()
            assert answer_of(port, name, question, stream=stream) == expected
    assert len(set(texts_alone.values())) > 3


def test_domains_are_asked_at_the_same_time(
    port: int, opened: dict[str, OpenBundle], texts_alone: dict[tuple[str, str], str]
) -> None:
    found: dict[str, str] = {}
    start = threading.Barrier(3)

    def ask(name: str) -> None:
        start.wait(30)
        found[name] = answer_of(port, name, QUESTIONS[1], stream=True)

    for bundle in opened.values():
        bundle.engine.forget()
    threads = [threading.Thread(target=ask, args=(name,)) for name in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {name: texts_alone[name, QUESTIONS[1]] for name in opened}


def test_a_request_must_say_which_of_several_domains_it_means(port: int) -> None:
    ask = {"messages": [{"role": "user", "content": "Dose?"}]}
    status, reply, _ = send(port, "POST", "/v1/chat/completions", ask)
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "missing_parameter", "model")
    assert "'one', 'two', 'plain'" in reply["error"]["message"]
    for unknown in ("three", "../one", "/etc/passwd", ""):
        status, reply, _ = send(port, "POST", "/v1/chat/completions", {**ask, "model": unknown})
        assert (status, reply["error"]["code"]) == (404, "model_not_found")
        assert "'one', 'two', 'plain'" in reply["error"]["message"]


def test_two_domains_of_one_name_are_refused(opened: dict[str, OpenBundle]) -> None:
    with pytest.raises(ConfigError, match="'one'"):
        create_app([opened["one"], opened["two"], opened["one"]], token=TOKEN)


# -- the front door --------------------------------------------------------------------------------


def test_the_command_serves_all_that_it_is_given(bundles: Path, texts_alone: dict[Any, str]) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
    service = subprocess.Popen(
        [sys.executable, "-m", "preceptor", "serve", "one", str(bundles / "two"), "--port", "0"],
        cwd=bundles,
        env={**environment, "PYTHONPATH": str(ROOT), "PRECEPTOR_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert service.stdout is not None
    lines = [service.stdout.readline() for _ in range(2)]
    for line, name in zip(lines, ("one", "two"), strict=True):
        assert f"The domain {name}" in line
    address = re.search(r"http://127\.0\.0\.1:(\d+)/v1", lines[0])
    assert address, lines
    for name in ("one", "two"):
        assert answer_of(int(address[1]), name, QUESTIONS[0]) == texts_alone[name, QUESTIONS[0]]
    service.send_signal(signal.SIGINT)
    out, err = service.communicate(timeout=60)
    assert (service.returncode, err) == (0, "")
    assert out.endswith("Stopped.\n")


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles / "one", tmp_path / "one"))


def flip_a_byte(bundle: Path) -> None:
    data = bytearray((bundle / "adapter.gguf").read_bytes())
    data[-1] ^= 1
    (bundle / "adapter.gguf").write_bytes(data)


def forget_the_file(bundle: Path) -> None:
    edit(bundle, lambda data: data["files"].pop("adapter.gguf"))


def point_outside(bundle: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["adapter"] = "../one.gguf"
        data["files"]["../one.gguf"] = data["files"]["adapter.gguf"]

    edit(bundle, change)


def edit(bundle: Path, change: Any) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_byte, "adapter.gguf: its bytes changed"),
        (lambda bundle: (bundle / "adapter.gguf").unlink(), "adapter.gguf: missing"),
        (forget_the_file, "adapter.gguf: not in the manifest"),
        (point_outside, "not a path inside the bundle"),
    ],
)
def test_a_damaged_adapter_is_found_before_anything_is_loaded(copy: Path, damage: Any, named: str) -> None:
    damage(copy)
    with SharedModels() as shared:
        with pytest.raises(DataError, match=re.escape(named)):
            open_bundle(copy, shared=shared)
        assert len(shared) == 0


def test_a_calibration_of_another_adapter_is_refused(copy: Path) -> None:
    from pipeline.bundle import note_files
    from serve.confidence import Calibration

    files = read_manifest(copy).files
    sources = {name: files[name].sha256 for name in ("student.gguf", "adapter.gguf")}
    for name, right in (("adapter.gguf", True), ("adapter.gguf", False), ("student.gguf", False)):
        told = sources if right else {**sources, name: "0" * 64}
        text = Calibration(reason="too few questions", sources=told).model_dump_json()
        (copy / "calibration.json").write_text(text, encoding="utf-8")
        note_files(copy, ["calibration.json"])
        if right:
            open_bundle(copy).close()
            continue
        with pytest.raises(DataError, match="fitted to another student"):
            open_bundle(copy)


def test_a_client_of_openai_is_told_of_a_wrong_name(port: int) -> None:
    with client(port) as api, pytest.raises(openai.NotFoundError, match="'two'"):
        api.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Dose?"}])
