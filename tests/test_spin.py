from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import LLAMA3_ROPE, small_llama

from domains.errors import ModelError
from pipeline import cayley as cayley_module
from pipeline import spin_forward
from pipeline.cayley import CayleyDescent, cayley, orthogonality_error
from pipeline.compensate import curvature, output_error, round_compensated
from pipeline.grids import decode, encode
from pipeline.hadamard import random_orthogonal
from pipeline.rotate import fold_norms, random_rotations, rotate
from pipeline.spin import RotationLoss, learn_rotations
from pipeline.spin_error import collect_moments, conditional_variances, predicted_error
from pipeline.spin_forward import SpunNetwork


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def folded(*, tied: bool = True) -> Any:
    network = small_llama(tied=tied, rope=LLAMA3_ROPE).eval()
    fold_norms(network)
    return network


def batches(network: Any, count: int = 2) -> list[torch.Tensor]:
    source = generator(2)
    return [torch.randint(0, network.config.vocab_size, (2, 48), generator=source) for _ in range(count)]


def skew(order: int) -> torch.Tensor:
    matrix = torch.randn(order, order, generator=generator(1))
    return matrix - matrix.T


def test_descent_finds_the_nearest_rotation_and_stays_orthogonal() -> None:
    wanted = random_orthogonal(24, generator()).float()
    start = wanted @ torch.linalg.matrix_exp(0.05 * skew(24))  # in the same component of the orthogonal group
    moving = start.clone().requires_grad_()
    descent = CayleyDescent([moving])
    for step in range(200):
        (moving - wanted).square().sum().backward()
        descent.step(0.5 * (1 - step / 200))
    assert (start - wanted).norm() > 0.5
    assert (moving - wanted).norm() < 0.02
    assert orthogonality_error(moving.detach()) < 1e-4


def test_heads_move_independently() -> None:
    matrices = torch.stack([random_orthogonal(16, generator(seed)).float() for seed in (1, 2)])
    together, alone = matrices.clone().requires_grad_(), matrices[1].clone().requires_grad_()
    weight = torch.randn(2, 16, 16, generator=generator(3))
    ((together * weight).sum() + (alone * weight[1]).sum()).backward()
    CayleyDescent([together]).step(0.7)
    CayleyDescent([alone]).step(0.7)
    assert torch.allclose(together[1], alone, atol=1e-5)


def test_momentum_goes_on_in_the_old_direction() -> None:
    matrix = torch.eye(8).requires_grad_()
    descent = CayleyDescent([matrix], momentum=0.9)
    (matrix * skew(8)).sum().backward()
    descent.step(0.2)
    before = matrix.detach().clone()
    matrix.grad = torch.zeros_like(matrix)
    descent.step(0.2)
    assert (matrix.detach() - before).abs().max() > 1e-3


def test_iterations_for_large_orders_agree_with_the_exact_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    start = random_orthogonal(96, generator()).float()
    exact = cayley(start, skew(96), 0.5)
    monkeypatch.setattr(cayley_module, "EXACT_UP_TO", 0)
    near = cayley(start, skew(96), 0.5)
    assert orthogonality_error(exact) < 1e-5
    assert (exact - start).abs().max() > 1e-3
    assert (near - exact).abs().max() < 1e-3 * (exact - start).abs().max()


def test_no_gradient_no_move_and_bad_gradients_are_refused() -> None:
    still, bad = torch.eye(8).requires_grad_(), torch.eye(8).requires_grad_()
    descent = CayleyDescent([still, bad])
    bad.grad = torch.full((8, 8), float("nan"))
    with pytest.raises(ModelError, match="learning a rotation failed"):
        descent.step(1.0)
    assert torch.equal(still, torch.eye(8))
    assert torch.equal(bad, torch.eye(8))
    assert torch.allclose(cayley(torch.eye(8), torch.zeros(8, 8), 1.0), torch.eye(8))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("r1", "r2"), [(True, True), (False, True), (True, False)])
def test_the_spun_network_is_the_rotated_and_rounded_one(tied: bool, r1: bool, r2: bool) -> None:
    network = folded(tied=tied)
    ids = batches(network)[0]
    rotations = random_rotations(network, r1=r1, r2=r2, seed=0)
    first = None if rotations.r1 is None else rotations.r1.float()
    seconds = None if rotations.r2s is None else [matrix.float() for matrix in rotations.r2s]
    spun = SpunNetwork(network, "Q4_0", first, seconds)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        kl, entropy = float(spun.kl(ids)), float(spun.cross_entropy(ids))
        target = network(input_ids=ids, use_cache=False).logits
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    rounded = copy.deepcopy(network)
    rotate(rounded, rotations.r1, rotations.r2s)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(decode(encode(parameter, "Q4_0")))
        logits = rounded(input_ids=ids, use_cache=False).logits
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none"
    )
    assert kl == pytest.approx(
        float(divergence.sum(-1).mean()), rel=0.05
    )  # a rare code falls on the other side
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert entropy == pytest.approx(float(wanted), rel=0.02)


@pytest.mark.parametrize("loss", ["kl", "ce", "error"])
def test_learning_lowers_the_loss_and_leaves_the_network_alone(loss: RotationLoss) -> None:
    network = folded()
    ids = batches(network, 1)
    before = copy.deepcopy(network.state_dict())
    losses: list[float] = []
    rotations = learn_rotations(
        network, ids, grid="Q4_0", loss=loss, steps=24, seed=1, on_step=lambda _, value: losses.append(value)
    )
    assert len(losses) == 24
    assert sum(losses[-6:]) < 0.995 * sum(losses[:6])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    logits = network(input_ids=ids[0], use_cache=False).logits
    rotate(network, rotations.r1, rotations.r2s)  # refuses what is not orthogonal
    assert (network(input_ids=ids[0], use_cache=False).logits - logits).abs().max() < 1e-2


