"""Checks of the product requirements domain: no invented figures, no open placeholders."""

from __future__ import annotations

import re
from collections.abc import Sequence

from domains.checks import PASS, Verdict
from domains.records import Passage, Question, Rationale
from domains.words import numbers

_PLACEHOLDER = re.compile(r"\b(?:TBD|TBC|TODO|FIXME|XXX)\b|\blorem ipsum\b|<[a-z][a-z _-]{2,30}>|\?\?\?")
# [1] names a passage; v2 and R3 name a version and a requirement (checked as words, not as figures).
_NOT_A_FIGURE = re.compile(r"\[\d{1,2}\]|(?:^|\n)\s*\d{1,2}[.)]\s")
_MONTH_NAMES = "january february march april may june july august september october november december"
_MONTHS = _MONTH_NAMES.split()
_DATE = re.compile(
    rf"\b(\d{{4}})-(\d\d)-(\d\d)\b|\b(\d{{1,2}}) ({'|'.join(_MONTHS)})(?: (\d{{4}}))?\b"
    rf"|\b({'|'.join(_MONTHS)}) (\d{{1,2}})(?:, (\d{{4}}))?\b",
    re.IGNORECASE,
)


def _figures(text: str) -> set[str]:
    """Numbers and parts of dates in one spelling, so that ``2 May 2025`` equals ``2025-05-02``."""
    found = set()
    for match in _DATE.finditer(text):
        year, month, day, day2, name2, year2, name3, day3, year3 = match.groups()
        name = name2 or name3
        month = month or str(_MONTHS.index(name.lower()) + 1)
        found |= {str(int(part)) for part in (year or year2 or year3, month, day or day2 or day3) if part}
    return found | numbers(_DATE.sub(" ", text))


def numbers_in_passages(question: Question, rationale: Rationale, passages: Sequence[Passage]) -> Verdict:
    """Rejects a number, percentage, metric or date that stands neither in the passages nor in the question."""
    asked = [question.question, *(question.options or {}).values()]
    known = _figures("\n".join([*asked, *(f"{p.title}\n{p.heading}\n{p.text}" for p in passages)]))
    said = _figures(_NOT_A_FIGURE.sub(" ", f"{rationale.text}\n{rationale.answer}"))
    if invented := sorted(said - known):
        return Verdict(
            ok=False, reason="invented_figure", detail=f"{', '.join(invented)}: in none of the passages"
        )
    return PASS


def no_placeholders(question: Question, rationale: Rationale, passages: Sequence[Passage]) -> Verdict:  # noqa: ARG001
    """Rejects a rationale that leaves something open: TBD, TODO, ``<team name>``."""
    match = _PLACEHOLDER.search(f"{rationale.text}\n{rationale.answer}")
    if match is None:
        return PASS
    return Verdict(ok=False, reason="placeholder", detail=f"{match[0]!r} is not filled in")
