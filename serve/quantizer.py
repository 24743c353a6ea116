"""llama.cpp's own quantizer, called through its C API: no second build of llama.cpp is needed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from domains.config import GgufType
from domains.errors import ModelError
from serve.llama_log import last_lines, quiet

# llama.h: enum llama_ftype
FILE_TYPES: dict[GgufType, int] = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}


def requantize(
    source: Path,
    target: Path,
    file_type: GgufType,
    *,
    imatrix: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> None:
    """Write ``source`` in another format to ``target``, atomically.

    Args:
        source: a GGUF file of any type (quantized input is dequantized first).
        target: where to write; replaced when it exists.
        file_type: llama.cpp's name of the mix.
        imatrix: GGUF tensor name → mean squared input activation, float32 [in_features].

    Raises:
        ModelError: llama.cpp refuses (its own words are in the message).
    """
    import llama_cpp

    quiet()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type]
    params.nthread = os.cpu_count() or 1
    params.allow_requantize = True
    rows, keep_alive = _imatrix_rows(imatrix or {})
    if imatrix:
        params.imatrix = rows
    try:
        code = llama_cpp.llama_model_quantize(
            str(source).encode(), str(temporary).encode(), ctypes.byref(params)
        )
        if code != 0:
            raise ModelError(
                f"llama.cpp can't quantize {source.name} to {file_type} (code {code}): {last_lines()}",
                expected="a complete GGUF file and enough disk space",
                next_step="preceptor doctor",
            )
        temporary.replace(target)
    finally:
        del keep_alive
        temporary.unlink(missing_ok=True)


def _imatrix_rows(imatrix: Mapping[str, npt.NDArray[np.float32]]) -> tuple[object, list[object]]:
    """llama.cpp's array of {name, data, size}, ended by a null name, and what must outlive the call."""
    import llama_cpp

    rows = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
    keep: list[object] = [rows]
    for row, (name, values) in zip(rows, imatrix.items(), strict=False):
        data = np.ascontiguousarray(values, dtype=np.float32)
        text = ctypes.c_char_p(name.encode())
        row.name, row.size = text, data.size
        row.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        keep += [data, text]
    return rows, keep
