"""llama.cpp's own quantizer, called in this process: no separate program to build."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from domains.config import GgufType
from domains.cores import usable_cores
from domains.errors import ModelError
from serve.gguf_check import check_gguf
from serve.llama_log import last_lines, quiet


def requantize(
    source: Path,
    target: Path,
    kind: GgufType,
    *,
    imatrix: Mapping[str, NDArray[np.float32]] | None = None,
    outer: Literal["F16", "Q8_0"] | None = None,
    threads: int | None = None,
) -> None:
    """Write ``source`` again with weights in another format; the target appears whole or not at all.

    Where a row is no multiple of a format's block, llama.cpp takes the next wider format.

    Args:
        source: a GGUF file in any format; from an already quantized one only Q8_0 and F16 make sense.
        target: where to write; replaced when it exists.
        kind: the format.
        imatrix: per tensor name the mean squared input of each in-feature, [in]; weighs the rounding.
        outer: the type of embedding and output matrix; None leaves the choice to llama.cpp.
        threads: default: all processors.

    Raises:
        ModelError: the source is damaged, or llama.cpp refuses (with its own words).
    """
    import llama_cpp

    check_gguf(source)
    quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = threads or usable_cores()
    params.allow_requantize = True
    if outer is not None:
        params.token_embedding_type = params.output_tensor_type = getattr(llama_cpp, f"GGML_TYPE_{outer}")
    if imatrix:
        params.imatrix = table = _imatrix_table(imatrix)
        assert table  # kept alive here; the struct holds a bare pointer
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _run(source, temporary, params)
        check_gguf(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _run(source: Path, target: Path, params: Any) -> None:
    import llama_cpp

    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    if code != 0:
        raise ModelError(
            f"llama.cpp can't quantize {source}: {last_lines()} (code {code})",
            expected="a GGUF file that llama.cpp's quantizer takes, and enough free space",
            next_step="export the model again, or choose another [export] format",
        )


def _imatrix_table(imatrix: Mapping[str, NDArray[np.float32]]) -> Any:
    """A C array of llama_model_imatrix_data, ended by a null name; it owns what it points to."""
    import llama_cpp

    table = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
    kept = []
    for row, (name, values) in zip(table, sorted(imatrix.items()), strict=False):
        data = np.ascontiguousarray(values, dtype=np.float32)
        kept.append(data)
        row.name = name.encode()
        row.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        row.size = data.size
    table.kept = kept
    return table
