"""What `benchmarks/distillation.py` says of reflecting and of abstaining students, each figure with its number of cases and its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from domains.domain import Domain
from domains.records import Answer, Question
from pipeline.arms import Conditions
from pipeline.bootstrap import ratio_interval
from pipeline.development import RetrievesWithout, ask_items, draw_items, judge_items, seed_questions
from pipeline.fit import calibrate
from pipeline.progress import Progress
from pipeline.reflection_report import support_pairs
from pipeline.selective_report import describe_selective
from serve.confidence import Calibration
from serve.engine import Engine

RESAMPLES = 2000
REFLECTING = ("tokens", "text", "grader")  # of several arms that say something the first counts
_SURE = 0.5  # support from which an answer counts as called supported


def reflection(
    questions: Sequence[Question], answers: Mapping[str, Sequence[Answer | None]], *, seed: int = 0
) -> dict[str, Any]:
    """Retrieval rate and support precision, of the first reflecting arm that says anything of it.

    Args:
        questions: of the exam; intervals draw the documents that they are about.
        answers: by arm, one for each question; None where the prompt was too long.
        seed: of the bootstrap.

    Returns:
        ``retrieval_rate`` and ``support_precision`` (plain numbers, None where no arm tells); for each ``…_n``, ``…_interval`` and
        under ``reflecting_arm`` the name of the arm.
    """
    found: dict[str, Any] = {"reflecting_arm": {}}
    for name, measure in (("retrieval_rate", retrieval_rate), ("support_precision", support_precision)):
        shares = {arm: measure(questions, answers.get(arm, ()), seed=seed) for arm in REFLECTING}
        arm = next((arm for arm in REFLECTING if shares[arm]["n"]), None)
        share = shares[arm] if arm else {"mean": None, "n": 0, "interval": None}
        found |= {name: share["mean"], f"{name}_n": share["n"], f"{name}_interval": share["interval"]}
        if arm:
            found["reflecting_arm"][name] = arm
    return found


def retrieval_rate(
    questions: Sequence[Question], answers: Sequence[Answer | None], *, seed: int = 0
) -> dict[str, Any]:
    """Of the answers of a reflecting student, the share for which it looked for passages."""
    outcomes = [
        [answer.reflection.retrieved] if answer is not None and answer.reflection else []
        for answer in answers
    ]
    return _share(questions, outcomes, seed)


def support_precision(
    questions: Sequence[Question], answers: Sequence[Answer | None], *, seed: int = 0
) -> dict[str, Any]:
    """Of the answers that the student calls supported (at least half sure), the share that a passage carries."""
    outcomes = [
        [carried for support, carried in support_pairs([answer]) if support >= _SURE] if answer else []
        for answer in answers
    ]
    return _share(questions, outcomes, seed)


def _share(questions: Sequence[Question], outcomes: Sequence[Sequence[bool]], seed: int) -> dict[str, Any]:
    """``mean``, ``n`` and ``interval`` of the true ones among all outcomes; the questions about a document are drawn together."""
    n = sum(map(len, outcomes))
    if not n:
        return {"mean": None, "n": 0, "interval": None}
    interval = ratio_interval(
        [float(sum(each)) for each in outcomes],
        [float(len(each)) for each in outcomes],
        clusters=[question.about for question, _ in zip(questions, outcomes, strict=True)],
        resamples=RESAMPLES,
        seed=seed,
    )
    assert interval is not None  # some question has an outcome
    return {
        "mean": round(interval.mean, 4),
        "n": n,
        "interval": [round(interval.low, 4), round(interval.high, 4)],
    }


def fit_to_development(
    domain: Domain,
    engine: Engine,
    retriever: RetrievesWithout,
    conditions: Conditions,
    *,
    trained_on: Set[str],
    count: int,
    progress: Progress,
) -> Calibration:
    """The student's confidence, fitted as the calibrate stage fits it: to its answers to seed questions, unseen ones first.

    Args:
        domain: whose seed questions are asked.
        engine: the student.
        retriever: finds what is shown.
        conditions: as in the exam, else the answers would be other ones.
        trained_on: ids of the questions that the student was trained on.
        count: prompts in all, 0 = all.
        progress: one bar.

    Returns:
        With a ``reason`` and without a model where there are too few right or wrong answers.
    """
    options = domain.config.calibrate
    items = draw_items(
        seed_questions(domain.read_questions()),
        set(trained_on),
        retriever,
        count=count,
        top_k=conditions.top_k,
        seed=options.seed,
    )
    answers = ask_items(
        items,
        engine,
        system=conditions.system,
        abstain=conditions.abstain,
        top_k=conditions.top_k,
        max_tokens=conditions.max_tokens,
        unsupported="keep",  # as the exam asks
        reflector=None,
        progress=progress,
    )
    rows = judge_items(items, answers, set(trained_on), folds=options.folds, seed=options.seed)
    calibration, _ = calibrate(rows, folds=options.folds, sources={})
    return calibration


def abstention(
    questions: Sequence[Question],
    answers: Sequence[Answer | None],
    calibration: Calibration | None = None,
    *,
    arm: str = "quotes",
) -> dict[str, Any]:
    """Area under the risk-coverage curve of the answers given, by the fitted confidence and by the likelihood alone.

    Args:
        questions: of the exam; intervals draw the documents that they are about.
        answers: one for each question; None where the prompt was too long.
        calibration: see `fit_to_development`; without a model in it the likelihood ranks.
        arm: whose answers they are, for the record.

    Returns:
        ``abstention_aurc``, ``abstention_aurc_likelihood`` (None without answers) and ``abstention``: what ranked
        (``ranked_by``), why it was not the fitted confidence (``reason``), how many ``development`` answers there were,
        and the curve's figures.
    """
    found = describe_selective(
        questions,
        {arm: answers},
        calibration,
        clusters=[question.about for question in questions],
        resamples=RESAMPLES,
        seed=0,
    )
    if found is None:
        return {"abstention_aurc": None, "abstention_aurc_likelihood": None}
    figures = found["arms"][arm]
    names = ("answers", "right", "aurc", "random", "oracle", "wrong_at")
    about = calibration or Calibration()
    return {
        "abstention_aurc": round(figures["aurc"]["mean"], 4),
        "abstention_aurc_likelihood": round(figures["aurc_likelihood"], 4),
        "abstention": {
            "arm": arm,
            "ranked_by": found["ranked_by"],
            "reason": found["reason"],
            "development": {
                "answers": about.answers,
                "right": about.right,
                "trained_on": about.trained_on,
                **about.facts,
            },
            **{name: figures[name] for name in names},
        },
    }
