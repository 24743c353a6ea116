"""The teacher's ledger: every answer that was ever paid for, in one SQLite file per domain.

A request is written down before it is sent (``reservations``), and its answer is committed before the next
request leaves. Killing the process loses at most the requests in flight; a later run asks only what has no
answer. What may have been billed without an answer (a reply that never arrived, a killed process) is counted
at its highest possible price, so ``spent`` is an upper bound and a cap on it is a hard cap.

WAL with ``synchronous=FULL``: an answer survives a power cut as well. It costs one fsync per answer, which is
nothing beside the seconds that the answer took.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from domains.errors import DataError

VERSION = 1
_WAIT_S = 60.0  # for another process that writes
_SCHEMA = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    cost REAL NOT NULL, currency TEXT NOT NULL, model TEXT NOT NULL, created TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, error TEXT NOT NULL,
    cost REAL NOT NULL, currency TEXT NOT NULL, created TEXT NOT NULL
);
CREATE TABLE reservations (key TEXT PRIMARY KEY, cost REAL NOT NULL, currency TEXT NOT NULL);
"""
_SPENT = """
SELECT (SELECT COALESCE(SUM(cost), 0) FROM answers WHERE currency = :currency)
     + (SELECT COALESCE(SUM(cost), 0) FROM attempts WHERE currency = :currency)
     + (SELECT COALESCE(SUM(cost), 0) FROM reservations WHERE currency = :currency AND key != :key)
"""


@dataclass(frozen=True)
class Entry:
    """An answered request. ``finish`` is ``length`` where ``max_tokens`` cut the reply."""

    key: str
    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    cost: float
    currency: str
    model: str
    created: str

    @property
    def truncated(self) -> bool:
        """Whether the reply is incomplete."""
        return self.finish == "length"


@dataclass(frozen=True)
class Totals:
    """What the ledger holds: counts, tokens, and cost in one currency.

    ``lost_cost`` is the part of ``cost`` for attempts that brought no answer but may have been billed.
    """

    answers: int
    truncated: int
    failed_attempts: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    lost_cost: float


