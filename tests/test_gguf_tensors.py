"""Packed matrices through a GGUF file: the same bytes, and llama.cpp computes with their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domains.errors import ModelError
from pipeline.gguf_tensors import read_packed
from pipeline.gguf_writer import write_llama_gguf
from pipeline.grids import Packed, decode, fit, ggml_decode, ggml_encode, pack, unpack
from serve.engine import Engine
from serve.gguf_check import check_gguf
from serve.models import packaged_gguf
from tests.small_models import LLAMA3_ROPE, TEMPLATE, small_llama, small_tokenizer

KINDS = {
    "q_proj": "Q4_0", "k_proj": "Q4_1", "v_proj": "Q8_0", "gate_proj": "Q4_K", "up_proj": "Q5_0", "down_proj": "Q6_K",
    "embed_tokens": "Q8_0", "lm_head": "Q6_K",
}  # fmt: skip


def pack_all(model: Any) -> dict[str, Packed]:
    """Every matrix but o_proj; q, k and v with scales that ggml's own rounding would not choose."""
    packed = {}
    for name, weight in model.state_dict().items():
        kind = KINDS.get(name.split(".")[-2])
        if kind is None or (name.startswith("lm_head") and model.config.tie_word_embeddings):
            continue
        if kind in {"Q4_0", "Q4_1", "Q8_0"}:
            packed[name] = Packed(kind, pack(fit(weight, kind)))  # type: ignore[arg-type]
        else:
            packed[name] = Packed(kind, ggml_encode(weight, kind))
    return packed


def write(path: Path, model: Any, packed: dict[str, Packed], **options: Any) -> Path:
    settings: dict[str, Any] = {"file_type": "F16", "file_kind": "Q4_K_M", **options}
    write_llama_gguf(
        path, state=model.state_dict(), config=model.config, tokenizer=small_tokenizer(), template=TEMPLATE,
        name="small", licence="CC0-1.0", packed=packed, **settings,
    )  # fmt: skip
    return path


