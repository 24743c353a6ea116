"""Keeps OpenBLAS to one thread while work is spread over Python threads instead.

An encoder's matrices are small. OpenBLAS's own threads then spend their time waiting for one another,
and on a machine that is doing something else too they spin: measured on 2 busy cores, 300 tokens/s
against 1,100 with one thread.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_lock = threading.Lock()
_inside = 0
_before = 1


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it, a matrix product uses the calling thread only; a no-op where numpy has no OpenBLAS."""
    global _inside, _before
    setting = _setting()
    if setting is None:
        yield
        return
    read, write = setting
    with _lock:
        if _inside == 0:
            _before = read()
            write(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                write(_before)


@lru_cache(maxsize=1)
def _setting() -> tuple[Any, Any] | None:
    """The functions that read and write the number of threads, in the library that numpy's wheel brings."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            library = ctypes.CDLL(str(path))
            for suffix in ("64_", ""):
                read = getattr(library, f"scipy_openblas_get_num_threads{suffix}", None)
                write = getattr(library, f"scipy_openblas_set_num_threads{suffix}", None)
                if read is not None and write is not None:
                    return read, write
    return None
