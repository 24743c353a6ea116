"""Yes, no or maybe from a given text: the cues of `rag.polarity`, a model's likelihoods, both.

Fitted arms never see the answers that they are marked by: they learn from other questions of the set (each fifth is
answered by a fit to the other four), from another half of it, or from another set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from domains.records import Passage
from pipeline.bootstrap import paired_difference
from pipeline.fit_yes_no import FOLDS, REPEATS, out_of_fold, predict
from pipeline.logistic import Floats
from pipeline.progress import Progress
from pipeline.public_sets import RESAMPLES, Read, accuracy, drawn
from pipeline.verify_model import passage_gains
from rag.polarity import polarity
from serve.engine import Engine

LEAST = 200  # questions that the model scored, for a fit to its scores
WORDS = ("yes", "no", "maybe")


def measure_yes_no(
    reads: Sequence[Read],
    progress: Progress,
    *,
    learn: Sequence[Read] = (),
    elsewhere: Sequence[Read] = (),
    engine: Engine | None = None,
    system: str = "",
    asked: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of each way to decide.

    Args:
        reads: what is reported.
        progress: one unit per question that the model scores.
        learn: labelled questions of the same kind to fit to; without them the arms are fitted out of fold.
        elsewhere: another set to fit to; adds the arm ``cues_elsewhere``.
        engine: the model; None leaves its arms out.
        system: see `passage_gains`.
        asked: how many questions the model scores, drawn at random; 0 = all.
        seed: of the folds, the draw and the intervals.

    Returns:
        ``always_yes`` and by arm ``accuracy``, ``interval``, ``n``: ``cues``; ``cues_elsewhere`` (only the spread of the
        cues is taken from the questions, no answer); on those that the model scored ``gain`` (the word that gains
        most), ``gain_levelled`` (less its mean over the questions, so that no word is preferred throughout), and from
        `LEAST` of them on ``cues_same``, ``cues_gain`` (fitted out of fold); ``cues_minus_yes`` (paired); ``fitted`` says on what.
    """
    gold = [read.question.answer or "" for read in reads]
    cues = table(reads)
    right, ones = _right(cues, gold, learn, seed), [1.0] * len(gold)
    yes = [float(answer == "yes") for answer in gold]
    gap = paired_difference((right, ones), (yes, ones), resamples=RESAMPLES, seed=seed)
    result: dict[str, Any] = {
        "always_yes": round(float(np.mean(yes)), 4),
        "labels": dict(sorted(Counter(gold).items())),
        "fitted": f"{len(learn)} other questions"
        if learn
        else f"out of fold, {FOLDS} folds, {REPEATS} times",
        "cues": accuracy(right, seed=seed),
        "cues_minus_yes": [round(value, 4) for value in (gap.mean, gap.low, gap.high)] if gap else None,
    }
    if elsewhere:
        others = table(elsewhere)
        moved = predict(
            _standard(cues), _standard(others), [read.question.answer or "" for read in elsewhere]
        )
        result["cues_elsewhere"] = _arm(moved, gold, seed) | {"learnt_from": len(elsewhere)}
    if engine is not None:
        places = drawn(len(reads), asked, seed=seed)
        result |= _by_model([reads[i] for i in places], cues[places], engine, system, progress, seed)
    return result


def table(reads: Sequence[Read]) -> Floats:
    """The cues of each, [questions, cues]."""
    return np.array([polarity(read.question.question, read.text) for read in reads], dtype=np.float64)


def gains_of(reads: Sequence[Read], engine: Engine, progress: Progress, *, system: str = "") -> Floats:
    """What yes, no and maybe gain in log-probability from each text, [questions, 3]."""
    progress.start("yes/no: what each answer gains from the text", len(reads))
    rows = []
    for read in reads:
        passage = Passage(
            passage_id=read.question.id, doc_id=read.question.about, title="Abstract", heading="", text=read.text,
            start=0, end=len(read.text),
        )  # fmt: skip
        found = passage_gains(engine, read.question, [passage], system=system)
        rows.append([found[word] for word in WORDS])
        progress.advance()
    return np.array(rows, dtype=np.float64)


def _by_model(
    reads: Sequence[Read], cues: Floats, engine: Engine, system: str, progress: Progress, seed: int
) -> dict[str, Any]:
    gold = [read.question.answer or "" for read in reads]
    gained = gains_of(reads, engine, progress, system=system)
    levelled = gained - gained.mean(axis=0)
    result = {
        "gain": _arm([WORDS[i] for i in gained.argmax(axis=1)], gold, seed),
        "gain_levelled": _arm([WORDS[i] for i in levelled.argmax(axis=1)], gold, seed),
    }
    if len(reads) >= LEAST:
        result["cues_same"] = accuracy(_right(cues, gold, (), seed), seed=seed)
        result["cues_gain"] = accuracy(_right(np.column_stack([cues, gained]), gold, (), seed), seed=seed)
    return result


def _right(cues: Floats, gold: Sequence[str], learn: Sequence[Read], seed: int) -> list[float]:
    """How often each is right: once after a fit to ``learn``, else in repeated draws of the folds."""
    each = [str(i) for i in range(len(gold))]
    tries = (
        [predict(cues, table(learn), [read.question.answer or "" for read in learn])]
        if learn
        else [out_of_fold(cues, gold, each, seed=seed + i) for i in range(REPEATS)]
    )
    return [float(np.mean([said[i] == label for said in tries])) for i, label in enumerate(gold)]


def _standard(rows: Floats) -> Floats:
    spread = rows.std(axis=0)
    standard: Floats = (rows - rows.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    return standard


def _arm(said: Sequence[str], gold: Sequence[str], seed: int) -> dict[str, Any]:
    return accuracy([a == b for a, b in zip(said, gold, strict=True)], seed=seed)
