from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domains.errors import ModelError
from serve.gguf_check import Array, check_gguf
from serve.models import packaged_gguf


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "é"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_tensor("token_embd.weight", np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_facts(small: Path) -> None:
    facts = check_gguf(small, arrays=True)
    assert facts.architecture == "llama"
    assert facts.metadata["tokenizer.ggml.tokens"] == Array(8, 3, ("a", "bc", "é"))
    assert facts.metadata["tokenizer.ggml.token_type"] == Array(5, 3, (1, 1, 3))
    assert facts.metadata["tokenizer.ggml.add_bos_token"] is True
    embedding = facts.tensors[0]
    assert (embedding.name, embedding.shape, embedding.kind) == ("token_embd.weight", (3, 32), "F32")
    data = small.read_bytes()[embedding.offset : embedding.offset + embedding.size_bytes]
    assert np.frombuffer(data, np.float32).tolist() == list(range(96))
    assert facts.bits_per_weight == 32
    assert facts.weights == 128
    assert check_gguf(small).metadata["tokenizer.ggml.tokens"] == Array(8, 3)


def test_agrees_with_the_reference_reader_on_the_default_model() -> None:
    from gguf import GGUFReader

    facts, theirs = check_gguf(packaged_gguf()), GGUFReader(packaged_gguf())
    assert [(t.name, t.shape[::-1], t.kind, t.offset, t.size_bytes) for t in facts.tensors] == [
        (t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in theirs.tensors
    ]
    assert facts.kind_counts == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    assert facts.metadata["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"GG", "only 2 bytes"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\n<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "Git LFS pointer"),
        (b"PK\x03\x04rest", "zip"),
        (struct.pack("<Q", 90) + b'{"__metadata__":{}}', "safetensors"),
        (b"ggjt\x03\x00\x00\x00", "begins with b'ggjt'"),
        (b"GGUF", "ends inside its header"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1), "counts 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture is None"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "ends inside its header"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        check_gguf(path)
    assert why in caught.value.what
    assert str(path) in caught.value.what


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        check_gguf(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="directory"):
        check_gguf(tmp_path)


def changed(small: Path, old: bytes, new: bytes, tmp_path: Path) -> Path:
    data = small.read_bytes()
    assert data.count(old) == 1
    path = tmp_path / "changed.gguf"
    path.write_bytes(data.replace(old, new))
    return path


def test_a_tensor_that_reaches_past_the_end(small: Path, tmp_path: Path) -> None:
    dims = struct.pack("<IQQI", 2, 32, 3, 0)
    path = changed(small, dims, struct.pack("<IQQI", 2, 32, 2**40, 0), tmp_path)
    with pytest.raises(ModelError, match=r"'token_embd\.weight' reaches to byte"):
        check_gguf(path)
    path.write_bytes(small.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"'output_norm\.weight' reaches to byte"):
        check_gguf(path)


@pytest.mark.parametrize(
    ("new", "why"),
    [
        ((2, 32, 0, 0), "not a positive multiple"),
        ((2, 30, 3, 8), "row size 30 .* multiple of 32, the block size of Q8_0"),
        ((2, 32, 3, 99), "unknown type 99"),
        ((9, 32, 3, 0), "9 dimensions"),
    ],
)
def test_impossible_tensors(small: Path, tmp_path: Path, new: tuple[int, ...], why: str) -> None:
    path = changed(small, struct.pack("<IQQI", 2, 32, 3, 0), struct.pack("<IQQI", *new), tmp_path)
    with pytest.raises(ModelError, match=why):
        check_gguf(path)


def test_other_architecture(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="architecture is 'qwens'"):
        check_gguf(
            changed(small, b"llama" + struct.pack("<Q", 12), b"qwens" + struct.pack("<Q", 12), tmp_path)
        )


def test_every_truncation_is_a_model_error(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError):
            check_gguf(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(4, 500), st.binary(min_size=1, max_size=8)), max_size=4))
def test_damaged_headers_never_raise_anything_else(
    small: Path, tmp_path: Path, edits: list[tuple[int, bytes]]
) -> None:
    data = bytearray(small.read_bytes())
    for at, piece in edits:
        data[at : at + len(piece)] = piece
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    try:
        facts = check_gguf(path, arrays=True)
    except ModelError:
        return
    assert all(tensor.offset + tensor.size_bytes <= len(data) for tensor in facts.tensors)