def test_same_seed_same_rotations_and_no_steps_are_the_fixed_ones() -> None:
    network = folded()
    ids = batches(network)
    first, again = (
        learn_rotations(network, ids, grid="Q4_0", loss="error", steps=3, seed=4) for _ in range(2)
    )
    assert first.r1 is not None
    assert first.r2s is not None
    assert again.r1 is not None
    assert torch.equal(first.r1, again.r1)
    fixed = random_rotations(network, r1=True, r2=True, seed=4)
    none = learn_rotations(network, ids, grid="Q4_0", loss="kl", steps=0, seed=4)
    assert fixed.r1 is not None
    assert none.r1 is not None
    assert torch.equal(none.r1, fixed.r1)
    assert not torch.allclose(first.r1, fixed.r1, atol=1e-4)


def test_r2_alone_is_learned_on_an_unfolded_network() -> None:
    network = small_llama()
    ids = batches(network)
    rotations = learn_rotations(network, ids, grid="Q4_0", loss="error", steps=2, r1=False)
    assert rotations.r1 is None
    assert rotations.r2s is not None
    assert len(rotations.r2s) == 2
    with pytest.raises(ModelError, match="gains differ"):
        learn_rotations(network, ids, grid="Q4_0", loss="kl", steps=2)
    with pytest.raises(ModelError, match="no text"):
        learn_rotations(network, [], grid="Q4_0", loss="kl", steps=2, r1=False)


def test_conditional_variances_are_what_later_columns_do_not_explain() -> None:
    inputs = torch.randn(4000, 6, generator=generator(), dtype=torch.float64)
    inputs[:, 0] = 2 * inputs[:, 3] + 0.1 * inputs[:, 0]
    moments = inputs.T @ inputs / len(inputs)
    variances = conditional_variances(moments)
    for column in range(5):
        rest = inputs[:, column + 1 :]
        fit = torch.linalg.lstsq(rest, inputs[:, column]).solution
        left = (inputs[:, column] - rest @ fit).square().mean()
        assert float(variances[column]) == pytest.approx(float(left), rel=1e-6)


def test_the_prediction_orders_rotations_as_gptq_does() -> None:
    network = folded()
    with torch.no_grad():  # a few large channels, which a rotation spreads
        network.model.embed_tokens.weight[:, :4] *= 8
        for layer in network.model.layers:
            for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj):
                linear.weight[:, ::16] *= 6
    ids = batches(network, 6)
    moments = collect_moments(network, ids, damp=0.01, mlp_damp=0.1)
    wanted, found = [], []
    r1s = [torch.eye(64), random_orthogonal(64, generator(3)).float(), network_hadamard(network)]
    for r1 in r1s:
        found.append(float(predicted_error(network, moments, [0], r1, None).detach()))
        wanted.append(gptq_error(network, moments[0].mlp, r1))
    assert found[0] > 1.2 * max(found[1:])
    assert wanted[0] > 1.2 * max(wanted[1:])


def network_hadamard(network: Any) -> torch.Tensor:
    r1 = random_rotations(network, r1=True, r2=False, seed=5).r1
    assert r1 is not None
    return r1.float()


def gptq_error(network: Any, moments: torch.Tensor, r1: torch.Tensor) -> float:
    """What GPTQ leaves of the first layer's gate."""
    weight = network.model.layers[0].mlp.gate_proj.weight.detach() @ r1
    turned = r1.T @ moments @ r1
    rounded = decode(round_compensated(weight, curvature(turned, damp=1e-6), "Q4_0"))
    return output_error(weight, rounded, turned)


def test_weights_are_rotated_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to bfloat16 first, another network would be put onto the grid than the one that is exported."""
    network, seen = folded(), []
    rotations = random_rotations(network, r1=True, r2=True, seed=0)
    assert rotations.r1 is not None
    assert rotations.r2s is not None
    r1, r2s = rotations.r1.float(), [r2.float() for r2 in rotations.r2s]

    def noting(weight: torch.Tensor, _grid: str) -> torch.Tensor:
        seen.append(weight.detach())
        return weight

    monkeypatch.setattr(spin_forward, "fake_quantize", noting)
    (ids,) = batches(network, 1)
    with torch.no_grad():
        SpunNetwork(network, "Q4_0", r1, r2s).kl(ids)
        exact, seen = seen, []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            SpunNetwork(network, "Q4_0", r1, r2s).kl(ids)
    assert {weight.dtype for weight in seen} == {torch.float32}
    assert len(seen) == len(exact) == 7 * network.config.num_hidden_layers
    for one, other in zip(seen, exact, strict=True):
        assert torch.equal(one, other)


def test_biases_are_refused_where_they_would_be_left_out() -> None:
    network = folded()
    down = network.model.layers[0].mlp.down_proj
    down.bias = torch.nn.Parameter(torch.ones(down.weight.shape[0]))
    for loss in ("kl", "ce"):
        with pytest.raises(ModelError, match="biases"):
            learn_rotations(
                network, batches(network), grid="Q4_0", loss=loss, steps=1, seed=0, r1=True, r2=True
            )
    learn_rotations(network, batches(network), grid="Q4_0", loss="error", steps=1, seed=0, r1=True, r2=True)
