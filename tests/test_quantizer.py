from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from domains.errors import ModelError
from serve.gguf_check import check_gguf
from serve.models import packaged_gguf
from serve.quantizer import requantize
from tests.small_models import read_tensors


@pytest.fixture(scope="module")
def q8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q8") / "q8.gguf"
    requantize(packaged_gguf(), path, "Q8_0")
    return path


def test_packaged_model_becomes_q8_with_the_same_numbers(q8: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert check_gguf(q8).kind_counts == {"F32": 61, "Q8_0": 211}
    after = read_tensors(q8)
    for name, before in read_tensors(packaged_gguf(), 10).items():
        assert np.abs(after[name] - before).max() <= np.abs(before).max() / 127
    assert capfd.readouterr() == ("", "")  # llama.cpp's log stays off the terminal


def test_refusal_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, q8: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"old")
    with pytest.raises(ModelError, match="imatrix"):
        requantize(q8, target, "Q4_0", imatrix={"blk.0.attn_q.weight": np.ones(5, np.float32)})
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_damaged_source(tmp_path: Path, q8: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(q8.read_bytes()[:-100])
    with pytest.raises(ModelError, match="reaches to byte"):
        requantize(broken, tmp_path / "out.gguf", "Q8_0")
