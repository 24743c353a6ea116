"""Better scales than ggml's reference: a search per block, in the weighted squared error of what is stored.

Scales are rounded to float16 before the codes are chosen, so no candidate is judged by numbers that the file
can't hold. The reference's own scale is among the candidates: a search never loses to it.
"""

from __future__ import annotations

import itertools

import torch

from domains.errors import ModelError
from pipeline.grids.blocks import BLOCK, LIMITS, Blocks, GridName, check_scales, checked, pieces
from pipeline.grids.rounding import extremes, round_to
from pipeline.one_thread import one_thread

# Shares of the reference's scale that are tried: below 1 the extreme weight is clipped. On Q4_0, whose grid
# reaches from -8 to 7, a negative share puts the extreme weight on the short side.
_SHARES: dict[GridName, tuple[float, ...]] = {
    "Q4_0": tuple(sign * (0.55 + 0.04 * step) for sign in (1, -1) for step in range(16)),
    "Q8_0": (0.985, 0.99, 0.995),
}
# Shares of a Q4_1 block's range that are cut off at its bottom and at its top, each with each.
_CUTS = (0.0, 0.05, 0.11, 0.18, 0.26)
_REFITS = 2  # least-squares steps from the best candidate

Scales = tuple[torch.Tensor, torch.Tensor | None]


def fit_scales(weight: torch.Tensor, grid: GridName, importance: torch.Tensor | None = None) -> Scales:
    """Scales (and offsets) whose nearest codes have the least weighted squared error found.

    Args:
        weight: [out, in], in a multiple of 32.
        grid: the target.
        importance: what an element's squared error counts, [in] or [out, in], >= 0; None counts all alike.

    Returns:
        d and m, float16 [out, in / 32]; m only on Q4_1. On Q4_0 a d may be negative.

    Raises:
        ModelError: an unsuitable shape or importance, numbers that are not finite, or a scale beyond float16.
    """
    weight = checked(weight)
    rows, width = weight.shape
    counts = _counts(importance, weight)
    d = weight.new_empty((rows, width // BLOCK), dtype=torch.float16)
    m = torch.empty_like(d) if grid == "Q4_1" else None
    for piece in pieces(rows, width):
        part = counts if counts is None or len(counts) == 1 else counts[piece]
        values = weight[piece]
        search = _Search(_columns(values), None if part is None else _columns(part.expand_as(values)), grid)
        search.run()
        d[piece] = search.d.half().reshape(len(values), -1)
        if m is not None:
            m[piece] = search.m.half().reshape(len(values), -1)
    check_scales(d, m)
    return d, m


def _columns(values: torch.Tensor) -> torch.Tensor:
    """Blocks as columns, [32, blocks]: a scale per column is the faster way to compute."""
    return values.reshape(-1, BLOCK).T.contiguous()


def fit(weight: torch.Tensor, grid: GridName, importance: torch.Tensor | None = None) -> Blocks:
    """A matrix on a grid with searched scales and nearest codes; never worse than `encode`, in weighted error.

    Raises:
        ModelError: as `fit_scales`.
    """
    with one_thread():
        d, m = fit_scales(weight, grid, importance)
        return Blocks(grid, round_to(weight, d, m, grid), d, m)


def _counts(importance: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """The importance as float32 [1 or out, in], with mean 1, so that sums neither vanish nor overflow."""
    if importance is None:
        return None
    counts = importance.detach().to(weight).reshape(-1, importance.shape[-1])
    if counts.shape[1] != weight.shape[1] or len(counts) not in {1, len(weight)}:
        _refuse(f"an importance of shape {tuple(importance.shape)}", weight)
    mean = counts.double().mean()
    if not torch.isfinite(mean) or counts.min() < 0:
        _refuse("an importance with negative or infinite numbers", weight)
    return counts / mean.clamp_min(torch.finfo(torch.float32).tiny).to(counts.dtype)


def _refuse(what: str, weight: torch.Tensor) -> None:
    raise ModelError(
        f"{what} does not fit a matrix of shape {tuple(weight.shape)}",
        expected="finite numbers >= 0, one per in-feature or one per weight",
        next_step="take the importance from the same matrix's inputs",
    )


class _Search:
    """The best scales so far of blocks [32, blocks]; scales stand as float32 [1, blocks]."""

    def __init__(self, blocks: torch.Tensor, counts: torch.Tensor | None, grid: GridName) -> None:
        self.blocks, self.counts = blocks, counts
        low, high, zero = LIMITS[grid]
        self.low, self.high = low - zero, high - zero
        self.offset = grid == "Q4_1"
        if self.offset:
            bottom, top = blocks.amin(0, keepdim=True), blocks.amax(0, keepdim=True)
            self.first, self.m = (top - bottom) / 15, _as_half(bottom)
        else:
            limit = self.low if grid == "Q4_0" else self.high
            self.first, self.m = extremes(blocks, dim=0) / limit, torch.zeros_like(blocks[:1])
        self.d = _as_half(self.first)
        self.error = self._error(self.d, self.m)
        self.grid = grid

    def run(self) -> None:
        bottom = self.m
        if self.offset:
            for low, high in itertools.product(_CUTS, _CUTS):
                d = _as_half(self.first * (1 - low - high))
                self._offer(*self._refit(d, _as_half(bottom + self.first * (15 * low))))
        else:
            for share in _SHARES[self.grid]:
                self._offer(_as_half(self.first * share), bottom)
        for _ in range(_REFITS):
            self._offer(*self._refit(self.d, self.m))

    def _offer(self, d: torch.Tensor, m: torch.Tensor) -> None:
        error = self._error(d, m)
        better = error < self.error  # not so where an error is NaN or infinite
        self.d = torch.where(better, d, self.d)
        self.m = torch.where(better, m, self.m)
        self.error = torch.where(better, error, self.error)

    def _steps(self, d: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        safe = torch.where(d == 0, 1.0, d)
        steps = (self.blocks - m).div_(safe) if self.offset else self.blocks / safe
        return steps.round_().clamp_(self.low, self.high)

    def _error(self, d: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        distance = self._steps(d, m).mul_(d).sub_(self.blocks)
        if self.offset:
            distance.add_(m)
        distance.square_()
        if self.counts is not None:
            distance.mul_(self.counts)
        return distance.sum(0, keepdim=True)

    def _refit(self, d: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least-squares scales for the codes that ``d`` and ``m`` give."""
        q = self._steps(d, m)
        weighted = q if self.counts is None else q * self.counts
        qq, qw = (weighted * q).sum(0, keepdim=True), (weighted * self.blocks).sum(0, keepdim=True)
        if not self.offset:
            return _as_half(torch.where(qq > 0, qw / qq, d)), m
        if self.counts is None:
            n, w = torch.full_like(qq, BLOCK), self.blocks.sum(0, keepdim=True)
        else:
            n = self.counts.sum(0, keepdim=True)
            w = (self.blocks * self.counts).sum(0, keepdim=True)
        s = weighted.sum(0, keepdim=True)
        spread = n * qq - s * s
        scale = (n * qw - s * w) / spread
        usable = (spread > 0) & (scale > 0)
        scale = _as_half(torch.where(usable, scale, d))
        # The offset answers to the scale as it is stored.
        return scale, _as_half(torch.where(usable, (w - scale * s) / n, m))


def _as_half(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()
