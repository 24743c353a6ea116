"""A run's folder: where every stage reads and writes, one process at a time, resumable.

runs/<domain>/ledger.sqlite      every teacher request ever made for the domain (shared by its runs)
runs/<domain>/latest             link to the run that finished last
runs/<domain>/<name>/
    run.json                     per finished stage: fingerprint, counts, facts, seconds
    rationales.jsonl             elicit
    generated.jsonl              elicit: new seed questions (mostly none)
    elicit/                      every row of every step of elicit, with its status and reason
    train.jsonl                  curate (critiques.jsonl too, where answers reflect)
    kept.jsonl rejected.jsonl    curate: every rationale, with what the verifier read in it or the reason against it
    rerank/                      what the reranker learnt from, and how it fared
    train/                       adapter, checkpoint, loss curve
    export/                      merged student in F16, importance matrix
    calibration.jsonl            development answers with their signals
    reflection.json, .jsonl      fitted threshold and weights, and the answers they choose from (backend "tokens")
    yes_no.json                  how far the cues of the documents answer yes/no questions (yes_no = "evidence")
    exam/                        every answer of every arm
    bundle/                      what is served: GGUF files, index, domain.toml, prompts, reports
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from domains.errors import ConfigError, DataError, PreceptorError, RunLocked, StageError
from domains.jsonl import write_text_atomic

LATEST = "latest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# How libraries that do not raise OSError (SQLite, Chroma, safetensors) say that the disk is full.
_DISK_WORDS = ("disk i/o error", "disk is full", "no space left", "file too large", "read-only file system")


@dataclass(frozen=True)
class Report:
    """What a stage did. ``counts`` add up (documented by the stage); ``facts`` are measurements."""

    counts: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A finished stage as kept in ``run.json``."""

    fingerprint: str
    counts: dict[str, int]
    facts: dict[str, Any]
    seconds: float


