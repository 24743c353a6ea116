"""Abstention on a set that says which questions its documents answer: is it silent when it should be?

A response is right when it answers an answerable question with a citation into one of its gold documents, or
abstains from an unanswerable one. Whether the words are right is not asked: such sets often have none to
compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from domains.errors import ContextOverflow
from domains.records import Answer
from pipeline.bootstrap import ratio_interval
from pipeline.right import is_given
from pipeline.selective import calibration_error, measure_selective, reliability
from serve.assistant import Asked, Assistant
from serve.confidence import Calibration
from serve.signals import LIKELIHOOD

_CHUNK = 16


@dataclass(frozen=True)
class Case:
    """A question, and the documents that answer it: none for one that is not answerable."""

    question: str
    gold_doc_ids: frozenset[str]


def ask_cases(cases: Sequence[Case], assistant: Assistant) -> list[Answer | None]:
    """Ask all of them; None where a prompt does not fit the context.

    Args:
        cases: the set.
        assistant: with ``signals`` (and without a threshold, to see every answer and choose later).
    """
    answers: list[Answer | None] = []
    for begin in range(0, len(cases), _CHUNK):
        asked = [_prepare(assistant, case) for case in cases[begin : begin + _CHUNK]]
        done = iter(assistant.ask_many([item for item in asked if item]))
        answers += [next(done) if item else None for item in asked]
    return answers


def _prepare(assistant: Assistant, case: Case) -> Asked | None:
    try:
        return assistant.prepare(case.question)
    except ContextOverflow:
        return None


def selective_numbers(
    rows: Sequence[tuple[float, bool]], *, probabilities: bool, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """AURC with its interval and references, and how honest the confidences are; empty without rows.

    Args:
        rows: (confidence, whether the answer is right).
        probabilities: whether the confidences are meant as such; else they only rank.
        resamples: bootstrap samples.
        seed: of the bootstrap.
    """
    confidences, right = [value for value, _ in rows], [outcome for _, outcome in rows]
    found = measure_selective(confidences, right, resamples=resamples, seed=seed)
    if found is None:
        return {}
    numbers = asdict(found)
    if probabilities:
        bins = reliability(confidences, right)
        numbers |= {
            "calibration_error": calibration_error(bins),
            "reliability": [asdict(item) for item in bins],
        }
    return numbers


def measure_abstention(
    cases: Sequence[Case],
    answers: Sequence[Answer | None],
    calibration: Calibration | None = None,
    *,
    bounds: Sequence[float] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Abstention as it is, at the threshold of each bound of wrong answers, and the AURC of the given answers.

    Args:
        cases: the set.
        answers: one each, see `ask_cases`.
        calibration: ranks the answers; without one their likelihood does.
        bounds: values of ``[serve] max_wrong`` to try.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        ``as_is`` and one entry for each bound, with ``right`` (of all responses), ``abstained_when_due``,
        ``abstained_wrongly``, ``wrong_of_given`` (each mean, low, high) and ``given``; and ``selective``.
    """
    fitted = calibration if calibration is not None and calibration.signals else None
    given = [answer is not None and is_given(answer) for answer in answers]
    right = [
        said and answer is not None and any(item.doc_id in case.gold_doc_ids for item in answer.citations)
        for case, answer, said in zip(cases, answers, given, strict=True)
    ]
    sure = [_confidence(answer, fitted) if said else 0.0 for answer, said in zip(answers, given, strict=True)]
    rows = [(value, outcome) for value, outcome, said in zip(sure, right, given, strict=True) if said]
    report: dict[str, Any] = {
        "n": len(cases),
        "answerable": sum(bool(case.gold_doc_ids) for case in cases),
        "ranked_by": "calibration" if fitted else "likelihood",
        "as_is": _count(cases, given, right, resamples, seed),
        "selective": selective_numbers(
            rows, probabilities=fitted is not None, resamples=resamples, seed=seed
        ),
    }
    for bound in bounds:
        if fitted is None or (choice := fitted.choose(bound)) is None:
            continue
        kept = [said and value >= choice.level.threshold for said, value in zip(given, sure, strict=True)]
        report[f"max_wrong={bound:g}"] = {
            "promised": choice.kept,
            "threshold": choice.level.threshold,
            **_count(cases, kept, right, resamples, seed),
        }
    return report


def _confidence(answer: Answer | None, calibration: Calibration | None) -> float:
    if answer is None or not answer.signals:
        return 0.0
    if calibration is None:
        return answer.signals[LIKELIHOOD]
    return calibration.confidence(answer.signals) or 0.0


def _count(
    cases: Sequence[Case], given: Sequence[bool], right: Sequence[bool], resamples: int, seed: int
) -> dict[str, Any]:
    answerable = [bool(case.gold_doc_ids) for case in cases]
    correct = [
        (said and outcome) if due else not said
        for said, outcome, due in zip(given, right, answerable, strict=True)
    ]
    wrong = [said and not outcome for said, outcome in zip(given, right, strict=True)]

    def share(hits: Sequence[bool], of: Sequence[bool]) -> dict[str, float] | None:
        tops = [float(hit and counts) for hit, counts in zip(hits, of, strict=True)]
        interval = ratio_interval(tops, [float(value) for value in of], resamples=resamples, seed=seed)
        return asdict(interval) if interval else None

    silent = [not said for said in given]
    return {
        "given": sum(given),
        "right": share(correct, [True] * len(cases)),
        "abstained_when_due": share(silent, [not due for due in answerable]),
        "abstained_wrongly": share(silent, answerable),
        "wrong_of_given": share(wrong, given),
    }
