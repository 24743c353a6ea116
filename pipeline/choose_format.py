"""Which of the measured files is served: fast and small, as far as the student stays the one that was trained."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.bootstrap import paired_difference
from pipeline.candidates import Measured
from pipeline.roundings import ROTATING

# A typical answer with retrieval: three passages are read, a quote and a sentence are written.
_READ, _WRITTEN = 600, 60
_AS_FAST = 1.3  # times within this ratio are taken as equal: files of one type differed by 28 % in one run
_RESAMPLES = 2000


@dataclass(frozen=True)
class Choice:
    """The file to serve, in a line each why the others are not, and `compare_rotations`' sentence."""

    winner: Measured
    reasons: tuple[str, ...]
    rotation: str


def choose(measured: Sequence[Measured], *, max_kl: float, min_top1: float) -> Choice:
    """The smallest of the fastest candidates that pass.

    A candidate passes if it is as near to the full-precision student as the parity gate asks, if a rotation beats
    GPTQ alone beyond noise, and if its exam is not worse than the nearest candidate's beyond noise. Where none passes, the
    nearest is taken, of those whose rotation, if any, is worth it.

    Args:
        measured: at least one, not all of them rotated.
        max_kl: nats per position, as in ``[parity]``.
        min_top1: as in ``[parity]``.
    """
    nearest = min(
        (each for each in measured if not _is_unproven(each, measured)),
        key=lambda each: each.fidelity.kl.mean,
    )
    rotation = compare_rotations(measured)
    reasons, passing = [], []
    for each in measured:
        reason = _objection(each, measured, nearest, max_kl=max_kl, min_top1=min_top1)
        if reason:
            reasons.append(f"{each.candidate.name}: {reason}")
        else:
            passing.append(each)
    if not passing:
        return Choice(nearest, (*reasons, "none is near enough: the nearest is taken"), rotation)
    seconds = {each.candidate.name: seconds_per_answer(each, measured) for each in passing}
    fastest = min(seconds.values())
    quick = [each for each in passing if seconds[each.candidate.name] <= _AS_FAST * fastest]
    winner = min(quick, key=lambda each: (each.bytes, each.fidelity.kl.mean))
    for each in passing:
        if each is not winner:
            what = "larger" if each in quick else "slower"
            reasons.append(f"{each.candidate.name}: near enough, but {what} than {winner.candidate.name}")
    return Choice(winner, tuple(reasons), rotation)


def compare_rotations(measured: Sequence[Measured]) -> str:
    """Whether a rotation is nearer to the full-precision student than GPTQ alone on the same grid, beyond noise.

    Said of the nearest of those that are, else of the nearest; whatever the bounds say of both. Empty where nothing
    is rotated.
    """
    pairs = [(each, plain) for each in measured if (plain := _without_rotation(each, measured)) is not None]
    if not pairs:
        rotated = any(each.candidate.how in ROTATING for each in measured)
        return "rotations were not compared: GPTQ alone was not measured beside them" if rotated else ""
    beating = [pair for pair in pairs if _is_nearer(*pair)]
    each, plain = min(beating or pairs, key=lambda pair: pair[0].fidelity.kl.mean)
    gap, texts = each.fidelity.minus(plain.fidelity), len(each.fidelity.positions)
    numbers = (
        f"{each.fidelity.kl.mean:.4f} nats against {plain.fidelity.kl.mean:.4f} of {plain.candidate.name}, difference "
        f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}], paired over {texts} text{'' if texts == 1 else 's'}"
    )
    if beating:
        return f"rotation beats GPTQ alone beyond noise: {each.candidate.name} has {numbers}"
    return f"no rotation beats GPTQ alone beyond noise: the nearest, {each.candidate.name}, has {numbers}"


def _without_rotation(each: Measured, measured: Sequence[Measured]) -> Measured | None:
    """GPTQ alone on the grid of a rotated file; None of a file that is not rotated, or where GPTQ was not measured."""
    if each.candidate.how not in ROTATING:
        return None
    same = (
        other
        for other in measured
        if other.candidate.how == "gptq" and other.candidate.kind == each.candidate.kind
    )
    return next(same, None)


def _is_nearer(each: Measured, other: Measured) -> bool:
    """Beyond noise; one text has no noise that could be seen."""
    return len(each.fidelity.positions) > 1 and each.fidelity.minus(other.fidelity).high < 0


def seconds_per_answer(each: Measured, measured: Sequence[Measured]) -> float:
    """Time of a typical answer; 0 where speed was not measured, so that bytes decide.

    The median of all files of its type whose output matrix is of the same size: they run the same kernels on the same
    shapes, so what their timings differ by is noise.
    """
    times = [
        _READ / other.speed.prompt_tokens_per_s + _WRITTEN / other.speed.decode_tokens_per_s
        for other in measured
        if other.speed is not None
        and (other.candidate.kind, other.untied_bytes) == (each.candidate.kind, each.untied_bytes)
    ]
    return statistics.median(times) if times else 0.0


def _is_unproven(each: Measured, measured: Sequence[Measured]) -> bool:
    """Rotated, and not nearer to the student than GPTQ alone beyond noise."""
    if each.candidate.how not in ROTATING:
        return False
    plain = _without_rotation(each, measured)
    return plain is None or not _is_nearer(each, plain)


def _objection(
    each: Measured, measured: Sequence[Measured], nearest: Measured, *, max_kl: float, min_top1: float
) -> str:
    kl, top1 = each.fidelity.kl.mean, each.fidelity.top1_agreement
    if kl > max_kl or top1 < min_top1:
        return (
            f"{kl:.4f} nats from the full-precision student (at most {max_kl:g}), same top token at {top1:.1%} "
            f"(at least {min_top1:.0%})"
        )
    if _is_unproven(each, measured):
        return "its rotation does not beat GPTQ alone beyond noise"
    if each.exam and nearest.exam and each is not nearest:
        ones = [1.0] * len(each.exam)
        gap = paired_difference((each.exam, ones), (nearest.exam, ones), resamples=_RESAMPLES, seed=0)
        if gap is not None and gap.high < 0:
            return f"{-100 * gap.mean:.0f} points worse in the exam than {nearest.candidate.name}"
    return ""
