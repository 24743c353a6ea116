"""Replies in which a teacher speaks of itself or declines, instead of doing what was asked."""

from __future__ import annotations

import re

FIRST_CHARS = 200
# Only what a model says of itself: "It is impossible to …" or "I cannot …" are ordinary in medicine and
# requirements, so a bare inability counts only together with the wish to help.
_REFUSAL = re.compile(
    r"\bas an? (?:\w+ ){0,2}(?:ai|language model|assistant)\b"
    r"|\bi(?:'m| am|’m) (?:just |only )?an? (?:\w+ ){0,2}(?:ai|language model)\b"
    r"|\b(?:i(?:'m| am|’m) sorry|i apologi[sz]e|my apologies)\b"
    r"|\bi (?:can(?:'t|’t|not)|am unable to|am not able to|won(?:'t|’t)) "
    r"(?:help|assist|comply|fulfil|fulfill|provide|answer|do that|continue|create|generate)\b"
    r"|\bmy (?:knowledge|training)(?: data)? (?:cut-?off|only goes|ends)\b"
    r"|\bknowledge cut-?off\b",
    re.IGNORECASE,
)


def refusal(text: str) -> str:
    """The words with which ``text`` declines in its first `FIRST_CHARS` characters; empty where it does not."""
    match = _REFUSAL.search(text[:FIRST_CHARS])
    return match[0] if match else ""
