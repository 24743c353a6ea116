"""Domain checks: functions that a domain brings to judge a teacher's rationale.

A check is named in ``domain.toml`` as ``"checks:function"`` and lives in ``checks.py`` of the domain's
folder. It is code of the domain's own team, run only while a student is made, never from a bundle.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from domains.errors import ConfigError
from domains.records import Passage, Question, Rationale


@dataclass(frozen=True)
class Verdict:
    """Whether a rationale passes; if not, the ``reason`` (a short word that is counted) and the ``detail``."""

    ok: bool
    reason: str = ""
    detail: str = ""


PASS = Verdict(ok=True)


class Check(Protocol):
    """Judges one rationale by the passages that the teacher saw."""

    def __call__(self, question: Question, rationale: Rationale, passages: Sequence[Passage]) -> Verdict:
        """`PASS`, or a `Verdict` with the reason for the rejection."""


def load_checks(folder: Path, names: Sequence[str]) -> dict[str, Check]:
    """The checks called ``names`` (``"checks:function"``), in that order.

    Raises:
        ConfigError: ``checks.py`` is missing or broken, or has no such function (names the neighbours).
    """
    loaded: dict[str, Check] = {}
    for name in names:
        stem, _, function = name.partition(":")
        if not function or not stem.isidentifier():
            raise ConfigError(
                f"curate.checks: {name!r} names no function",
                expected="'checks:FUNCTION' for a function in checks.py of the domain's folder",
                next_step=f"mend curate.checks in {folder / 'domain.toml'}",
            )
        module = _load_module(folder / f"{stem}.py")
        check = getattr(module, function, None)
        if not callable(check):
            known = sorted(
                key
                for key, value in vars(module).items()
                if callable(value)
                and not key.startswith("_")
                and getattr(value, "__module__", "") == module.__name__
            )
            close = difflib.get_close_matches(function, known, n=1)
            raise ConfigError(
                f"curate.checks: {folder / stem}.py has no function {function!r}",
                expected=f"did you mean {close[0]!r}?" if close else f"one of {known}",
                next_step=f"mend curate.checks in {folder / 'domain.toml'}",
            )
        loaded[name] = check
    return loaded


def _load_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            f"{str(path)!r} does not exist",
            expected="a Python file with the functions named in curate.checks",
            next_step="take the name out of curate.checks, or write the file",
        )
    # One module per file: two domains may both have a checks.py.
    name = f"_checks_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py path always has a spec
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{path} can't be loaded: {type(error).__name__}: {error}",
            expected="a Python file that imports without errors",
            next_step=f"python {path}",
        ) from error
    return module