class Ledger:
    """The ledger file; made when missing. Several processes may hold it open.

    Args:
        path: the SQLite file.
        now: the time as text, kept with every row.

    Raises:
        DataError: the file is damaged, no ledger, or can't be written.
    """

    def __init__(self, path: Path, *, now: Callable[[], str] | None = None) -> None:
        self.path = path
        self._now = now or (lambda: datetime.now(UTC).isoformat(timespec="seconds"))
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        with self._explained():
            self._use_wal()
            self._db.execute("PRAGMA synchronous=FULL")
            problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise self._damaged(str(problem))
        with self._writing():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version == VERSION:
                return
            if version or tables:
                raise DataError(
                    f"{self.path} is no ledger of this version (version {version}, {tables} tables)",
                    expected=f"a ledger of version {VERSION}",
                    next_step=f"move it aside: mv {self.path} {self.path}.other",
                )
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={VERSION}")

    def _use_wal(self) -> None:
        """SQLite's own waiting does not hold for this change: two processes that begin a ledger at once meet here."""
        deadline = time.monotonic() + _WAIT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was committed stays."""
        self._db.close()

    # -- reading -----------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """The answer to a request, or None where there is none yet."""
        with self._explained():
            row = self._db.execute("SELECT * FROM answers WHERE key = ?", (key,)).fetchone()
        return Entry(*row) if row else None

    def spent(self, currency: str) -> float:
        """Upper bound of all costs so far in ``currency``, with what is in flight."""
        with self._explained():
            return self._spent(currency, key="")

    def _spent(self, currency: str, *, key: str) -> float:
        """`spent` without the reservation of ``key``."""
        return float(self._db.execute(_SPENT, {"currency": currency, "key": key}).fetchone()[0])

    def totals(self, currency: str) -> Totals:
        """Counts over the whole ledger; costs in ``currency`` only."""
        with self._explained():
            answers, truncated, prompt, completion = self._db.execute(
                "SELECT count(*), COALESCE(SUM(finish = 'length'), 0), COALESCE(SUM(prompt_tokens), 0), "
                "COALESCE(SUM(completion_tokens), 0) FROM answers"
            ).fetchone()
            attempts, lost = self._db.execute(
                "SELECT count(*), COALESCE(SUM(cost * (currency = ?)), 0) FROM attempts", (currency,)
            ).fetchone()
            cost = self._spent(currency, key="")
        return Totals(answers, truncated, attempts, prompt, completion, cost, float(lost))

    def failures(self) -> dict[str, list[str]]:
        """Errors of the requests that have no answer, oldest first."""
        found: dict[str, list[str]] = {}
        with self._explained():
            rows = self._db.execute(
                "SELECT key, error FROM attempts WHERE key NOT IN (SELECT key FROM answers) ORDER BY id"
            ).fetchall()
        for key, error in rows:
            found.setdefault(key, []).append(error)
        return found

    # -- writing -----------------------------------------------------------------------------------

    @contextmanager
    def asking(self, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Be the only process that asks on this ledger: no request is sent twice, no cap passed together.

        Waits for another process, after calling ``on_wait``. Requests that were in flight when their process
        died become failed attempts at their highest price.
        """
        lock = self.path.with_name(f"{self.path.name}.lock")
        with self._explained():
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is not None:
                    on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            self._settle()
            try:
                yield
            finally:
                self._settle()
        finally:
            os.close(handle)

    def reserve(self, key: str, *, cost: float, currency: str, max_cost: float) -> bool:
        """Set aside the highest price of a request before it is sent.

        Returns:
            False where it could pass ``max_cost``; the request must not be sent then.
        """
        with self._writing():
            if self._spent(currency, key=key) + cost > max_cost:
                return False
            self._db.execute("INSERT OR REPLACE INTO reservations VALUES (?, ?, ?)", (key, cost, currency))
            return True

    def put(
        self,
        key: str,
        text: str,
        *,
        finish: str,
        prompt_tokens: int,
        completion_tokens: int,
        cost: float,
        currency: str,
        model: str,
    ) -> Entry:
        """Commit an answer. The first answer to a key stays: it is the one that was used."""
        entry = Entry(key, text, finish, prompt_tokens, completion_tokens, cost, currency, model, self._now())
        row = tuple(getattr(entry, name) for name in Entry.__dataclass_fields__)
        with self._writing():
            self._db.execute(f"INSERT OR IGNORE INTO answers VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608
            self._db.execute("DELETE FROM reservations WHERE key = ?", (key,))
        return entry

    def fail(self, key: str, error: str, *, cost: float, currency: str) -> None:
        """Commit an attempt that brought no answer. ``cost`` is what it may have cost at most."""
        with self._writing():
            self._add_attempt(key, error, cost, currency)
            self._db.execute("DELETE FROM reservations WHERE key = ?", (key,))

    def _add_attempt(self, key: str, error: str, cost: float, currency: str) -> None:
        self._db.execute(
            "INSERT INTO attempts (key, error, cost, currency, created) VALUES (?, ?, ?, ?, ?)",
            (key, error, cost, currency, self._now()),
        )

    def _settle(self) -> None:
        with self._writing():
            for key, cost, currency in self._db.execute("SELECT * FROM reservations").fetchall():
                self._add_attempt(key, "interrupted before the reply arrived", cost, currency)
            self._db.execute("DELETE FROM reservations")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction that holds the write lock from its beginning."""
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # -- errors ------------------------------------------------------------------------------------

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
                raise self._damaged(str(error)) from error
            raise DataError(
                f"can't use the ledger {str(self.path)!r}: {error}",
                expected="a writable file on a disk with free space, not held by another program",
                next_step="mend that and run the same command again: what is answered is kept",
            ) from error
        except OSError as error:
            raise DataError(
                f"can't write the ledger {str(self.path)!r}: {error.strerror}",
                expected="a writable place with free space",
                next_step="mend that, or choose another place with --runs DIR",
            ) from error

    def _damaged(self, problem: str) -> DataError:
        aside = self.path.with_name(f"{self.path.stem}-damaged{self.path.suffix}")
        return DataError(
            f"the ledger {str(self.path)!r} is damaged: {problem}",
            expected="the SQLite file that preceptor wrote",
            next_step=f"keep it and save what is readable: mv {self.path} {aside} && "
            f"sqlite3 {aside} .recover | sqlite3 {self.path} (without the second command a new ledger begins, "
            "and the teacher is asked again)",
        )
