"""The main job with stages that only write their files: what is skipped, run again, kept and lost."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from domains.domain import Domain, load_domain
from domains.errors import DataError, RunLocked, StageError, TeacherError
from pipeline.job import Outcome, run_job
from pipeline.new import new_domain
from pipeline.progress import Progress, Silent
from pipeline.run_folder import Report, Run
from pipeline.stages import NAMES, STAGES, paths_of
from pipeline.status import stage_rows

ROOT = Path(__file__).parent.parent
BY_NAME = {stage.name: stage for stage in STAGES}
DOCUMENT = (
    "# The pump\n\n## Care\nThe pump is cleaned every day with a dry cloth and some oil.\n\n## Age\n"
    + ("A pump works for ten years if its filter is changed in time. ")
)


class FakeStages:
    """Stand-ins for the stage modules: each writes into its outputs what it read, and can misbehave.

    Attributes:
        called: the stages in the order in which they ran.
        misbehave: stage → what it does after the first of its outputs is half written.
    """

    def __init__(self) -> None:
        self.called: list[str] = []
        self.misbehave: dict[str, Callable[[], object]] = {}

    def install(self, place: Callable[[str, ModuleType], None]) -> None:
        for name in NAMES:
            module = ModuleType(f"pipeline.{name}")
            module.__spec__ = importlib.util.find_spec(f"pipeline.{name}")  # its text is the stage's version
            module.run = self._stage(name)  # type: ignore[attr-defined]
            place(f"pipeline.{name}", module)

    def _stage(self, name: str) -> Callable[[Domain, Run, Progress], Report]:
        def run(domain: Domain, run: Run, _progress: Progress) -> Report:
            self.called.append(name)
            stage = BY_NAME[name]
            files = [
                path / "weights" if what == "adapter" else path
                for what in stage.writes
                for path in paths_of(what, domain, run)
            ]
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
            if name in self.misbehave:
                files[0].write_text("half")
                self.misbehave[name]()
            # [train] reaches the served file by the adapter alone, unless a search retrains.
            sections = [each for each in stage.sections if each != "train" or name == "train"]
            text = f"{name}: {[getattr(domain.config, each.partition('.')[0]) for each in sections]}\n"
            for file in files:
                file.write_text(text)
            return Report(counts={"files": len(files)}, facts={"stage": name})

        return run


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fake = FakeStages()
    fake.install(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
    return fake


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "pump.md").write_text(DOCUMENT)
    return load_domain(str(new_domain("machines", tmp_path / "docs", into=tmp_path / "machines")))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "machines" / "quick")


def with_config(domain: Domain, section: str, **values: object) -> Domain:
    new = getattr(domain.config, section).model_copy(update=values)
    return replace(domain, config=domain.config.model_copy(update={section: new}))


def states(domain: Domain, run: Run) -> list[str]:
    return [row.state for row in stage_rows(domain, run)]


def test_stages_run_in_order_once(stages: FakeStages, domain: Domain, run: Run) -> None:
    told: list[Outcome] = []
    assert states(domain, run) == ["missing"] * len(NAMES)
    outcomes = run_job(domain, run, Silent(), after=told.append)
    assert stages.called == list(NAMES)
    assert outcomes == told
    assert [(each.stage, each.skipped) for each in told] == [(name, False) for name in NAMES]
    assert told[0].entry.counts == {"files": 1}
    assert told[0].entry == run.finished()["index"]
    assert (run.folder.parent / "latest").resolve() == run.folder.resolve()
    assert states(domain, run) == ["done"] * len(NAMES)

    again = run_job(domain, run, Silent(), after=told.append)
    assert stages.called == list(NAMES)
    assert [each.skipped for each in again] == [True] * len(NAMES)
    assert [each.entry for each in again] == [each.entry for each in outcomes]
    assert len(told) == 2 * len(NAMES)


def test_one_stage_alone_and_force(stages: FakeStages, domain: Domain, run: Run) -> None:
    run_job(domain, run, Silent(), stages=["index"])
    run_job(domain, run, Silent(), stages=["index"])
    assert stages.called == ["index"]
    assert not (run.folder.parent / "latest").exists()
    run_job(domain, run, Silent(), stages=["index"], force=True)
    assert stages.called == ["index", "index"]
    run_job(domain, run, Silent(), force=True)
    assert stages.called == ["index", "index", *NAMES]


def test_a_change_runs_what_depends_on_it(stages: FakeStages, domain: Domain, run: Run) -> None:
    run_job(domain, run, Silent())
    stages.called.clear()
    other = with_config(domain, "train", epochs=7)
    assert states(other, run) == ["stale" if name in {"train", "export"} else "done" for name in NAMES]
    run_job(other, run, Silent())
    # A search retrains, so exporting follows [train]; the student came out the same, so it is not examined.
    assert stages.called == ["train", "export"]
    assert states(other, run) == ["done"] * len(NAMES)
    assert states(domain, run)[NAMES.index("train")] == "stale"

    stages.called.clear()
    (domain.documents / "saw.md").write_text("# The saw\n")
    run_job(other, run, Silent())
    assert stages.called == ["index"]

    stages.called.clear()
    run_job(with_config(other, "retrieve", top_k=9), run, Silent())
    assert stages.called == ["elicit", "curate", "rerank", "train", "export", "calibrate", "exam"]


def test_a_deleted_output_is_made_again(stages: FakeStages, domain: Domain, run: Run) -> None:
    run_job(domain, run, Silent())
    for name in NAMES:
        for what in BY_NAME[name].writes:
            for path in paths_of(what, domain, run):
                stages.called.clear()
                (path / "weights").unlink() if path.is_dir() else path.unlink()
                if path.is_dir():
                    path.rmdir()
                run_job(domain, run, Silent())
                assert stages.called == [name], path.name
                assert path.exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [TeacherError("no answer"), ZeroDivisionError(), KeyboardInterrupt()])
def test_a_stage_that_fails_or_is_stopped_loses_only_itself(
    stages: FakeStages, domain: Domain, run: Run, name: str, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    stages.misbehave[name] = fail
    with pytest.raises(type(error)):
        run_job(domain, run, Silent())
    before = list(NAMES[: NAMES.index(name)])
    assert list(run.finished()) == before
    assert states(domain, run) == ["done"] * len(before) + ["missing"] * (len(NAMES) - len(before))
    assert not (run.folder.parent / "latest").exists()

    stages.called.clear()
    stages.misbehave.clear()
    outcomes = run_job(domain, run, Silent())
    assert stages.called == list(NAMES[NAMES.index(name) :])
    assert [each.stage for each in outcomes if each.skipped] == before
    assert states(domain, run) == ["done"] * len(NAMES)


KILLED = """
import os, signal, sys
from pathlib import Path
from test_job import FakeStages
from domains.domain import load_domain
from pipeline.job import run_job
from pipeline.progress import Silent
from pipeline.run_folder import Run
fake = FakeStages()
fake.install(sys.modules.__setitem__)
fake.misbehave[sys.argv[3]] = lambda: os.kill(os.getpid(), signal.SIGKILL)
run_job(load_domain(sys.argv[1]), Run(Path(sys.argv[2])), Silent())
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_stage_runs_again(stages: FakeStages, domain: Domain, run: Run, name: str) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(domain.folder), str(run.folder), name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = list(NAMES[: NAMES.index(name)])
    assert list(run.finished()) == before
    run_job(domain, run, Silent())
    assert stages.called == list(NAMES[NAMES.index(name) :])
    assert states(domain, run) == ["done"] * len(NAMES)


