"""What an exam says of a reflecting student: marks per answer, warnings, and how honest its probabilities are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from domains.records import Answer, Reflection
from pipeline.selective import calibration_error, reliability

Mark = tuple[float, float]


def mark_reflection(reflection: Reflection | None) -> dict[str, Mark]:
    """Marks of one answer: retrieval, judgements that were missing or unreadable, cost; none without reflection."""
    if reflection is None:
        return {}
    marks = {
        "retrieval_rate": (float(reflection.retrieved), 1.0),
        "judgement_unparsed": (float(reflection.unparsed > 0), 1.0),
        "passes_per_question": (float(reflection.passes), 1.0),
    }
    if expected := sum(reflection.expected.values()):
        marks["group_missing"] = (float(sum(reflection.missing.values())), float(expected))
    return marks


def describe_reflection(answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any] | None:
    """The report's part on reflection; None where no arm reflected.

    Args:
        answers: per arm, with passages within reach.
    """
    reflecting = {
        arm: [answer for answer in given if answer.reflection is not None] for arm, given in answers.items()
    }
    arms = {arm: _describe(given) for arm, given in reflecting.items() if given}
    if not arms:
        return None
    return {"arms": arms, "warnings": [line for arm, facts in arms.items() for line in _warnings(arm, facts)]}


def _describe(answers: Sequence[Answer]) -> dict[str, Any]:
    backends = sorted({answer.reflection.backend for answer in answers if answer.reflection})
    retrieved = [answer.reflection.retrieved for answer in answers if answer.reflection]
    decided = [answer for answer in answers if answer.reflection and answer.reflection.p_retrieve is not None]
    pairs = support_pairs(answers)
    table = reliability([p for p, _ in pairs], [found for _, found in pairs]) if pairs else []
    return {
        "backend": ", ".join(backends),
        "n": len(answers),
        "n_decided": len(decided),
        "retrieval_rate": sum(retrieved) / len(retrieved),
        "support_reliability": [asdict(each) for each in table],
        "support_calibration_error": calibration_error(table) if table else None,
    }


def support_pairs(answers: Sequence[Answer]) -> list[tuple[float, bool]]:
    """(support that the student gives its answer, whether a passage's sentence carries it), for each that has one."""
    return [
        (segment.support, answer.support == "supported")
        for answer in answers
        if answer.reflection
        for segment in answer.reflection.segments
        if segment.support is not None
    ]


def _warnings(arm: str, facts: Mapping[str, Any]) -> list[str]:
    """A student that always or never looks has learnt no decision."""
    if not facts["n_decided"] or 0 < facts["retrieval_rate"] < 1:
        return []
    always = facts["retrieval_rate"] == 1
    return [
        f"{arm}: retrieved for {'all' if always else 'none'} of {facts['n']} questions: the decision to retrieve "
        f"tells nothing apart; {'raise' if always else 'lower'} [reflect] threshold, or fit it"
    ]
