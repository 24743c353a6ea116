"""The quantization benchmark: what its comparisons and its look at the base file say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.candidates import CANDIDATES, Measured
from pipeline.fidelity import Fidelity
from pipeline.grids import Packed
from pipeline.speed import Speed

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import quantization


def measured(name: str, *, kl: float, bits: float = 4.5, speed: float = 100.0) -> Measured:
    candidate = next(each for each in CANDIDATES if each.name == name)
    fidelity = Fidelity((kl,) * 8, (1.0,) * 8, (1,) * 8, (1,) * 8)
    return Measured(candidate, Path(name), 0.0, 100, bits, 0, fidelity, (), Speed(speed, speed))


def test_the_best_of_few_bits_is_compared_with_llama_cpps_own() -> None:
    found = quantization.comparisons([
        measured("gptq-q4_0", kl=0.03), measured("r1r2-gptq-q4_0", kl=0.02, speed=150),
        measured("gptq-q4_1", kl=0.01, bits=5.0),  # nearer, but of more bits
        measured("llamacpp-q4_0-imatrix", kl=0.04), measured("llamacpp-q4_k_m-imatrix", kl=0.01, bits=4.8),
    ])  # fmt: skip
    assert found["best"] == "r1r2-gptq-q4_0"
    assert found["llamacpp-q4_0-imatrix"] == {
        "kl_ratio": 0.5, "kl_minus": [-0.02, -0.02, -0.02], "block_bits": [4.5, 4.5], "prompt_speed_ratio": 1.5,
    }  # fmt: skip
    assert found["llamacpp-q4_k_m-imatrix"]["kl_ratio"] == 2.0
    assert quantization.comparisons([measured("llamacpp-q4_0-imatrix", kl=0.04)]) == {}


def test_every_byte_that_differs_from_the_base_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {
        "a": Packed("Q4_1", np.zeros((3, 40), np.uint8)),
        "b": Packed("Q8_0", np.zeros((2, 34), np.uint8)),
    }
    rows = {name: matrix.rows.copy() for name, matrix in theirs.items()}
    rows["a"][0, 2] = rows["a"][0, 3] = 7  # one minimum, both of its bytes
    rows["a"][2, 22] = 7  # another
    ours = {name: Packed(theirs[name].kind, array) for name, array in rows.items()}
    monkeypatch.setattr(quantization, "packaged_gguf", lambda: Path("base"))
    monkeypatch.setattr(
        quantization, "read_packed", lambda path, _config: theirs if path == Path("base") else ours
    )
    found = quantization.compare_with_base(Path("ours"), None)
    assert found == {"minima_changed": 2, "other_bytes_changed": 0}
    rows["a"][1, 4] = 1  # a code
    rows["a"][1, 20] = 1  # a scale
    rows["b"][1, 0] = 1
    assert quantization.compare_with_base(Path("ours"), None)["other_bytes_changed"] == 3


def test_quick_names_real_candidates() -> None:
    names = {each.name for each in CANDIDATES}
    assert all(left_out < names for left_out in quantization.NOT_QUICK.values())
