"""Reads and checks a GGUF file's header before llama.cpp maps the file.

llama.cpp trusts much of what a header says, and a size that reaches past the end of the file has been a
heap leak elsewhere (CVE-2026-7482). Tensor data is never read: a check costs milliseconds at any size.
The layout follows ggml's docs/gguf.md, version 3; numbers are little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

from domains.errors import ModelError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_MAX_KEYS = 4096
_MAX_TENSORS = 65536
_MAX_NAME = 64  # GGML_MAX_NAME
_MAX_KEY = 65535
_MAX_DIMS = 4

Scalar = int | float | bool | str


@dataclass(frozen=True)
class Array:
    """An array of the metadata. ``values`` is empty unless the arrays were asked for."""

    kind: int
    count: int
    values: tuple[Scalar, ...] = ()


@dataclass(frozen=True)
class TensorFacts:
    """One tensor. ``shape`` is numpy's order (rows first); ``offset`` counts from the file's begin."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class GgufFacts:
    """A checked header. ``kinds`` maps each key to GGUF's number of its value type."""

    path: Path
    version: int
    size_bytes: int
    metadata: dict[str, Scalar | Array]
    kinds: dict[str, int]
    tensors: tuple[TensorFacts, ...]

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def bits_per_weight(self) -> float:
        """Mean over all tensors, norms and embeddings included."""
        return 8 * sum(tensor.size_bytes for tensor in self.tensors) / self.weights

    @property
    def weights(self) -> int:
        """How many numbers the tensors hold."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def kind_counts(self) -> dict[str, int]:
        """How many tensors there are of each GGML type, by name."""
        return dict(sorted(Counter(tensor.kind for tensor in self.tensors).items()))


class _Cut(Exception):
    """The header goes on behind the end of the file."""


class _Cursor:
    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise _Cut
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def string(self, limit: int) -> str:
        length = self.number("<Q")
        if length > len(self.data) - self.at:
            raise _Cut
        if length > limit:
            raise ValueError(f"a name of {length} bytes (at most {limit})")
        return self.take(length).decode("utf-8")


def check_gguf(path: Path, *, arrays: bool = False) -> GgufFacts:
    """The header of a GGUF file, after every number in it was checked against the file.

    Args:
        path: the file.
        arrays: keep the values of arrays (vocabulary, merges) too, not only their lengths.

    Raises:
        ModelError: missing, cut off, not GGUF, split, not of the Llama architecture, or any count, size or
            offset does not fit the file (names what is wrong).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            _check_magic(path, head)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, _Cursor(data), size, arrays)
    except OSError as error:
        raise ModelError(
            f"can't read the model file {str(path)!r}: {error.strerror}",
            expected="a GGUF file",
            next_step="check the path",
        ) from None
    except _Cut:
        _refuse(path, f"it ends inside its header, after {size} bytes")
    except UnicodeDecodeError:
        _refuse(path, "a name in its header is not UTF-8")
    except ValueError as error:
        _refuse(path, str(error))


def _refuse(path: Path, why: str) -> NoReturn:
    raise ModelError(
        f"{path} is not a usable GGUF file: {why}",
        expected="a whole GGUF file of a Llama model",
        next_step="fetch or export the file again",
    ) from None


def _check_magic(path: Path, head: bytes) -> None:
    if head[:4] == b"GGUF":
        return
    text = head.lstrip().lower()
    if not head:
        _refuse(path, "it is empty")
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        _refuse(path, "it is a web page, saved in place of the file")
    if text.startswith(b"version https://git-lfs"):
        _refuse(path, "it is a Git LFS pointer, not the file itself")
    if head[:4] == b"PK\x03\x04":
        _refuse(path, "it is a zip archive")
    if b'"__metadata__"' in head or head[8:9] == b"{":
        _refuse(path, "it looks like a safetensors file")
    if len(head) < 4:
        _refuse(path, f"it has only {len(head)} bytes")
    _refuse(path, f"it begins with {head[:4]!r} where GGUF should stand")


