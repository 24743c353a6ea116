"""For all tests: no connection leaves this machine, and the cache is the user's own."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

_LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anywhere else fails the test: no telemetry, no hub, no real teacher."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
            raise AssertionError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session", autouse=True)
def close_what_llama_cpp_leaves_open() -> Iterator[None]:
    """llama-cpp-python opens /dev/null at import and never closes it, which warns at exit."""
    yield
    opened = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if opened is not None and hasattr(opened, name):
            getattr(opened, name).close()


@pytest.fixture(scope="module")
def on_one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and two trainings must sum in the same order."""
    from pipeline.one_thread import one_thread

    with one_thread():
        yield
