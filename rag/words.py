"""Words, stems and sentences: what the lexical index and the citation check count."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Iterator
from typing import Any

# A number keeps its decimals and thousands ("2.5", "1,000"); "HbA1c" and "v1" are one word.
_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:['’][^\W_]+)?")
# Lucene's English stop set, the one behind the BM25 baselines of Pyserini.
_LUCENE = """
a an and are as at be but by for if in into is it no not of on or such that the their then there these
they this to was will with
"""
LUCENE_STOPWORDS = frozenset(_LUCENE.split())
# Where a sentence ends: punctuation, closing marks, white space, and something that can begin one.
_END = re.compile(
    r"[.!?][\"”’')\]]*(?=\s+[\"“‘'(\[]*[^\W_a-z])|\n(?=\s*(?:\n|[-*+•] |\d{1,3}[.)] |\||#{1,6} ))"
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|al|approx|ca|dr|mr|mrs|ms|prof|st|fig|no|vol|pp|sec|eq|inc|ltd|jr|sr)"
    r"|\b[A-Za-z])\.$",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """The words of ``text``, case-folded, compatibility forms unified, thousands separators taken out."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return [
        word.replace(",", "") if word[0].isdigit() else word.replace("’", "'").removesuffix("'s")
        for word in _WORD.findall(plain)
    ]


_stemmers = threading.local()  # one each: Snowball's object must not be used by two threads at once


def _stemmer() -> Any:
    if not hasattr(_stemmers, "english"):
        import Stemmer

        _stemmers.english = Stemmer.Stemmer("english")
    return _stemmers.english


_NEGATION = "no not never none neither nor without cannot nothing nobody"
NEGATIONS = frozenset(_NEGATION.split())


def is_negation(word: str) -> bool:
    """Whether one of `words` negates."""
    return word in NEGATIONS or word.endswith("n't")


def stem(word_list: list[str]) -> list[str]:
    """Snowball's English stem of each word."""
    return list(_stemmer().stemWords(word_list))


def index_terms(text: str) -> list[str]:
    """What BM25 counts: stems of the words that are no stop words, in order, repeated."""
    return stem([word for word in words(text) if word not in LUCENE_STOPWORDS])


def sentence_spans(text: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Offsets of the sentences of ``text[start:end]``, without the white space around them.

    List items, table rows, headings and paragraphs end a sentence too; a bare line break does not.
    """
    stop = len(text) if end is None else end
    begin = start
    for match in _END.finditer(text, start, stop):
        if match[0] != "\n" and _ABBREVIATION.search(text, begin, match.start() + 1):
            continue
        if span := _trimmed(text, begin, match.end()):
            yield span
        begin = match.end()
    if span := _trimmed(text, begin, stop):
        yield span


def _trimmed(text: str, start: int, end: int) -> tuple[int, int] | None:
    piece = text[start:end]
    if not piece.strip():
        return None
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
