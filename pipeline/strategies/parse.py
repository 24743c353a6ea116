"""The four grammars of replies. Each gives a value or says why not; none gives a default.

    numbered list     1. …   2) …            items may have several lines
    labelled blocks   Reason: …  Score: …    or  [Better Answer] … [End]
    JSON              the first balanced object or array, one repair (fence, trailing commas)
    score             a number after ``Score:``, or a first line that is only a number

Of a reply that ``max_tokens`` cut, the last item or the open block is discarded and the rest is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# A space must follow: "rise by 3.5 percent" and "since 2008.Wages" are no items.
_ITEM = re.compile(r"^[ \t]{0,3}(\d{1,3})[.)][ \t]+", re.MULTILINE)
_NUMBER = r"[-+]?\d++(?:\.\d++)?+"
# "of 5" ends the score or names points: "3 of 4 facts hold" is no scale.
_SCALE = r"(?:[ \t*(]*(?:/|out[ \t]of)[ \t]*(\d+)|[ \t*(]+of[ \t]+(\d+)(?=[ \t]*(?:$|[-–—.,;:)*]|(?:points?|because|possible)\b)))"
# A range is no score; a dash may begin the reason ("4 - 2 facts are missing").
_RANGE = r"[-–—]\d|[ \t*]*(?:[-–—]|\bto\b)[ \t*]*\d+(?:\.\d+)?[ \t*]*(?:$|[.,;:(/]|(?:out|points?|stars?)\b)"
_SCORE = re.compile(
    rf"^[ \t*#]*(?:score|rating)\b[ \t*]*[:=][ \t*]*({_NUMBER})(?:{_SCALE}(?![-–—]?\d)|(?![\d/%]|{_RANGE}|{_SCALE}))[^\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
# What begins JSON, not a citation like [1] or a placeholder.
_OBJECT = re.compile(r'\{\s*["}]')
_OPENING = re.compile(r'\{\s*["}]|\[\s*[\[{"\]]')
_BARE = re.compile(rf"^[ \t*]*({_NUMBER})(?:{_SCALE})?[ \t*.)]*$", re.IGNORECASE)


@dataclass(frozen=True)
class Unparsed:
    """Why a reply can't be read; ``reason`` is a short word that is counted."""

    reason: str
    detail: str = ""


def numbered_list(text: str, *, truncated: bool = False) -> list[str] | Unparsed:
    """The items of a numbered list. A number that does not follow the one before belongs to the item."""
    marks: list[re.Match[str]] = []
    for match in _ITEM.finditer(text):
        expected = int(marks[-1][1]) + 1 if marks else None
        # A skipped number is a slip of the teacher; a year or a quantity at a line's start is none.
        if expected is None or expected <= int(match[1]) <= expected + 2:
            marks.append(match)
    if not marks:
        return Unparsed("no_list", text[:80])
    ends = [*(match.start() for match in marks[1:]), len(text)]
    items = [text[match.end() : end].strip() for match, end in zip(marks, ends, strict=True)]
    if truncated:
        items = items[:-1]
    items = [item for item in items if item]
    return items or Unparsed("no_list", text[:80])


def labelled(
    text: str, names: Sequence[str], *, optional: Sequence[str] = (), truncated: bool = False
) -> dict[str, str] | Unparsed:
    """The blocks that begin with these names: ``Name: …`` at a line's start, or ``[Name] … [End]``.

    A name that is missing, empty, or there twice makes the reply unparsed.
    """
    every = (*names, *optional)
    either = "|".join(re.escape(name) for name in sorted(every, key=len, reverse=True))
    mark = re.compile(
        rf"^[ \t]*(?:\[({either})\][ \t]*:?|[*#]{{0,3}}[ \t]*({either})[ \t]*[*]{{0,2}}:[*]{{0,2}})",
        re.IGNORECASE | re.MULTILINE,
    )
    known = {name.lower(): name for name in every}
    marks = list(mark.finditer(text))
    found: dict[str, str] = {}
    for number, match in enumerate(marks):
        last = number + 1 == len(marks)
        block = text[match.end() : None if last else marks[number + 1].start()]
        closed = re.search(r"\[end\]", block, re.IGNORECASE) if match[1] else None
        name = known[(match[1] or match[2]).lower()]
        if name in found:
            return Unparsed("twice", name)
        if last and truncated and not closed:
            break
        found[name] = (block[: closed.start()] if closed else block).strip()
    missing = [name for name in names if not found.get(name)]
    if missing:
        return Unparsed("missing_block", ", ".join(missing))
    return {name: found.get(name, "") for name in every}


