"""Public question sets as their folders hold them: PubMedQA, OpenStax's health books, K-QA's judged claims.

Each reader takes the folder and which half of the set to read (``dev`` or ``hidden``). Nothing is downloaded or kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domains.jsonl import iter_json_lines
from domains.records import Document, Passage, Question
from pipeline.bootstrap import ratio_interval
from rag.passages import split_document

_FINDINGS = re.compile(r"RESULT|FINDING|OBSERV|OUTCOME|CONCL", re.IGNORECASE)
RESAMPLES = 2000
_SNIPPETS = 6


@dataclass(frozen=True)
class Read:
    """A yes/no question with the text that is given with it."""

    question: Question
    text: str


@dataclass(frozen=True)
class Claim:
    """A statement about an answer, and what most of three physicians said: is it entailed?"""

    question: str
    answer: str
    claim: str
    label: str


def pubmedqa(folder: Path, *, split: str) -> list[Read]:
    """Questions with the findings of their abstracts: the sections named so, else the last one (arXiv 1909.06146)."""
    return [
        Read(
            Question(
                id=row["id"], kind="yes_no", question=row["question"], answer=row["answer"], about=row["pmid"],
                split="exam",
            ),
            findings(row["contexts"], row["context_labels"]),
        )
        for row in json_rows(folder / f"{split}.jsonl")
    ]  # fmt: skip


def findings(sections: Sequence[str], labels: Sequence[str]) -> str:
    """The sections of an abstract that say what was found."""
    named = [text for text, label in zip(sections, labels, strict=True) if _FINDINGS.search(label)]
    return "\n".join(named or sections[-1:])


def bioasq_yes_no(folder: Path, *, split: str) -> list[Read]:
    """Yes/no questions with their first gold snippets: another set than PubMedQA to learn from."""
    texts = {row["doc_id"]: row["text"] for row in json_rows(folder / f"{split}_corpus.jsonl")}
    snippets: dict[str, list[str]] = {}
    for row in json_rows(folder / f"{split}_qrels.jsonl"):
        snippets.setdefault(row["query_id"], []).append(texts[row["doc_id"]])
    return [
        Read(
            Question(
                id=row["id"], kind="yes_no", question=row["question"], answer=row["exact_answer"], about=row["id"],
                split="seed",
            ),
            "\n".join(snippets[row["id"]][:_SNIPPETS]),
        )
        for row in json_rows(folder / f"{split}.jsonl")
        if row["type"] == "yesno" and row["id"] in snippets
    ]  # fmt: skip


def openstax(folder: Path, *, split: str, passage_chars: int = 350) -> tuple[list[Passage], list[Question]]:
    """The books' text in passages, and the end-of-section questions about it.

    Args:
        folder: with ``<split>_passages.jsonl`` and ``<split>_mcq.jsonl``.
        split: ``dev`` or ``hidden``.
        passage_chars: length of a passage.
    """
    documents = [
        Document(doc_id=row["id"], title=row["module"], text=row["text"], source=row["book"])
        for row in json_rows(folder / f"{split}_passages.jsonl")
    ]
    questions = [
        Question(
            id=row["id"], kind="options", question=row["question"], options=row["options"], answer=row["answer"],
            about=" / ".join((row["book"], row["chapter"], row["module"])), split="exam",
        )
        for row in json_rows(folder / f"{split}_mcq.jsonl")
    ]  # fmt: skip
    passages = [
        passage
        for document in documents
        for passage in split_document(document, max_chars=passage_chars, overlap_chars=0)
    ]
    return passages, questions


def kqa_claims(folder: Path, *, split: str) -> list[Claim]:
    """K-QA's statements with the majority of the physicians' labels (arXiv 2401.14493)."""
    return [
        Claim(row["question"], row["answer"], row["claim"], row["majority_label"])
        for row in json_rows(folder / f"{split}_nli.jsonl")
    ]


def accuracy(
    right: Sequence[float],
    clusters: Sequence[str] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """The share of right ones with its 95 % interval, and their number; 0.5 is right half of the time."""
    found = ratio_interval(
        [float(value) for value in right],
        [1.0] * len(right),
        clusters=clusters,
        resamples=resamples,
        seed=seed,
    )
    assert found is not None  # a set has questions
    numbers = {name: round(value, 4) for name, value in asdict(found).items()}
    return {"accuracy": numbers["mean"], "interval": [numbers["low"], numbers["high"]], "n": len(right)}


def drawn(n: int, count: int, *, seed: int) -> list[int]:
    """``count`` of ``n`` places at random, in order; all for 0."""
    if not count or count >= n:
        return list(range(n))
    return sorted(np.random.default_rng(seed).permutation(n)[:count].tolist())


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file as they stand."""
    return [row for _, row in iter_json_lines(path)]
