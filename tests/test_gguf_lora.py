"""A GGUF adapter beside its base answers as the network with the adapter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domains.errors import ModelError
from pipeline.gguf_lora import write_lora_gguf
from pipeline.gguf_writer import write_llama_gguf
from serve.engine import Engine
from serve.gguf_check import check_gguf
from tests.small_models import LLAMA3_ROPE, TEMPLATE, read_tensors, small_llama, small_tokenizer

RANK, ALPHA = 4, 12.0
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]


def random_adapter(model: Any, *, head: bool = False) -> Adapter:
    """One for every linear layer, strong enough to change the logits thoroughly."""
    generator = torch.Generator().manual_seed(3)
    adapter = {}
    for name, weight in model.state_dict().items():
        if name.endswith("_proj.weight") or (head and name == "lm_head.weight"):
            a = torch.randn(RANK, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5
            adapter[name] = a, torch.randn(weight.shape[0], RANK, generator=generator) * 0.1
    return adapter


def write(path: Path, adapter: Any, model: Any, **options: Any) -> Path:
    write_lora_gguf(
        path, adapter, **{"alpha": ALPHA, "config": model.config, "name": "a", "base_name": "b", **options}
    )
    return path


def run(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_adds_the_adapter_to_the_base(tmp_path: Path, tied: bool) -> None:
    """Grouped queries and llama3's rotary factors; an untied head may have an adapter too."""
    model = small_llama(tied=tied, rope=LLAMA3_ROPE)
    adapter = random_adapter(model, head=not tied)
    base = tmp_path / "base.gguf"
    write_llama_gguf(
        base, state=model.state_dict(), config=model.config, tokenizer=small_tokenizer(), template=TEMPLATE,
        name="small", licence="CC0-1.0", file_type="F32",
    )  # fmt: skip
    path = write(tmp_path / "adapter.gguf", adapter, model)
    tokens = np.random.default_rng(1).integers(4, 400, 150).tolist()
    plain = run(model, tokens)
    with torch.no_grad():
        for name, (a, b) in adapter.items():
            model.get_parameter(name).add_(ALPHA / RANK * b @ a)
    expected = run(model, tokens)
    with Engine(base, adapter=path, context=512, parallel=1) as engine:
        got = engine.logits(tokens, first=0)
    assert np.abs(plain - expected).max() > 0.5 * expected.std()
    assert np.abs(got - expected).max() < 0.02 * expected.std()  # attention computes in half precision


def test_stock_llama_cpp_loads_it(tmp_path: Path) -> None:
    """Through its plain interface, without the checks of serve."""
    import llama_cpp

    model = small_llama()
    base = tmp_path / "base.gguf"
    write_llama_gguf(
        base, state=model.state_dict(), config=model.config, tokenizer=small_tokenizer(), template=TEMPLATE,
        name="small", licence="CC0-1.0", file_type="F32",
    )  # fmt: skip
    path = write(tmp_path / "adapter.gguf", random_adapter(model), model, file_type="F16")
    loaded = llama_cpp.llama_model_load_from_file(str(base).encode(), llama_cpp.llama_model_default_params())
    adapter = llama_cpp.llama_adapter_lora_init(loaded, str(path).encode())
    assert adapter
    llama_cpp.llama_adapter_lora_free(adapter)
    llama_cpp.llama_model_free(loaded)


def test_names_facts_and_numbers(tmp_path: Path) -> None:
    model = small_llama()
    adapter = random_adapter(model)
    path = write(tmp_path / "adapter.gguf", adapter, model, name="clinic", base_name="SmolLM2")
    facts = check_gguf(path)
    assert {key: facts.metadata[key] for key in facts.metadata if not key.startswith("general.q")} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "clinic",
        "general.base_model.count": 1,
        "general.base_model.0.name": "SmolLM2",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": 12.0,
    }
    tensors = read_tensors(path)
    assert len(tensors) == 2 * len(adapter)
    a, b = adapter["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_a"], a)
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_b"], b)
    b = adapter["model.layers.1.self_attn.k_proj.weight"][1]
    turned = tensors["blk.1.attn_k.weight.lora_b"]
    assert not np.array_equal(turned, b)
    assert np.array_equal(
        turned[[0, 2, 1, 3]], b[[0, 1, 8, 9]]
    )  # heads of 16: pairs (i, i + 8) -> (2i, 2i + 1)


def test_same_adapter_same_bytes(tmp_path: Path) -> None:
    model = small_llama()
    adapter = random_adapter(model)
    one = write(tmp_path / "1.gguf", adapter, model)
    arrays = {name: (a.numpy(), b.numpy()) for name, (a, b) in reversed(adapter.items())}
    two = write(tmp_path / "2.gguf", arrays, model)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"model.embed_tokens.weight": (torch.ones(4, 416), torch.ones(64, 4))}, {}, "embed_tokens"),
        ({"lm_head.weight": (torch.ones(4, 64), torch.ones(416, 4))}, {}, "lm_head"),
        ({"model.layers.0.mlp.up_proj.bias": (torch.ones(4, 64), torch.ones(128, 4))}, {}, "bias"),
        ({"model.layers.0.mlp.up_proj.weight": (torch.ones(4, 64), torch.ones(64, 4))}, {}, r"\(64, 4\)"),
        ({"model.layers.0.mlp.up_proj.weight": (torch.ones(64, 4), torch.ones(4, 128))}, {}, r"\(64, 4\)"),
        ({"model.layers.0.mlp.up_proj.weight": (torch.ones(3, 64), torch.ones(128, 4))}, {}, r"\(3, 64\)"),
        ({"model.layers.0.mlp.up_proj.weight": (torch.ones(4, 64) * 1e5, torch.ones(128, 4))}, {"file_type": "F16"}, "up_proj"),
        ({"model.layers.0.mlp.up_proj.weight": (torch.ones(4, 64) / 0, torch.ones(128, 4))}, {}, "up_proj"),
        ({}, {"alpha": 0.0}, "alpha 0"),
        (None, {}, "0 matrices"),
    ],
)  # fmt: skip
def test_what_can_not_be_served_is_refused_and_the_old_file_stays(
    tmp_path: Path, change: Any, options: dict[str, Any], message: str
) -> None:
    model = small_llama()
    path = write(tmp_path / "adapter.gguf", random_adapter(model), model)
    before = path.read_bytes()
    adapter = {} if change is None else {**random_adapter(model), **change}
    with pytest.raises(ModelError, match=message):
        write(path, adapter, model, **options)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
