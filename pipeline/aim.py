"""What a matrix is rounded towards: what it gave in the unrounded network, as far as other text bears that out.

Rounded layers hand the next one inputs x where the unrounded network had x̃. GPTAQ (arXiv 2504.02692) rounds W towards
W x̃ instead of W x. Here the weight is moved to the damped least-squares answer, W + W·E[(x̃ - x) xᵀ]·H⁻¹, before it is
rounded. With few tokens per input channel that answer fits the calibration text more than the network, so only a
share of the step is taken: the one that is best on text the step was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.compensate import Curvature, curvature
from pipeline.layer_inputs import Moments

if TYPE_CHECKING:
    import torch

_ROWS = 256  # of a matrix, to choose the share by


@dataclass(frozen=True)
class Inputs:
    """Moments of a matrix's inputs on two halves of the calibration batches; one entry each if there is one batch.

    Attributes:
        moments: E[x xᵀ] of each half, float64 [in, in].
        drifts: E[(x̃ - x) xᵀ] of each half, float64 [in, in].
        tokens: in each half.
    """

    moments: tuple[torch.Tensor, ...]
    drifts: tuple[torch.Tensor, ...]
    tokens: tuple[int, ...]

    def all_moments(self) -> torch.Tensor:
        """E[x xᵀ] of both halves."""
        return self._together(self.moments)

    def all_drifts(self) -> torch.Tensor:
        """E[(x̃ - x) xᵀ] of both halves."""
        return self._together(self.drifts)

    def reordered(self, order: torch.Tensor) -> Inputs:
        """The same with the channels in another order."""
        moments = tuple(each[order][:, order] for each in self.moments)
        return Inputs(moments, tuple(each[order][:, order] for each in self.drifts), self.tokens)

    def _together(self, halves: tuple[torch.Tensor, ...]) -> torch.Tensor:
        total = sum(self.tokens)
        mean = halves[0] * (self.tokens[0] / total)
        for half, count in zip(halves[1:], self.tokens[1:], strict=True):
            mean.add_(half, alpha=count / total)
        return mean


def measure_inputs(inputs: Sequence[torch.Tensor], unrounded: Sequence[torch.Tensor]) -> Inputs:
    """Count batches of x and of x̃, each [..., in]; every second batch belongs to the second half."""
    moments, drifts, tokens = [], [], []
    for begin in range(min(2, len(inputs))):
        square, cross = Moments(), Moments()
        for rows, exact in zip(inputs[begin::2], unrounded[begin::2], strict=True):
            square.add(rows)
            cross.add(rows, exact - rows)
        moments.append(square.mean())
        drifts.append(cross.mean())
        tokens.append(square.count)
    return Inputs(tuple(moments), tuple(drifts), tuple(tokens))


def aim(weight: torch.Tensor, inputs: Inputs, curved: Curvature, *, damp: float) -> torch.Tensor:
    """The weight [out, in], float32, to round instead of the given one.

    Args:
        weight: W.
        inputs: of it.
        curved: of both halves of them.
        damp: with which ``curved`` was made; each half is damped alike.
    """
    share = choose_share(weight[:: -(-len(weight) // _ROWS)], inputs, damp=damp)
    if share == 0:
        return weight
    aimed: torch.Tensor = weight + share * step(weight, inputs.all_drifts(), curved)
    return aimed


def step(weight: torch.Tensor, drift: torch.Tensor, curved: Curvature) -> torch.Tensor:
    """W·drift·H⁻¹, float32 [out, in]: least |W x̃ - (W + step) x|² on average, damped as H is."""
    import torch

    factor = curved.feedback.double()  # H = M·diag(c)·Mᵀ
    pushed = weight.double() @ drift
    pushed = torch.linalg.solve_triangular(factor.T, pushed, upper=False, left=False, unitriangular=True)
    pushed = pushed / curved.variances.double()
    pushed = torch.linalg.solve_triangular(factor, pushed, upper=True, left=False, unitriangular=True)
    moved: torch.Tensor = pushed.float()
    return moved


def choose_share(weight: torch.Tensor, inputs: Inputs, *, damp: float) -> float:
    """How much of the step to take, 0 to 1: by least squares on each half, with the step fitted to the other.

    0 where there is one batch, which leaves nothing to judge by.
    """
    if len(inputs.tokens) < 2:
        return 0.0
    gain = cost = 0.0
    for fitted, held in ((0, 1), (1, 0)):
        half = step(weight, inputs.drifts[fitted], curvature(inputs.moments[fitted], damp=damp)).double()
        gain += float((half * (weight.double() @ inputs.drifts[held])).sum())
        cost += float((half * (half @ inputs.moments[held])).sum())
    return min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0
