from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from domains.errors import ModelError
from pipeline.merge import merge_adapter
from pipeline.qlora import attach_lora, quantize_nf4
from pipeline.student import load_base
from tests.tiny_llama import make_tiny_llama

TOKENS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def trained(tiny: Path, *, keep_quantized: bool) -> Any:
    model = load_base(str(tiny), dtype=torch.float32).model
    quantize_nf4(model, keep_quantized=keep_quantized)
    adapted = attach_lora(model, rank=4, alpha=8.0, dropout=0.0, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return adapted.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("keep_quantized", [True, False])
def test_merged_is_base_plus_adapter(tiny: Path, keep_quantized: bool) -> None:
    adapted = trained(tiny, keep_quantized=keep_quantized)
    with adapted.disable_adapter():
        base = logits(adapted)
    expected = logits(adapted)
    merged = merge_adapter(adapted)
    assert (expected - base).abs().max() > 0.5  # the adapter does something
    assert (logits(merged) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_merged_network_is_an_ordinary_one(tiny: Path) -> None:
    plain = load_base(str(tiny), dtype=torch.float32).model
    merged = merge_adapter(trained(tiny, keep_quantized=True))
    assert type(merged) is type(plain)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert all(value.dtype == torch.float32 for value in merged.state_dict().values())
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.model.norm.weight, plain.model.norm.weight)


def test_not_into_the_unrounded_base(tiny: Path) -> None:
    """Merging into the full-precision weights would give another network."""
    adapted = trained(tiny, keep_quantized=False)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = merge_adapter(adapted).model.layers[0].mlp.up_proj.weight
    rounded = merged - delta
    original = load_base(str(tiny), dtype=torch.float32).model.model.layers[0].mlp.up_proj.weight
    error = (rounded - original).square().mean() / original.square().mean()
    assert 1e-4 < error < 0.05


def test_no_adapter_is_an_error(tiny: Path) -> None:
    with pytest.raises(ModelError, match="no adapter"):
        merge_adapter(load_base(str(tiny), dtype=torch.float32).model)


def test_a_network_with_biases_is_refused_before_they_are_lost(tmp_path: Path) -> None:
    adapted = trained(make_tiny_llama(tmp_path / "biased", biases=True), keep_quantized=False)
    with pytest.raises(ModelError, match="biases"):
        merge_adapter(adapted)


def test_numbers_that_are_not_finite_are_named(tiny: Path) -> None:
    adapted = trained(tiny, keep_quantized=False)
    with torch.no_grad():
        adapted.get_base_model().model.layers[1].self_attn.q_proj.lora_A["default"].weight[0, 0] = float(
            "inf"
        )
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj"):
        merge_adapter(adapted)
