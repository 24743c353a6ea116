"""Which of the measured files is served: fast and small, as far as the student stays the one that was trained."""

from __future__ import annotations

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
    """The file to serve, and in a line each why the others are not."""

    winner: Measured
    reasons: tuple[str, ...]


def choose(measured: Sequence[Measured], *, max_kl: float, min_top1: float) -> Choice:
    """The smallest of the fastest candidates that pass.

    A candidate passes if it is as near to the full-precision student as the parity gate asks, if a rotation beats
    GPTQ alone beyond noise, and if its exam is not worse than the nearest candidate's beyond noise. Where none passes, the
    nearest is taken.

    Args:
        measured: at least one.
        max_kl: nats per position, as in ``[parity]``.
        min_top1: as in ``[parity]``.
    """
    nearest = min(measured, key=lambda each: each.fidelity.kl.mean)
    reasons, passing = [], []
    for each in measured:
        reason = _objection(each, measured, nearest, max_kl=max_kl, min_top1=min_top1)
        if reason:
            reasons.append(f"{each.candidate.name}: {reason}")
        else:
            passing.append(each)
    if not passing:
        return Choice(nearest, (*reasons, "none is near enough: the nearest is taken"))
    fastest = min(map(seconds_per_answer, passing))
    quick = [each for each in passing if seconds_per_answer(each) <= _AS_FAST * fastest]
    winner = min(quick, key=lambda each: (each.bytes, each.fidelity.kl.mean))
    for each in passing:
        if each is not winner:
            what = "larger" if each in quick else "slower"
            reasons.append(f"{each.candidate.name}: near enough, but {what} than {winner.candidate.name}")
    return Choice(winner, tuple(reasons))


def seconds_per_answer(measured: Measured) -> float:
    """Time of a typical answer; 0 where speed was not measured, so that bytes decide."""
    if measured.speed is None:
        return 0.0
    return _READ / measured.speed.prompt_tokens_per_s + _WRITTEN / measured.speed.decode_tokens_per_s


def _objection(
    each: Measured, measured: Sequence[Measured], nearest: Measured, *, max_kl: float, min_top1: float
) -> str:
    kl, top1 = each.fidelity.kl.mean, each.fidelity.top1_agreement
    if kl > max_kl or top1 < min_top1:
        return (
            f"{kl:.4f} nats from the full-precision student (at most {max_kl:g}), same top token at {top1:.1%} "
            f"(at least {min_top1:.0%})"
        )
    if each.candidate.how in ROTATING:
        plain = [
            other
            for other in measured
            if other.candidate.how == "gptq" and other.candidate.kind == each.candidate.kind
        ]
        if not plain or each.fidelity.minus(plain[0].fidelity).high >= 0:
            return "its rotation does not beat GPTQ alone beyond noise"
    if each.exam and nearest.exam and each is not nearest:
        ones = [1.0] * len(each.exam)
        gap = paired_difference((each.exam, ones), (nearest.exam, ones), resamples=_RESAMPLES, seed=0)
        if gap is not None and gap.high < 0:
            return f"{-100 * gap.mean:.0f} points worse in the exam than {nearest.candidate.name}"
    return ""
