"""K-QA's questions of patients (arXiv 2401.14493): how much of what a physician's answer must say is said.

The paper's completeness asks a large model whether an answer entails each statement. Nothing that runs here judges
entailment (`pipeline.public_sets_support`), so words count: the share of a statement's content words that the answer
has. What repeating the question and what the physician's own answer reach by that measure stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domains.domain import Domain
from domains.records import Passage
from pipeline.progress import Progress
from pipeline.public_sets import accuracy, drawn, json_rows
from rag.answers import is_abstention
from rag.citations import coverage
from serve.assistant import Assistant, Retrieves
from serve.engine import Engine

_AT_ONCE = 32  # questions between two moves of the bar


@dataclass(frozen=True)
class Consultation:
    """A patient's question, a physician's answer, and the statements that it must make."""

    question: str
    answer: str
    must_have: tuple[str, ...]


def kqa_consultations(folder: Path, *, split: str) -> list[Consultation]:
    """K-QA's questions with answers; those without a must-have statement are left out."""
    return [
        Consultation(row["question"], row["answer"], tuple(row["must_have"]))
        for row in json_rows(folder / f"{split}.jsonl")
        if row["must_have"]
    ]


def completeness(answer: str, must_have: Sequence[str]) -> float:
    """The mean share of the statements' content words that an answer has, in [0, 1]."""
    said = Passage(
        passage_id="answer#0", doc_id="answer", title="", heading="", text=answer, start=0, end=len(answer)
    )
    return sum(coverage(statement, said) for statement in must_have) / len(must_have)


def measure_consultations(
    rows: Sequence[Consultation],
    domain: Domain,
    retrievers: Mapping[str, Retrieves | None],
    progress: Progress,
    *,
    engine: Engine,
    asked: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Completeness of a model's answers, by what finds its passages; and of the question and the physician's answer.

    Args:
        rows: see `kqa_consultations`.
        domain: whose system prompt and sizes it is asked with.
        retrievers: by name; None asks closed-book.
        progress: one bar for each.
        engine: the model.
        asked: how many questions, 0 = all.
        seed: of the draw.

    Returns:
        By name ``accuracy`` (the mean), ``interval``, ``n``, and ``abstained``, the share of answers that say nothing.
    """
    rows = [rows[at] for at in drawn(len(rows), asked, seed=seed)]
    result: dict[str, Any] = {
        "question_repeated": accuracy([completeness(row.question, row.must_have) for row in rows]),
        "physician": accuracy([completeness(row.answer, row.must_have) for row in rows]),
    }
    config = domain.config
    for name, retriever in retrievers.items():
        assistant = Assistant(
            engine, retriever, system=domain.prompts["system"], abstain=config.domain.abstain,
            top_k=config.retrieve.top_k, max_tokens=config.serve.max_tokens, unsupported="keep",
        )  # fmt: skip
        progress.start(f"kqa: {name}", len(rows))
        texts: list[str] = []
        for begin in range(0, len(rows), _AT_ONCE):
            asked_now = [assistant.prepare(row.question) for row in rows[begin : begin + _AT_ONCE]]
            texts += [answer.text for answer in assistant.ask_many(asked_now)]
            progress.advance(len(asked_now))
        silent = [is_abstention(text, abstain=config.domain.abstain) for text in texts]
        found = [completeness(text, row.must_have) for text, row in zip(texts, rows, strict=True)]
        result[name] = {**accuracy(found), "abstained": round(sum(silent) / len(silent), 4)}
    return result
