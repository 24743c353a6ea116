"""Does retrieval know when the documents do not answer? A confidence from its scores alone, without a model.

It is fitted on questions about other documents than those reported: each is searched twice, with all documents and
as if those that answer it were missing. An answer counts as right where the first passage is of a document that
answers the question. MedQuAD's answerable set marks no words (the page is the answer), so nothing else can be asked of
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domains.records import Hit
from pipeline.abstention import Case
from pipeline.development import RetrievesWithout
from pipeline.fit import L2
from pipeline.public_sets import accuracy, json_rows
from pipeline.selective import measure_selective
from serve.confidence import Calibration, fit_logistic
from serve.signals import SIGNALS, measure

Floats = NDArray[np.float64]
TOP_K = 3
# What is known before a word is written.
RETRIEVAL = ("fused_top", "fused_margin", "dense_top", "lexical_top", "both_lists", "question_coverage")
_LIKELY = 0.5
_NO_REPLY = dict.fromkeys(SIGNALS[:5], 0.0)
_ALONE = ("dense_top", "lexical_top")


def medquad_cases(folder: Path, *, split: str) -> tuple[list[Case], list[str]]:
    """All questions, answerable or not, and the disease of each.

    Args:
        folder: with ``<split>_questions.jsonl``.
        split: ``dev`` or ``hidden``.
    """
    rows = json_rows(folder / f"{split}_questions.jsonl")
    return (
        [Case(row["question"], frozenset(row["gold_doc_ids"])) for row in rows],
        [row["focus"].casefold() for row in rows],
    )


@dataclass(frozen=True)
class Confidence:
    """Two models over `RETRIEVAL`: that the first passage is right, and that any document answers at all."""

    right: Calibration
    answerable: Calibration


def fit_on_pairs(cases: Sequence[Case], retriever: RetrievesWithout) -> Confidence:
    """Fitted to each case as it is, and to each answerable one as if its documents were missing.

    Args:
        cases: most of them answerable.
        retriever: over documents that answer them.
    """
    rows: list[dict[str, float]] = []
    right: list[bool] = []
    answerable: list[bool] = []
    for case in cases:
        for without in {frozenset[str](): None, case.gold_doc_ids: None}:  # once where nothing answers
            hits = retriever.retrieve(case.question, top_k=TOP_K, without=without)
            rows.append(signals_of(case.question, hits))
            right.append(_is_right(case, hits))
            answerable.append(bool(case.gold_doc_ids) and not without)
    values = np.array([[row[name] for name in RETRIEVAL] for row in rows])
    return Confidence(_fit(values, right), _fit(values, answerable))


def _fit(values: Floats, outcome: Sequence[bool]) -> Calibration:
    """A logistic model; with one outcome only there is none."""
    if not 0 < sum(outcome) < len(outcome):
        return Calibration(reason="only one outcome to fit to")
    means, spread = values.mean(axis=0), values.std(axis=0)
    scales = np.where(spread > 1e-9, spread, 1.0)
    weights, bias = fit_logistic((values - means) / scales, outcome, l2=L2)
    return Calibration(
        signals=list(RETRIEVAL), means=means.tolist(), scales=scales.tolist(), weights=weights.tolist(), bias=bias,
        l2=L2, answers=len(outcome), right=sum(outcome),
    )  # fmt: skip


def measure_retrieval_confidence(
    cases: Sequence[Case],
    groups: Sequence[str],
    retriever: RetrievesWithout,
    confidence: Confidence,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """AURC over all questions, where each is answered with its first passage; and who is told apart.

    Args:
        cases: answerable or not.
        groups: one each, drawn together for the intervals.
        retriever: over the documents.
        confidence: see `fit_on_pairs`.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        By confidence (``right``, ``answerable``, and single scores): `Selective` as a dict and ``tells_apart``, the
        probability that an answerable question is surer than an unanswerable one. For ``answerable`` also what silence
        below one half comes to: ``abstained_when_due``, ``abstained_wrongly``.
    """
    found = [retriever.retrieve(case.question, top_k=TOP_K) for case in cases]
    rows = [signals_of(case.question, hits) for case, hits in zip(cases, found, strict=True)]
    right = [_is_right(case, hits) for case, hits in zip(cases, found, strict=True)]
    due = [bool(case.gold_doc_ids) for case in cases]
    confidences: Mapping[str, list[float]] = {
        "right": [confidence.right.confidence(row) or 0.0 for row in rows],
        "answerable": [confidence.answerable.confidence(row) or 0.0 for row in rows],
        **{name: [row[name] for row in rows] for name in _ALONE},
    }
    result: dict[str, Any] = {
        "n": len(cases),
        "n_answerable": sum(due),
        "learnt_from": confidence.right.answers,
    }
    for name, values in confidences.items():
        numbers = measure_selective(values, right, clusters=groups, resamples=resamples, seed=seed)
        assert numbers is not None  # a set has questions
        result[name] = asdict(numbers) | {"tells_apart": round(auroc(values, due), 4)}
    silent = [value < _LIKELY for value in confidences["answerable"]]
    missing = [not answers for answers in due]
    result["answerable"] |= {
        "abstained_when_due": _share(silent, missing, groups, seed),
        "abstained_wrongly": _share(silent, due, groups, seed),
    }
    return result


def signals_of(question: str, hits: Sequence[Hit]) -> dict[str, float]:
    """The retrieval signals as serving measures them."""
    found = measure(question=question, answer="", hits=hits, citations=[], rejected=0, likelihood=_NO_REPLY)
    return {name: found[name] for name in RETRIEVAL}


def auroc(values: Sequence[float], positive: Sequence[bool]) -> float:
    """The probability that a positive one has the higher value, half of it where they are equal."""
    scores, hit = np.asarray(values), np.asarray(positive, dtype=bool)
    gaps = scores[hit][:, None] - scores[~hit][None]
    return float((gaps > 0).mean() + 0.5 * (gaps == 0).mean()) if gaps.size else 0.5


def _share(hits: Sequence[bool], of: Sequence[bool], groups: Sequence[str], seed: int) -> dict[str, Any]:
    chosen = [i for i, counts in enumerate(of) if counts]
    return accuracy([hits[i] for i in chosen], [groups[i] for i in chosen], seed=seed)


def _is_right(case: Case, hits: Sequence[Hit]) -> bool:
    return bool(hits) and hits[0].passage.doc_id in case.gold_doc_ids