def json_value(text: str) -> Any | Unparsed:
    """The first JSON object or array in ``text``, after one repair. ``[1]`` and ``{x}`` in prose are none."""
    opening = _OPENING.search(text)
    if opening is None:
        return Unparsed("no_json", text[:80])
    piece, end = _balanced(text, opening.start())
    try:
        return json.loads(piece, strict=False) if end else Unparsed("broken_json", piece[-80:])
    except ValueError as error:
        return Unparsed("broken_json", str(error))


def json_objects(text: str, *, truncated: bool = False) -> list[dict[str, Any]] | Unparsed:
    """The objects of a JSON array, or one object alone. An array that was cut gives its whole objects."""
    value = json_value(text)
    if isinstance(value, list) and (objects := [item for item in value if isinstance(item, dict)]):
        return objects
    if isinstance(value, dict):
        return [value]
    if not truncated or not isinstance(value, Unparsed):
        return value if isinstance(value, Unparsed) else Unparsed("no_objects", text[:80])
    return list(_whole_objects(text)) or Unparsed("broken_json", text[-80:])


def _whole_objects(text: str) -> Iterator[dict[str, Any]]:
    start = 0
    while (opening := _OBJECT.search(text, start)) is not None:
        piece, start = _balanced(text, opening.start())
        if not start:
            return
        try:
            yield json.loads(piece, strict=False)
        except ValueError:
            return


def _balanced(text: str, start: int) -> tuple[str, int]:
    """The bracketed piece from ``start``, without trailing commas, and where it ends (0: it is not closed)."""
    depth, inside, escaped = 0, False, False
    out: list[str] = []
    for end, char in enumerate(text[start:], start + 1):
        if inside:
            inside = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            inside = True
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
            while out and (out[-1].isspace() or out[-1] == ","):
                out.pop()
        out.append(char)
        if depth == 0:
            return "".join(out), end
    return "".join(out), 0


def fields(
    text: str, names: Sequence[str], *, optional: Sequence[str] = (), truncated: bool = False
) -> dict[str, str] | Unparsed:
    """Named texts from a JSON object, or from labelled blocks where a weak teacher writes no JSON.

    ``optional`` names may be empty or left out; they are "" then.
    """
    value = json_value(text)
    if isinstance(value, dict):
        lower = {str(key).lower(): _text(item) for key, item in value.items()}
        missing = [name for name in names if not lower.get(name.lower())]
        if missing:
            return Unparsed("missing_field", ", ".join(missing))
        return {name: lower.get(name.lower(), "") for name in (*names, *optional)}
    if isinstance(value, Unparsed) and value.reason == "broken_json":
        return value
    return labelled(text, names, optional=optional, truncated=truncated)


def _text(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(_text(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).strip() if isinstance(value, str | int | float) else ""


def score(text: str, *, low: float, high: float) -> float | Unparsed:
    """A score: after the first ``Score:`` or ``Rating:`` at a line's start, else a first line that is a number.

    ``4/5`` is 4 only where the scale ends at 5.
    """
    lines = text.strip().splitlines()
    match = _SCORE.search(text) or (_BARE.match(lines[0]) if lines else None)
    if match is None:
        return Unparsed("no_score", text[:80])
    value = float(match[1])
    if (scale := match[2] or match[3]) is not None and float(scale) != high:
        return Unparsed("other_scale", match[0])
    if not low <= value <= high:
        return Unparsed("out_of_range", match[0])
    return value
