"""A run's folder: one process at a time, a record that is never half written, errors of the disk in plain words."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from domains.errors import ConfigError, DataError, PreceptorError, RunLocked, StageError
from pipeline.run_folder import (
    Finished,
    Run,
    check_space,
    disk_errors,
    need,
    need_folder,
    open_run,
)

ROOT = Path(__file__).parent.parent
HOLD = """
import sys
from pathlib import Path
from pipeline.run_folder import Run
with Run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def entry(name: str = "x") -> Finished:
    return Finished(fingerprint=name, counts={"rows": 3}, facts={"loss": 0.5}, seconds=1.5)


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the run's lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    with hold(tmp_path / "run") as process:
        with pytest.raises(RunLocked, match=f"pid {process.pid}") as caught, Run(tmp_path / "run"):
            pass
        assert caught.value.exit_code == 4
        assert "--run" in caught.value.next_step
        with Run(tmp_path / "other"):  # another run of the same domain is free
            pass
        process.communicate()
    with Run(tmp_path / "run"):
        pass


def test_the_lock_is_free_after_a_kill(tmp_path: Path) -> None:
    with hold(tmp_path / "run") as process:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with Run(tmp_path / "run"), pytest.raises(RunLocked, match=f"pid {os.getpid()}"), Run(tmp_path / "run"):
        pass


def test_an_error_gives_the_lock_back(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    with run:
        pass


def test_a_place_that_can_not_hold_a_run_is_an_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="Not a directory"), Run(tmp_path / "file" / "run"):
        pass
    (tmp_path / "run" / "run.lock").mkdir(parents=True)
    with pytest.raises(DataError, match="Is a directory"), Run(tmp_path / "run"):
        pass


def test_finished_stages_are_kept_in_the_order_they_ended(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.finished() == {}
    run.finish("index", entry("a"))
    run.finish("elicit", entry("b"))
    run.finish("index", entry("c"))
    assert run.finished() == {"elicit": entry("b"), "index": entry("c")}
    assert list(run.finished()) == ["elicit", "index"]
    run.forget(["index", "never there"])
    assert run.finished() == {"elicit": entry("b")}


@pytest.mark.parametrize(
    "damage", [b"{", b"[]", b"3", b'{"index": 3}', b'{"index": {}}', b'{"index": {"a": 1}}', b"\xff\xfe", b""]
)
def test_a_damaged_record_is_named_and_left_alone(tmp_path: Path, damage: bytes) -> None:
    run = Run(tmp_path)
    (tmp_path / "run.json").write_bytes(damage)
    for use in (run.finished, lambda: run.finish("index", entry()), lambda: run.forget(["index"])):
        with pytest.raises(DataError, match=r"run\.json is damaged") as caught:
            use()
        assert str(tmp_path / "run.json") in caught.value.next_step
    assert (tmp_path / "run.json").read_bytes() == damage


def test_a_full_disk_leaves_the_former_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.finish("index", entry("a"))
    before = (tmp_path / "run.json").read_bytes()

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"), disk_errors(tmp_path):
        run.finish("elicit", entry("b"))
    assert (tmp_path / "run.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_latest_points_to_the_run_that_ended_last_and_moves_with_its_folder(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "shelf"
    for name in ("one", "two"):
        with Run(runs / name) as run:
            run.finish("exam", entry(name))
            run.point_latest()
    assert (runs / "latest").readlink() == Path("two")
    shutil.rmtree(runs / "two")
    Run(runs / "one").point_latest()
    (tmp_path / "runs").rename(tmp_path / "moved")
    latest = tmp_path / "moved" / "shelf" / "latest"
    assert json.loads((latest / "run.json").read_text())["exam"]["fingerprint"] == "one"
    assert sorted(path.name for path in latest.parent.iterdir()) == ["latest", "one"]


def test_space_is_looked_for_where_the_run_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    usage = namedtuple("usage", "total used free")

    def disk_usage(place: Path) -> usage:
        asked.append(place)
        return usage(10e9, 9e9, 1e9)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    check_space(tmp_path / "runs" / "not" / "yet", 1_000_000_000)
    assert asked == [tmp_path]
    with pytest.raises(DataError, match="1,000 MB free") as caught:
        check_space(tmp_path / "runs", 1_000_000_001)
    assert "--runs" in caught.value.next_step


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b.gguf"), "Disk quota exceeded (a/b.gguf)"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (sqlite3.OperationalError("database or disk is full"), "database or disk is full"),
        (RuntimeError("Query error: (code: 778) disk I/O error"), "disk I/O error"),
    ],
)
def test_what_the_disk_refuses_is_said_in_words(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(DataError) as caught, disk_errors(tmp_path / "bundle"):
        raise error
    assert words in caught.value.what
    assert str(tmp_path / "bundle") in caught.value.what
    assert "finished work is kept" in caught.value.next_step


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset"),
        OSError("meta/llama is not a local folder"),
        ValueError("no disk in sight"),
        StageError("the disk is full of joy"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_names_of_runs(tmp_path: Path) -> None:
    assert (
        open_run(tmp_path / "runs", "shelf", "quick-2.b").folder == tmp_path / "runs" / "shelf" / "quick-2.b"
    )
    assert not (tmp_path / "runs").exists()
    for name in ("latest", "a/b", "..", "", ".hidden", "x" * 65, "a b"):
        with pytest.raises(ConfigError, match="can't be a run's name") as caught:
            open_run(tmp_path / "runs", "shelf", name)
        assert "--run" in caught.value.next_step


def test_a_file_is_no_folder_of_runs_and_a_missing_output_names_its_stage(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("x")
    with pytest.raises(PreceptorError, match="is a file"):
        open_run(tmp_path / "runs", "shelf", "quick")
    need_folder(tmp_path / "not-yet")
    with pytest.raises(StageError, match="is missing") as caught:
        need(tmp_path / "train.jsonl", stage="curate")
    assert caught.value.next_step == "preceptor curate DOMAIN"
    assert need(tmp_path, stage="curate") == tmp_path
