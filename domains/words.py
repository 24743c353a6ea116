"""Numbers, white space and literal pieces of plain text: what checks of domains and curation compare."""

from __future__ import annotations

import re

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
# Digits inside a word (v2, B12, FEV1) are part of its name, not a number.
_NUMBER = re.compile(rf"(?<![\w.]){_DIGITS}")
_WORD = re.compile(r"[^\W\d_]+")
_NUMBER_NAMES = (
    "zero _ two three four five six seven eight nine ten eleven twelve"  # "one" is mostly a pronoun
)
NUMBER_WORDS = {name: str(value) for value, name in enumerate(_NUMBER_NAMES.split()) if name != "_"}


def numbers(text: str) -> set[str]:
    """The numbers in ``text`` in one spelling: ``1,000`` → ``1000``, ``3.50`` → ``3.5``, ``two`` → ``2``."""
    spelled = {word.lower() for word in _WORD.findall(text)} & NUMBER_WORDS.keys()
    return {_plain(match[0]) for match in _NUMBER.finditer(text)} | {NUMBER_WORDS[word] for word in spelled}


# What makes a number another amount: a line each, names of the same unit.
_UNIT_LINES = """
mg milligram milligrams
mcg µg μg ug microgram micrograms
g gram grams
kg
ml millilitre millilitres
dl
l litre litres liter liters
mol
mmol
nmol
pmol
iu
unit units
mm
mmhg
cm
m
km
kb
mb
gb
px
% percent
ms millisecond milliseconds
second s sec secs seconds
minute min mins minutes
hour h hr hrs hours
day d days
week weeks
month months
year years
time times
tablet tablets
drop drops
"""
_UNITS = {name: line.split()[0] for line in _UNIT_LINES.split("\n") for name in line.split()}
# Case is folded for ASCII alone (?ai): otherwise "ı" is an "i" and "ſ" an "s", which no table has.
_AMOUNT = re.compile(
    rf"(?<![\w.])((?ai:{_DIGITS}|{'|'.join(NUMBER_WORDS)}))[ \t\u00a0-]*"
    rf"((?ai:{'|'.join(re.escape(unit) for unit in sorted(_UNITS, key=len, reverse=True))}))(?!\w)"
)
_PERIODS = "hour|day|week|month|year"
# "An hour before breakfast" and "for a week" say when and how long, not how often.
_PER = re.compile(
    rf"(?<!\bfor )(?<!\bin )(?<!\bafter )(?<!\bwithin )(?<!\babout )(?<!\bthan )(?<!\bhalf )"
    rf"\b(?:an?|per|each|every)[ \t]+({_PERIODS})\b(?!\s+(?:before|after|later|earlier|ago))"
    rf"|/[ \t]?({_PERIODS})\b|\b(hour|dai|week|month|year)ly\b",
    re.IGNORECASE | re.ASCII,
)
_TIMES = re.compile(
    rf"\b(once|twice|thrice)\b|\b({_DIGITS}|{'|'.join(NUMBER_WORDS)})[ \t]+times\b", re.IGNORECASE | re.ASCII
)
_OFTEN = {"once": "1", "twice": "2", "thrice": "3"}


def amounts(text: str) -> dict[str, set[str]]:
    """Which units stand behind each number: ``"40 mg twice a day"`` → ``{"40": {"mg"}, "times": {"2"}, "per": {"day"}}``.

    Under ``per`` are the periods in which something is repeated or measured, under ``times`` how often.
    """
    found: dict[str, set[str]] = {}
    for match in _AMOUNT.finditer(text):
        number = NUMBER_WORDS.get(match[1].lower()) or _plain(match[1])
        found.setdefault(number, set()).add(_UNITS[match[2].lower()])
    for match in _PER.finditer(text):
        period = next(group for group in match.groups() if group).lower()
        found.setdefault("per", set()).add(_UNITS["day" if period == "dai" else period])
    for match in _TIMES.finditer(text):
        often = (match[1] or match[2]).lower()
        often = _OFTEN.get(often) or NUMBER_WORDS.get(often) or _plain(often)
        found.setdefault("times", set()).add(often)
    return found


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
