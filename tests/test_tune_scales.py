from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import LLAMA3_ROPE, small_llama

from domains.errors import ModelError
from pipeline.gptq import collect_and_round
from pipeline.grids import GridName, decode
from pipeline.next_token_kl import next_token_kl
from pipeline.rotate import fold_norms, random_rotations, rotate
from pipeline.tune_scales import tune_scales


def batches(count: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(2)
    return [torch.randint(0, 416, (2, 48), generator=source) for _ in range(count)]


def distance(reference: Any, network: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        target, hidden = (
            each.model(input_ids=ids, use_cache=False).last_hidden_state for each in (reference, network)
        )
        return float(next_token_kl(reference.lm_head, target, network.lm_head, hidden))


def test_the_divergence_is_that_of_all_logits_at_once() -> None:
    first, second = small_llama(), small_llama(tied=False)
    ids = batches(1)[0]
    with torch.no_grad():
        target, mine = (
            each(input_ids=ids, use_cache=False).logits.log_softmax(-1) for each in (first, second)
        )
    wanted = torch.nn.functional.kl_div(mine, target, log_target=True, reduction="none").sum(-1).mean()
    assert distance(first, second, ids) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("grid", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("rotated", [False, True])
def test_tuned_scales_are_nearer_with_the_same_codes(grid: GridName, rotated: bool) -> None:
    reference = small_llama(rope=LLAMA3_ROPE).eval()
    network = copy.deepcopy(reference)
    if rotated:
        fold_norms(network)
        rotations = random_rotations(network, r1=True, r2=True, seed=0)
        rotate(network, rotations.r1, rotations.r2s)
    ids = batches(32)
    rounded = collect_and_round(network, ids, grid=grid, sweeps=0)
    before, untouched = distance(reference, network, torch.cat(ids)), copy.deepcopy(reference.state_dict())
    losses: list[float] = []
    tuned = tune_scales(
        network,
        reference,
        rounded,
        ids,
        steps=48,
        learning_rate=5e-3,
        on_step=lambda _, value: losses.append(value),
    )
    assert (
        distance(reference, network, torch.cat(ids)) < 0.97 * before
    )  # random networks leave little to tune
    assert len(losses) == 48
    state = network.state_dict()
    assert set(tuned) == set(rounded)
    for name, blocks in tuned.items():
        assert torch.equal(blocks.codes, rounded[name].codes)
        assert torch.equal(decode(blocks), state[name])  # what is served is what was tuned
        assert (blocks.m is None) == (grid == "Q4_0")
    assert any(not torch.equal(blocks.d, rounded[name].d) for name, blocks in tuned.items())
    assert all(torch.equal(value, untouched[name]) for name, value in reference.state_dict().items())
    last = ids[(48 - 1) % 32]  # the last step moves nothing by more than a cosine's tail
    assert distance(reference, network, last) == pytest.approx(losses[-1], rel=0.02)


def test_norms_are_left_alone_on_request_and_the_network_is_usable_after() -> None:
    reference = small_llama().eval()
    network = copy.deepcopy(reference)
    ids = batches(2)
    rounded = collect_and_round(network, ids, grid="Q4_0", sweeps=0)
    tune_scales(network, reference, rounded, ids, steps=2, norms=False)
    for (name, mine), theirs in zip(network.named_parameters(), reference.parameters(), strict=True):
        assert mine.requires_grad
        assert torch.equal(mine, theirs) == (not name.endswith("proj.weight"))
    assert network.model.layers[0].mlp.up_proj.forward.__self__ is network.model.layers[0].mlp.up_proj


def test_no_text_and_divergence_are_named() -> None:
    network = small_llama()
    ids = batches(1)
    rounded = collect_and_round(network, ids, grid="Q4_0", sweeps=0)
    with pytest.raises(ModelError, match="no text"):
        tune_scales(network, network, rounded, [], steps=1)
    reference = copy.deepcopy(network)
    with torch.no_grad():
        reference.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="diverged"):
        tune_scales(network, reference, rounded, ids, steps=1)
