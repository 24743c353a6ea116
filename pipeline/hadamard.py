"""Hadamard and random orthogonal matrices, by construction.

Sylvester's doubling, Paley's two constructions over the residues of a prime, and Kronecker products of all of
them: 2^k, 12·2^k, 20, 28, 576 = 12·12·4, 768, 1536, 3072 … No tables.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from domains.errors import ModelError

if TYPE_CHECKING:
    import torch


def hadamard(order: int) -> torch.Tensor:
    """A Hadamard matrix over √n: entries ±1/√n, orthogonal, float64 [n, n]; same order, same matrix.

    Raises:
        ModelError: no construction here reaches ``order`` (names the nearest orders that work).
    """
    import torch

    signs = _signs(order)
    if signs is None:
        below = next((n for n in range(order - 1, 0, -1) if _plan(n)), 1)
        above = next((n for n in range(order + 1, 4 * order + 8) if _plan(n)), 0)
        raise ModelError(
            f"no Hadamard matrix of order {order} can be built from Sylvester's and Paley's constructions",
            expected=f"a width such as {below} or {above}",
            next_step="use a random orthogonal rotation (pipeline.hadamard.random_orthogonal) for this width",
        )
    matrix: torch.Tensor = signs.to(torch.float64) / order**0.5
    return matrix


def has_hadamard(order: int) -> bool:
    """Whether `hadamard` can build this order."""
    return _plan(order) is not None


def signed_hadamard(order: int, generator: torch.Generator) -> torch.Tensor:
    """D1·H·D2 with random signs on both sides, float64 [n, n].

    For row vectors x·R. The signs on the output side matter: without them the sum of an aligned group of 32
    rotated channels sees only every 32nd original channel (Sylvester's first column block), so an adapter on
    pooled inputs would be blind to the others.
    """
    matrix = hadamard(order)
    left, right = _random_signs(order, generator), _random_signs(order, generator)
    return left[:, None] * matrix * right[None, :]


def random_orthogonal(order: int, generator: torch.Generator) -> torch.Tensor:
    """A Haar-distributed orthogonal matrix, float64 [n, n]: QR of a Gaussian with R's diagonal made positive."""
    import torch

    return orthonormalized(torch.randn(order, order, generator=generator, dtype=torch.float64))


def orthonormalized(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor of ``matrix`` [n, n] (QR with a positive diagonal), near it when it is near orthogonal."""
    import torch

    q, r = torch.linalg.qr(matrix)
    signs: torch.Tensor = torch.where(torch.diagonal(r) < 0, -1.0, 1.0).to(q)
    return torch.as_tensor(q * signs)


def random_rotation(order: int, generator: torch.Generator) -> torch.Tensor:
    """A signed Hadamard matrix where one can be built, else a random orthogonal one; float64 [n, n]."""
    return (signed_hadamard if has_hadamard(order) else random_orthogonal)(order, generator)


def _random_signs(order: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    signs: torch.Tensor = 2.0 * torch.randint(0, 2, (order,), generator=generator).to(torch.float64) - 1.0
    return signs


@cache
def _plan(order: int) -> tuple[str, int, int] | None:
    """How to build an order: (construction, prime or left factor, right factor), or nothing.

    Small Paley factors come first, so that 576 is 12 ⊗ 48 = 12 ⊗ (12 ⊗ 4) and not one of order 288 doubled.
    """
    if order in (1, 2):
        return ("sylvester", order, 1)
    if order < 1 or order % 4:
        return None
    if order & (order - 1) == 0:
        return ("kronecker", 2, order // 2)
    for left in range(12, order // 2 + 1, 4):
        if order % left == 0 and _paley(left) and _plan(order // left):
            return ("kronecker", left, order // left)
    return _paley(order)


def _paley(order: int) -> tuple[str, int, int] | None:
    if (order - 1) % 4 == 3 and _is_prime(order - 1):
        return ("paley1", order - 1, 1)
    if order % 2 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        return ("paley2", order // 2 - 1, 1)
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _signs(order: int) -> torch.Tensor | None:
    """The matrix of +1 and -1, int8 [n, n]; nothing where no construction applies."""
    import torch

    plan = _plan(order)
    if plan is None:
        return None
    how, first, second = plan
    if how == "sylvester":
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)[:order, :order]
    if how == "paley1":
        return _paley1(first)
    if how == "paley2":
        return _paley2(first)
    left, right = _signs(first), _signs(second)
    assert left is not None
    assert right is not None
    return torch.kron(left, right)


def _residues(prime: int) -> torch.Tensor:
    """Jacobsthal's matrix Q[i, j] = χ(i - j) over the field of ``prime`` elements, int8."""
    import torch

    character = torch.full((prime,), -1, dtype=torch.int8)
    character[torch.arange(1, prime) ** 2 % prime] = 1
    character[0] = 0
    index = torch.arange(prime)
    matrix: torch.Tensor = character[(index[:, None] - index[None, :]) % prime]
    return matrix


def _bordered(prime: int, lower_left: int) -> torch.Tensor:
    import torch

    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.int8)
    matrix[0, 1:] = 1
    matrix[1:, 0] = lower_left
    matrix[1:, 1:] = _residues(prime)
    return matrix


def _paley1(prime: int) -> torch.Tensor:
    """Order q + 1 for a prime q ≡ 3 (mod 4): I + S with S skew."""
    import torch

    return torch.eye(prime + 1, dtype=torch.int8) + _bordered(prime, -1)


def _paley2(prime: int) -> torch.Tensor:
    """Order 2(q + 1) for a prime q ≡ 1 (mod 4): S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]] with S symmetric."""
    import torch

    one = torch.eye(prime + 1, dtype=torch.int8)
    cross = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(_bordered(prime, 1), cross) + torch.kron(one, diagonal)
