"""Numbers, white space and literal pieces of plain text: what checks of domains and curation compare."""

from __future__ import annotations

import re

# Digits inside a word (v2, B12, FEV1) are part of its name, not a number.
_NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_WORD = re.compile(r"[^\W\d_]+")
_NUMBER_NAMES = (
    "zero _ two three four five six seven eight nine ten eleven twelve"  # "one" is mostly a pronoun
)
NUMBER_WORDS = {name: str(value) for value, name in enumerate(_NUMBER_NAMES.split()) if name != "_"}


def numbers(text: str) -> set[str]:
    """The numbers in ``text`` in one spelling: ``1,000`` → ``1000``, ``3.50`` → ``3.5``, ``two`` → ``2``."""
    spelled = {word.lower() for word in _WORD.findall(text)} & NUMBER_WORDS.keys()
    return {_plain(match[0]) for match in _NUMBER.finditer(text)} | {NUMBER_WORDS[word] for word in spelled}


def _plain(number: str) -> str:
    whole, _, part = number.replace(",", "").partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")


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
