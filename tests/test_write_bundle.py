from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.config import DomainConfig, parse_config, read_config
from domains.errors import DataError
from pipeline.bundle import close_bundle, dump_toml, licence_notices, mark_ready, open_bundle, student_file
from serve.manifest import BaseModelFacts, read_manifest

BASE = BaseModelFacts(name="smollm2-135m", licence="apache-2.0", version="sha256:" + "ab" * 32)
CONFIG = """
[domain]
name = "shelf"
title = 'Äpfel "and" \\ pears'
licence = "CC0-1.0"
[corpus]
documents = "../docs"
[train]
learning_rate = 1e-5
[export]
formats = ["Q8_0", "Q4_K_M"]
[curate]
checks = ["checks:one", "checks:two"]
[profiles.small.train]
epochs = 1
"""


def config(profile: str | None = None) -> DomainConfig:
    return parse_config(CONFIG, origin="test", profile=profile)


def fill(bundle: Path) -> None:
    open_bundle(bundle, keep=["student.gguf"])
    (bundle / "student.gguf").write_bytes(b"GGUF model")
    (bundle / "index").mkdir(exist_ok=True)
    (bundle / "index" / "chroma.sqlite3").write_bytes(b"changes")
    close_bundle(
        bundle, config=config("small"), prompts={"system": "Answer."}, base=BASE,
        teachers=["gpt", "local", "gpt"], template="{{ messages }}",
    )  # fmt: skip


def test_configuration_comes_back_resolved(tmp_path: Path) -> None:
    fill(tmp_path)
    assert read_config(tmp_path / "domain.toml") == config("small")
    assert config("small").train.epochs == 1


def test_manifest_hashes_what_does_not_change(tmp_path: Path) -> None:
    fill(tmp_path)
    manifest = read_manifest(tmp_path)
    assert not manifest.ready
    assert set(manifest.files) == {"student.gguf", "domain.toml", "prompts/system.md", "NOTICE"}
    assert manifest.files["student.gguf"].sha256 == hashlib.sha256(b"GGUF model").hexdigest()
    assert manifest.files["student.gguf"].size_bytes == 10
    assert manifest.template_sha256 == hashlib.sha256(b"{{ messages }}").hexdigest()
    assert manifest.teachers == ["gpt", "local"]
    assert manifest.versions["llama-cpp-python"]
    assert manifest.created == ""


def test_ready_is_noted_with_the_parity_file(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "parity.json").write_bytes(b"{}")
    mark_ready(tmp_path, ready=True)
    manifest = read_manifest(tmp_path)
    assert manifest.ready
    assert manifest.files["parity.json"].size_bytes == 2


def test_same_input_same_bytes_and_the_clock_only_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    fill(tmp_path)
    first = (tmp_path / "manifest.json").read_bytes()
    fill(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    fill(tmp_path)
    assert read_manifest(tmp_path).created == "1970-01-02T00:00:00+00:00"


def test_a_bundle_being_rewritten_has_no_manifest_and_no_stale_report(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "report.json").write_bytes(b"{}")
    (tmp_path / "student-Q4_0.gguf").write_bytes(b"GGUF")
    open_bundle(tmp_path, keep=["student.gguf"])
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "student.gguf", "domain.toml", "prompts", "NOTICE", "index"
    }  # fmt: skip


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text("utf-8").replace('"schema_version": 1', '"schema_version": 7'), "utf-8")
    with pytest.raises(DataError, match="schema_version"):
        read_manifest(tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="JSON"):
        read_manifest(tmp_path)


def test_llama_licence_is_told() -> None:
    base = BaseModelFacts(name="Llama-3.2-1B-Instruct", licence="llama3.2", version="commit:0")
    notices = licence_notices(base, domain_licence="CC0-1.0")
    assert "Built with Llama" in notices
    assert any("Llama 3.2 Community License" in line for line in notices)
    assert "Built with Llama" not in licence_notices(BASE, domain_licence="CC0-1.0")


def test_file_names() -> None:
    assert student_file("Q8_0", served="Q8_0") == "student.gguf"
    assert student_file("Q4_0", served="Q8_0") == "student-Q4_0.gguf"


scalars = st.one_of(
    st.text(), st.integers(-(2**60), 2**60), st.booleans(), st.floats(allow_nan=False, allow_infinity=True)
)


@given(st.dictionaries(st.sampled_from("abcd"), st.one_of(scalars, st.lists(st.text(), max_size=3))))
def test_toml_round_trip(values: dict[str, Any]) -> None:
    assert tomllib.loads(dump_toml({"section": values})) == {"section": values}
