"""SAIL's verdict about the passages in plain words (arXiv 2305.15225 §3.2), written and read in one place.

It is the first line of a completion and needs no new token, so it survives any tokenizer and file format:

    No passages were found.
    The passage is informative.                          (one passage, or "Both passages are", "All 3 passages are")
    The passage is distracting.                          (likewise)
    Passages [1] and [3] are informative, passage [2] is distracting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NOTHING_FOUND = "No passages were found."
_INFORMATIVE, _DISTRACTING = "informative", "distracting"
_ALL = re.compile(
    r"(?:(The passage is)|(Both passages are)|(?:All(?: (\d{1,2}))?|The) passages are) (informative|distracting)\.?",
    re.IGNORECASE,
)
_GROUP = re.compile(
    r"passages? ((?:\[\d{1,2}\](?:, | and |, and )?)+) (?:is|are) (informative|distracting)", re.IGNORECASE
)
_NUMBER = re.compile(r"\[(\d{1,2})\]")


def format_verdict(informative: Sequence[bool]) -> str:
    """The verdict about passages [1], [2], …; ``informative[i]`` is that of passage ``[i + 1]``."""
    if not informative:
        return NOTHING_FOUND
    if len(set(informative)) == 1:
        count = len(informative)
        subject = {1: "The passage is", 2: "Both passages are"}.get(count, f"All {count} passages are")
        return f"{subject} {_word(informative[0])}."
    groups = []
    for wanted in (True, False):
        numbers = [f"[{number}]" for number, each in enumerate(informative, 1) if each is wanted]
        subject = f"passage {numbers[0]} is" if len(numbers) == 1 else f"passages {_listed(numbers)} are"
        groups.append(f"{subject} {_word(wanted)}")
    text = ", ".join(groups)
    return f"{text[0].upper()}{text[1:]}."


def split_verdict(text: str, passages: int) -> tuple[list[bool] | None, str]:
    """A completion as (verdict, the reply after it).

    Args:
        text: what the student wrote.
        passages: how many it was shown.

    Returns:
        One bool a passage (informative or not) and the rest; None and the whole text where the first line is no
        verdict about exactly these passages.
    """
    line, _, rest = text.lstrip().partition("\n")
    verdict = _read(line.strip(), passages)
    return (None, text) if verdict is None else (verdict, rest.lstrip("\n"))


def _read(line: str, passages: int) -> list[bool] | None:
    if line.rstrip(".").lower() == NOTHING_FOUND.rstrip(".").lower():
        return [] if passages == 0 else None
    if match := _ALL.fullmatch(line):
        count = 1 if match[1] else 2 if match[2] else int(match[3] or passages)
        return [match[4].lower() == _INFORMATIVE] * passages if passages and count == passages else None
    found: dict[int, bool] = {}
    for match in _GROUP.finditer(line):
        for number in _NUMBER.findall(match[1]):
            if int(number) in found:
                return None  # named twice
            found[int(number)] = match[2].lower() == _INFORMATIVE
    if not found or sorted(found) != list(range(1, passages + 1)):
        return None
    return [found[number] for number in sorted(found)]


def _word(informative: bool) -> str:
    return _INFORMATIVE if informative else _DISTRACTING


def _listed(numbers: Sequence[str]) -> str:
    return f"{', '.join(numbers[:-1])} and {numbers[-1]}"
