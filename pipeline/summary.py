"""From answers to ``report.json``: marks, intervals, paired differences, verdict, and where it all came from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from domains.config import OnUnsupported
from domains.records import Answer, Hit, Passage, Question
from pipeline.arms import Row
from pipeline.bootstrap import mcnemar, paired_difference, ratio_interval
from pipeline.metrics import Gold, Mark, locate_gold, mark_answer, mark_retrieval
from pipeline.reflection_report import describe_reflection
from pipeline.run_folder import Run
from pipeline.selective_report import describe_selective
from pipeline.verdict import give_verdict
from rag.prompt import render_question
from serve.confidence import Calibration, read_calibration
from serve.manifest import CALIBRATION, MANIFEST, read_manifest

PAIRS = (
    ("tuned_rag", "base_rag"),
    ("exported_rag", "tuned_rag"),
    ("base_rag", "base"),
    ("tuned_rag", "tuned"),
)
SPEED = ("tokens_per_s", "seconds_per_question")
RIGHT_OR_WRONG = ("option_accuracy", "yes_no_accuracy", "abstention_recall", "false_abstention")
EXAMPLES = 5
# With a handful of documents, drawing whole documents gives intervals that are too narrow to be honest.
MIN_CLUSTERS = 10

Marks = Mapping[str, Mapping[str, Mark]]  # question id -> metric -> mark


@dataclass(frozen=True)
class Sources:
    """What other stages left behind that the report shows; empty where a stage did not run."""

    parity: dict[str, Any] | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: list[dict[str, Any]] = field(default_factory=list)
    sizes_bytes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    teachers: list[str] = field(default_factory=list)
    calibration: Calibration | None = None

    @classmethod
    def of(cls, run: Run) -> Self:
        """The sources in a run folder."""
        parity, calibration = run.bundle / "parity.json", run.bundle / CALIBRATION
        losses = run.training / "loss.jsonl"
        files = [*run.bundle.glob("*.gguf"), *run.export.glob("*.gguf")]
        manifest = read_manifest(run.bundle) if (run.bundle / MANIFEST).is_file() else None
        return cls(
            parity=json.loads(parity.read_text("utf-8")) if parity.is_file() else None,
            stages={
                name: {"counts": entry.counts, "facts": entry.facts, "seconds": entry.seconds}
                for name, entry in run.finished().items()
                if name != "exam"
            },
            losses=_json_lines(losses) if losses.is_file() else [],
            sizes_bytes={path.name: path.stat().st_size for path in sorted(files)},
            versions=manifest.versions if manifest else {},
            teachers=manifest.teachers if manifest else [],
            calibration=read_calibration(calibration) if calibration.is_file() else None,
        )


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def summarise(
    questions: Sequence[Question],
    rows: Mapping[str, Sequence[Row]],
    *,
    hits: Mapping[str, Sequence[Hit]],
    passages: Sequence[Passage],
    abstain: str,
    resamples: int,
    seed: int,
    not_drawn: int,
    seen_documents: Set[str],
    about: Mapping[str, str],
    sources: Sources,
    unsupported: OnUnsupported = "withdraw",
) -> dict[str, Any]:
    """The report as JSON; numbers are rounded to 4 digits. A metric that no question speaks of is left out.

    Args:
        questions: the exam.
        rows: every arm's answers.
        hits: what was retrieved per question, at least 10 deep.
        passages: all of the index.
        abstain: the domain's sentence.
        resamples: bootstrap samples.
        seed: of the bootstrap and the drawn examples.
        not_drawn: exam questions that were not asked.
        seen_documents: ids of the documents that seed questions are about.
        about: the domain: name, title, disclaimer, licence, base.
        sources: what other stages left behind.
        unsupported: ``[serve] unsupported``, for the score as served.
    """
    located = {question.id: locate_gold(question, passages) for question in questions}
    gold = {name: found for name, (found, _) in located.items()}
    marks = {arm: _mark_arm(questions, answers, gold, abstain, unsupported) for arm, answers in rows.items()}
    draw = _Draw(questions, resamples, seed)
    arms = {arm: draw.intervals(values) for arm, values in marks.items()}
    differences = {f"{one}-{other}": draw.differences(marks[one], marks[other]) for one, other in PAIRS}
    verdict = give_verdict(
        differences=differences, arms=arms, n_questions=len(questions),
        bits_equal=bool((sources.parity or {}).get("bits_equal")),
    )  # fmt: skip
    report = {
        "schema_version": 1,
        "domain": dict(about),
        "verdict": verdict.text,
        "verdict_code": verdict.code,
        **draw.facts(),
        "n_seen_documents": len(seen_documents & {question.about for question in questions}),
        "arms": arms,
        "differences": differences,
        "retrieval": draw.intervals(
            {
                name: mark_retrieval(found, hits[name])
                for name, (found, missing) in located.items()
                if not missing
            }
        ),
        **_from_sources(sources),
        "left_out": {
            "not_drawn": not_drawn,
            "too_long": {arm: sum(row.answer is None for row in answers) for arm, answers in rows.items()},
            "gold_not_found": [
                {"question": name, "quote": quote} for name, (_, lost) in located.items() for quote in lost
            ],
        },
        "examples": _examples(questions, rows, marks, seed),
    }
    shown = {arm: [row.answer for row in values] for arm, values in rows.items() if arm.endswith("_rag")}
    selective = describe_selective(
        questions, shown, sources.calibration, clusters=draw.clusters, resamples=resamples, seed=seed
    )
    if selective is not None:
        report["selective"] = selective
    answers = {arm: [answer for answer in values if answer] for arm, values in shown.items()}
    if (reflection := describe_reflection(answers)) is not None:
        report["reflection"] = reflection
    rounded: dict[str, Any] = _rounded(report)
    return rounded


def _mark_arm(
    questions: Sequence[Question],
    rows: Sequence[Row],
    gold: Mapping[str, Sequence[Gold]],
    abstain: str,
    unsupported: OnUnsupported,
) -> dict[str, dict[str, Mark]]:
    return {
        question.id: mark_answer(
            question,
            row.answer,
            gold=gold[question.id],
            abstain=abstain,
            seconds=row.seconds,
            unsupported=unsupported,
        )
        for question, row in zip(questions, rows, strict=True)
    }


class _Draw:
    """Intervals and differences over the exam's questions, all from the same draws."""

    def __init__(self, questions: Sequence[Question], resamples: int, seed: int) -> None:
        documents = [question.about for question in questions]
        self._questions = questions
        self.clusters = documents if len(set(documents)) >= MIN_CLUSTERS else None
        self._resamples = resamples
        self._seed = seed

    def facts(self) -> dict[str, Any]:
        """How much was asked, and how it is resampled."""
        return {
            "n_questions": len(self._questions),
            "kinds": dict(sorted(Counter(question.kind for question in self._questions).items())),
            "n_documents": len({question.about for question in self._questions}),
            "resampled": "documents" if self.clusters else "questions",
            "resamples": self._resamples,
            "seed": self._seed,
        }

    def _columns(self, marks: Marks, metric: str) -> tuple[list[float], list[float]]:
        pairs = [marks.get(question.id, {}).get(metric, (0.0, 0.0)) for question in self._questions]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def intervals(self, marks: Marks) -> dict[str, dict[str, float]]:
        """Per metric: mean, low, high."""
        result = {}
        for metric in _metrics(marks.values()):
            numerators, denominators = self._columns(marks, metric)
            interval = ratio_interval(
                numerators,
                denominators,
                clusters=self.clusters,
                resamples=self._resamples,
                seed=self._seed,
            )
            if interval is not None:
                result[metric] = asdict(interval)
        return result

    def differences(self, one: Marks, other: Marks) -> dict[str, dict[str, float]]:
        """Per metric that both arms have, speed apart: mean, low, high, p; and McNemar's p for 0/1 metrics."""
        shared = set(_metrics(other.values())) - {*SPEED, "too_long"}
        result = {}
        for metric in [name for name in _metrics(one.values()) if name in shared]:
            columns = self._columns(one, metric), self._columns(other, metric)
            difference = paired_difference(
                *columns, clusters=self.clusters, resamples=self._resamples, seed=self._seed
            )
            if difference is None:
                continue
            result[metric] = asdict(difference)
            if metric in RIGHT_OR_WRONG:
                result[metric]["mcnemar_p"] = mcnemar(*([value == 1 for value in c[0]] for c in columns))
        return result


