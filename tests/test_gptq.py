from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from small_models import LLAMA3_ROPE, small_llama

from domains.errors import ModelError
from pipeline.aim import aim, choose_share, measure_inputs, step
from pipeline.compensate import curvature, output_error, round_compensated
from pipeline.gptq import collect_and_round
from pipeline.grids import GridName, decode, encode, fit
from pipeline.layer_inputs import second_moments
from pipeline.rotate import fold_norms, random_rotations, rotate

GRIDS: list[GridName] = ["Q4_0", "Q4_1", "Q8_0"]


def correlated(width: int = 128, tokens: int = 4096) -> torch.Tensor:
    """Inputs [tokens, width] whose channels differ in strength and depend on each other."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) * torch.randn(width, generator=generator).exp()
    return torch.randn(tokens, width, generator=generator) @ mix


def weight(rows: int = 96, width: int = 128) -> torch.Tensor:
    return 0.05 * torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def batches(network: Any, count: int = 4, rows: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(0, network.config.vocab_size, (rows, 64), generator=generator) for _ in range(count)
    ]


def logits(network: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("grid", GRIDS)
def test_compensation_beats_weighted_search_which_beats_plain_rounding(grid: GridName) -> None:
    inputs, target = correlated(), weight()
    moments = inputs.T @ inputs / len(inputs)
    curved = curvature(moments, damp=0.01)

    def error(rounded: torch.Tensor) -> float:
        return float(((target - rounded) @ inputs.T).square().sum(0).mean())

    plain = error(decode(encode(target, grid)))
    searched = error(decode(fit(target, grid, importance=moments.diagonal())))
    gptq = error(decode(round_compensated(target, curved, grid)))
    swept = error(decode(round_compensated(target, curved, grid, sweeps=4)))
    assert gptq < 0.8 * searched < 0.8 * plain
    assert swept < 0.9 * gptq
    rounded = decode(round_compensated(target, curved, grid))
    assert output_error(target, rounded, moments) == pytest.approx(gptq, rel=1e-3)


def test_the_codes_are_those_of_the_published_algorithm_on_the_same_scales() -> None:
    inputs, target = correlated(), weight()
    curved = curvature(inputs.T @ inputs / len(inputs), damp=0.01)
    blocks = round_compensated(target, curved, "Q4_0")
    factor = torch.linalg.cholesky(torch.linalg.inv(curved.hessian.double())).T  # H⁻¹ = UᵀU
    work = target.double().clone()
    codes = torch.zeros_like(blocks.codes)
    for column in range(work.shape[1]):
        scale = blocks.d[:, column // 32].double()
        code = (work[:, column] / scale).round().clamp(-8, 7)
        codes[:, column] = (code + 8).to(torch.uint8)
        error = (work[:, column] - code * scale) / factor[column, column]
        work[:, column:] -= error[:, None] * factor[column, column:]
    assert (codes != blocks.codes).float().mean() < 1e-3  # a tie may fall either way in float32


@pytest.mark.parametrize("grid", GRIDS)
def test_no_sweep_raises_the_error_it_minimizes(grid: GridName) -> None:
    inputs, target = correlated(64, 512), weight(32, 64)
    curved = curvature(inputs.T @ inputs / len(inputs), damp=0.01)
    errors = [
        output_error(target, decode(round_compensated(target, curved, grid, sweeps=sweeps)), curved.hessian)
        for sweeps in range(6)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("grid", GRIDS)
def test_uncorrelated_inputs_give_nearest_codes(grid: GridName) -> None:
    target = weight()
    blocks = round_compensated(target, curvature(torch.eye(128), damp=0.01), grid)
    scale = blocks.d.float().abs().repeat_interleave(32, 1)
    inside = (decode(blocks) - target).abs() <= 0.5 * scale * 1.001
    assert inside.float().mean() > 0.9  # what is outside was clipped on purpose, by the scale search
    searched = fit(target, grid)
    assert (decode(blocks) - target).square().sum() <= 1.02 * (decode(searched) - target).square().sum()


def test_weights_already_on_the_grid_are_kept() -> None:
    target = decode(encode(weight(), "Q4_0"))
    inputs = correlated()
    curved = curvature(inputs.T @ inputs / len(inputs), damp=0.01)
    for sweeps in (0, 3):
        assert torch.equal(decode(round_compensated(target, curved, "Q4_0", sweeps=sweeps)), target)


def test_dead_columns_and_few_tokens_are_no_obstacle() -> None:
    inputs = correlated(64, tokens=8)  # rank 8 of 64
    inputs[:, 5] = 0
    moments = inputs.T @ inputs / len(inputs)
    target = weight(16, 64)
    rounded = decode(round_compensated(target, curvature(moments, damp=0.01), "Q4_0", sweeps=2))
    assert rounded.isfinite().all()
    assert output_error(target, rounded, moments) < output_error(
        target, decode(encode(target, "Q4_0")), moments
    )


def test_damping_is_raised_until_the_factor_exists() -> None:
    moments = torch.diag(torch.cat([torch.ones(32), torch.full((32,), 1e-3)])).double()
    moments[0, 1] = moments[1, 0] = 1.02  # an eigenvalue of -0.02
    curved = curvature(moments, damp=0.01)
    ridge = float(curved.hessian[0, 0] - 1)
    assert ridge == pytest.approx(0.1 * float(moments.diagonal().mean()), rel=1e-3)
    product = curved.feedback * curved.variances @ curved.feedback.T
    assert torch.allclose(product, curved.hessian, atol=1e-5)
    assert torch.equal(curved.feedback, curved.feedback.triu())
    assert torch.equal(curved.feedback.diagonal(), torch.ones(64))


def test_infinite_moments_are_refused() -> None:
    with pytest.raises(ModelError, match="second moments"):
        curvature(torch.full((32, 32), float("nan")), damp=0.01)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_network_is_left_with_exactly_the_returned_weights(grid: GridName, tied: bool) -> None:
    network = small_llama(tied=tied, rope=LLAMA3_ROPE)
    untouched = {
        key: value.clone() for key, value in network.state_dict().items() if not key.endswith("proj.weight")
    }
    seen: list[tuple[int, int]] = []
    rounded = collect_and_round(
        network,
        batches(network, 2),
        grid=grid,
        sweeps=1,
        on_layer=lambda done, total: seen.append((done, total)),
    )
    state = network.state_dict()
    assert set(rounded) == {key for key in state if key.endswith("proj.weight")}
    assert all(torch.equal(decode(blocks), state[name]) for name, blocks in rounded.items())
    assert all(torch.equal(value, state[key]) for key, value in untouched.items())
    assert seen == [(1, 2), (2, 2)]


def test_same_input_same_codes_and_gptq_is_nearer_than_rounding() -> None:
    network = small_llama()
    ids, fresh = batches(network, 8), batches(network, 12)[-1]
    target = logits(network, fresh)

    def distance(other: Any) -> float:
        kl = torch.nn.functional.kl_div(
            logits(other, fresh).log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none"
        )
        return float(kl.sum(-1).mean())

    first, again, nearest = (copy.deepcopy(network) for _ in range(3))
    codes = collect_and_round(first, ids, grid="Q4_0")
    repeated = collect_and_round(again, ids, grid="Q4_0")
    assert all(torch.equal(codes[name].codes, repeated[name].codes) for name in codes)
    with torch.no_grad():
        for name, parameter in nearest.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(decode(encode(parameter, "Q4_0")))
    assert distance(first) < 0.75 * distance(nearest)


def test_sorting_the_intermediate_channels_keeps_the_function() -> None:
    network = small_llama()
    ids = batches(network, 2)
    before = logits(network, ids[0])
    gate = network.model.layers[0].mlp.gate_proj.weight.detach().clone()
    plain = copy.deepcopy(network)
    collect_and_round(network, ids, grid="Q8_0")
    collect_and_round(plain, ids, grid="Q8_0", permute_intermediate=False)
    moved = (network.model.layers[0].mlp.gate_proj.weight - gate).abs().max()
    assert moved > 20 * (plain.model.layers[0].mlp.gate_proj.weight - gate).abs().max()
    for network_ in (network, plain):
        assert (logits(network_, ids[0]) - before).abs().mean() < 0.03 * before.abs().mean()


def test_rotated_networks_can_be_rounded() -> None:
    network = small_llama(rope=LLAMA3_ROPE)
    ids = batches(network)
    before = logits(network, ids[0])
    fold_norms(network)
    rotations = random_rotations(network, r1=True, r2=True, seed=0)
    rotate(network, rotations.r1, rotations.r2s)
    collect_and_round(network, ids, grid="Q8_0", sweeps=1)
    assert (logits(network, ids[0]) - before).abs().mean() < 0.03 * before.abs().mean()


def test_what_can_not_be_calibrated_is_named() -> None:
    network = small_llama()
    with pytest.raises(ModelError, match="no calibration text"):
        collect_and_round(network, [], grid="Q4_0")
    with pytest.raises(ModelError, match="float64"):
        collect_and_round(network.double(), batches(network), grid="Q4_0")


def test_the_step_is_the_least_squares_answer_to_the_unrounded_inputs() -> None:
    inputs, target = correlated(), weight()
    wanted = inputs + 0.1 * correlated().roll(1, 0) + 0.05 * inputs.flip(1)
    measured = measure_inputs(list(inputs.split(512)), list(wanted.split(512)))
    curved = curvature(measured.all_moments(), damp=1e-7)
    assert torch.allclose(measured.all_moments(), second_moments([inputs]), rtol=1e-4, atol=1e-3)

    def error(moved: torch.Tensor) -> float:
        return float(
            (wanted.double() @ target.double().T - inputs.double() @ moved.double().T).square().mean()
        )

    best = torch.linalg.lstsq(inputs.double(), wanted.double() @ target.double().T).solution.T
    full = target + step(target, measured.all_drifts(), curved)
    assert error(best) < 0.9 * error(target)
    assert error(full) == pytest.approx(error(best), rel=1e-3)
    assert error(aim(target, measured, curved, damp=1e-7)) == pytest.approx(error(best), rel=0.02)
    order = torch.arange(127, -1, -1)
    turned = measured.reordered(order)
    assert torch.equal(turned.all_drifts(), measured.all_drifts()[order][:, order])


def test_the_share_of_the_step_is_what_other_text_bears_out() -> None:
    inputs, target = correlated(), weight()
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(5))

    def share(wanted: torch.Tensor, tokens: int, parts: int) -> float:
        measured = measure_inputs(
            list(inputs[:tokens].split(tokens // parts)), list(wanted[:tokens].split(tokens // parts))
        )
        return choose_share(target, measured, damp=0.01)

    assert share(inputs, 4096, 8) == 0  # nothing drifts
    assert share(inputs + 0.1 * inputs.flip(1), 4096, 8) > 0.9  # lawful
    assert share(inputs + noise, 512, 8) < 0.2  # by chance
    assert share(inputs + 0.1 * inputs.flip(1), 4096, 1) == 0  # nothing to judge by


@pytest.mark.parametrize("grid", ["Q4_0", "Q4_1"])
def test_aiming_at_the_unrounded_network_brings_the_output_nearer(
    grid: GridName, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small_llama()
    many, fresh = batches(network, 32), batches(network, 40)[-8:]
    few = [each[:1, :16] for each in many[:8]]

    def distance(ids: list[torch.Tensor]) -> float:
        other = copy.deepcopy(network)
        collect_and_round(other, ids, grid=grid)
        return sum(float((logits(other, each) - logits(network, each)).square().mean()) for each in fresh)

    aimed, aimed_by_few = distance(many), distance(few)
    monkeypatch.setattr("pipeline.gptq.aim", lambda weight, _inputs, _curved, damp: weight)
    assert aimed < 0.9 * distance(many)
    assert aimed_by_few < 1.03 * distance(few)  # one or two tokens per channel: no harm


def test_biases_move_with_their_channels() -> None:
    network = small_llama()
    for layer in network.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.o_proj):
            linear.bias = torch.nn.Parameter(0.3 * torch.randn(linear.weight.shape[0]))
    ids = batches(network, 4)
    before = logits(network, ids[0])
    collect_and_round(network, ids, grid="Q8_0")
    assert (logits(network, ids[0]) - before).abs().mean() < 0.03 * before.abs().mean()


def test_unused_weights_become_zero_and_leave_their_neighbours_alone() -> None:
    inputs, target = 0.03 * correlated(64, 2048), weight(32, 64)
    dead = torch.tensor([3, 17, 40])
    inputs[:, dead] = 0
    target[:, dead] *= 8  # would widen their blocks' scales
    moments = second_moments([inputs])
    curved = curvature(moments, damp=0.01)
    live = moments.diagonal()[moments.diagonal() > 0].mean()
    assert float(curved.hessian[3, 3]) == pytest.approx(0.01 * float(live), rel=1e-5)
    rounded = decode(round_compensated(target, curved, "Q4_0", sweeps=2))
    alone = target.clone()
    alone[:, dead] = 0
    assert torch.equal(rounded, decode(round_compensated(alone, curved, "Q4_0", sweeps=2)))
    assert (rounded[:, dead] == 0).all()
