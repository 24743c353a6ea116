"""Gradient descent on orthogonal matrices by the Cayley transform (Li et al. 2020, arXiv 2002.01113).

With the gradient G of the loss in X, A = ½ (G Xᵀ - X Gᵀ) is skew, and X' = (I + α/2·A)⁻¹ (I - α/2·A) X is
orthogonal again and, for small α, a step downhill. SpinQuant caps α at 1/‖A‖₁ and asks for so much that the cap
decides; here the step is that cap times a rate in (0, 1], which therefore means the same for every loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from domains.errors import ModelError
from pipeline.hadamard import orthonormalized
from pipeline.rotate import ORTHOGONALITY

if TYPE_CHECKING:
    import torch

EXACT_UP_TO = 1024
"""Above this order the transform is solved by fixed-point iterations; α ≤ 1/‖A‖₁ makes each halve the error."""
_ITERATIONS = 5
_DRIFT = 1e-5  # orthogonality error that float32 may gather before a QR retraction


class CayleyDescent:
    """Descends on orthogonal matrices, in place.

    Args:
        matrices: float32 [n, n] or [heads, n, n], orthogonal, requiring gradients.
        momentum: of the skew directions; the paper of SpinQuant uses none.
    """

    def __init__(self, matrices: Sequence[torch.Tensor], *, momentum: float = 0.0) -> None:
        self.matrices = list(matrices)
        self.momentum = momentum
        self._directions: list[torch.Tensor | None] = [None] * len(self.matrices)

    def step(self, rate: float) -> None:
        """One step of every matrix that has a gradient; gradients are cleared.

        Args:
            rate: share of the largest safe step, in (0, 1].

        Raises:
            ModelError: a gradient is not finite, or a matrix stopped being orthogonal.
        """
        import torch

        with torch.no_grad():
            for index, matrix in enumerate(self.matrices):
                gradient, matrix.grad = matrix.grad, None
                if gradient is None:
                    continue
                direction = gradient @ matrix.mT
                direction = 0.5 * (direction - direction.mT)
                before = self._directions[index]
                if before is not None:
                    direction = direction + self.momentum * before
                if self.momentum:
                    self._directions[index] = direction
                matrix.copy_(_retracted(cayley(matrix, direction, rate)))


def cayley(matrix: torch.Tensor, skew: torch.Tensor, rate: float) -> torch.Tensor:
    """The orthogonal matrix ``rate`` of the largest safe step away from ``matrix``, against ``skew``.

    Both are [..., n, n]; a skew matrix of zeros leaves ``matrix`` where it is.
    """
    import torch

    size = skew.abs().sum(-2).amax(-1)[..., None, None]
    half = skew * (0.5 * rate / size.clamp_min(torch.finfo(skew.dtype).tiny))
    start = matrix - half @ matrix
    if matrix.shape[-1] <= EXACT_UP_TO:
        one = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
        solved: torch.Tensor = torch.linalg.solve(one + half, start)
        return solved
    moved = start - half @ matrix
    for _ in range(_ITERATIONS):
        moved = start - half @ moved
    return moved


def orthogonality_error(matrix: torch.Tensor) -> float:
    """Largest entry of R·Rᵀ - I, in magnitude."""
    import torch

    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return float((matrix @ matrix.mT - one).abs().max())


def _retracted(matrix: torch.Tensor) -> torch.Tensor:
    error = orthogonality_error(matrix)
    if error > _DRIFT:
        matrix = orthonormalized(matrix.double()).to(matrix.dtype)
        error = orthogonality_error(matrix)
    if not error <= ORTHOGONALITY:
        raise ModelError(
            f"learning a rotation failed: R·Rᵀ is off by {error:.2g}",
            expected="finite gradients",
            next_step="use fixed rotations, or a lower learning rate",
        )
    return matrix
