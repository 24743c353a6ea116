"""Who judges what reflection tokens will say: the interface of critics (arXiv 2310.11511 §3.2.1).

A critic gets many questions at once, because a teacher answers them in parallel. What it can't judge is None,
never a default: the caller counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from domains.records import Critique, CritiqueTask, Passage, Question
from rag.prompt import render_question

# What may be answered; a retrieve decision at the beginning of an answer knows no "continue".
LABELS: dict[CritiqueTask, tuple[str, ...]] = {
    "retrieve": ("retrieve", "no_retrieval", "continue"),
    "isrel": ("relevant", "irrelevant"),
    "issup": ("full", "partial", "none"),
    "isuse": ("1", "2", "3", "4", "5"),
}


@dataclass(frozen=True)
class Ask:
    """One thing to judge. Which fields count depends on the task, see `domains.records.Critique`."""

    task: CritiqueTask
    question: Question
    passage: Passage | None = None
    preceding: str = ""
    output: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that may be given here."""
        return (
            LABELS[self.task][:2] if self.task == "retrieve" and self.passage is None else LABELS[self.task]
        )

    def labelled(self, label: str, explanation: str, teacher: str) -> Critique:
        """The record of a judgement."""
        return Critique(
            task=self.task,
            question_id=self.question.id,
            instruction=render_question(self.question),
            preceding=self.preceding,
            output=self.output,
            passage_id=self.passage.passage_id if self.passage else "",
            evidence=evidence_text(self.passage) if self.passage else "",
            label=label,
            explanation=explanation,
            teacher=teacher,
        )


class Critic(Protocol):
    """Judges. ``name`` says who, in every record."""

    name: str

    def judge(self, asks: Sequence[Ask]) -> list[Critique | None]:
        """A judgement each, in the given order; None where there is none.

        Raises:
            StageError: too many can't be read.
        """


def evidence_text(passage: Passage) -> str:
    """A passage as a critic sees it."""
    return f"{passage.title}\n{passage.text.strip()}"
