"""The turns of a conversation as text: what is shown of an answer, and what a follow-up looks for."""

from __future__ import annotations

from domains.records import Answer, Message
from rag.prompt import stem_of
from rag.words import index_terms, words

_SOURCES = "\n\nSources:\n"
_SHORT = 3  # words that count; below that a question hardly says what it is about
_POINTING = """
it its he him his she her they them their this that these those there then one ones
"""
_REFERRING = frozenset(_POINTING.split())
_LEADS = (
    ("and",),
    ("or",),
    ("but",),
    ("so",),
    ("also",),
    ("what", "about"),
    ("how", "about"),
    ("what", "if"),
)


def sources_text(answer: Answer) -> str:
    """The quotes an answer rests on, as text to put behind it; empty where there are none."""
    if not answer.citations:
        return ""
    return _SOURCES + "\n".join(source_lines(answer))


def source_lines(answer: Answer) -> list[str]:
    """One line for each quote: the passage's number, the document's title, the literal words."""
    return [f'[{item.number}] {item.title}: "{" ".join(item.quote.split())}"' for item in answer.citations]


def without_sources(content: str) -> str:
    """An earlier answer as a client sends it back, without the quotes that were put behind it."""
    return content.partition(_SOURCES + "[")[0]


def retrieval_query(question: str, history: list[Message]) -> str:
    """What to look for: the question, a closed one without its options; the user's previous question with it where it stands on that.

    That is when it has fewer than three words that count, begins like a follow-up ("and", "what about"),
    or has a pronoun among its first four words. The model still sees the question as it was asked.
    """
    previous = next((turn.content for turn in reversed(history) if turn.role == "user"), "")
    question = stem_of(question)
    said = words(question)
    refers = any(tuple(said[: len(lead)]) == lead for lead in _LEADS) or not _REFERRING.isdisjoint(said[:4])
    if previous and (refers or len(set(index_terms(question))) < _SHORT):
        return f"{stem_of(previous)}\n{question}"
    return question
