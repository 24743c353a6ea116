"""Which passages the teacher sees: those that decide the answer, among others that were retrieved."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from domains.records import Passage, Question, Quote

# (query, how many) → passages, best first
Find = Callable[[str, int], list[Passage]]


def teacher_passages(
    passages: Sequence[Passage], find: Find, *, top_k: int
) -> Callable[[Question, str], list[Passage]]:
    """A function of a question and its reference answer to the passages for the teacher's prompt.

    All passages that hold a gold quote, filled up to ``top_k`` with what is retrieved for the question (for
    question and reference answer where no gold passage is known). Their order is a hash of question and
    passage: the right passage has no favourite number.
    """
    documents: defaultdict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        documents[passage.doc_id].append(passage)

    def choose(question: Question, reference: str) -> list[Passage]:
        chosen: dict[str, Passage] = {}
        for quote in question.gold:
            chosen |= {passage.passage_id: passage for passage in holding(quote, documents[quote.doc_id])}
        query = question.question if chosen else f"{question.question} {reference}"
        room = top_k - len(chosen)
        others = [each for each in find(query, top_k + len(chosen)) if each.passage_id not in chosen]
        chosen |= {passage.passage_id: passage for passage in others[: max(0, room)]}
        return sorted(chosen.values(), key=lambda passage: _shuffled(question.id, passage.passage_id))

    return choose


def holding(quote: Quote, passages: Sequence[Passage]) -> list[Passage]:
    """The passages of one document that hold the quote: one, or the neighbours that it spans."""
    parts = quote.quote.split()
    if not parts:
        return []
    pattern = re.compile(r"\s+".join(re.escape(part) for part in parts))
    whole = [passage for passage in passages if pattern.search(passage.text)]
    if whole:
        return whole[:1]
    text = [" "] * max((passage.end for passage in passages), default=0)
    for passage in passages:
        text[passage.start : passage.end] = passage.text
    match = pattern.search("".join(text))
    if match is None:
        return []
    return [passage for passage in passages if passage.start < match.end() and match.start() < passage.end]


def _shuffled(question_id: str, passage_id: str) -> bytes:
    return hashlib.sha256(f"{question_id}\0{passage_id}".encode()).digest()
