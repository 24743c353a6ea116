"""Development questions: what the student is asked before it is known how sure it may be.

Each answerable question is asked twice: with the passages that retrieval finds, and with those of its gold
documents left out, so that there is nothing right to say. The domain's own unanswerable seed
questions are asked as they are. Questions that training did not use come first: a student is surer of what it
has learnt by heart than of anything that users ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal, Protocol

from domains.config import OnUnsupported
from domains.errors import ContextOverflow
from domains.records import Answer, Hit, Question, Record
from pipeline.progress import Progress
from pipeline.right import is_given, is_right_and_supported
from rag.prompt import render_question
from serve.assistant import Asked, Assistant
from serve.engine import Engine
from serve.reflection import Reflector
from serve.vote import GREEDY, Votes

PARALLEL = 8
CHUNK = 2 * PARALLEL
Part = Literal["answerable", "gold_removed", "unanswerable"]


class RetrievesWithout(Protocol):
    """A retriever that can leave documents out, such as `rag.retrieve.Retriever`."""

    def retrieve(self, query: str, *, top_k: int, without: Set[str] = frozenset()) -> list[Hit]:
        """The ``top_k`` best passages as if the documents ``without`` were not in the index."""


@dataclass(frozen=True)
class Item:
    """One development question with the passages to be shown."""

    question: Question
    hits: list[Hit]
    part: Part


class Row(Record):
    """One development answer. ``answer`` is None where the prompt did not fit; ``fold`` its group of documents.

    ``confidence`` is that of a model which saw no answer about the same documents; None where there is none.
    """

    question_id: str
    part: Part
    trained_on: bool
    fold: int
    answer: Answer | None
    given: bool
    right: bool
    confidence: float | None = None


# -- the questions -----------------------------------------------------------------------------------


def seed_questions(questions: Sequence[Question]) -> list[Question]:
    """Those of the seed split: what is examined must not be fitted to."""
    return [question for question in questions if question.split == "seed"]


def draw_items(
    questions: Sequence[Question],
    seen: set[str],
    retriever: RetrievesWithout,
    *,
    count: int,
    top_k: int,
    seed: int,
) -> list[Item]:
    """The questions to be asked, with what is shown for each.

    Args:
        questions: of the seed split.
        seen: ids of those that training used; they are drawn last.
        retriever: of the bundle.
        count: prompts in all; 0 takes everything.
        top_k: passages per item, as many as answering may ask for (`serve.reflection.retrieval_depth`).
        seed: orders the draw.
    """
    order = sorted(questions, key=lambda q: (q.id in seen, _draw_order(f"{seed}:{q.id}"), q.id))
    items: list[Item] = []
    for question in order:
        if count and len(items) >= count:
            break
        items += _items_of(question, retriever, top_k)
    return items[: count or None]


def _items_of(question: Question, retriever: RetrievesWithout, top_k: int) -> list[Item]:
    """The gold documents are left out before ranking: a first passage of rank 4 would give the gap away."""
    hits = retriever.retrieve(question.question, top_k=top_k)
    if question.kind == "unanswerable":
        return [Item(question, hits, "unanswerable")]
    gold = {question.about, *(quote.doc_id for quote in question.gold)}
    others = retriever.retrieve(question.question, top_k=top_k, without=gold)
    return [Item(question, hits, "answerable"), Item(question, others, "gold_removed")]


def _draw_order(text: str) -> str:
    return hashlib.sha256(f"calibrate {text}".encode()).hexdigest()


# -- the answers -------------------------------------------------------------------------------------


class _Shown:
    """A retriever that finds what an item shows, whatever is looked for."""

    def __init__(self, item: Item) -> None:
        self._hits = item.hits

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:  # noqa: ARG002  whatever is looked for
        """The item's first ``top_k`` passages."""
        return self._hits[:top_k]


def ask_items(
    items: Sequence[Item],
    engine: Engine,
    *,
    system: str,
    abstain: str,
    top_k: int,
    max_tokens: int,
    unsupported: OnUnsupported,
    reflector: Reflector | None,
    votes: Votes = GREEDY,
    progress: Progress,
) -> list[Answer | None]:
    """Answer all items through the assistant that serves; None where a prompt does not fit the context.

    A reflecting student looks for passages itself while it answers, so its items are asked one by one.
    """

    def assistant_of(item: Item) -> Assistant:
        return Assistant(
            engine,
            _Shown(item),
            system=system,
            abstain=abstain,
            top_k=top_k,
            max_tokens=max_tokens,
            unsupported=unsupported,
            signals=True,
            reflector=reflector,
            votes=votes,
        )

    progress.start("calibrate: asking", len(items))
    answers: list[Answer | None] = []
    size = CHUNK if reflector is None else 1
    for begin in range(0, len(items), size):
        chunk = items[begin : begin + size]
        asking = [assistant_of(item) for item in chunk]
        asked = [_prepare(assistant, item) for assistant, item in zip(asking, chunk, strict=True)]
        engine.forget()  # the answers must not depend on what was asked before
        done = iter(asking[0].ask_many([each for each in asked if each is not None]))
        answers += [None if each is None else next(done) for each in asked]
        progress.advance(len(chunk))
    return answers


def _prepare(assistant: Assistant, item: Item) -> Asked | None:
    try:
        return assistant.prepare(render_question(item.question), query=item.question.question)
    except ContextOverflow:
        return None


def judge_items(
    items: Sequence[Item], answers: Sequence[Answer | None], seen: set[str], *, folds: int, seed: int
) -> list[Row]:
    """Which answers were given, and which of them are right and supported."""
    documents = sorted(
        {item.question.about for item in items}, key=lambda name: _draw_order(f"{seed}:{name}")
    )
    fold = {name: number % folds for number, name in enumerate(documents)}
    rows = []
    for item, answer in zip(items, answers, strict=True):
        given = answer is not None and is_given(answer)
        right = (
            given
            and answer is not None
            and item.part == "answerable"
            and is_right_and_supported(item.question, answer)
        )
        rows.append(
            Row(
                question_id=item.question.id,
                part=item.part,
                trained_on=item.question.id in seen,
                fold=fold[item.question.about],
                answer=answer,
                given=given,
                right=right,
            )
        )
    return rows
