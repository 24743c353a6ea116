"""What both kinds of reflecting rows stand on: the domain's words, who judges, and the room for abstentions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from domains.records import Example, Message, Passage, Question
from pipeline.augment import Find, Sampling
from pipeline.critic import Critic
from pipeline.rows import Kept, Origin, distractors
from rag.prompt import render_question, student_messages

T = TypeVar("T")
# (question, passages, origin, the request of its rationale) -> a row that abstains
Refuse = Callable[[Question, list[Passage], Origin, str], Example]


@dataclass(frozen=True)
class Ground:
    """What rows of one domain are made of.

    Attributes:
        system: the student's system prompt.
        abstain: the domain's abstention.
        find: (query, top_k) -> passages, best first.
        critic: who judges passages and answers.
        top_k: passages that serving shows in a prompt.
        passages: how many are found for a sentence of an answer (``tokens``) or for the question (``text``).
        rationale_in_target: whether the student learns to write the rationale too.
        sampling: the draws; its seed orders everything else, too.
    """

    system: str
    abstain: str
    find: Find
    critic: Critic
    top_k: int
    passages: int
    rationale_in_target: bool
    sampling: Sampling

    def messages(self, question: Question, passages: Sequence[Passage]) -> list[Message]:
        """The prompt of a row."""
        return student_messages(self.system, render_question(question), passages)

    def ordered(self, items: Sequence[T], key: Callable[[T], str]) -> list[T]:
        """The items in an order that depends on the seed and their keys alone."""
        seed = self.sampling.seed
        return sorted(items, key=lambda item: hashlib.sha256(f"{seed}\0{key(item)}".encode()).digest())

    def abstentions(
        self,
        kept: Sequence[Kept],
        unanswerable: Sequence[Question],
        counts: Counter[str],
        refuse: Refuse,
        *,
        room: int,
        wanted: int,
    ) -> list[Example]:
        """Answerable questions with passages that do not answer, and unanswerable ones; at most ``room`` rows.

        ``wanted`` of the first kind, but half of the room is for the second; what is left out is counted.
        """
        rows: list[Example] = []
        extra = max(min(wanted, max(room // 2, room - len(unanswerable))), 0)
        seen: set[str] = set()
        for item in self.ordered(kept, lambda one: f"irrelevant\0{one.question.id}"):
            if len(rows) < extra and item.question.id not in seen:
                seen.add(item.question.id)
                if others := distractors(item.question, self.find, top_k=self.top_k):
                    rows.append(refuse(item.question, others, "irrelevant", item.rationale.request))
        counts["irrelevant_extra"] = len(rows)
        counts["irrelevant_left_out"] = max(wanted, 0) - len(rows)
        ordered = self.ordered(unanswerable, lambda question: question.id)
        found = [(question, self.find(question.question, self.top_k)) for question in ordered]
        chosen = [pair for pair in found if pair[1]][: max(room - len(rows), 0)]
        counts["unanswerable_left_out"] = len(unanswerable) - len(chosen)
        return rows + [refuse(question, passages, "unanswerable", "") for question, passages in chosen]


def room_for(answers: int, share: float) -> int:
    """The most abstentions beside so many answers, where they may be ``share`` of all rows."""
    return int(answers * share / (1 - share) + 1e-9)


def wanted_extra(irrelevant_share: float, abstention_share: float, kept: int) -> int:
    """Rows of answerable questions whose passages do not answer, beside so many rationales."""
    share = min(irrelevant_share, abstention_share)
    return round(share / (1 - share) * kept)
