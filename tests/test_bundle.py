from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domains.errors import ConfigError, DataError, ModelError, PreceptorError
from pipeline.bundle import close_bundle, mark_ready
from serve.bundle import find_bundle, open_base, open_bundle
from serve.gguf_check import check_gguf
from serve.manifest import BaseModelFacts
from serve.models import inference_gguf
from tests.small_serving import SYSTEM, write_domain, write_index


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    domain = write_domain(root / "domain")
    folder = root / "bundle"
    folder.mkdir()
    gguf = inference_gguf("smollm2-135m")
    try:
        os.link(gguf, folder / "student.gguf")
    except OSError:  # another file system
        shutil.copyfile(gguf, folder / "student.gguf")
    write_index(folder / "index")
    close_bundle(
        folder,
        config=domain.config,
        prompts=domain.prompts,
        base=BaseModelFacts(name="SmolLM2-135M-Instruct", licence="apache-2.0", version=""),
        teachers=["local"],
        template=str(check_gguf(gguf).metadata["tokenizer.chat_template"]),
    )
    (folder / "parity.json").write_text("{}", encoding="utf-8")
    mark_ready(folder, ready=True)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; big files are links, so replace them, never write into them."""
    copy = tmp_path / "bundle"
    shutil.copytree(original, copy, copy_function=_link_big)
    return copy


def _link_big(source: str, target: str) -> None:
    if Path(source).stat().st_size > 1_000_000:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_a_bundle_opens_and_finds_the_document_that_answers(bundle: Path) -> None:
    with open_bundle(bundle, parallel=1) as opened:
        assert opened.name == "shelf"
        assert opened.manifest is not None
        assert opened.engine.context == 1024
        asked = opened.assistant.prepare("Where are Corvane drops kept?")
        assert asked.hits[0].passage.doc_id == "corvane"
        assert len(asked.hits) == 2
        assert opened.engine.detokenize(asked.tokens).find(SYSTEM) >= 0
        answer = opened.assistant.ask_many([asked])[0]
        assert answer.passages == asked.hits
        assert answer.completion_tokens > 0


def test_a_bundle_can_be_moved(bundle: Path, tmp_path: Path) -> None:
    moved = bundle.rename(tmp_path / "elsewhere")
    with open_bundle(moved) as opened:
        assert opened.assistant.prepare("Sanivar doses?").hits[0].passage.doc_id == "sanivar"


def test_an_unready_bundle_opens_only_when_asked_to(bundle: Path) -> None:
    edit_manifest(bundle, lambda data: data.update(ready=False))
    with pytest.raises(ModelError) as caught:
        open_bundle(bundle)
    assert "parity" in str(caught.value)
    assert "preceptor export shelf" in caught.value.next_step
    with open_bundle(bundle, parallel=1, unready_ok=True) as opened:
        assert opened.manifest is not None
        assert not opened.manifest.ready


def _cut_student(bundle: Path) -> None:
    whole = (bundle / "student.gguf").read_bytes()
    (bundle / "student.gguf").unlink()
    (bundle / "student.gguf").write_bytes(whole[:-1])


def _other_student(bundle: Path) -> None:
    size = (bundle / "student.gguf").stat().st_size
    (bundle / "student.gguf").unlink()
    (bundle / "student.gguf").write_bytes(b"GGUF" + bytes(size - 4))


def _empty_prompt(bundle: Path) -> None:
    (bundle / "prompts" / "system.md").write_text("\n", encoding="utf-8")
    edit_manifest(bundle, lambda data: data["files"]["prompts/system.md"].update(size_bytes=1))


DAMAGE: list[tuple[Callable[[Path], Any], type[PreceptorError], str]] = [
    (lambda b: (b / "manifest.json").unlink(), DataError, "manifest.json"),
    (lambda b: (b / "manifest.json").write_text("{", encoding="utf-8"), DataError, "manifest.json"),
    (lambda b: edit_manifest(b, lambda data: data.pop("files")), DataError, "files"),
    (lambda b: edit_manifest(b, lambda data: data["files"].pop("student.gguf")), DataError, "student.gguf"),
    (
        lambda b: edit_manifest(b, lambda data: data["files"].update({"../x": data["files"]["NOTICE"]})),
        DataError,
        "not a path inside",
    ),
    (lambda b: (b / "NOTICE").unlink(), DataError, "NOTICE: missing"),
    (_cut_student, DataError, "student.gguf"),
    (_other_student, DataError, "student.gguf"),
    (lambda b: edit_manifest(b, lambda data: data.update(template_sha256="0" * 64)), ModelError, "template"),
    (_empty_prompt, DataError, "system.md"),
    (lambda b: shutil.rmtree(b / "index"), DataError, "index"),
]


@pytest.mark.parametrize(("damage", "error", "named"), DAMAGE)
def test_damage_is_found_named_and_answered_with_a_next_step(
    bundle: Path, damage: Callable[[Path], Any], error: type[PreceptorError], named: str
) -> None:
    damage(bundle)
    with pytest.raises(error) as caught:
        open_bundle(bundle)
    assert named in caught.value.what
    assert caught.value.next_step


def test_an_untrained_base_answers_over_the_domains_index(tmp_path: Path) -> None:
    domain = write_domain(tmp_path / "domain")
    write_index(tmp_path / "index")
    with open_base(domain, tmp_path / "index", parallel=1) as opened:
        assert opened.manifest is None
        answer = opened.assistant.ask("What is the adult dose of Brenzal?")
        assert answer.passages[0].passage.doc_id == "brenzal"
        assert answer.raw
        if answer.support == "supported":
            assert answer.citations


def test_a_base_without_a_gguf_says_what_to_do(tmp_path: Path) -> None:
    domain = write_domain(tmp_path / "domain")
    toml = (domain.folder / "domain.toml").read_text(encoding="utf-8")
    base = 'base = "meta-llama/Llama-3.2-1B-Instruct"\n'
    (domain.folder / "domain.toml").write_text(
        toml.replace("[student]\n", f"[student]\n{base}"), encoding="utf-8"
    )
    from domains.domain import load_domain

    with pytest.raises(ModelError) as caught:
        open_base(load_domain(str(domain.folder)), tmp_path / "index")
    assert "meta-llama/Llama-3.2-1B-Instruct" in caught.value.what
    assert "preceptor run shelf" in caught.value.next_step


def test_a_domains_bundle_is_that_of_its_latest_run(tmp_path: Path) -> None:
    folder = write_domain(tmp_path / "somewhere").folder
    runs = tmp_path / "runs"

    def write(run: str, name: str, age: int) -> Path:
        path = runs / "shelf" / run / "bundle" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}", encoding="utf-8")
        os.utime(path, ns=(10**18 - age, 10**18 - age))
        return runs / "shelf" / run / "bundle"

    with pytest.raises(DataError) as caught:
        find_bundle(str(folder), runs)
    assert caught.value.next_step == f"preceptor run {folder}"
    indexed = write("quick", "index/index.json", age=5)
    assert find_bundle("shelf", runs, base=True) == indexed
    with pytest.raises(DataError):
        find_bundle("shelf", runs)
    old, new = write("old", "manifest.json", age=9), write("new", "manifest.json", age=1)
    assert find_bundle("shelf", runs) == new
    (runs / "shelf" / "latest").symlink_to("old")
    assert find_bundle(str(folder), runs).resolve() == old
    assert find_bundle("shelf", runs, base=True) == indexed
    assert find_bundle(str(new), runs) == new
    with pytest.raises(ConfigError):
        find_bundle(str(tmp_path / "nowhere"), runs)
