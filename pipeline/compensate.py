"""Rounds one matrix so that later columns make up for the errors of earlier ones, on GGUF's own grids.

GPTQ (arXiv 2210.17323): columns are rounded one by one, and what a column's rounding does to the output is moved
into the columns not yet rounded, as the inputs' second moments H = E[x xᵀ] allow. What differs:

* The grid is ggml's: blocks of 32 columns. A block's float16 scale is searched on its compensated weights before
  its codes are chosen, so nothing is rounded twice.
* Then come sweeps of coordinate descent on tr((W - Ŵ) H (W - Ŵ)ᵀ): each block's scale by least squares given its
  codes, each code given all others. No step increases that error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from domains.errors import ModelError
from pipeline.grids import BLOCK, Blocks, GridName, fit_scales
from pipeline.grids.blocks import LIMITS
from pipeline.one_thread import one_thread

if TYPE_CHECKING:
    import torch

_RETRIES = 4


@dataclass(frozen=True)
class Curvature:
    """H with its damping, and its factors H = M·diag(c)·Mᵀ with M unit upper triangular.

    c_j is what later columns can't explain of column j's input. GPTQ's U, with H⁻¹ = UᵀU, is (M·√c)⁻¹; with M
    itself nothing has to be inverted: tr(Δ H Δᵀ) = Σ_j c_j·|Δ_j + Σ_{k<j} Δ_k M_kj|², column by column.

    Attributes:
        hessian: float32 [in, in].
        feedback: M, float32 [in, in].
        variances: c, float32 [in].
        dead: bool [in], inputs that were always zero.
    """

    hessian: torch.Tensor
    feedback: torch.Tensor
    variances: torch.Tensor
    dead: torch.Tensor


def curvature(hessian: torch.Tensor, *, damp: float) -> Curvature:
    """Damp second moments [in, in] and factor them, in float64.

    The damping is a share of the mean diagonal of inputs that are not always zero. If Cholesky fails, it is raised
    tenfold, up to four times.

    Raises:
        ModelError: the moments are not finite, or stay singular.
    """
    import torch

    damped = hessian.double()
    diagonal = torch.diagonal(damped)
    dead = diagonal == 0
    mean = 1.0 if bool(dead.all()) else float(diagonal[~dead].mean())
    for attempt in range(_RETRIES + 1):
        ridge = damp * 10**attempt * mean
        trial = damped.clone()
        torch.diagonal(trial).add_(ridge)
        # Mirrored, the lower Cholesky factor of H mirrored is an upper one of H.
        lower, failed = torch.linalg.cholesky_ex(trial.flip(0, 1))
        if not int(failed) and bool(lower.isfinite().all()):
            upper = lower.flip(0, 1)
            roots = torch.diagonal(upper)
            return Curvature(
                trial.float(), (upper / roots).float().contiguous(), roots.square().float(), dead
            )
    raise ModelError(
        "the inputs of a layer have no invertible second moments",
        expected="finite activations of calibration text, and more damping where they are few",
        next_step="raise damp, or calibrate on more tokens",
    )


def round_compensated(weight: torch.Tensor, curved: Curvature, grid: GridName, *, sweeps: int = 0) -> Blocks:
    """Put a matrix onto a grid with GPTQ and, after it, sweeps of coordinate descent.

    A weight whose input was always zero becomes zero, as in GPTQ's release: it can't matter, and its block's scale
    should not be wide for its sake.

    Args:
        weight: float32 [out, in], in a multiple of 32.
        curved: of its inputs.
        grid: the target.
        sweeps: of coordinate descent over scales and codes.
    """
    state = _Rounding(weight.masked_fill(curved.dead, 0), grid)
    with one_thread():
        state.gptq(curved)
        for _ in range(sweeps):
            state.sweep(curved.hessian)
    return state.blocks()


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ), the summed squared error of the outputs per token."""
    delta = (weight - rounded).double()
    return float(((delta @ hessian.double()) * delta).sum())


