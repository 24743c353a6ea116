"""Grids against ggml itself: the C library and gguf-py are the judges of every rounded bit."""

from __future__ import annotations

import platform
from typing import Any, get_args

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from domains.errors import ModelError
from pipeline.grids import (
    Blocks,
    GridName,
    decode,
    decode_values,
    encode,
    fake_quantize,
    fit,
    fit_scales,
    ggml_decode,
    ggml_encode,
    ggml_needs_importance,
    pack,
    round_scales,
    round_to,
    round_values,
    unpack,
)

GRIDS: tuple[GridName, ...] = get_args(GridName)
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
# Elsewhere a compiler may fuse ggml's products and sums, which moves near-ties.
ALLOWED_SHARE = 0.0 if platform.machine() in {"x86_64", "AMD64"} else 1e-4


def random(rows: int, width: int, *, scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def relative_error(got: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor | float = 1.0) -> float:
    return float((((got - weight) ** 2 * importance).sum() / (weight**2 * importance).sum()).sqrt())


def assert_same_as_ggml(weight: torch.Tensor, grid: GridName) -> None:
    ours, size = pack(encode(weight, grid)), BYTES[grid]
    theirs = ggml_encode(weight, grid)
    assert ours.shape == theirs.shape
    assert (ours.reshape(-1, size) != theirs.reshape(-1, size)).any(axis=1).mean() <= ALLOWED_SHARE
    # Below 1e-36 gguf-py's 1 / d is infinite and its casts undefined; a block of -0 gets another sign of zero.
    usual = weight.abs().amax(1).numpy() > 1e-36
    assert np.array_equal(ours[usual], quants.quantize(weight.numpy()[usual], GGMLQuantizationType[grid]))
    assert np.array_equal(decode(unpack(ours, grid)).numpy(), ggml_decode(ours, grid, weight.shape[1]))


@pytest.mark.parametrize("scale", [3e-9, 1e-6, 1e-4, 0.02, 1.0, 2000.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_million_random_blocks_are_rounded_as_ggml_rounds_them(grid: GridName, scale: float) -> None:
    """56 thousand of them each; at 3e-9 and 1e-6 the scales are float16's zeros and subnormals."""
    assert_same_as_ggml(random(890, 2016, scale=scale, seed=int(1e9 * scale)), grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_special_blocks_are_rounded_as_ggml_rounds_them(grid: GridName) -> None:
    ramp = torch.linspace(-1, 1, 32)
    ties = torch.tensor([0.5, -0.5, 0.25, -0.25] * 8)
    rows = [
        torch.zeros(32), -torch.zeros(32), ramp, -ramp, ties, -ties, torch.full((32,), 0.3),
        torch.full((32,), -0.3), torch.eye(32)[5] * 0.7, torch.eye(32)[31] * -0.7, ramp.abs(), ramp.clamp(max=0),
        # Halves between codes: w / d = k + 1/2 without any rounding.
        torch.cat([torch.tensor([-8.0]), torch.arange(-7.5, 8, 0.5)])[:32],
        torch.cat([torch.tensor([127.0, -127.0]), torch.arange(-7.5, 7.5, 0.5)]),
        torch.cat([torch.tensor([0.0, 15.0]), torch.arange(0, 15, 0.5)]),
        # From ordinary numbers down through float16's and float32's subnormals.
        *(ramp * 10.0**-power for power in range(1, 46)),
    ]  # fmt: skip
    assert_same_as_ggml(torch.stack(rows), grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_again_changes_nothing(grid: GridName) -> None:
    weight = decode(encode(random(64, 576), grid))
    assert torch.equal(decode(encode(weight, grid)), weight) or grid == "Q4_1"
    # Q4_1's range is cut to float16 twice; what stays is the error of one rounding.
    assert relative_error(decode(encode(weight, grid)), weight) < 2e-3


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(grid: GridName, bad: float) -> None:
    weight = random(2, 64)
    weight[1, 40] = bad
    for way in (encode, fit, fit_scales, fake_quantize):
        with pytest.raises(ModelError, match="not finite"):
            way(weight, grid)
    with pytest.raises(ModelError, match="not finite"):
        ggml_encode(weight, grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_scale_beyond_half_precision_is_refused(grid: GridName) -> None:
    weight = random(2, 64)
    weight[0, 3], weight[0, 4] = 1e7, -1e7
    for way in (encode, fit):
        with pytest.raises(ModelError, match="65504"):
            way(weight, grid)


@pytest.mark.parametrize("shape", [(4, 33), (32,), (0, 32), (2, 2, 32)])
def test_shapes_without_whole_blocks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="can't be cut into blocks"):
        encode(torch.zeros(shape), "Q4_0")


@pytest.mark.parametrize("grid", GRIDS)
def test_any_codes_and_scales_survive_packing_and_ggml_reads_them_alike(grid: GridName) -> None:
    """Codes that no rounding gave, scales of either sign."""
    rng = np.random.default_rng(0)
    low, high = (-128, 127) if grid == "Q8_0" else (0, 15)
    codes = torch.from_numpy(rng.integers(low, high + 1, (40, 96)))
    blocks = Blocks(
        grid,
        codes.to(torch.int8 if grid == "Q8_0" else torch.uint8),
        random(40, 3, scale=1.0).half(),
        random(40, 3, scale=1.0, seed=1).half() if grid == "Q4_1" else None,
    )
    rows = pack(blocks)
    again = unpack(rows, grid)
    assert torch.equal(again.codes, blocks.codes)
    assert torch.equal(again.d, blocks.d)
    assert (again.m is None and blocks.m is None) or torch.equal(again.m, blocks.m)  # type: ignore[arg-type]
    assert np.array_equal(pack(again), rows)
    assert np.array_equal(decode(blocks).numpy(), ggml_decode(rows, grid, 96))
    assert np.array_equal(decode(blocks).numpy(), quants.dequantize(rows, GGMLQuantizationType[grid]))


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="Q4_0 blocks"):
        unpack(np.zeros((2, 20), np.uint8), "Q4_0")


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_on_given_scales_are_the_nearest(grid: GridName) -> None:
    weight = random(24, 64)
    d, m = fit_scales(weight, grid)
    codes = round_to(weight, d, m, grid)
    low, high = (-128, 127) if grid == "Q8_0" else (0, 15)
    every = torch.arange(low, high + 1)[:, None, None]
    wide_m = None if m is None else m.repeat_interleave(32, 1)
    grids = decode_values(every, d.repeat_interleave(32, 1), wide_m, grid)
    best = (grids - weight).abs().amin(0)
    got = (decode(Blocks(grid, codes, d, m)) - weight).abs()
    assert torch.all(got <= best + 1e-8)
    assert best.mean() > 1e-5  # there was something to round


@pytest.mark.parametrize("grid", GRIDS)
def test_a_column_at_a_time_gives_the_codes_of_the_matrix(grid: GridName) -> None:
    weight = random(24, 64)
    d, m = fit_scales(weight, grid)
    codes = round_to(weight, d, m, grid)
    full = decode(Blocks(grid, codes, d, m))
    for column in (0, 31, 32, 63):
        scales = d[:, column // 32], None if m is None else m[:, column // 32]
        assert torch.equal(round_values(weight[:, column], *scales, grid), codes[:, column])
        assert torch.equal(decode_values(codes[:, column], *scales, grid), full[:, column])


def test_a_zero_scale_gives_zeros() -> None:
    for grid in GRIDS:
        m = torch.zeros(2, 1).half() if grid == "Q4_1" else None
        d = torch.zeros(2, 1).half()
        codes = round_to(random(2, 32), d, m, grid)
        assert torch.equal(decode(Blocks(grid, codes, d, m)), torch.zeros(2, 32))


def test_scales_of_another_matrix_are_refused() -> None:
    weight = random(4, 64)
    d, m = fit_scales(weight, "Q4_1")
    for scales in ((d[:2], m), (d, None)):
        with pytest.raises(ModelError, match="scales of shape"):
            round_to(weight, *scales, "Q4_1")
    with pytest.raises(ModelError, match="scales of shape"):
        round_to(weight, d, m, "Q4_0")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["none", "columns", "weights"])
def test_a_searched_block_is_never_worse_than_the_reference(grid: GridName, kind: str) -> None:
    weight = torch.cat([random(64, 192), random(16, 192, scale=3e-6), random(16, 192).pow(3) * 1e3])
    generator = torch.Generator().manual_seed(5)
    importance = {
        "none": None,
        "columns": torch.rand(192, generator=generator) ** 4,
        "weights": torch.rand(96, 192, generator=generator) ** 4,
    }[kind]
    counts = torch.ones(()) if importance is None else importance
    blocks = fit(weight, grid, importance)
    reference = decode(encode(weight, grid))

    def error(values: torch.Tensor) -> torch.Tensor:
        return (((values - weight).double() ** 2) * counts).reshape(96, -1, 32).sum(-1)

    ours, theirs = error(decode(blocks)), error(reference)
    assert torch.all(ours <= theirs * (1 + 1e-5) + 1e-24)
    assert ours[:64].sum() < {"Q4_0": 0.9, "Q4_1": 0.85, "Q8_0": 0.96}[grid] * theirs[:64].sum()
    assert np.array_equal(decode(blocks).numpy(), ggml_decode(pack(blocks), grid, 192))


@pytest.mark.parametrize("grid", ["Q4_0", "Q4_1"])
def test_the_search_beats_ggmls_own(grid: GridName) -> None:
    """Of ggml's weighted search (imatrix), at the same bytes per weight."""
    weight = random(256, 576)
    importance = torch.rand(576, generator=torch.Generator().manual_seed(5)) ** 4 + 1e-3
    ours = decode(fit(weight, grid, importance))
    theirs = torch.from_numpy(ggml_decode(ggml_encode(weight, grid, importance.numpy()), grid, 576))
    assert relative_error(ours, weight, importance) < 0.97 * relative_error(theirs, weight, importance)


@pytest.mark.parametrize("grid", GRIDS)
def test_columns_that_were_never_used_keep_their_weights(grid: GridName) -> None:
    """A block without importance counts as unknown, not as worthless."""
    weight, importance = random(8, 128), torch.ones(128)
    importance[32:64] = 0
    for values in (
        decode(fit(weight, grid, importance)),
        torch.from_numpy(ggml_decode(ggml_encode(weight, grid, importance.numpy()), grid, 128)),
        decode(fit(weight, grid, torch.zeros(128))),
    ):
        assert relative_error(values, weight) < 0.1


def test_importance_of_another_matrix_is_refused() -> None:
    weight = random(4, 64)
    for importance in (torch.ones(32), torch.ones(3, 64), -torch.ones(64), torch.full((64,), float("nan"))):
        with pytest.raises(ModelError, match="does not fit"):
            fit(weight, "Q4_0", importance)
        with pytest.raises(ModelError, match="does not fit"):
            ggml_encode(weight, "Q4_0", importance.numpy())


@pytest.mark.parametrize("grid", GRIDS)
def test_fake_quantization_computes_with_the_served_numbers_and_passes_gradients(grid: GridName) -> None:
    weight = random(8, 64)
    a, b = random(2, 64, scale=0.1, seed=1).requires_grad_(), random(8, 2, seed=2).requires_grad_()
    inputs = random(5, 64, scale=1.0, seed=3)
    effective = weight + b @ a
    quantized = fake_quantize(effective, grid)
    assert np.array_equal(
        quantized.detach().numpy(), ggml_decode(pack(encode(effective.detach(), grid)), grid, 64)
    )
    assert not torch.equal(quantized, effective)
    (inputs @ quantized.T).square().sum().backward()
    upstream = 2 * (inputs @ quantized.detach().T).T @ inputs  # as if the rounding were no function at all
    torch.testing.assert_close(b.grad, upstream @ a.detach().T)
    torch.testing.assert_close(a.grad, b.detach().T @ upstream)


def test_rounded_scales_are_those_of_half_precision() -> None:
    values = random(4, 3).requires_grad_()
    rounded = round_scales(values)
    assert torch.equal(rounded, values.detach().half().float())
    (rounded * 3).sum().backward()
    assert torch.equal(values.grad, torch.full((4, 3), 3.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "bits", "bound"),
    [("Q4_K", 4.5, 0.08), ("Q5_0", 5.5, 0.05), ("Q6_K", 6.5625, 0.02), ("F16", 16, 3e-4)],
)
def test_ggml_encodes_the_formats_that_have_no_grid_here(kind: str, bits: float, bound: float) -> None:
    weight = random(9, 512)
    rows = ggml_encode(weight, kind)
    assert rows.shape == (9, int(512 * bits / 8))
    decoded = ggml_decode(rows, kind, 512)
    assert relative_error(torch.from_numpy(decoded), weight) < bound
    theirs = rows.view(np.float16) if kind == "F16" else rows
    assert np.array_equal(decoded, quants.dequantize(theirs, GGMLQuantizationType[kind]))
    one = ggml_encode(weight[4:5], kind)  # rows don't depend on each other, nor on how they were parted
    assert np.array_equal(rows[4:5], one)


def test_importance_moves_ggmls_error_to_where_it_counts_less() -> None:
    weight = random(16, 512)
    importance = np.where(np.arange(512) % 2, 1.0, 1e-3).astype(np.float32)

    def error(rows: NDArray[np.uint8]) -> float:
        return relative_error(
            torch.from_numpy(ggml_decode(rows, "Q4_K", 512)), weight, torch.from_numpy(importance)
        )

    weighted = ggml_encode(weight, "Q4_K", importance)
    assert error(weighted) < 0.95 * error(ggml_encode(weight, "Q4_K"))
    per_row = np.stack([importance, *[np.ones(512, np.float32)] * 15])
    mixed = ggml_encode(weight, "Q4_K", per_row)
    assert np.array_equal(mixed[0], weighted[0])
    assert not np.array_equal(mixed[1], weighted[1])


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        (torch.zeros(2, 64), "Q4_K", "row of 64 weights"),
        (torch.zeros(2, 64), "Q9_9", "Q9_9"),
        (torch.zeros(64), "Q4_0", "shape"),
        (torch.zeros(2, 256), "IQ2_XXS", "without an importance"),
        (torch.zeros(2, 256), "I32", "not a type for weights"),
    ],
)
def test_what_would_end_the_process_in_ggml_is_refused_before(weight: Any, kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ggml_encode(weight, kind)


def test_rows_of_another_length_are_not_decoded() -> None:
    rows = ggml_encode(random(2, 64), "Q4_0")
    for width in (32, 33, 96):
        with pytest.raises(ModelError, match="row"):
            ggml_decode(rows, "Q4_0", width)
    assert ggml_needs_importance("IQ2_XXS")
    assert not ggml_needs_importance("Q4_K")
