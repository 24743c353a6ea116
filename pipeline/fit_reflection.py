"""Threshold and weights of Self-RAG's inference, fitted on a development set (arXiv 2310.11511 §3.3, appendix A).

The student answers every development question once without passages and once per passage; threshold and weights
then only choose among what is there, so the whole grid costs no further pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from domains.config import ReflectSection
from domains.domain import Domain
from domains.jsonl import write_jsonl
from pipeline.progress import Progress
from pipeline.reflection_cases import Case, collect, development_questions, worth
from pipeline.selective import Bin, calibration_error, reliability
from serve.assistant import Assistant
from serve.reflection_fit import FittedReflection
from serve.reflection_scores import Parts, Weights, best, segment_score, wants_retrieval
from serve.reflection_tokens import open_tokens

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WEIGHT_GRID = (0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Fit:
    """The best of the grid, and the present settings for comparison; scores are mean outcomes in [0, 1].

    ``retrieval_rate`` is that of the best. ``tried`` counts settings.
    """

    threshold: float
    weights: Weights
    score: float
    before: float
    always: float
    never: float
    retrieval_rate: float
    questions: int
    tried: int

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
    allowed = [item for item in case.candidates if not (drop_unsupported and item.unsupported)]
    if not allowed:
        return case.nothing, True
    scores = [
        segment_score(Parts(item.relevance, item.support, item.utility, item.sequence), weights)
        for item in allowed
    ]
    won = best([item.key for item in allowed], scores, closed=case.is_closed)
    return allowed[won].outcome, True


def fit(cases: Sequence[Case], present: ReflectSection) -> Fit:
    """The settings of the grid with the highest mean outcome; of equals, the nearest to the present ones.

    Args:
        cases: see `collect`.
        present: what is configured now.
    """
    start = Weights(
        relevance=present.relevance_weight,
        support=present.support_weight,
        utility=present.utility_weight,
        sequence=present.sequence_weight,
    )
    drop = present.drop_unsupported

    def mean(threshold: float, weights: Weights) -> float:
        values = [
            outcome(case, threshold=threshold, weights=weights, drop_unsupported=drop)[0] for case in cases
        ]
        return sum(values) / len(values)

    def far(threshold: float, weights: Weights) -> float:
        pairs = zip(astuple(weights), astuple(start), strict=True)
        return abs(threshold - present.threshold) + sum(
            abs(float(one) - float(other)) for one, other in pairs
        )

    tried = [
        (mean(threshold, weights), -far(threshold, weights), threshold, weights)
        for weights in _weights(start)
        for threshold in sorted({*THRESHOLDS, present.threshold})
    ]
    score, _, threshold, weights = max(tried, key=lambda item: item[:2])
    looked = [outcome(case, threshold=threshold, weights=weights, drop_unsupported=drop)[1] for case in cases]
    return Fit(
        threshold=threshold,
        weights=weights,
        score=score,
        before=mean(present.threshold, start),
        always=mean(-1.0, start),
        never=mean(1.0, start),
        retrieval_rate=sum(looked) / len(looked),
        questions=len(cases),
        tried=len(tried),
    )


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


def fit_student(
    domain: Domain,
    assistant: Assistant,
    *,
    count: int,
    trained_on: Set[str],
    progress: Progress,
    keep: Path | None = None,
) -> tuple[FittedReflection, dict[str, Any]]:
    """Fit the settings of a domain's student: what serving reads, and all numbers as plain data.

    Args:
        domain: whose seed questions are drawn.
        assistant: of the bundle, with a retriever.
        count: most development questions, 0 = all.
        trained_on: ids of the questions in the training rows.
        progress: told what happens.
        keep: where the cached candidates are written, JSONL.

    Raises:
        ModelError: the student has no reflection tokens.
        DataError: there are no development questions.
    """
    reflect = domain.config.reflect
    reflector = open_tokens(reflect, assistant.engine)
    questions = development_questions(
        domain.read_questions(), count=count, seed=reflect.seed, trained_on=trained_on
    )
    cases = collect(
        assistant,
        reflector,
        questions,
        value=lambda question, text, asked: worth(question, text, assistant, asked),
        progress=progress,
    )
    if keep is not None:
        write_jsonl(keep, cases)
    found = fit(cases, reflect)
    table, error = retrieval_reliability(cases)
    progress.say(
        f"reflection fitted on {found.questions} questions: {100 * found.before:.0f} -> {100 * found.score:.0f} points, "
        f"threshold {found.threshold:g}, retrieves for {100 * found.retrieval_rate:.0f} %"
    )
    if found.retrieval_rate in {0.0, 1.0}:
        progress.say(
            "the fitted threshold retrieves for all questions or none: the decision tells nothing apart"
        )
    facts = {
        **asdict(found),
        "trained_on": sum(question.id in trained_on for question in questions),
        "toml": found.toml(),
        "retrieval_reliability": [asdict(each) for each in table],
        "retrieval_calibration_error": error,
    }
    return found.settings(), facts