class _Rounding:
    """Codes and scales of one matrix on their way; all tensors [in, out], so that a column is contiguous.

    ``steps`` are codes as float32 that count from the code of zero; they become bytes at the end, since the
    loops below run once per column and live on few, cheap operations.
    """

    def __init__(self, weight: torch.Tensor, grid: GridName) -> None:
        import torch

        self.grid = grid
        self.target = weight.detach().float().T.contiguous()
        width, rows = self.target.shape
        self.low, self.high, self.zero = LIMITS[grid]
        self.steps = torch.zeros_like(self.target)
        self.values = torch.zeros_like(self.target)
        self.d = torch.zeros(width // BLOCK, rows)
        self.m = torch.zeros_like(self.d) if grid == "Q4_1" else None

    def blocks(self) -> Blocks:
        """The result, [out, in]."""
        import torch

        kind = torch.int8 if self.grid == "Q8_0" else torch.uint8
        codes = self.steps.add(self.zero).T.to(kind).contiguous()
        m = None if self.m is None else self.m.T.half().contiguous()
        return Blocks(self.grid, codes, self.d.T.half().contiguous(), m)

    def gptq(self, curved: Curvature) -> None:
        """One pass: each column is rounded after the errors before it were fed back into it."""
        import torch

        work, feedback = self.target.clone(), curved.feedback
        errors = torch.empty(BLOCK, work.shape[1])
        for begin in range(0, len(work), BLOCK):
            end = begin + BLOCK
            block = work[begin:end]
            self._fit(begin // BLOCK, block, curved.variances[begin:end])
            rounder = self._rounder(begin // BLOCK)
            for offset, error in enumerate(errors):
                column = begin + offset
                rounder(column, block[offset])
                torch.sub(self.target[column], self.values[column], out=error)
                block[offset + 1 :].addr_(feedback[column, column + 1 : end], error)
            work[end:].addmm_(feedback[begin:end, end:].T, errors)

    def sweep(self, hessian: torch.Tensor) -> None:
        """Refit each block's scale, then each of its codes, given everything else."""
        pull = hessian @ (self.values - self.target)  # half the gradient in the rounded values, [in, out]
        for begin in range(0, len(pull), BLOCK):
            block = slice(begin, begin + BLOCK)
            before = self.values[block].clone()
            within = hessian[block, block]
            self._refit(begin // BLOCK, block, pull[block], within)
            local = pull[block].addmm(within, self.values[block] - before)
            curves = within.diagonal().tolist()
            rounder = self._rounder(begin // BLOCK)
            for offset, old in enumerate(self.values[block].clone()):
                rounder(begin + offset, old.sub(local[offset], alpha=1 / curves[offset]))
                moved = self.values[begin + offset] - old
                local[offset + 1 :].addr_(within[offset + 1 :, offset], moved)
            pull.addmm_(hessian[:, block], self.values[block] - before)

    def _fit(self, index: int, weights: torch.Tensor, variances: torch.Tensor) -> None:
        """The scale of a block [32, out]; an error counts by what can't be compensated."""
        d, m = fit_scales(weights.T, self.grid, importance=variances)
        self.d[index] = d[:, 0]
        if self.m is not None and m is not None:
            self.m[index] = m[:, 0]

    def _rounder(self, index: int) -> Callable[[int, torch.Tensor], None]:
        """Rounds a column of a block to its nearest steps: (column, wanted [out])."""
        import torch

        d = self.d[index]
        m = None if self.m is None else self.m[index]
        inverse = torch.where(d == 0, 0.0, 1 / d)
        low, high = float(self.low - self.zero), float(self.high - self.zero)

        def into(column: int, wanted: torch.Tensor) -> None:
            steps, values = self.steps[column], self.values[column]
            torch.mul(wanted if m is None else wanted - m, inverse, out=steps).round_().clamp_(low, high)
            torch.mul(steps, d, out=values)
            if m is not None:
                values.add_(m)

        return into

    def _refit(self, index: int, block: slice, pull: torch.Tensor, within: torch.Tensor) -> None:
        """Least-squares scale (and offset) of a block for its codes; kept where the stored one is better."""
        import torch

        d, m, steps = self.d[index], None if self.m is None else self.m[index], self.steps[block]
        curved = within @ steps
        first = -(steps * pull).sum(0)
        second = (steps * curved).sum(0)
        if m is None:
            new_d, new_m = (d + first / second).half().float(), torch.zeros_like(d)
            values = steps * new_d
        else:
            ones, total, cross = -pull.sum(0), within.sum(), curved.sum(0)
            spread = second * total - cross.square()
            new_d = (d + (first * total - ones * cross) / spread).half().float()
            new_m = (m + (ones * second - first * cross) / spread).half().float()
            values = steps * new_d + new_m
        moved = values - self.values[block]
        gain = (moved * (2 * pull + within @ moved)).sum(0)  # NaN where a block has nothing to fit
        better = (gain < 0) & ((new_d > 0) if m is not None else (new_d != 0)) & new_d.isfinite()
        self.d[index] = torch.where(better, new_d, d)
        self.values[block] = torch.where(better, values, self.values[block])
        if self.m is not None:
            self.m[index] = torch.where(better, new_m, self.m[index])
