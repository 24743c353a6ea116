from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import LLAMA3_ROPE, small_llama
from tiny_llama import make_tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from domains.errors import ModelError
from pipeline.hadamard import random_orthogonal
from pipeline.rotate import Rotations, fold_norms, is_tied, random_rotations, rotate, untie


class ExactNorm(torch.nn.Module):
    """RMSNorm in the type of its input; transformers' own computes in float32, whatever the network's type."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon)


def exact(network: Any) -> Any:
    """The network in float64 throughout."""
    network = network.double().eval()
    for path, module in list(network.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, ExactNorm(module))
    return network


def biased_llama(*, tied: bool = False) -> Any:
    """Biases everywhere, and a head size that is not width / heads."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied,
        initializer_range=0.15, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def tiny(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_tiny_llama(tmp_path / "tiny"), dtype=torch.float64)


def logits(network: Any) -> torch.Tensor:
    ids = torch.randint(0, network.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return network(input_ids=ids, use_cache=False).logits


NETWORKS = {
    "tied": lambda _: small_llama(tied=True, rope=LLAMA3_ROPE),
    "untied": lambda _: small_llama(tied=False, rope=LLAMA3_ROPE),
    "llama 3.2's features": tiny,
    "biased": lambda _: biased_llama(),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("per_head", [False, True])
def test_a_rotated_network_equals_the_original_in_float64(name: str, per_head: bool, tmp_path: Path) -> None:
    network = exact(NETWORKS[name](tmp_path))
    before = logits(network)
    vocabulary = network.model.embed_tokens.weight.numel()
    was_tied = is_tied(network)
    assert fold_norms(network) == (vocabulary if was_tied else 0)
    assert not is_tied(network)
    assert network.config.tie_word_embeddings is False
    rotations = random_rotations(network, r1=True, r2=True, seed=0)
    assert rotations.r2s is not None
    r2s = list(rotations.r2s)
    if per_head:
        generator = torch.Generator().manual_seed(9)
        width = r2s[0].shape[-1]
        r2s = [torch.stack([random_orthogonal(width, generator) for _ in range(2)]) for _ in r2s]
    weights = copy.deepcopy(network.state_dict())
    rotate(network, rotations.r1, r2s)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, weights[key])}
    assert all("norm" not in key for key in changed)
    assert {key for key in weights if key.endswith("proj.weight")} <= changed
    assert (logits(network) - before).abs().max() < 1e-9


@pytest.mark.parametrize("tied", [True, False])
def test_folding_without_the_final_norm_keeps_a_tied_network_tied(tied: bool) -> None:
    network = exact(small_llama(tied=tied))
    before, final = logits(network), network.model.norm.weight.clone()
    assert fold_norms(network, final=False) == 0
    assert is_tied(network) == tied
    assert torch.equal(network.model.norm.weight, final)
    assert (logits(network) - before).abs().max() < 1e-9


def test_a_folded_norm_keeps_the_root_mean_square_of_its_gains() -> None:
    network = exact(small_llama())
    gains = network.model.layers[0].input_layernorm.weight.clone()
    scale = network.model.layers[0].self_attn.q_proj.weight.square().mean()
    fold_norms(network)
    folded = network.model.layers[0].input_layernorm.weight
    assert torch.allclose(folded, gains.square().mean().sqrt().expand(folded.shape))
    assert 0.7 < network.model.layers[0].self_attn.q_proj.weight.square().mean() / scale < 1.4


def test_r2_alone_needs_no_folding_and_no_untying() -> None:
    network = exact(small_llama(tied=True))
    before = logits(network)
    rotations = random_rotations(network, r1=False, r2=True, seed=3)
    rotate(network, rotations.r1, rotations.r2s)
    assert is_tied(network)
    assert (logits(network) - before).abs().max() < 1e-9


def test_a_tied_network_whose_final_gains_are_equal_stays_tied_under_r1() -> None:
    network = exact(small_llama(tied=True))
    with torch.no_grad():
        network.model.norm.weight.fill_(1.3)
    before = logits(network)
    assert fold_norms(network) == 0
    rotate(network, random_rotations(network, r1=True, r2=False, seed=0).r1, None)
    assert is_tied(network)
    assert (logits(network) - before).abs().max() < 1e-9


def test_float32_weights_stay_float32_and_near() -> None:
    network = small_llama(tied=True)
    before = logits(network)
    fold_norms(network)
    rotations = random_rotations(network, r1=True, r2=True, seed=0)
    rotate(network, rotations.r1, rotations.r2s)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert (logits(network) - before).abs().max() < 1e-3


def test_same_seed_same_rotations() -> None:
    network = small_llama()
    first, again, other = (random_rotations(network, r1=True, r2=True, seed=seed) for seed in (1, 1, 2))
    assert first.r1 is not None
    assert first.r2s is not None
    assert torch.equal(first.r1, again.r1)
    assert torch.equal(first.r2s[1], again.r2s[1])
    assert not torch.equal(first.r1, other.r1)
    assert not torch.equal(first.r2s[0], first.r2s[1])


def test_mistakes_are_named() -> None:
    network = small_llama()
    rotations: Rotations = random_rotations(network, r1=True, r2=True, seed=0)
    assert rotations.r1 is not None
    assert rotations.r2s is not None
    with pytest.raises(ModelError, match="gains differ"):
        rotate(network, rotations.r1, None)
    fold_norms(network)
    before = logits(network)
    with pytest.raises(ModelError, match="not orthogonal"):
        rotate(network, 1.01 * rotations.r1, None)
    with pytest.raises(ModelError, match="not orthogonal"):
        rotate(network, rotations.r1 * float("nan"), None)
    with pytest.raises(ModelError, match="R2 of layer 1 has shape"):
        rotate(network, None, [rotations.r2s[0], rotations.r1])
    with pytest.raises(ModelError, match="1 matrices R2 for 2 layers"):
        rotate(network, None, rotations.r2s[:1])
    assert torch.equal(logits(network), before)  # nothing was half done


def test_untying_twice_adds_nothing() -> None:
    network = small_llama(tied=True)
    assert untie(network) == network.lm_head.weight.numel()
    assert untie(network) == 0
