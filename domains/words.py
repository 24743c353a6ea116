"""Words, numbers and sentences of plain text, the same for checks, importers and curation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Digits inside a word (v2, B12, FEV1) are part of its name, not a number.
_NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
# A blank line, a list mark, a heading or a table row begins a new block: no sentence crosses it.
_BLOCK = re.compile(
    r"\n[ \t]*\n|^[ \t]*(?:[-*+•]|\d{1,2}[.)])[ \t]+(?:\[[ xX]\][ \t]+)?|^#{1,6}[ \t][^\n]*$|^(?=[ \t]*\|)",
    re.MULTILINE,
)
_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|al|approx|Dr|Mr|Mrs|Ms|Prof|St|Fig|No|Nos|Vol|Inc|Ltd|Co|resp)|\b[A-Z])\.$"
)
_STOP_WORDS = (
    "a about above after again all also am an and any are as at be because been before being below between both "
    "but by can could did do does doing done down during each either few for from further had has have having he "
    "her here hers him his how i if in into is it its itself just may me might more most must my no nor not of off "
    "on once one only or other our out over own per same shall she should so some such than that the their theirs "
    "them then there these they this those through to too under until up upon us very was we were what when where "
    "which while who whom whose why will with within without would yes you your yours"
)
_STOP = frozenset(_STOP_WORDS.split())
_NUMBER_NAMES = (
    "zero _ two three four five six seven eight nine ten eleven twelve"  # "one" is mostly a pronoun
)
_NUMBER_WORDS = {name: str(value) for value, name in enumerate(_NUMBER_NAMES.split()) if name != "_"}


def words(text: str) -> list[str]:
    """The words and numbers of ``text`` in order, lower case, without punctuation."""
    return [match[0].lower().replace("’", "'") for match in _WORD.finditer(text)]


@lru_cache(maxsize=1)
def _stemmer():  # type: ignore[no-untyped-def]  # PyStemmer has no types
    import Stemmer

    return Stemmer.Stemmer("english")


def content_words(text: str) -> set[str]:
    """The distinct content words of ``text``: no stop words, Snowball stems, number words as digits."""
    kept = [_NUMBER_WORDS.get(word, word) for word in words(text) if word not in _STOP]
    return set(_stemmer().stemWords(kept))


def recall(reference: str, text: str) -> float:
    """Share of the reference's content words that occur in ``text``, in [0, 1]; 1 where it has none."""
    wanted = content_words(reference)
    return len(wanted & content_words(text)) / len(wanted) if wanted else 1.0


def numbers(text: str) -> set[str]:
    """The numbers in ``text`` in one spelling: ``1,000`` → ``1000``, ``3.50`` → ``3.5``, ``two`` → ``2``."""
    found = {_plain(match[0]) for match in _NUMBER.finditer(text)}
    return found | {_NUMBER_WORDS[word] for word in words(text) if word in _NUMBER_WORDS}


def _plain(number: str) -> str:
    digits = number.replace(",", "")
    whole, dot, part = digits.partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (dot + part if part else "")


@dataclass(frozen=True)
class Sentence:
    """A sentence as it stands in a text: ``text == source[start:end]``."""

    text: str
    start: int
    end: int


def sentences(text: str) -> Iterator[Sentence]:
    """The sentences of ``text`` with their offsets; list marks and markdown headings are left out.

    A sentence may run over a line break, never over a blank line, a list mark or a heading.
    """
    position = 0
    for mark in [*_BLOCK.finditer(text), None]:
        end = mark.start() if mark else len(text)
        yield from _block_sentences(text, position, end)
        position = mark.end() if mark else end


def _block_sentences(text: str, start: int, end: int) -> Iterator[Sentence]:
    begin = start
    for match in _END.finditer(text, start, end):
        if _ABBREVIATION.search(text, max(begin, match.start() - 8), match.start() + 1):
            continue
        yield from _trimmed(text, begin, match.end())
        begin = match.end()
    yield from _trimmed(text, begin, end)


def _trimmed(text: str, start: int, end: int) -> Iterator[Sentence]:
    piece = text[start:end]
    left = len(piece) - len(piece.lstrip())
    stripped = piece.strip()
    if any(char.isalnum() for char in stripped):
        yield Sentence(stripped, start + left, start + left + len(stripped))


def squash(text: str) -> str:
    """``text`` with every run of white space as one blank, stripped."""
    return " ".join(text.split())


def find_literal(quote: str, text: str) -> str | None:
    """The piece of ``text`` that equals ``quote`` up to white space, as it stands there; None if absent."""
    parts = quote.split()
    if not parts:
        return None
    if quote in text:
        return quote
    match = re.search(r"\s+".join(re.escape(part) for part in parts), text)
    return match[0] if match else None