def run(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


@pytest.mark.parametrize(("tied", "rope"), [(True, None), (False, LLAMA3_ROPE)])
def test_llama_cpp_computes_with_the_packed_numbers(
    tmp_path: Path, tied: bool, rope: dict[str, Any] | None
) -> None:
    model = small_llama(tied=tied, rope=rope, width=256)
    packed = pack_all(model)
    path = write(tmp_path / "small.gguf", model, packed)
    tokens = np.random.default_rng(1).integers(4, 400, 150).tolist()
    plain = run(model, tokens)
    model.load_state_dict(
        {
            name: torch.from_numpy(ggml_decode(packed[name].rows, packed[name].kind, weight.shape[1]))
            if name in packed
            else weight
            for name, weight in model.state_dict().items()
        }
        | (
            {"lm_head.weight": decode(unpack(packed["model.embed_tokens.weight"].rows, "Q8_0"))}
            if tied
            else {}
        )
    )
    expected = run(model, tokens)
    with Engine(path, context=256, parallel=1) as engine:
        got = engine.logits(tokens, first=0)
    distance = np.sqrt(((got - expected) ** 2).mean())
    rounding = np.sqrt(((plain - expected) ** 2).mean())
    assert distance < 0.2 * rounding  # what is left are llama.cpp's 8-bit activations
    assert distance < 0.08 * expected.std()
    facts = check_gguf(path)
    assert facts.metadata["general.file_type"] == 15
    kinds = {tensor.name: tensor.kind for tensor in facts.tensors}
    assert kinds["blk.1.attn_q.weight"] == "Q4_0"
    assert kinds["blk.1.attn_output.weight"] == "F16"
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    assert kinds.get("output.weight") == (None if tied else "Q6_K")


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_gives_back_the_bytes_that_were_written(tmp_path: Path, tied: bool) -> None:
    model = small_llama(tied=tied, rope=LLAMA3_ROPE, width=256)
    packed = pack_all(model)
    path = write(tmp_path / "small.gguf", model, packed)
    found = read_packed(path, model.config)
    wanted = set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert set(found) == wanted
    for name in wanted:
        weight = model.state_dict()[name]
        if name in packed:
            assert found[name].kind == packed[name].kind
            assert np.array_equal(found[name].rows, packed[name].rows), name
        else:
            assert found[name].kind == ("F32" if weight.ndim == 1 else "F16")
            values = ggml_decode(found[name].rows, found[name].kind, weight.shape[-1])
            assert np.array_equal(
                values.reshape(weight.shape),
                weight.to(torch.float16 if weight.ndim > 1 else torch.float32).float(),
            )
    # All of it, norms too, as packed bytes: the same file again, byte for byte.
    again = write(tmp_path / "again.gguf", model, found)
    assert again.read_bytes() == path.read_bytes()
    (tmp_path / "alone").mkdir()
    write_llama_gguf(
        tmp_path / "alone" / "small.gguf", state={}, config=model.config, tokenizer=small_tokenizer(),
        template=TEMPLATE, name="small", licence="CC0-1.0", packed=found, file_kind="Q4_K_M",
    )  # fmt: skip
    assert (tmp_path / "alone" / "small.gguf").read_bytes() == path.read_bytes()


def test_reading_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    model = small_llama(width=256)
    path = write(tmp_path / "small.gguf", model, pack_all(model))
    before = path.read_bytes()
    read_packed(path, model.config)["model.embed_tokens.weight"].rows[:] = 0
    assert path.read_bytes() == before


def test_the_packaged_model_is_read_with_its_own_types() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152
    )
    found = read_packed(packaged_gguf(), config)
    assert len(found) == 2 + 30 * 9
    assert found["model.embed_tokens.weight"].rows.shape == (49152, 576 // 32 * 34)
    assert found["model.embed_tokens.weight"].kind == "Q8_0"
    assert found["model.norm.weight"].kind == "F32"
    assert found["model.norm.weight"].rows.shape == (1, 576 * 4)
    projection = found["model.layers.7.mlp.down_proj.weight"]
    assert projection.kind == "Q4_1"
    weight = decode(unpack(projection.rows, "Q4_1"))
    assert weight.shape == (576, 1536)
    assert np.array_equal(weight.numpy(), ggml_decode(projection.rows, "Q4_1", 1536))
    assert 0.01 < weight.std() < 1


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    model = small_llama(width=256)
    path = write(tmp_path / "small.gguf", model, {})
    for key, value in {"num_key_value_heads": 4, "hidden_size": 512, "num_hidden_layers": 3}.items():
        other = small_llama(width=256).config
        setattr(other, key, value)
        with pytest.raises(ModelError, match="config says"):
            read_packed(path, other)


def test_an_output_packed_apart_from_tied_embeddings_is_written(tmp_path: Path) -> None:
    """llama.cpp uses it where it stands; a smaller output with finer embeddings is a choice."""
    model = small_llama(width=256)
    packed = {"lm_head.weight": Packed("Q6_K", ggml_encode(model.lm_head.weight, "Q6_K"))}
    found = read_packed(write(tmp_path / "small.gguf", model, packed), model.config)
    assert found["lm_head.weight"].kind == "Q6_K"
    assert found["model.embed_tokens.weight"].kind == "F16"


@pytest.mark.parametrize(
    ("name", "packed", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight", Packed("Q4_0", np.zeros((512, 17), np.uint8)), "rows of 17 bytes"),
        ("model.layers.0.mlp.up_proj.weight", Packed("Q4_0", np.zeros((512, 18), np.uint8)), r"\(512, 256\)"),
        ("model.layers.0.mlp.up_proj.weight", Packed("Q4_9", np.zeros((512, 144), np.uint8)), "Q4_9"),
        ("model.layers.0.mlp.up_proj.weight", Packed("Q4_0", np.zeros((512, 144), np.int8)), "int8"),  # type: ignore[arg-type]
        ("model.layers.0.mlp.up_proj.bias", Packed("Q4_0", np.zeros((512, 144), np.uint8)), "bias"),
    ],
)  # fmt: skip
def test_packed_rows_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, packed: Packed, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        write(tmp_path / "small.gguf", small_llama(width=256), {name: packed})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_file_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'Q4_X'"):
        write(tmp_path / "small.gguf", small_llama(width=256), {}, file_kind="Q4_X")
