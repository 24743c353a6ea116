"""Content words and sentences, as curation and the importers count them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from domains.words import NUMBER_WORDS
from rag.words import sentence_spans, stem, words

_STOP_WORDS = (
    "a about above after again all also am an and any are as at be because been before being below between both "
    "but by can could did do does doing done down during each either few for from further had has have having he "
    "her here hers him his how i if in into is it its itself just may me might more most must my no nor not of off "
    "on once one only or other our out over own per same shall she should so some such than that the their theirs "
    "them then there these they this those through to too under until up upon us very was we were what when where "
    "which while who whom whose why will with within without would yes you your yours"
)
_STOP = frozenset(_STOP_WORDS.split())
_HEADING = re.compile(r"#{1,6}[ \t][^\n]*(?:\n\s*|$)")
_LIST_MARK = re.compile(r"(?:[-*+•]|\d{1,3}[.)])\s+(?:\[[ xX]\]\s+)?")


def content_words(text: str) -> set[str]:
    """The distinct content words of ``text``: no stop words, Snowball stems, number words as digits."""
    return {each for each in content_stems(words(text)) if each is not None}


def content_stems(text_words: Sequence[str]) -> list[str | None]:
    """Of each word of `words` what `content_words` counts it as; None for a stop word."""
    stems = stem([NUMBER_WORDS.get(word, word) for word in text_words])
    return [None if word in _STOP else each for word, each in zip(text_words, stems, strict=True)]


def recall(reference: str, text: str) -> float:
    """Share of the reference's content words that occur in ``text``, in [0, 1]; 1 where it has none."""
    wanted = content_words(reference)
    return len(wanted & content_words(text)) / len(wanted) if wanted else 1.0


@dataclass(frozen=True)
class Sentence:
    """A sentence as it stands in a text: ``text == source[start:end]``."""

    text: str
    start: int
    end: int


def sentences(text: str) -> Iterator[Sentence]:
    """The sentences of ``text`` without headings, table rows, and the marks of list items."""
    for start, end in sentence_spans(text):
        # A heading line runs into the sentence below it where no blank line parts them.
        while mark := _HEADING.match(text, start, end) or _LIST_MARK.match(text, start, end):
            start = mark.end()
        piece = text[start:end]
        if not piece.startswith("|") and any(char.isalnum() for char in piece):
            yield Sentence(piece, start, end)
