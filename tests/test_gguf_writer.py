from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domains.errors import ModelError
from pipeline.gguf_names import gguf_name, llama3_rope_factors, permute_rows, restore_rows
from pipeline.gguf_writer import write_llama_gguf
from serve.engine import Engine
from serve.gguf_check import Array, check_gguf
from serve.models import packaged_gguf
from tests.small_models import LLAMA3_ROPE, TEMPLATE, TEXT, read_tensors, small_llama, small_tokenizer


def write(path: Path, model: Any, tokenizer: Any, **options: Any) -> Path:
    settings = {"template": TEMPLATE, "name": "small", "licence": "apache-2.0", "file_type": "F32", **options}
    write_llama_gguf(path, state=model.state_dict(), config=model.config, tokenizer=tokenizer, **settings)
    return path


@pytest.mark.parametrize(("tied", "rope"), [(True, LLAMA3_ROPE), (False, None)])
def test_llama_cpp_computes_what_transformers_computes(
    tmp_path: Path, tied: bool, rope: dict[str, Any] | None
) -> None:
    """150 tokens: far beyond the 64 of the original context, where the rotary factors matter."""
    model = small_llama(tied=tied, rope=rope)
    path = write(tmp_path / "small.gguf", model, small_tokenizer())
    tokens = np.random.default_rng(1).integers(4, 400, 150).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    with Engine(path, context=512, parallel=1) as engine:
        got = engine.logits(tokens, first=0)
    names = {tensor.name for tensor in check_gguf(path).tensors}
    assert ("output.weight" in names) is not tied
    assert ("rope_freqs.weight" in names) is (rope is not None)
    assert expected.std() > 0.5
    assert np.abs(got - expected).max() < 0.02 * expected.std()  # attention computes in half precision
    assert (got.argmax(1) == expected.argmax(1)).mean() > 0.98


def test_rotary_factors_keep_short_waves_and_stretch_long_ones() -> None:
    """The values for Llama 3.2's settings, from the definition in Llama 3.1's reference code."""
    rope = {
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_rope_factors(rope, 64)
    assert factors.shape == (32,)
    assert factors[0] == 1.0
    assert factors[-1] == 32.0
    assert (np.diff(factors) >= 0).all()
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", **rope},
    )  # fmt: skip
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / factors, inverse.numpy(), rtol=1e-5)


def test_restore_rows_undoes_permute_rows() -> None:
    weight = np.arange(48.0).reshape(16, 3)
    assert not np.array_equal(permute_rows(weight, 2), weight)
    assert np.array_equal(restore_rows(permute_rows(weight, 2), 2), weight)


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "gpt-2"])
@pytest.mark.parametrize("bos", [True, False])
def test_both_sides_see_the_same_tokens(tmp_path: Path, kind: str, bos: bool) -> None:
    tokenizer = small_tokenizer(adds_bos=bos, kind=kind)
    path = write(tmp_path / "small.gguf", small_llama(), tokenizer)
    facts = check_gguf(path, arrays=True)
    assert facts.metadata["tokenizer.ggml.pre"] == kind
    types = facts.metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, Array)
    assert types.values[:4] == (3, 3, 3, 3)
    assert types.values[-1] == 5  # rows of embeddings behind the vocabulary
    with Engine(path, context=256, parallel=1) as engine:
        assert engine.adds_bos is bos
        assert engine.template == TEMPLATE
        for text in [*TEXT, "<|start|>user\n12345 it's  two\n\nlines<|im_end|>\n", "naïve 日本 x_1"]:
            tokens = engine.tokenize(text)
            assert tokens == tokenizer(text)["input_ids"]
            assert tokens.count(0) == int(bos)


def test_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Whitespace"):
        write(tmp_path / "small.gguf", small_llama(), small_tokenizer(kind="other"))
    assert list(tmp_path.iterdir()) == []


def test_unknown_parameter_and_missing_one_are_refused(tmp_path: Path) -> None:
    model, tokenizer = small_llama(), small_tokenizer()
    options = {
        "config": model.config,
        "tokenizer": tokenizer,
        "template": TEMPLATE,
        "name": "x",
        "licence": "y",
    }
    state = dict(model.state_dict())
    with pytest.raises(ModelError, match=r"q_proj\.bias"):
        write_llama_gguf(
            tmp_path / "a.gguf",
            state={**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)},
            **options,
        )
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"lacks 1 of .*blk.1.ffn_up.weight"):
        write_llama_gguf(tmp_path / "a.gguf", state=state, **options)


def test_a_number_too_large_for_half_precision_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    model, tokenizer = small_llama(), small_tokenizer()
    path = write(tmp_path / "small.gguf", model, tokenizer, file_type="F16")
    before = path.read_bytes()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        write(path, model, tokenizer, file_type="F16")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_same_model_same_bytes(tmp_path: Path) -> None:
    one = write(tmp_path / "1.gguf", small_llama(), small_tokenizer())
    two = write(tmp_path / "2.gguf", small_llama(), small_tokenizer())
    assert one.read_bytes() == two.read_bytes()


def test_names() -> None:
    assert gguf_name("model.layers.12.self_attn.o_proj.weight") == "blk.12.attn_output.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.layers.12.self_attn.o_proj.bias") is None


def test_default_model_comes_back_as_it_was(tmp_path: Path) -> None:
    """Packaged GGUF -> names and row order of transformers -> our F32 file: same numbers, same vocabulary."""
    from transformers import LlamaConfig

    source = packaged_gguf()
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    theirs = read_tensors(source)
    heads = {"q_proj": 9, "k_proj": 3}
    state = {}
    layers = [f"model.layers.{n}.{k}" for n in range(30) for k in _LAYER_KINDS]
    for name in ["model.embed_tokens", "model.norm", *layers]:
        target = gguf_name(f"{name}.weight")
        assert target is not None
        kind = name.split(".")[-1]
        state[f"{name}.weight"] = (
            restore_rows(theirs[target], heads[kind]) if kind in heads else theirs[target]
        )
    path = tmp_path / "smollm2.gguf"
    write_llama_gguf(
        path, state=state, config=config, tokenizer=None, template="{{ messages }}", name="SmolLM2",
        licence="apache-2.0", file_type="F32", copy_tokenizer_from=source,
    )  # fmt: skip
    ours = read_tensors(path)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    facts, packaged = check_gguf(path, arrays=True), check_gguf(source, arrays=True)
    for key, value in packaged.metadata.items():
        if key.startswith("tokenizer.ggml") or key.startswith("llama."):
            assert facts.metadata[key] == value, key
    assert facts.metadata["tokenizer.chat_template"] == "{{ messages }}"


_LAYER_KINDS = [
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip
