"""Threshold and weights of Self-RAG's inference, fitted on a development set (arXiv 2310.11511 §3.3, appendix A).

The student answers every development question once without passages and once per passage; threshold and weights
then only choose among what is there, so the whole grid costs no further pass. The best of some 3,000 settings looks
good on the questions that it was chosen by, so what it is worth is measured out of fold, by document, and it is kept only
where it is certainly better there than what is configured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domains.config import ReflectSection
from domains.domain import Domain
from domains.jsonl import write_jsonl
from pipeline.bootstrap import paired_difference
from pipeline.progress import Progress
from pipeline.reflection_cases import Case, collect, development_questions, general_questions, worth
from pipeline.selective import Bin, calibration_error, reliability
from serve.assistant import Assistant
from serve.reflection_fit import FittedReflection
from serve.reflection_scores import Parts, Weights, best, may_win, segment_score, wants_retrieval
from serve.reflection_tokens import open_tokens

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WEIGHT_GRID = (0.0, 0.5, 1.0, 2.0)
GENERAL_SHARE = 0.25  # of the development questions, where there are instructions: the critic's share of them
LEAST_DOCUMENTS = 10  # as in the exam: fewer, drawn whole, give intervals that are too narrow
FOLDS, REPEATS = 5, 5
RESAMPLES = 2000


@dataclass(frozen=True)
class Fit:
    """The best of the grid, and the present settings for comparison; scores are mean outcomes in [0, 1].

    ``retrieval_rate`` is that of the best, ``retrieval_rate_general`` that of questions that need no passage (None
    without such). ``tried`` counts settings. ``out_of_fold`` is the mean outcome of settings that were chosen without the
    questions' documents, ``gain`` (mean, low, high) what it has above ``before``.
    """

    threshold: float
    weights: Weights
    score: float
    before: float
    always: float
    never: float
    retrieval_rate: float
    retrieval_rate_general: float | None
    questions: int
    documents: int
    tried: int
    out_of_fold: float
    gain: tuple[float, float, float]

    def refusal(self) -> str:
        """Why it is not kept; empty where it is."""
        if self.documents < LEAST_DOCUMENTS:
            return f"the questions are about {self.documents} documents, and {LEAST_DOCUMENTS} are needed"
        if self.gain[1] <= 0:
            return "it is not certainly better than the settings of [reflect]"
        return ""

    def settings(self) -> FittedReflection:
        """What serving reads."""
        return FittedReflection(
            threshold=self.threshold,
            relevance_weight=self.weights.relevance,
            support_weight=self.weights.support,
            utility_weight=self.weights.utility,
            sequence_weight=self.weights.sequence,
            questions=self.questions,
            score=self.score,
            before=self.before,
            retrieval_rate=self.retrieval_rate,
            gain=[round(value, 4) for value in self.gain],
        )

    def toml(self) -> str:
        """The keys to put under ``[reflect]``."""
        return (
            f"threshold = {self.threshold:g}\n"
            f"relevance_weight = {self.weights.relevance:g}\n"
            f"support_weight = {self.weights.support:g}\n"
            f"utility_weight = {self.weights.utility:g}\n"
            f"sequence_weight = {self.weights.sequence:g}\n"
        )


def outcome(case: Case, *, threshold: float, weights: Weights, drop_unsupported: bool) -> tuple[float, bool]:
    """What serving with these settings would have been worth, and whether it would have retrieved."""
    if not case.candidates or not wants_retrieval(case.p_retrieve, threshold):
        return case.closed.outcome, False
    places = may_win(
        [item.unsupported for item in case.candidates],
        [item.silent for item in case.candidates],
        drop_unsupported=drop_unsupported,
    )
    allowed = [case.candidates[at] for at in places]
    if not allowed:
        return case.nothing, True
    scores = [
        segment_score(Parts(item.relevance, item.support, item.utility, item.sequence), weights)
        for item in allowed
    ]
    won = best([item.key for item in allowed], scores, closed=case.is_closed)
    return allowed[won].outcome, True


def fit(cases: Sequence[Case], present: ReflectSection, *, seed: int = 0) -> Fit:
    """The settings of the grid with the highest mean outcome; of equals, the nearest to the present ones.

    Args:
        cases: see `collect`.
        present: what is configured now.
        seed: of the folds and the interval.
    """
    start = Weights(
        relevance=present.relevance_weight,
        support=present.support_weight,
        utility=present.utility_weight,
        sequence=present.sequence_weight,
    )
    drop = present.drop_unsupported
    now = (present.threshold, start)
    grid = [now, *_grid(present.threshold, start)]

    def outcomes(threshold: float, weights: Weights) -> list[tuple[float, bool]]:
        return [outcome(case, threshold=threshold, weights=weights, drop_unsupported=drop) for case in cases]

    # Stable, so of equally good ones the nearest comes first.
    grid.sort(key=lambda setting: _far(setting, now))
    table = np.array([[value for value, _ in outcomes(*setting)] for setting in grid])  # [settings, cases]
    documents = [case.about or case.question_id for case in cases]
    found = int(table.mean(axis=1).argmax())
    threshold, weights = grid[found]
    before = table[grid.index(now)]
    unseen = _out_of_fold(table, documents, seed=seed)
    ones = [1.0] * len(cases)
    gain = paired_difference(
        (unseen.tolist(), ones), (before.tolist(), ones), clusters=documents, resamples=RESAMPLES, seed=seed
    )
    assert gain is not None  # there are questions
    looked = [way for _, way in outcomes(threshold, weights)]
    general = [way for way, case in zip(looked, cases, strict=True) if not case.about]
    return Fit(
        threshold=threshold,
        weights=weights,
        score=float(table[found].mean()),
        before=float(before.mean()),
        always=_mean(outcomes(-1.0, start)),
        never=_mean(outcomes(1.0, start)),
        retrieval_rate=sum(looked) / len(looked),
        retrieval_rate_general=sum(general) / len(general) if general else None,
        questions=len(cases),
        documents=len({case.about for case in cases if case.about}),
        tried=len(grid),
        out_of_fold=float(unseen.mean()),
        gain=(gain.mean, gain.low, gain.high),
    )


def _mean(outcomes: Sequence[tuple[float, bool]]) -> float:
    return sum(value for value, _ in outcomes) / len(outcomes)


def _out_of_fold(table: NDArray[np.float64], documents: Sequence[str], *, seed: int) -> NDArray[np.float64]:
    """What each case is worth with the settings that are best for the other folds' documents, over several deals.

    Args:
        table: [settings, cases], of equally good settings the first is taken.
        documents: [cases]; equal ones share a fold.
        seed: deals the folds.
    """
    names = {name: at for at, name in enumerate(dict.fromkeys(documents))}
    member = np.array([names[name] for name in documents])
    worth = np.zeros(len(documents))
    for repeat in range(REPEATS):
        fold = (np.random.default_rng(seed + repeat).permutation(len(names)) % FOLDS)[member]
        for number in range(FOLDS):
            out = fold == number
            # All of one document: nothing is left to choose by, the nearest setting stays.
            best_there = int(table[:, ~out].mean(axis=1).argmax()) if not out.all() else 0
            worth[out] += table[best_there, out] / REPEATS
    return worth


Setting = tuple[float, Weights]


def _far(one: Setting, other: Setting) -> float:
    pairs = zip(astuple(one[1]), astuple(other[1]), strict=True)
    return abs(one[0] - other[0]) + sum(abs(float(a) - float(b)) for a, b in pairs)


def _grid(threshold: float, weights: Weights) -> list[Setting]:
    """Every setting but the present one."""
    return [
        (at, each)
        for each in _weights(weights)
        for at in sorted({*THRESHOLDS, threshold})
        if (at, each) != (threshold, weights)
    ]


def _weights(present: Weights) -> list[Weights]:
    grid = [Weights(*values) for values in itertools.product(WEIGHT_GRID, repeat=4) if any(values)]
    return grid if present in grid else [present, *grid]


def retrieval_reliability(cases: Sequence[Case]) -> tuple[list[Bin], float]:
    """p(retrieve) against whether passages helped: bins, and the expected calibration error.

    Passages helped where the answer chosen with the paper's weights is worth more than the one without. Questions
    where both are worth the same say nothing and are left out.
    """
    pairs = []
    for case in cases:
        with_passages, looked = outcome(case, threshold=-1.0, weights=Weights(), drop_unsupported=False)
        if looked and case.p_retrieve is not None and with_passages != case.closed.outcome:
            pairs.append((case.p_retrieve, with_passages > case.closed.outcome))
    if not pairs:
        return [], 0.0
    table = reliability([p for p, _ in pairs], [helped for _, helped in pairs])
    return table, calibration_error(table)


@dataclass(frozen=True)
class ReflectionFit:
    """``settings`` are the best of the grid; ``reason`` says why they are not kept, empty where they are.

    ``facts`` are all numbers as plain data.
    """

    settings: FittedReflection
    reason: str
    facts: dict[str, Any]


def fit_student(
    domain: Domain,
    assistant: Assistant,
    *,
    count: int,
    trained_on: Set[str],
    progress: Progress,
    keep: Path | None = None,
) -> ReflectionFit:
    """Fit the settings of a domain's student.

    Args:
        domain: whose seed questions and general instructions are drawn.
        assistant: of the bundle, with a retriever.
        count: most development questions, 0 = all; up to a quarter of them are general instructions.
        trained_on: ids of the questions in the training rows.
        progress: told what happens.
        keep: where the cached candidates are written, JSONL.

    Raises:
        ModelError: the student has no reflection tokens.
        DataError: there are no development questions.
    """
    reflect = domain.config.reflect
    reflector = open_tokens(reflect, assistant.engine)
    general = general_questions(
        domain.read_instructions(),
        count=max(1, round(GENERAL_SHARE * count)) if count else 0,
        seed=reflect.seed,
        trained_on=trained_on,
    )
    questions = development_questions(
        domain.read_questions(),
        count=max(1, count - len(general)) if count else 0,
        seed=reflect.seed,
        trained_on=trained_on,
    )
    cases = collect(
        assistant,
        reflector,
        [*questions, *general],
        value=lambda question, text, asked: worth(question, text, assistant, asked),
        progress=progress,
    )
    if keep is not None:
        write_jsonl(keep, cases)
    found = fit(cases, reflect, seed=reflect.seed)
    table, error = retrieval_reliability(cases)
    reason = found.refusal()
    progress.say(_told(found, reason))
    if found.retrieval_rate in {0.0, 1.0}:
        progress.say(
            "the fitted threshold retrieves for all questions or none: the decision tells nothing apart"
        )
    facts = {
        **asdict(found),
        "gain": [round(value, 4) for value in found.gain],
        "kept": not reason,
        "reason": reason,
        "general": len(general),
        "trained_on": sum(question.id in trained_on for question in questions),
        "toml": found.toml(),
        "retrieval_reliability": [asdict(each) for each in table],
        "retrieval_calibration_error": error,
    }
    return ReflectionFit(found.settings(), reason, facts)


def _told(found: Fit, reason: str) -> str:
    low, high = (f"{100 * value:+.1f}" for value in found.gain[1:])
    kept = f"not kept, [reflect] decides: {reason}" if reason else "kept"
    return (
        f"reflection fitted on {found.questions} questions: {100 * found.before:.1f} -> {100 * found.out_of_fold:.1f} "
        f"points out of fold (gain {low} to {high}), threshold {found.threshold:g}, retrieves for "
        f"{100 * found.retrieval_rate:.0f} %: {kept}"
    )
