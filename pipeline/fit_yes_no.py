"""What the cues of a document say of a yes/no answer: fitted to a domain's seed questions, kept only where it helps.

The cues are of what serving will read for a question (`serve.yes_no.read_evidence`): retrieval's mistakes are in the
fit. Its accuracy is out of fold; questions about one document share a fold, and are drawn together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from domains.records import Question
from pipeline.bootstrap import paired_difference
from pipeline.logistic import Fit, Floats, fit_labels
from pipeline.progress import Progress
from rag.polarity import NAMES, polarity
from serve.options import Find
from serve.yes_no import FittedYesNo, read_evidence

LEAST = 50  # questions; where two ways differ on 4 of 10, fewer leave 18 points within chance
LEAST_DOCUMENTS = 10  # as in the exam: fewer, drawn whole, give intervals that are too narrow
FOLDS, REPEATS = 5, 5
RESAMPLES = 2000


@dataclass(frozen=True)
class YesNoFit:
    """``model`` is None where there was too little to fit to; ``reason`` says why it is not kept, empty where it is."""

    model: FittedYesNo | None
    reason: str
    facts: dict[str, Any]


def fit_yes_no(
    questions: Sequence[Question], find: Find, *, folds: int, seed: int, progress: Progress
) -> YesNoFit:
    """Fit the cues to the answers of the yes/no questions among ``questions``.

    Args:
        questions: of the seed split; other kinds are left out.
        find: looks for passages, as serving does.
        folds: groups of documents of the cross-validation.
        seed: of the folds and the interval.
        progress: told what comes of it.

    Returns:
        The model, and as plain data ``questions``, ``labels``, ``documents``, ``nothing_found`` (questions left out),
        ``kept``, ``reason``; where it was fitted ``accuracy`` (out of fold), ``majority`` (always their commonest
        answer), ``gain`` (mean, low, high).
    """
    asked = [question for question in questions if question.kind == "yes_no"]
    progress.start("calibrate: yes/no questions", len(asked))
    used, rows = [], []
    for question in asked:
        evidence = read_evidence(question.question, find)
        if evidence is not None:
            used.append(question)
            rows.append(polarity(question.question, evidence.text))
        progress.advance()
    labels = [question.answer or "" for question in used]
    groups = [question.about for question in used]
    facts: dict[str, Any] = {
        "questions": len(used),
        "labels": dict(sorted(Counter(labels).items())),
        "documents": len(set(groups)),
        "nothing_found": len(asked) - len(used),
    }
    reason = _too_little(labels, groups)
    model = None
    if not reason:
        model = _fit(np.array(rows, dtype=np.float64), labels, groups, folds=folds, seed=seed)
        facts |= model.model_dump(include={"accuracy", "majority", "gain"})
        if model.gain[1] <= 0:
            reason = "they are not certainly better than always giving the commonest answer"
    progress.say(_told(len(used), model, reason))
    return YesNoFit(model, reason, {**facts, "kept": not reason, "reason": reason})


def out_of_fold(
    rows: Floats, labels: Sequence[str], groups: Sequence[str], *, seed: int, folds: int = FOLDS
) -> list[str]:
    """The likeliest label of each row by a fit to the other folds.

    Args:
        rows: [questions, cues].
        labels: one each.
        groups: one each; equal ones share a fold.
        seed: deals the groups.
        folds: how many.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    dealt = np.random.default_rng(seed).permutation(len(names)) % folds
    fold = dealt[[names[name] for name in groups]]
    said = [""] * len(rows)
    for number in sorted(set(fold.tolist())):
        out, rest = ([int(i) for i in np.flatnonzero(hit)] for hit in (fold == number, fold != number))
        found = predict(rows[out], rows[rest], [labels[i] for i in rest])
        for i, label in zip(out, found, strict=True):
            said[i] = label
    return said


def predict(rows: Floats, learn: Floats, labels: Sequence[str]) -> list[str]:
    """The likeliest label of each row, after a fit to ``learn`` and its ``labels``."""
    fit = fit_labels(learn, labels)
    return [fit.labels[i] for i in fit.probabilities(rows).argmax(axis=1)]


def _too_little(labels: Sequence[str], groups: Sequence[str]) -> str:
    if len(labels) < LEAST:
        return f"{LEAST} seed questions to be answered yes, no or maybe are needed"
    if len(set(groups)) < LEAST_DOCUMENTS:
        return f"the questions are about {len(set(groups))} documents, and {LEAST_DOCUMENTS} are needed"
    if len(set(labels)) < 2:
        return f"all answers are {labels[0]!r}"
    return ""


def _fit(rows: Floats, labels: Sequence[str], groups: Sequence[str], *, folds: int, seed: int) -> FittedYesNo:
    tries = [out_of_fold(rows, labels, groups, seed=seed + i, folds=folds) for i in range(REPEATS)]
    right = [float(np.mean([said[i] == label for said in tries])) for i, label in enumerate(labels)]
    (commonest, count), *_ = Counter(sorted(labels)).most_common(1)
    ones = [1.0] * len(labels)
    gain = paired_difference(
        (right, ones),
        ([float(label == commonest) for label in labels], ones),
        clusters=groups,
        resamples=RESAMPLES,
        seed=seed,
    )
    assert gain is not None  # there are questions
    return _record(
        fit_labels(rows, labels),
        questions=len(labels),
        accuracy=round(float(np.mean(right)), 4),
        majority=round(count / len(labels), 4),
        gain=[round(value, 4) for value in (gain.mean, gain.low, gain.high)],
    )


def _record(fit: Fit, *, questions: int, accuracy: float, majority: float, gain: list[float]) -> FittedYesNo:
    return FittedYesNo(
        labels=cast("Any", list(fit.labels)),
        cues=list(NAMES),
        means=fit.mean.tolist(),
        scales=fit.scale.tolist(),
        weights=fit.weights.tolist(),
        questions=questions,
        accuracy=accuracy,
        majority=majority,
        gain=gain,
    )


def _told(questions: int, model: FittedYesNo | None, reason: str) -> str:
    found = ""
    if model is not None:
        low, high = (f"{100 * value:+.0f}" for value in model.gain[1:])
        found = (
            f", out of fold {100 * model.accuracy:.0f} % right where always the commonest answer is "
            f"{100 * model.majority:.0f} % (gain {low} to {high} points)"
        )
    kept = f"not kept, the student answers them: {reason}" if reason else "kept"
    return f"yes/no by evidence, {questions} seed questions{found}: {kept}"
