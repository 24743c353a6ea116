"""llama.cpp logs to stderr by default; keep its last lines for error messages instead."""

from __future__ import annotations

import ctypes
from collections import deque

_lines: deque[str] = deque(maxlen=30)
_callback: object | None = None


def quiet() -> None:
    """Collect llama.cpp's log lines from now on; does nothing the second time."""
    global _callback
    if _callback is not None:
        return
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        _lines.append(text.decode("utf-8", errors="replace"))

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    _callback = collect  # llama.cpp keeps only the pointer


def last_lines(count: int = 3) -> str:
    """The last ``count`` lines that say error or fail, else the last lines, joined by semicolons."""
    whole = "".join(_lines).splitlines()
    bad = [line.strip() for line in whole if "error" in line.lower() or "fail" in line.lower()]
    return "; ".join((bad or [line.strip() for line in whole])[-count:])