def _read(path: Path, cursor: _Cursor, size: int, arrays: bool) -> GgufFacts:
    cursor.take(4)
    version = cursor.number("<I")
    if version not in _VERSIONS:
        big_endian = version & 0xFFFF == 0 and version >> 24 in _VERSIONS
        raise ValueError("it is big-endian" if big_endian else f"GGUF version {version}, not 2 or 3")
    tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
    if tensor_count > _MAX_TENSORS or key_count > _MAX_KEYS:
        raise ValueError(f"its header counts {tensor_count} tensors and {key_count} keys")
    metadata, kinds = _read_metadata(cursor, key_count, arrays)
    _check_metadata(metadata)
    infos = [_read_info(cursor) for _ in range(tensor_count)]
    tensors = _place_tensors(infos, _data_begin(cursor.at, metadata), size)
    if not tensors:
        raise ValueError("it holds no tensors")
    return GgufFacts(path, version, size, metadata, kinds, tensors)


def _read_metadata(
    cursor: _Cursor, count: int, arrays: bool
) -> tuple[dict[str, Scalar | Array], dict[str, int]]:
    metadata: dict[str, Scalar | Array] = {}
    kinds: dict[str, int] = {}
    for _ in range(count):
        key = cursor.string(_MAX_KEY)
        if key in metadata:
            raise ValueError(f"the key {key!r} stands twice in its header")
        kinds[key] = kind = cursor.number("<I")
        metadata[key] = _read_array(cursor, key, arrays) if kind == _ARRAY else _read_value(cursor, kind, key)
    return metadata, kinds


def _read_value(cursor: _Cursor, kind: int, key: str) -> Scalar:
    if kind == _STRING:
        return cursor.string(len(cursor.data))
    if kind not in _SCALARS:
        raise ValueError(f"the key {key!r} has the unknown value type {kind}")
    return cursor.number(_SCALARS[kind])


def _read_array(cursor: _Cursor, key: str, keep: bool) -> Array:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    if kind != _STRING and kind not in _SCALARS:
        raise ValueError(f"the array {key!r} has elements of the unknown type {kind}")
    width = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
    if count > (len(cursor.data) - cursor.at) // width:
        raise _Cut
    if kind != _STRING:
        raw = cursor.take(count * width)
        return Array(kind, count, struct.unpack(f"<{count}{_SCALARS[kind][1]}", raw) if keep else ())
    if keep:
        return Array(kind, count, tuple(cursor.string(len(cursor.data)) for _ in range(count)))
    _skip_strings(cursor, count)
    return Array(kind, count)


def _skip_strings(cursor: _Cursor, count: int) -> None:
    data, at, end, length = cursor.data, cursor.at, len(cursor.data), struct.Struct("<Q")
    for _ in range(count):
        if at + 8 > end:
            raise _Cut
        at += 8 + length.unpack_from(data, at)[0]
    if at > end:
        raise _Cut
    cursor.at = at


def _check_metadata(metadata: dict[str, Scalar | Array]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"its architecture is {architecture!r}, not 'llama'")
    split = metadata.get("split.count", 1)
    if isinstance(split, int) and split > 1:
        raise ValueError(
            f"it is one of {split} parts of a split model; join them with llama-gguf-split --merge"
        )


def _data_begin(header_end: int, metadata: dict[str, Scalar | Array]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    return -(-header_end // alignment) * alignment


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int, int]:
    """Name, shape (rows first), type, size in bytes, offset from where the data begin."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string(_MAX_NAME)
    dims = cursor.number("<I")
    if not 1 <= dims <= _MAX_DIMS:
        raise ValueError(f"the tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dims))
    number, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"the tensor {name!r} has the unknown type {number}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[0] % block:
        raise ValueError(
            f"row size {shape[0]} of {name!r} is not a positive multiple of {block}, the block size of {kind.name}"
        )
    return name, shape[::-1], kind.name, prod(shape) // block * block_bytes, offset


def _place_tensors(
    infos: list[tuple[str, tuple[int, ...], str, int, int]], begin: int, size: int
) -> tuple[TensorFacts, ...]:
    seen: set[str] = set()
    tensors = []
    for name, shape, kind, size_bytes, offset in infos:
        if name in seen:
            raise ValueError(f"the tensor {name!r} stands twice in its header")
        seen.add(name)
        if begin + offset + size_bytes > size:
            raise ValueError(
                f"the tensor {name!r} reaches to byte {begin + offset + size_bytes}, the file ends at {size}"
            )
        tensors.append(TensorFacts(name, shape, kind, begin + offset, size_bytes))
    return tuple(tensors)