def test_a_failure_forgets_what_the_stage_did_before(stages: FakeStages, domain: Domain, run: Run) -> None:
    run_job(domain, run, Silent())

    def fail() -> None:
        raise TeacherError("no answer")

    stages.misbehave["train"] = fail
    with pytest.raises(TeacherError):
        run_job(domain, run, Silent(), force=True)
    assert list(run.finished()) == ["export", "calibrate", "exam", "index", "elicit", "curate", "rerank"]
    assert states(domain, run)[NAMES.index("train")] == "missing"


def test_a_full_disk_is_said_and_the_rest_kept(stages: FakeStages, domain: Domain, run: Run) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    stages.misbehave["export"] = full
    with pytest.raises(DataError, match="No space left on device") as caught:
        run_job(domain, run, Silent())
    assert "run the same command again" in caught.value.next_step
    assert list(run.finished()) == ["index", "elicit", "curate", "rerank", "train"]


def test_an_input_that_changes_meanwhile_makes_the_stage_stale(
    stages: FakeStages, domain: Domain, run: Run
) -> None:
    stages.misbehave["index"] = lambda: (domain.documents / "late.md").write_text("# Late\n")
    run_job(domain, run, Silent(), stages=["index"])
    assert states(domain, run)[0] == "stale"


def test_a_missing_input_names_the_stage_that_makes_it(stages: FakeStages, domain: Domain, run: Run) -> None:
    with pytest.raises(StageError, match=r"train needs .*train\.jsonl") as caught:
        run_job(domain, run, Silent(), stages=["train"])
    # By its path: no domain of that name can be found from here.
    assert f"preceptor curate {domain.folder}" in caught.value.next_step
    assert stages.called == []


def test_missing_documents_name_the_key(stages: FakeStages, domain: Domain, run: Run) -> None:
    nowhere = with_config(domain, "corpus", documents="nowhere")
    with pytest.raises(StageError, match="nowhere") as caught:
        run_job(nowhere, run, Silent())
    assert "[corpus] documents" in caught.value.expected
    assert str(domain.folder / "domain.toml") in caught.value.expected


def test_the_run_is_locked_meanwhile_only(stages: FakeStages, domain: Domain, run: Run) -> None:
    refused = []

    def enter() -> None:
        with pytest.raises(RunLocked) as caught, Run(run.folder):
            pass
        refused.append(caught.value)

    stages.misbehave["elicit"] = enter
    run_job(domain, run, Silent())
    assert len(refused) == 1
    with Run(run.folder):
        pass
