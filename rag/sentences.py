"""Quote or drop: which sentence of an answer rests on which words of the documents.

A student writes its quotes first and its answer after them, so a quote belongs to no sentence by its place.
Here each sentence gets the quotes that carry it; where none does, a passage sentence that does is looked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from domains.records import Citation, Passage, Statement
from rag.answers import parse_option, without_letter
from rag.citations import content, find_support, supports
from rag.prompt import closed_form, stem_of
from rag.words import sentence_spans, words

MARK = "[not in the documents]"
_LIST_NUMBER = re.compile(r"\d{1,3}[.)]")
_BEFORE = re.compile(r"#{1,6}[ \t][^\n]*\n\s*|(?:[-*+•]|\d{1,3}[.)])\s+")
_AFFIRMING = {"yes", "maybe"}
_SHORT = 4  # words; a shorter answer is read together with its question


@dataclass(frozen=True)
class Unit:
    """A sentence of a text: ``text[start:stop]`` with its lead-in ("Take these:") and the space behind it.

    ``claim`` is where the sentence itself lies.
    """

    start: int
    stop: int
    claim: tuple[int, int]


@dataclass(frozen=True)
class Linked:
    """An answer sentence by sentence. ``citations`` are those that some sentence rests on, each once."""

    units: list[Unit]
    statements: list[Statement]
    citations: list[Citation]

    @property
    def supported(self) -> list[bool]:
        """Which sentences rest on a citation."""
        return [bool(statement.citations) for statement in self.statements]


def split_units(text: str) -> list[Unit]:
    """The sentences of a text; together they are all of it from the first on.

    Headings, the numbers of list items, and lines that end in a colon stand or fall with the sentence behind
    them. Adding text changes no unit but the last.
    """
    groups: list[list[tuple[int, int]]] = []
    leading = False
    for span in sentence_spans(text):
        if leading:
            groups[-1].append(span)
        else:
            groups.append([span])
        leading = _leads_in(text[span[0] : span[1]])
    starts = [group[0][0] for group in groups]
    stops = [*starts[1:], len(text)][: len(starts)]
    return [
        Unit(start, stop, _claim(text, *group[-1]))
        for start, stop, group in zip(starts, stops, groups, strict=True)
    ]


def _leads_in(sentence: str) -> bool:
    heading = sentence.startswith("#") and "\n" not in sentence
    return heading or sentence.endswith(":") or _LIST_NUMBER.fullmatch(sentence) is not None


def _claim(text: str, start: int, end: int) -> tuple[int, int]:
    """A sentence without a heading above it and the mark of its list item."""
    while (mark := _BEFORE.match(text, start, end)) and mark.end() < end:
        start = mark.end()
    return start, end


def link_sentences(
    answer: str,
    *,
    question: str,
    rationale: str,
    citations: Sequence[Citation],
    passages: Sequence[Passage],
    search: bool,
) -> Linked:
    """Link every sentence of an answer to the quotes that carry it.

    A quote that carries a sentence alone comes first; else all that carry it together.

    Args:
        answer: the text of the answer.
        question: what was asked, with its options if any.
        rationale: what the student wrote before its answer, without the quotes.
        citations: its quotes that stand in the passages.
        passages: what it saw.
        search: whether to look for support where no quote carries a sentence.
    """
    units = split_units(answer)
    used: list[Citation] = []
    statements = []
    stem = stem_of(question)
    for unit in units:
        claim = answer[unit.claim[0] : unit.claim[1]]
        carrying = _carrying(in_words(claim, question), citations, passages, stem)
        if not carrying and search and (found := found_support(question, claim, rationale, passages)):
            carrying = [found]
        used += [item for item in carrying if item not in used]
        statements.append(Statement(text=claim, citations=[used.index(item) for item in carrying]))
    return Linked(units, statements, used)


def in_words(claim: str, question: str) -> str:
    """A claim that names one of the question's options by its letter, with the option's text in the letter's place."""
    options = closed_form(question)
    letter = parse_option(claim, options) if isinstance(options, dict) else None
    if letter is None or not isinstance(options, dict):
        return claim
    rest = without_letter(claim, options)
    return rest if options[letter].lower() in rest.lower() else f"{options[letter]} {rest}".strip()


def _carrying(
    claim: str, citations: Sequence[Citation], passages: Sequence[Passage], stem: str
) -> list[Citation]:
    alone = [item for item in citations if supports(claim, [item], passages, question=stem)]
    if alone or not supports(claim, citations, passages, question=stem):
        return alone
    return list(citations)


def kept_text(answer: str, linked: Linked, *, mark: bool) -> str:
    """The answer without its unsupported sentences, or with `MARK` behind them."""
    pieces = []
    for unit, supported in zip(linked.units, linked.supported, strict=True):
        if supported:
            pieces.append(answer[unit.start : unit.stop])
        elif mark:
            end = unit.claim[1]
            pieces.append(f"{answer[unit.start : end]} {MARK}{answer[end : unit.stop]}")
    return "".join(pieces).strip()


def found_support(question: str, answer: str, rationale: str, passages: Sequence[Passage]) -> Citation | None:
    """A passage sentence that carries the answer, and what of it the question did not say; a short one is read together with its question.

    A closed question counts without its options and the form of its answer: what they say is not claimed. "Yes" claims
    what the question asks, "no" that it is negated.
    """
    stem, claim = stem_of(question), in_words(answer, question)
    if len(claim.split()) >= _SHORT:
        asked = content(stem)
        return find_support(claim, passages, own=" ".join(w for w in words(claim) if content(w) - asked))
    said = "" if set(words(claim)) <= _AFFIRMING else claim
    return find_support(f"{stem} {rationale} {said}", passages, own=said)


def citation_quality(
    sentences: Sequence[str], citations: Sequence[Citation], passages: Sequence[Passage], *, question: str
) -> tuple[int, int]:
    """How many sentences are cited, and how many citations are needed: ALCE (arXiv 2305.14627).

    ALCE asks an entailment model; here literal overlap answers (`rag.citations.supports`), which misses
    paraphrases. A sentence counts where the citations together carry it. A citation counts where it carries
    a sentence alone, or a sentence is carried by all of them and no longer without it.

    Returns:
        (sentences that are carried, citations that count).
    """
    sentences, stem = [in_words(item, question) for item in sentences], stem_of(question)
    carried = [item for item in sentences if supports(item, citations, passages, question=stem)]
    needed = 0
    for i, citation in enumerate(citations):
        others = [*citations[:i], *citations[i + 1 :]]
        needed += any(
            supports(item, [citation], passages, question=stem)
            or not supports(item, others, passages, question=stem)
            for item in carried
        )
    return len(carried), needed
