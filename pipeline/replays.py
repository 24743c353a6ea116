"""The prompts of the parity gate: exam questions with what retrieval finds, and the reference completion."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

from domains.records import Message, Passage, Question, Segment
from pipeline.parity import Replay
from pipeline.rows import gold_quotes
from pipeline.student import Base, encode_completion, encode_prompt, render_prompt
from rag.answers import format_reply, reference_answer
from rag.prompt import neutralise, render_question, student_messages
from rag.reflection import ABSTENTION_UTILITY, render_segments
from rag.verdicts import format_verdict

Backend = Literal["none", "text", "tokens", "grader"]
Turn = tuple[list[Message], str]
_MOST_QUOTES = 2


def exam_turns(
    questions: Sequence[Question],
    retrieve: Callable[[str], list[Passage]],
    *,
    system: str,
    abstain: str,
    count: int,
    backend: Backend = "none",
) -> list[Turn]:
    """Messages and completion of up to ``count`` exam questions.

    Which ones depends on their ids only, so that adding a question rarely changes the choice.

    Args:
        questions: the domain's; only those of the exam are taken.
        retrieve: the passages for a query, as in serving.
        system: the student's system prompt.
        abstain: the completion's answer where nothing answers.
        count: most turns.
        backend: ``[reflect] backend``: how a reply is written.
    """
    exam = [question for question in questions if question.split == "exam"]
    exam.sort(key=lambda question: hashlib.sha256(question.id.encode()).hexdigest())
    turns = []
    for question in exam[:count]:
        text = render_question(question)
        passages = retrieve(question.question)
        shown = [] if backend == "tokens" else passages
        completion = _completion(question, passages, abstain)
        if backend == "tokens":
            completion = _reflected(question, passages[:1], abstain)
        elif backend == "text":
            verdict = [bool(gold_quotes(question, [passage])) for passage in passages]
            completion = f"{format_verdict(verdict)}\n{completion}"
        turns.append((student_messages(system, text, shown), completion))
    return turns


def _reflected(question: Question, passages: Sequence[Passage], abstain: str) -> str:
    """A reply of one segment, with every kind of reflection token that it may have."""
    text = _completion(question, passages, abstain)
    segment = Segment(decision="no_retrieval", text=text)
    if passages:
        relevant = bool(gold_quotes(question, passages))
        support: Literal["full"] | None = "full" if relevant else None
        segment = Segment(
            decision="retrieve", passage=passages[0], relevant=relevant, text=text, support=support
        )
    utility = ABSTENTION_UTILITY if question.kind == "unanswerable" else 5
    return "".join(piece.text for piece in render_segments([segment], utility))


def _completion(question: Question, passages: Sequence[Passage], abstain: str) -> str:
    if question.kind == "unanswerable":
        return format_reply(quotes=[], rationale="", answer=abstain)
    quotes = gold_quotes(question, passages)[:_MOST_QUOTES]
    return format_reply(quotes=quotes, rationale="", answer=neutralise(reference_answer(question)))


def make_replay(base: Base, turn: Turn) -> Replay:
    """A turn as training renders and tokenizes its rows."""
    messages, completion = turn
    prompt = render_prompt(base, messages)
    return Replay(
        messages=messages,
        prompt=prompt,
        prompt_tokens=encode_prompt(base, prompt),
        completion=completion,
        completion_tokens=encode_completion(base, completion),
        end_tokens=[base.end_of_turn],
    )