class Run:
    """The folder of one run. Use it as a context manager while writing: it holds the lock.

    Args:
        folder: ``runs/<domain>/<name>``; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    @property
    def ledger(self) -> Path:
        """The domain's teacher ledger, shared by all its runs: nothing is paid twice."""
        return self.folder.parent / "ledger.sqlite"

    @property
    def rationales(self) -> Path:
        """`Rationale` records."""
        return self.folder / "rationales.jsonl"

    @property
    def generated(self) -> Path:
        """`Question` records that the teacher wrote; always seed questions."""
        return self.folder / "generated.jsonl"

    @property
    def steps(self) -> Path:
        """The elicit stage's folder: ``<n>-<strategy>.jsonl`` with every row of every step."""
        return self.folder / "elicit"

    @property
    def examples(self) -> Path:
        """`Example` records kept for training."""
        return self.folder / "train.jsonl"

    @property
    def critiques(self) -> Path:
        """`Critique` records: the labels behind reflected training rows."""
        return self.folder / "critiques.jsonl"

    @property
    def kept(self) -> Path:
        """`KeptRationale` records: those that passed every check."""
        return self.folder / "kept.jsonl"

    @property
    def rejections(self) -> Path:
        """`Rejection` records."""
        return self.folder / "rejected.jsonl"

    @property
    def rerank(self) -> Path:
        """The rerank stage's folder: ``pools.jsonl``, ``result.json``."""
        return self.folder / "rerank"

    @property
    def reranker(self) -> Path:
        """The reranker, part of the bundle, beside the index; only where it is enabled."""
        return self.bundle / "reranker"

    @property
    def training(self) -> Path:
        """The train stage's folder: ``adapter/``, ``loss.jsonl``, ``checkpoint/``."""
        return self.folder / "train"

    @property
    def export(self) -> Path:
        """The export stage's own folder: ``student-F16.gguf``, ``imatrix.npz``."""
        return self.folder / "export"

    @property
    def reflection_fit(self) -> Path:
        """What the fit of the reflecting student's threshold and weights found, with its reliability."""
        return self.folder / "reflection.json"

    @property
    def yes_no_fit(self) -> Path:
        """What the fit of yes/no answers to the documents' cues found, kept or not."""
        return self.folder / "yes_no.json"

    @property
    def calibration(self) -> Path:
        """The development answers that the calibration was fitted to."""
        return self.folder / "calibration.jsonl"

    @property
    def exam(self) -> Path:
        """The exam stage's folder: ``<arm>.jsonl`` with every answer."""
        return self.folder / "exam"

    @property
    def bundle(self) -> Path:
        """What is served."""
        return self.folder / "bundle"

    @property
    def index(self) -> Path:
        """The passage index, part of the bundle."""
        return self.bundle / "index"

    def __enter__(self) -> Self:
        """Take the run's lock.

        Raises:
            RunLocked: another process holds it.
            DataError: the folder can't be made or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        except OSError as error:
            raise DataError(
                f"can't write the run folder {str(self.folder)!r}: {error.strerror}",
                expected="a writable place with free space",
                next_step="choose another with --runs DIR",
            ) from None
        return self

    def _take_lock(self) -> int:
        handle = os.open(self.folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.write(handle, f"pid {os.getpid()}\n".encode())
        except BlockingIOError:
            owner = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            raise RunLocked(
                f"another process ({owner or 'unknown'}) works on {self.folder}",
                expected="one process per run folder",
                next_step="wait for it, or start a second run with --run OTHER_NAME",
            ) from None
        except OSError:
            os.close(handle)
            raise
        return handle

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back (the system does it too when the process dies)."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def finished(self) -> dict[str, Finished]:
        """The finished stages, in the order they ended; empty for a new run."""
        path = self.folder / "run.json"
        if not path.is_file():
            return {}
        try:
            return {name: Finished(**row) for name, row in json.loads(path.read_text("utf-8")).items()}
        except (ValueError, TypeError, AttributeError):
            raise DataError(
                f"{path} is damaged",
                expected="the JSON that preceptor wrote",
                next_step=f"delete {path}: the stages run again, and what the teacher answered is kept",
            ) from None

    def finish(self, stage: str, entry: Finished) -> None:
        """Record a finished stage; written last, so that a killed stage simply runs again."""
        entries = {name: asdict(value) for name, value in self.finished().items() if name != stage}
        entries[stage] = asdict(entry)
        write_text_atomic(self.folder / "run.json", json.dumps(entries, indent=1) + "\n")

    def forget(self, stages: list[str]) -> None:
        """Take stages out of the record: they are about to run again."""
        entries = {name: asdict(value) for name, value in self.finished().items() if name not in stages}
        write_text_atomic(self.folder / "run.json", json.dumps(entries, indent=1) + "\n")

    def point_latest(self) -> None:
        """Let ``latest`` beside the run folder point here."""
        link = self.folder.parent / LATEST
        temporary = link.with_name(f".latest.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.folder.name)
        temporary.replace(link)


def open_run(runs: Path, domain: str, name: str) -> Run:
    """The run ``<runs>/<domain>/<name>``; nothing is written yet.

    Raises:
        ConfigError: ``name`` can't be a folder's name, or is the one that the link to the last run has.
        DataError: ``runs`` is a file.
    """
    if not _NAME.fullmatch(name) or name == LATEST:
        raise ConfigError(
            f"{name!r} can't be a run's name",
            expected=f"1 to 64 of letters, digits, '.', '_' and '-'; not {LATEST!r}, the link to the last run",
            next_step="choose another with --run NAME",
        )
    need_folder(runs)
    return Run(runs / domain / name)


def need_folder(runs: Path) -> None:
    """Refuse a folder of runs that is no folder; it need not exist.

    Raises:
        DataError: it is a file.
    """
    if runs.exists() and not runs.is_dir():
        raise DataError(
            f"{str(runs)!r} is a file",
            expected="the folder where runs lie",
            next_step="choose another with --runs DIR",
        )


def need(path: Path, *, stage: str) -> Path:
    """``path`` if it exists.

    Raises:
        StageError: it does not; names the stage that writes it.
    """
    if not path.exists():
        raise StageError(
            f"{path} is missing",
            expected=f"the output of the {stage} stage",
            next_step=f"preceptor {stage} DOMAIN",
        )
    return path


def check_space(folder: Path, need_bytes: int) -> None:
    """Refuse to begin what the disk can't hold.

    Raises:
        DataError: fewer than ``need_bytes`` are free where ``folder`` lies.
    """
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need_bytes:
        raise DataError(
            f"{place} has {free / 1e6:,.0f} MB free",
            expected=f"at least {need_bytes / 1e6:,.0f} MB",
            next_step="free some space, or choose another place with --runs DIR",
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns "no space left" and its kin into an error a user can act on; partial files stay temporary.

    Raises:
        DataError: writing below ``path`` failed.
    """
    try:
        yield
    except (PreceptorError, FileNotFoundError, ConnectionError):
        raise
    except Exception as error:
        reason = _disk_reason(error)
        if not reason:
            raise
        raise DataError(
            f"can't write below {str(path)!r}: {reason}",
            expected="a writable place with free space",
            next_step="free some space and run the same command again: finished work is kept",
        ) from error


def _disk_reason(error: Exception) -> str:
    """What the disk said, or nothing where the error is another."""
    if isinstance(error, OSError) and error.errno is not None:
        return str(error.strerror) + (f" ({error.filename})" if error.filename else "")
    text = str(error)
    return text if any(words in text.lower() for words in _DISK_WORDS) else ""