def _metrics(marks: Iterable[Mapping[str, Mark]]) -> list[str]:
    """The names of all metrics, in the order in which they first occur, the headline first."""
    names = dict.fromkeys(name for values in marks for name in values)
    return sorted(names, key=lambda name: name != "score")


def _from_sources(sources: Sources) -> dict[str, Any]:
    parity = sources.parity
    stages = sources.stages
    return {
        "parity": {key: parity.get(key) for key in ("ready", "kl", "top1_agreement", "bits_equal")}
        if parity
        else None,
        "elicit": stages.get("elicit"),
        "curate": stages.get("curate"),
        "train": stages.get("train"),
        "export": stages.get("export"),
        "stage_seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "losses": sources.losses,
        "sizes_bytes": sources.sizes_bytes,
        "versions": sources.versions,
        "teachers": sources.teachers,
    }


def _examples(
    questions: Sequence[Question], rows: Mapping[str, Sequence[Row]], marks: Mapping[str, Marks], seed: int
) -> list[dict[str, Any]]:
    """Questions drawn by hash, one of each kind first: not chosen for what the answers look like."""
    order = sorted(questions, key=lambda q: hashlib.sha256(f"example {seed}:{q.id}".encode()).hexdigest())
    first = {question.kind: question for question in reversed(order)}
    picked = [*first.values(), *(question for question in order if question not in first.values())]
    answers = {arm: {row.question_id: row.answer for row in values} for arm, values in rows.items()}
    return [
        {
            "id": question.id,
            "kind": question.kind,
            "question": question.question,
            "options": question.options,
            "reference": question.answer,
            "gold": [quote.model_dump() for quote in question.gold],
            "answers": {
                arm: _said(question, answers[arm][question.id], marks[arm][question.id]["score"][0])
                for arm in rows
            },
        }
        for question in sorted(picked[:EXAMPLES], key=lambda question: (question.kind, question.id))
    ]


def _said(question: Question, answer: Answer | None, score: float) -> dict[str, Any]:
    if answer is None:
        return {
            "question": render_question(question),
            "text": None,
            "support": "too_long",
            "citations": [],
            "score": score,
        }
    return {
        "question": answer.question,
        "text": answer.text,
        "support": answer.support,
        "citations": [citation.model_dump() for citation in answer.citations],
        "score": score,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
