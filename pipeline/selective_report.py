"""What an exam says of refusing: per arm, how much wrong would remain if the least certain answers were refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from domains.records import Answer, Question
from pipeline.right import is_given, is_right_and_supported
from pipeline.selective import calibration_error, measure_selective, reliability, risk_coverage
from serve.confidence import Calibration
from serve.signals import LIKELIHOOD

_CURVE_POINTS = 100


def describe_selective(
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[Answer | None]],
    calibration: Calibration | None,
    *,
    clusters: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> dict[str, Any] | None:
    """The report's part on confidence; None where no arm gave an answer.

    Without a calibration, answers are ranked by the probability that the model gave them, and no share of right
    ones is claimed.

    Args:
        questions: of the exam.
        answers: per arm that saw passages, one for each question; None where the prompt was too long.
        calibration: the bundle's.
        clusters: one for each question, see `pipeline.bootstrap.ratio_interval`.
        resamples: bootstrap samples.
        seed: of the bootstrap.
    """
    fitted = calibration if calibration is not None and calibration.signals else None
    arms = {}
    for arm, said in answers.items():
        given = [
            i for i, answer in enumerate(said) if answer is not None and is_given(answer) and answer.signals
        ]
        if given:
            pairs = [(questions[i], said[i]) for i in given]
            groups = [clusters[i] for i in given] if clusters else None
            arms[arm] = _describe(pairs, fitted, groups, resamples, seed)
    if not arms:
        return None
    return {
        "ranked_by": "calibration" if fitted else "likelihood",
        "reason": "" if fitted else (calibration.reason if calibration else "there is no calibration.json"),
        "development": _development(fitted),
        "n_questions": len(questions),
        "arms": arms,
        "text": _text(arms.get("exported_rag"), len(questions)),
    }


def _describe(
    pairs: Sequence[tuple[Question, Answer | None]],
    calibration: Calibration | None,
    clusters: Sequence[str] | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    said = [(question, answer) for question, answer in pairs if answer is not None]
    right = [is_right_and_supported(question, answer) for question, answer in said]
    own = [answer.signals[LIKELIHOOD] for _, answer in said]
    confidences = (
        [calibration.confidence(answer.signals) or 0.0 for _, answer in said] if calibration else own
    )
    found = measure_selective(confidences, right, clusters=clusters, resamples=resamples, seed=seed)
    before = measure_selective(own, right, resamples=0, seed=seed)
    assert found is not None
    assert before is not None
    bins = reliability(confidences, right) if calibration else []
    curve = risk_coverage(confidences, right)
    n = len(curve)
    steps = sorted({max(1, round(step * n / _CURVE_POINTS)) for step in range(1, _CURVE_POINTS + 1)})
    return {
        **asdict(found),
        "aurc_likelihood": before.aurc.mean,
        "calibration_error": calibration_error(bins) if bins else None,
        "reliability": [asdict(item) for item in bins],
        "curve": [[i / n, float(curve[i - 1])] for i in steps],
    }


def _development(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {
        "answers": calibration.answers,
        "right": calibration.right,
        "trained_on": calibration.trained_on,
        **calibration.facts,
        "levels": [level.model_dump() for level in calibration.levels],
        "doubt": calibration.doubt,
    }


def _text(served: Mapping[str, Any] | None, n_questions: int) -> str:
    """The served student in words for people who know no AURC."""
    if served is None:
        return ""
    n, at = served["answers"], served["wrong_at"]
    sentences = [
        f"The served student gave {n} answers to {n_questions} questions; {100 * at['1']:.0f} % of them are wrong "
        "(not what the reference says, or to a question that the documents do not answer)."
    ]
    if n >= 3:
        sentences.append(
            f"If it may refuse the least certain third, it is wrong on {100 * at['0.67']:.0f} %; "
            f"if it may refuse two thirds, on {100 * at['0.33']:.0f} %."
        )
    low, high = served["aurc"]["low"], served["aurc"]["high"]
    if 0 < served["right"] < n and low <= served["random"] <= high:
        sentences.append("That its confidence tells right from wrong can't be seen with so few answers.")
    return " ".join(sentences)
