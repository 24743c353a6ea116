"""The doctor looks at everything, whatever is broken, and says what to do."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from domains.errors import ModelError
from pipeline import doctor
from pipeline.doctor import NEEDED, PACKAGES, Finding, examine
from pipeline.run_folder import Finished, Run


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks that read hundreds of megabytes; one test below has them."""
    monkeypatch.setattr(doctor, "_student", lambda: "student")
    monkeypatch.setattr(doctor, "_embedder", lambda: "embedder")
    monkeypatch.setattr(doctor, "_installed_bytes", lambda: 10**9)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    named = {finding.what: finding for finding in findings}
    assert len(named) == len(findings)
    return named


def test_this_machine_is_sound(tmp_path: Path) -> None:
    findings = by_name(examine(tmp_path / "no-runs-yet", speed=False))
    assert [finding for finding in findings.values() if not finding.ok] == []
    assert {"python", "cores", "memory", "free disk", "student model", "embedder", *PACKAGES} <= set(findings)
    assert "speed of llama.cpp" not in findings
    assert findings["torch"].found == importlib.metadata.version("torch")
    assert "checksum right" in findings["student model"].found
    assert "384 dimensions" in findings["embedder"].found
    assert float(findings["installed size"].found.split()[0]) > 0.5


@pytest.mark.usefixtures("light")
def test_missing_packages_are_bad_where_serving_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = by_name(examine(tmp_path, speed=False))
    assert {name for name in PACKAGES if not findings[name].ok} == set(NEEDED)
    for name in NEEDED:
        assert findings[name].found.startswith("not installed\nNext: ")
        assert "pip install" in findings[name].found
    assert "can serve, not train" in findings["torch"].found


@pytest.mark.usefixtures("light")
def test_a_broken_model_or_library_is_one_bad_line_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise ModelError("no model", expected="a model", next_step="pip install models")

    def broken() -> str:
        raise OSError("libllama.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "_student", missing)
    monkeypatch.setattr(doctor, "_speed", broken)
    findings = by_name(examine(tmp_path))
    assert [name for name, finding in findings.items() if not finding.ok] == [
        "student model",
        "speed of llama.cpp",
    ]
    assert findings["student model"].found == "no model\nExpected: a model\nNext: pip install models"
    assert "libllama.so" in findings["speed of llama.cpp"].found
    assert "\nNext: " in findings["speed of llama.cpp"].found


@pytest.mark.usefixtures("light")
def test_runs_are_listed_once_with_their_times_and_damaged_ones_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with Run(runs / "shelf" / "quick") as run:
        run.finish("index", Finished("f", {}, {}, 12.4))
        run.finish("elicit", Finished("f", {}, {}, 3.0))
        run.point_latest()
    with Run(runs / "shelf" / "new") as run:
        run.forget([])
    with Run(runs / "shelf" / "torn") as run:
        (run.folder / "run.json").write_text("{")
    findings = [finding for finding in examine(runs, speed=False) if finding.what.startswith("run ")]
    assert [finding.what for finding in findings] == ["run shelf/new", "run shelf/quick", "run shelf/torn"]
    new, quick, torn = findings
    assert quick.found.startswith("index 12 s, elicit 3 s; ")
    assert new.found.startswith("nothing finished; ")
    assert not torn.ok
    assert "is damaged" in torn.found
    assert "\nNext: delete" in torn.found
