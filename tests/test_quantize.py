from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domains.errors import StageError
from pipeline.gguf_writer import write_llama_gguf
from pipeline.imatrix import collect_imatrix, read_imatrix, write_imatrix
from pipeline.quantize import describe_file, quantize
from serve.gguf_check import check_gguf
from serve.quantizer import requantize
from tests.small_models import TEMPLATE, read_tensors, small_llama, small_tokenizer

ROWS = [np.random.default_rng(n).integers(4, 400, 40).tolist() for n in range(3)]


def write(path: Path, model: Any) -> Path:
    write_llama_gguf(
        path, state=model.state_dict(), config=model.config, tokenizer=small_tokenizer(), template=TEMPLATE,
        name="small", licence="apache-2.0",
    )  # fmt: skip
    return path


def test_widths_that_256_divides_get_what_was_asked(tmp_path: Path) -> None:
    source = write(tmp_path / "f16.gguf", small_llama(width=256))
    report = quantize(source, tmp_path / "q4k.gguf", kind="Q4_K_M")
    assert report.fallbacks == ()
    assert "Q4_K" in report.kinds
    assert sum(report.kinds.values()) == 20
    assert "blocks do not divide" not in report.describe()


def test_other_widths_are_told(tmp_path: Path) -> None:
    source = write(tmp_path / "f16.gguf", small_llama(width=96))
    report = quantize(source, tmp_path / "q4k.gguf", kind="Q4_K_M")
    assert len(report.fallbacks) == report.kinds["Q5_0"] + report.kinds["Q8_0"]
    assert "blk.0.attn_q.weight" in report.fallbacks
    assert f"{len(report.fallbacks)} of 20 tensors" in report.describe()
    assert report.bits_per_weight > 5.5
    assert report.size_bytes == (tmp_path / "q4k.gguf").stat().st_size
    assert quantize(source, tmp_path / "q8.gguf", kind="Q8_0").fallbacks == ()


def test_an_embedding_that_is_wider_on_purpose_is_no_fallback(tmp_path: Path) -> None:
    source = write(tmp_path / "f16.gguf", small_llama(width=256))
    requantize(source, tmp_path / "q4.gguf", "Q4_0", outer="Q8_0")
    assert describe_file(tmp_path / "q4.gguf", "Q4_0", outer="Q8_0").fallbacks == ()
    assert describe_file(tmp_path / "q4.gguf", "Q4_0").fallbacks == ("token_embd.weight",)


def test_imatrix_is_the_mean_square_of_what_goes_into_each_layer() -> None:
    model = small_llama()
    found = collect_imatrix(model, ROWS, max_tokens=100)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(found) == len(linear)
    with torch.no_grad():
        states = [model.model(torch.tensor([row])).last_hidden_state[0] for row in (*ROWS[:2], ROWS[2][:20])]
        embedded = [model.model.embed_tokens(torch.tensor(row)) for row in (*ROWS[:2], ROWS[2][:20])]
        normed = torch.cat([model.model.layers[0].input_layernorm(rows) for rows in embedded])
    np.testing.assert_allclose(found["token_embd.weight"], torch.cat(states).square().mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["blk.0.attn_q.weight"], normed.square().mean(0), rtol=1e-4)
    assert np.array_equal(found["blk.0.attn_q.weight"], found["blk.0.attn_v.weight"])
    assert found["blk.1.ffn_down.weight"].shape == (128,)
    assert "output.weight" in collect_imatrix(small_llama(tied=False), ROWS, max_tokens=100)


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(StageError, match="no tokens"):
        collect_imatrix(small_llama(), [], max_tokens=100)


def test_imatrix_weighs_the_rounding(tmp_path: Path) -> None:
    """Where a few inputs carry nearly all the weight, their columns come out more exact."""
    source = write(tmp_path / "f16.gguf", small_llama())
    name = "blk.0.ffn_gate.weight"
    importance = np.full(64, 1e-4, np.float32)
    importance[::8] = 100.0
    quantize(source, tmp_path / "plain.gguf", kind="Q4_0")
    quantize(source, tmp_path / "weighed.gguf", kind="Q4_0", imatrix={name: importance})
    truth = read_tensors(source)[name]

    def error(file: str) -> float:
        return float(np.square(read_tensors(tmp_path / file)[name] - truth)[:, ::8].mean())

    assert error("weighed.gguf") < 0.7 * error("plain.gguf")
    assert (
        check_gguf(tmp_path / "weighed.gguf").kind_counts == check_gguf(tmp_path / "plain.gguf").kind_counts
    )


def test_imatrix_file_round_trip_and_same_bytes(tmp_path: Path) -> None:
    imatrix = collect_imatrix(small_llama(), ROWS, max_tokens=50)
    write_imatrix(tmp_path / "a.npz", imatrix)
    write_imatrix(tmp_path / "b.npz", dict(reversed(imatrix.items())))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    back = read_imatrix(tmp_path / "a.npz")
    assert back.keys() == imatrix.keys()
    assert all(np.array_equal(back[name], imatrix[name]) for name in back)
