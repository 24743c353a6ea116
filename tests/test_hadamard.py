from __future__ import annotations

import pytest
import torch

from domains.errors import ModelError
from pipeline.hadamard import (
    hadamard,
    has_hadamard,
    orthonormalized,
    random_orthogonal,
    random_rotation,
    signed_hadamard,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 64, 76, 128, 192, 576, 768, 1536, 2048, 3072]
)
def test_entries_are_plus_minus_one_and_rows_are_orthogonal(order: int) -> None:
    signs = (hadamard(order) * order**0.5).round()
    assert torch.equal(signs.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(signs @ signs.T, order * torch.eye(order, dtype=torch.float64))  # exact in integers
    assert torch.allclose(hadamard(order) * order**0.5, signs, atol=1e-12)


@pytest.mark.parametrize("order", [640, 896, 960, 1152, 2560, 3072, 4096, 8192])
def test_widths_of_llama_type_models_can_be_built(order: int) -> None:
    assert has_hadamard(order)


@pytest.mark.parametrize("order", [3, 6, 0, 52, 92, 100])
def test_unreachable_order_names_the_nearest(order: int) -> None:
    with pytest.raises(ModelError) as caught:
        hadamard(order)
    assert f"order {order}" in str(caught.value)
    assert "random_orthogonal" in str(caught.value)
    named = [int(word.rstrip(".")) for word in caught.value.expected.split() if word.rstrip(".").isdigit()]
    assert named
    assert all(has_hadamard(near) for near in named)


def test_random_orthogonal_is_orthogonal_and_reproducible() -> None:
    matrix = random_orthogonal(52, generator(3))
    assert torch.allclose(matrix @ matrix.T, torch.eye(52, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, random_orthogonal(52, generator(3)))
    assert not torch.equal(matrix, random_orthogonal(52, generator(4)))


def test_orthonormalized_stays_near_a_nearly_orthogonal_matrix() -> None:
    matrix = random_orthogonal(24, generator())
    moved = matrix + 1e-6 * torch.randn(24, 24, generator=generator(), dtype=torch.float64)
    assert (orthonormalized(moved) - matrix).abs().max() < 1e-4


def test_random_rotation_falls_back_to_an_orthogonal_matrix() -> None:
    for order in (48, 52):
        matrix = random_rotation(order, generator())
        assert torch.allclose(matrix.T @ matrix, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert random_rotation(48, generator()).abs().std() < 1e-12
    assert random_rotation(52, generator()).abs().std() > 1e-2


@pytest.mark.parametrize("order", [256, 576])
def test_pooled_groups_of_32_see_all_channels_only_with_signs_on_the_output_side(order: int) -> None:
    def seen_by_pooled_features(rotation: torch.Tensor) -> int:
        pooled = rotation.reshape(order, order // 32, 32).sum(2)  # [original channel, group]
        return int((pooled.abs().amax(1) > 1e-9).sum())

    one_sided = torch.sign(torch.randn(order, generator=generator()).double())[:, None] * hadamard(order)
    assert seen_by_pooled_features(signed_hadamard(order, generator())) == order
    if order == 256:
        assert seen_by_pooled_features(one_sided) == order // 32
    else:  # Paley's factor softens the hazard, but does not remove it
        assert seen_by_pooled_features(one_sided) < order
