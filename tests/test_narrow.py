"""Narrowing cuts only what is weakest: a network that does not use the rest computes the same afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from domains.errors import ModelError
from pipeline.narrow import narrow
from tests.small_models import small_llama

TOKENS = torch.randint(0, 400, (3, 40), generator=torch.Generator().manual_seed(1))


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(input_ids=TOKENS, use_cache=False).logits
    return found


def wide_network() -> Any:
    """320 wide with 5 heads of 64, of which one per layer and 64 directions of the stream do nothing."""
    from transformers import LlamaForCausalLM

    config = small_llama(width=256).config
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim = (
        320,
        5,
        5,
        64,
    )
    torch.manual_seed(0)
    network = LlamaForCausalLM(config).eval()
    used, _ = torch.linalg.qr(torch.randn(320, 256))
    with torch.no_grad():
        onto = used @ used.T
        network.model.embed_tokens.weight.copy_(network.model.embed_tokens.weight @ onto)
        for index, layer in enumerate(network.model.layers):
            output = layer.self_attn.o_proj.weight
            output[:, 64 * index : 64 * (index + 1)] = 0
            output.copy_(onto @ output)
            layer.mlp.down_proj.weight.copy_(onto @ layer.mlp.down_proj.weight)
    return network


def test_what_does_nothing_is_cut_and_nothing_else() -> None:
    network = wide_network()
    before = logits(network)
    narrowed = narrow(network, [TOKENS])
    assert (narrowed.config.hidden_size, narrowed.config.num_attention_heads) == (256, 4)
    assert narrowed.model.layers[0].self_attn.o_proj.weight.shape == (256, 256)
    # The norm's epsilon is the same, its mean is over fewer numbers: equal up to that.
    assert (logits(narrowed) - before).abs().max() < 2e-3 * before.abs().max()
    assert torch.equal(logits(network), before)


def test_grouped_heads_are_written_out() -> None:
    network = small_llama(width=256)
    narrowed = narrow(network, [TOKENS])
    assert narrowed.config.num_key_value_heads == 4
    assert (logits(narrowed) - logits(network)).abs().max() < 1e-3


def test_cutting_what_is_used_changes_the_answers() -> None:
    network = wide_network()
    with torch.no_grad():
        network.model.embed_tokens.weight.add_(torch.randn_like(network.model.embed_tokens.weight))
    before = logits(network)
    assert (logits(narrow(network, [TOKENS])) - before).abs().max() > 0.05 * before.abs().max()


def test_too_narrow_a_network_is_refused() -> None:
    with pytest.raises(ModelError, match="64 wide"):
        narrow(small_llama(), [TOKENS])
