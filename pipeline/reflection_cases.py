"""What a reflecting student answers to development questions, in every way that serving could choose.

Each question is answered once without passages and once per passage. The development set is drawn by document from
the seed questions and never holds an exam question; general instructions that training left out stand for the
questions that need no passage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, replace

from domains.errors import DataError
from domains.records import Instruction, Question, Record
from pipeline.metrics import mark_answer
from pipeline.progress import Progress
from rag.prompt import closed_form, render_question
from serve.assistant import Asked, Assistant
from serve.engine import Completion
from serve.reflection_tokens import Candidate, Plan, TokenReflector, closed_answer

_CHUNK = 8


class CachedAnswer(Record):
    """One candidate: its judgements, what it answers (closed questions), and what it is worth in [0, 1]."""

    relevance: float | None
    support: float | None
    utility: float | None
    sequence: float | None
    unsupported: bool
    silent: bool = False
    key: str | None
    outcome: float


class Case(Record):
    """A development question with all its candidates: ``closed`` is the answer without a passage.

    ``nothing`` is what the abstention is worth here; ``about`` the question's document, empty where it needs none.
    """

    question_id: str
    about: str
    is_closed: bool
    p_retrieve: float | None
    closed: CachedAnswer
    candidates: list[CachedAnswer]
    nothing: float


def development_questions(
    questions: Sequence[Question], *, count: int, seed: int, trained_on: Set[str] = frozenset()
) -> list[Question]:
    """Seed questions in an order drawn by document; those that training did not use come first.

    Args:
        questions: the domain's; those of the exam are never taken.
        count: how many at most; 0 = all.
        seed: of the draw.
        trained_on: ids of questions that the student was trained on: it is surer of them than of any other.

    Raises:
        DataError: there are none.
    """
    seeds = [question for question in questions if question.split == "seed"]
    if not seeds:
        raise DataError(
            f"0 of {len(questions)} questions are for development",
            expected='questions with "split": "seed"',
            next_step="add questions to the domain's questions.jsonl",
        )
    drawn = sorted(seeds, key=lambda each: (each.id in trained_on, _place(each.about, seed), each.id))
    return drawn[:count] if count else drawn


def general_questions(
    instructions: Sequence[Instruction], *, count: int, seed: int, trained_on: Set[str]
) -> list[Question]:
    """General instructions that no training row is made of, in a drawn order: questions that need no passage.

    Args:
        instructions: the domain's, see ``[reflect] instructions``.
        count: how many at most; 0 = all.
        seed: of the draw.
        trained_on: ids of what the student was trained on.
    """
    unseen = [each for each in instructions if each.id not in trained_on]
    drawn = sorted(unseen, key=lambda each: _place(each.id, seed))
    return [each.as_question() for each in (drawn[:count] if count else drawn)]


def _place(document: str, seed: int) -> str:
    return hashlib.sha256(f"development {seed}:{document}".encode()).hexdigest()


def worth(question: Question, text: str, assistant: Assistant, asked: Asked) -> float:
    """The exam's headline score of a text as an answer to the question."""
    answer = assistant.judge(replace(asked, hits=[]), Completion(text, [], 0, "stop"))
    marks = mark_answer(question, answer, gold=[], abstain=assistant.abstention, seconds=0)
    return marks["score"][0]


def collect(
    assistant: Assistant,
    reflector: TokenReflector,
    questions: Sequence[Question],
    *,
    value: Callable[[Question, str, Asked], float],
    progress: Progress,
) -> list[Case]:
    """Let the student answer every question in every way.

    Args:
        assistant: with the reflector as its back-end, and a retriever.
        reflector: writes the candidates.
        questions: the development set.
        value: what a text is worth as an answer to a question, in [0, 1].
        progress: one bar.
    """
    cases: list[Case] = []
    progress.start("fit: answers", len(questions))
    for begin in range(0, len(questions), _CHUNK):
        chunk = questions[begin : begin + _CHUNK]
        asked = [assistant.prepare(render_question(question), query=question.question) for question in chunk]
        wishes = reflector.decide(asked, assistant)
        ways = [
            [
                reflector.plan(item, wish, assistant, retrieve=way)
                for item, wish in zip(asked, wishes, strict=True)
            ]
            for way in (False, True)
        ]
        limit = max(item.max_tokens for item in asked)
        closed, opened = (reflector.candidates(plans, assistant, max_tokens=limit) for plans in ways)
        for at, question in enumerate(chunk):
            cases.append(_case(question, asked[at], ways[1][at], closed[at][0], opened[at], assistant, value))
        progress.advance(len(chunk))
    return cases


def _case(
    question: Question,
    asked: Asked,
    plan: Plan,
    closed: Candidate,
    candidates: Sequence[Candidate],
    assistant: Assistant,
    value: Callable[[Question, str, Asked], float],
) -> Case:
    form = closed_form(asked.question)

    def cached(item: Candidate) -> CachedAnswer:
        return CachedAnswer(
            **asdict(item.stretch.parts),
            unsupported=item.stretch.label == "none",
            silent=item.stretch.silent,
            key=closed_answer(item.stretch.text, form),
            outcome=value(question, item.stretch.text, asked),
        )

    return Case(
        question_id=question.id,
        about=question.about,
        is_closed=form is not None,
        p_retrieve=plan.wish.p_retrieve,
        closed=cached(closed),
        candidates=[cached(item) for item in candidates] if plan.retrieved else [],
        nothing=value(question, f"Answer: {assistant.abstention}", asked),
    )
