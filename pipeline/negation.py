"""Does a text say the opposite of a reference? To shares of content words "safe" and "not safe" are the same.

A negation concerns the content word that follows it ("not safe in pregnancy": safe), past adverbs and words like
"considered" ("not usually considered safe"); where none follows, its whole clause ("Brenzal is not."). Rules, not a
parser: they know neither what "it" stands for nor that "unsafe" and "safe" are opposites, and are silent where in doubt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.wording import content_stems
from rag.words import is_negation, sentence_spans, words

# What looks like a negation and denies nothing.
_NEUTRAL = re.compile(
    r"\b(?:no|not) (?:more|less|fewer|later|longer|earlier|sooner|higher|lower|greater) than\b"
    r"|\bnot (?:only|just|merely|simply|until)\b|\b(?:no|without) doubt\b|\bor not\b",
    re.IGNORECASE,
)
_TWICE = re.compile(
    r"\b(?:not|never|\w+n['’]t)\b([^.;:]*?)\bwithout\b", re.IGNORECASE
)  # "not without food": with food
# Beginnings of words that may stand for a negation: "P waves are absent" is "no P waves".
_SOFT = (
    *("absen", "lack", "fail", "avoid", "stop", "refus", "rarely", "seldom", "hardly", "barely", "unlikely"),
    *("free", "instead", "rather", "non"),
)
# "Not thought to be safe" denies the safety, and so do "no longer safe" and "no evidence that it is safe".
_PASSED = "evidence proof believed called considered deemed found known proven regarded said seen shown thought always longer often yet"
_PASSED_OVER = frozenset(_PASSED.split())
_NEAR = 3  # words after a negation that it may concern
# Where another clause begins. Not at every comma: "not used for asthma, gout or migraine" is one.
_BOUNDARY = re.compile(
    r"[;:]\s|\s[–—-]\s"
    r"|,\s+(?=(?:not|never|no|nor|neither|without|the|it|they|this|these|he|she|you|we)\b)"
    r"|\b(?:but|although|though|whereas|while|because|if|unless|when|so|which)\b",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"^\W*(?:yes|no)\s*[,.:;!]\s*(?=\w)", re.IGNORECASE)


@dataclass(frozen=True)
class _Clause:
    """Stems of a clause: its content words, those that a negation ``denies`` or ``may_deny``, and soft negations."""

    content: frozenset[str]
    denies: frozenset[str]
    may_deny: frozenset[str]
    soft: frozenset[str]


def opposed(reference: str, text: str) -> bool:
    """Whether ``text`` denies what ``reference`` says, or says what it denies.

    Each clause of the reference is compared with the clause of the text that has most of its content words, at least
    half of those that the text has at all. The two are opposed where a word of both is denied in one and near no
    negation in the other, unless an equally good clause agrees. Where a side has no content words ("No."), it counts
    whether the first sentences are negated at all.
    """
    wanted, said = [*_clauses(reference)], [*_clauses(text)]
    found = {stem for clause in said for stem in clause.content}
    if not found or not any(clause.content for clause in wanted):
        first, other = _first_words(reference), _first_words(text)
        return bool(first and other) and _negates(first) != _negates(other)
    return any(_contradicted(clause, said, found) for clause in wanted)


def _contradicted(wanted: _Clause, said: Sequence[_Clause], found: set[str]) -> bool:
    best = max(len(wanted.content & clause.content) for clause in said)
    if not best or 2 * best < len(wanted.content & found):
        return False
    return all(_differ(wanted, clause) for clause in said if len(wanted.content & clause.content) == best)


def _differ(one: _Clause, other: _Clause) -> bool:
    both = one.content & other.content

    def may_deny(clause: _Clause) -> bool:
        return bool(clause.may_deny & both or clause.soft - both)

    denied, also = bool(one.denies & both), bool(other.denies & both)
    return (denied and not may_deny(other)) or (also and not may_deny(one))


def _clauses(text: str) -> Iterator[_Clause]:
    plain = _TWICE.sub(r"\1with", _NEUTRAL.sub(" ", text))
    for start, end in sentence_spans(plain):
        for piece in _BOUNDARY.split(_YES_NO.sub("", plain[start:end])):
            if said := words(piece):
                yield _clause(said)


def _clause(said: Sequence[str]) -> _Clause:
    stems = [
        None if is_negation(word) else stem for word, stem in zip(said, content_stems(said), strict=True)
    ]
    content = frozenset(stem for stem in stems if stem)
    denies: set[str] = set()
    may_deny: set[str] = set()
    for i, word in enumerate(said):
        if is_negation(word):
            denies |= _governed(said[i + 1 :], stems[i + 1 :]) or content
            may_deny |= {stem for stem in stems[i + 1 : i + 1 + _NEAR] if stem}
    soft = frozenset(stem for word, stem in zip(said, stems, strict=True) if stem and word.startswith(_SOFT))
    return _Clause(content, frozenset(denies), frozenset(may_deny | denies), soft)


def _governed(said: Sequence[str], stems: Sequence[str | None]) -> set[str]:
    """The first content word of what follows a negation, and what is passed over on the way to it."""
    governed: set[str] = set()
    for word, stem in zip(said, stems, strict=True):
        if stem is not None:
            governed.add(stem)
            if not word.endswith("ly") and word not in _PASSED_OVER:
                break
    return governed


def _first_words(text: str) -> list[str]:
    return next((words(text[start:end]) for start, end in sentence_spans(text)), [])


def _negates(said: Sequence[str]) -> bool:
    return any(is_negation(word) for word in said)
