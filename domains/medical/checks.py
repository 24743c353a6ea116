"""Checks of the medical domain: a dose that no passage states never becomes training data."""

from __future__ import annotations

import re
from collections.abc import Sequence

from domains.checks import PASS, Verdict
from domains.records import Passage, Question, Rationale
from domains.words import numbers

_UNITS = {
    "mg": "mg",
    "milligram": "mg",
    "mcg": "mcg",
    "µg": "mcg",
    "μg": "mcg",
    "microgram": "mcg",
    "g": "g",
    "gram": "g",
    "ml": "ml",
    "millilitre": "ml",
    "milliliter": "ml",
    "unit": "unit",
    "iu": "iu",
    "international unit": "iu",
}
_NAMES = "|".join(sorted((re.escape(name) for name in _UNITS), key=len, reverse=True))
_DOSE = re.compile(
    rf"(\d[\d,.]*|\b(?:two|three|four|five|six|eight|ten)\b)[\s-]*({_NAMES})s?\b", re.IGNORECASE
)
# The first number of a range ("500 to 1000 mg", "5-10 mg") has the unit of the second.
_RANGE = re.compile(rf"(\d[\d,.]*)\s*(?:-|–|to|or|and)\s*(?=\d[\d,.]*[\s-]*({_NAMES})s?\b)", re.IGNORECASE)


def doses(text: str) -> set[tuple[str, str]]:
    """The doses in ``text`` as (number, unit) in one spelling: ``1,000 milligrams`` → (``1000``, ``mg``)."""
    found = set()
    for match in [*_DOSE.finditer(text), *_RANGE.finditer(text)]:
        unit = _UNITS[match[2].lower()]
        found |= {(number, unit) for number in numbers(match[1].strip(".,"))}
    return found


def dose_in_passages(question: Question, rationale: Rationale, passages: Sequence[Passage]) -> Verdict:
    """Rejects a rationale that states a number with a dose unit which no passage (or the question) states."""
    known = doses("\n".join([question.question, *(passage.text for passage in passages)]))
    invented = sorted(doses(f"{rationale.text}\n{rationale.answer}") - known)
    if not invented:
        return PASS
    listed = ", ".join(f"{number} {unit}" for number, unit in invented)
    return Verdict(ok=False, reason="invented_dose", detail=f"{listed}: in none of the passages")
