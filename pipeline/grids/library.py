"""ggml's own encoders and decoders, through the C library that llama-cpp-python brings along.

For formats without a grid of ours (Q4_K, Q6_K, Q5_0, ...), and the judge of `pipeline.grids.rounding`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from domains.errors import ModelError

_THREADS = 2
_FLOATS = {"F32": np.float32, "F16": np.float16}


class _Traits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


@cache
def _library() -> Any:
    """libggml-base with the signatures that are used here."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = [] if spec is None or spec.origin is None else [Path(spec.origin).parent / "lib"]
    found = [
        path
        for folder in folders
        for name in ("libggml-base", "ggml-base")
        for path in folder.glob(f"{name}.*")
    ]
    found = sorted(path for path in found if path.suffix in {".so", ".dylib", ".dll"})
    if not found:
        raise ModelError(
            "can't find ggml's library, libggml-base, beside llama-cpp-python",
            expected="llama-cpp-python with its shared libraries",
            next_step="pip install --force-reinstall --no-cache-dir llama-cpp-python",
        )
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


def _kind(kind: str) -> tuple[int, _Traits, int]:
    """A type's number, traits, and bytes per block; checked against gguf's table of the same things."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    number = GGMLQuantizationType.__members__.get(kind)
    if number is None:
        _refuse(f"{kind!r} is not one of ggml's types", "a name such as 'Q4_K' or 'Q6_K'")
    traits = _library().ggml_get_type_traits(int(number)).contents
    if (traits.blck_size, traits.type_size) != GGML_QUANT_SIZES[number]:
        _refuse(f"this ggml library has no type {kind}", "a newer llama-cpp-python")
    return int(number), traits, traits.type_size


def _refuse(what: str, expected: str) -> NoReturn:
    raise ModelError(what, expected=expected, next_step="choose another format for that matrix")


def ggml_needs_importance(kind: str) -> bool:
    """Whether ggml encodes this type only with an importance of its columns (IQ2_XXS and its like)."""
    return bool(_library().ggml_quantize_requires_imatrix(_kind(kind)[0]))


def ggml_encode(weight: Any, kind: str, importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """A matrix in any of ggml's types, encoded by ggml.

    Args:
        weight: a tensor or array [out, in]; computed in float32.
        kind: a ``GGMLQuantizationType`` name, such as "Q6_K".
        importance: how much a column's error counts, [in], or [out, in]; ggml's "imatrix". A zero counts as
            the smallest positive number there: ggml would encode blocks without importance as zeros.

    Returns:
        uint8 [out, bytes per row].

    Raises:
        ModelError: an unknown type, a width that is no multiple of its block, numbers that are not finite, or
            a type that needs an importance and got none. (ggml would end the process.)
    """
    values = _matrix(weight, "the weight")
    number, traits, size = _kind(kind)
    rows, width = values.shape
    if width % traits.blck_size:
        _refuse(
            f"a row of {width} weights can't be cut into {kind} blocks of {traits.blck_size}",
            f"a multiple of {traits.blck_size}",
        )
    if importance is None and ggml_needs_importance(kind):
        _refuse(f"{kind} can't be encoded without an importance of the columns", "an importance [in]")
    if not traits.is_quantized and kind not in _FLOATS and kind != "BF16":
        _refuse(f"{kind} is not a type for weights", "a name such as 'Q4_K' or 'Q6_K'")
    if kind in _FLOATS:
        return np.ascontiguousarray(values.astype(_FLOATS[kind])).view(np.uint8).reshape(rows, -1)
    weights = None if importance is None else _importance(importance, values.shape)
    encoded = np.empty((rows, width // traits.blck_size * size), dtype=np.uint8)
    library = _library()
    library.ggml_quantize_init(number)  # its tables, before threads ask for them

    def run(part: slice) -> None:
        for begin, end, pointer in _strips(part, weights):
            library.ggml_quantize_chunk(
                number, values[begin].ctypes.data, encoded[begin].ctypes.data, 0, end - begin, width, pointer
            )

    _in_parts(rows, run)
    return encoded


def _strips(part: slice, weights: NDArray[np.float32] | None) -> list[tuple[int, int, int | None]]:
    """Row ranges that share one importance: all of them, or each row its own."""
    if weights is None or weights.ndim == 1:
        return [(part.start, part.stop, None if weights is None else weights.ctypes.data)]
    return [(row, row + 1, weights[row].ctypes.data) for row in range(part.start, part.stop)]


def _in_parts(rows: int, run: Callable[[slice], None]) -> None:
    """Rows are independent and ctypes lets other threads run; the parts don't change the bytes."""
    step = -(-rows // _THREADS)
    parts = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(run, parts))


def _matrix(weight: Any, what: str) -> NDArray[np.float32]:
    array = weight if isinstance(weight, np.ndarray) else weight.detach().float().cpu().numpy()
    values: NDArray[np.float32] = np.ascontiguousarray(array, dtype=np.float32)
    if values.ndim != 2 or not values.size:
        _refuse(f"{what} has shape {values.shape}", "a matrix [out, in]")
    if not np.isfinite(values).all():
        raise ModelError(
            f"{what} holds numbers that are not finite",
            expected="finite weights",
            next_step="train again with a lower [train] learning_rate",
        )
    return values


def _importance(importance: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = importance if isinstance(importance, np.ndarray) else importance.detach().float().cpu().numpy()
    weights: NDArray[np.float32] = np.ascontiguousarray(array, dtype=np.float32)
    if weights.shape not in {shape, shape[1:]} or not np.isfinite(weights).all() or weights.min() < 0:
        _refuse(
            f"an importance of shape {weights.shape} does not fit a matrix of shape {shape}",
            f"finite numbers >= 0, {shape[1:]} or {shape}",
        )
    positive = weights[weights > 0]
    return np.maximum(weights, positive.min() if positive.size else np.float32(1))


def ggml_decode(rows: NDArray[np.uint8], kind: str, width: int) -> NDArray[np.float32]:
    """The numbers that ggml dequantizes packed rows to, float32 [out, width].

    Args:
        rows: uint8 [out, bytes per row].
        kind: a ``GGMLQuantizationType`` name.
        width: in-features.

    Raises:
        ModelError: an unknown type, or rows of another length.
    """
    _, traits, size = _kind(kind)
    if rows.dtype != np.uint8 or rows.ndim != 2 or width % traits.blck_size:
        _refuse(
            f"{rows.dtype} rows of shape {rows.shape} are not {kind} rows of {width}", "uint8 [out, bytes]"
        )
    if rows.shape[1] != width // traits.blck_size * size:
        _refuse(
            f"a {kind} row of {width} weights has {width // traits.blck_size * size} bytes, not {rows.shape[1]}",
            "the tensor's own width",
        )
    rows = np.ascontiguousarray(rows)
    if kind == "F32":
        return rows.view("<f4").astype(np.float32)
    if not traits.to_float:
        _refuse(f"{kind} is not a type for weights", "a name such as 'Q4_K' or 'Q6_K'")
    decoded = np.empty((len(rows), width), dtype=np.float32)

    def run(part: slice) -> None:
        count = (part.stop - part.start) * width
        traits.to_float(rows[part.start].ctypes.data, decoded[part.start].ctypes.data, count)

    _in_parts(len(rows), run)
    return decoded
