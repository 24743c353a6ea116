"""Documents cut into passages that never lie about where they stand: ``text == document.text[start:end]``.

A passage stays within one section. The heading line is not part of its text: `Passage.heading` holds
it, the index reads it and the prompt shows it. Only a heading with neither text nor subsections
below it is a passage by itself, so that no word of a document is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from domains.errors import ConfigError
from domains.records import Document, Passage
from rag.words import sentence_spans

_HEADING = re.compile(r"(#{1,6})[ \t]+(.*?)[ \t#]*$")
_FENCE = re.compile(r"\s*(?:```|~~~)")
_ITEM = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)]|\|)(?:\s|$)")
# Documents that no longer hold say so in the title of each passage, which the student sees.
_STALE = ("superseded", "rejected")

Span = tuple[int, int]


@dataclass(frozen=True)
class _Section:
    """``level`` is 0 before the first heading; ``line`` spans the heading line, ``body`` what follows."""

    level: int
    heading: str
    line: Span
    body: Span


def split_document(document: Document, *, max_chars: int, overlap_chars: int) -> list[Passage]:
    """The passages of a document, in order, none longer than ``max_chars`` characters.

    Whole paragraphs and list items are packed together; a longer paragraph is cut at sentence ends, a
    longer sentence between words, and only a single word longer than ``max_chars`` inside.
    With an overlap, a passage repeats up to ``overlap_chars`` of the section's text before it, from
    the start of a sentence (or of a word, where no sentence starts there).

    Raises:
        ConfigError: the overlap is not smaller than the passage.
    """
    if not 0 <= overlap_chars < max_chars:
        raise ConfigError(
            f"overlap_chars = {overlap_chars} with passages of {max_chars} characters",
            expected="0 <= overlap_chars < passage_chars",
            next_step="mend [index] in domain.toml",
        )
    title = _visible_title(document)
    passages = []
    sections = list(_sections(document.text))
    for i, section in enumerate(sections):
        spans = _pack(document.text, section.body, max_chars)
        leaf = i + 1 == len(sections) or sections[i + 1].level <= section.level
        if not spans and leaf and section.level:
            spans = list(_cut(document.text, section.line, max_chars))
        if overlap_chars:
            spans = _overlapped(document.text, spans, max_chars, overlap_chars)
        heading = "" if section.heading == document.title else section.heading
        passages += [_passage(document, title, heading, span) for span in spans]
    return passages


def _visible_title(document: Document) -> str:
    status = document.meta.get("status", "").strip().lower()
    title = document.title
    return f"{title} ({status})" if status in _STALE and f"({status})" not in title.lower() else title


def _passage(document: Document, title: str, heading: str, span: Span) -> Passage:
    start, end = span
    return Passage(
        passage_id=f"{document.doc_id}#{start}-{end}",
        doc_id=document.doc_id,
        title=title,
        heading=heading,
        text=document.text[start:end],
        start=start,
        end=end,
    )


def _lines(text: str, start: int = 0, end: int | None = None) -> Iterator[Span]:
    """Spans of the lines, without their line feeds."""
    stop = len(text) if end is None else end
    while start < stop:
        found = text.find("\n", start, stop)
        line_end = stop if found < 0 else found
        yield start, line_end
        start = line_end + 1


def _sections(text: str) -> Iterator[_Section]:
    level, heading, line, fenced = 0, "", (0, 0), False
    body = 0
    for start, end in _lines(text):
        if _FENCE.match(text, start, end):
            fenced = not fenced
        match = None if fenced else _HEADING.match(text, start, end)
        if match is None:
            continue
        yield _Section(level, heading, line, (body, start))
        level, heading = len(match[1]), match[2].strip()
        line, body = (start, start + len(text[start:end].rstrip())), min(end + 1, len(text))
    yield _Section(level, heading, line, (body, len(text)))


def _blocks(text: str, body: Span) -> Iterator[Span]:
    """Paragraphs, list items and table rows, trimmed."""
    start: int | None = None
    end = body[0]
    for line_start, line_end in _lines(text, *body):
        blank = not text[line_start:line_end].strip()
        if start is not None and (blank or _ITEM.match(text, line_start, line_end)):
            yield start, end
            start = None
        if not blank:
            line = text[line_start:line_end]
            if start is None:
                start = line_start + len(line) - len(line.lstrip())
            end = line_start + len(line.rstrip())
    if start is not None:
        yield start, end


def _atoms(text: str, body: Span, max_chars: int) -> Iterator[Span]:
    """Blocks; those that are too long as sentences; those that are still too long as runs of words."""
    for block in _blocks(text, body):
        if block[1] - block[0] <= max_chars:
            yield block
            continue
        for sentence in sentence_spans(text, *block):
            if sentence[1] - sentence[0] <= max_chars:
                yield sentence
            else:
                yield from _cut(text, sentence, max_chars)


def _cut(text: str, span: Span, max_chars: int) -> Iterator[Span]:
    """Pieces of at most ``max_chars``, cut between words wherever there is white space."""
    start, end = span
    while end - start > max_chars:
        cut = start + max_chars
        while cut > start and not (text[cut].isspace() or text[cut - 1].isspace()):
            cut -= 1
        if cut == start:
            cut = start + max_chars
        yield start, start + len(text[start:cut].rstrip())
        start = cut + len(text[cut:end]) - len(text[cut:end].lstrip())
    if start < end:
        yield start, end


def _pack(text: str, body: Span, max_chars: int) -> list[Span]:
    spans: list[Span] = []
    for start, end in _atoms(text, body, max_chars):
        if spans and end - spans[-1][0] <= max_chars:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def _overlapped(text: str, spans: list[Span], max_chars: int, overlap_chars: int) -> list[Span]:
    """Each span but the first, begun earlier where that keeps it within ``max_chars``."""
    result = spans[:1]
    for (previous, previous_end), (start, end) in pairwise(spans):
        earliest = max(previous + 1, start - overlap_chars, end - max_chars)
        starts = [s for s, _ in sentence_spans(text, previous, previous_end)]
        starts += [
            i for i in range(earliest, previous_end) if text[i - 1].isspace() and not text[i].isspace()
        ]
        # The first sentence start in reach, else the first word start, else no overlap.
        begin = next((s for s in starts if earliest <= s < start), start)
        result.append((begin, end))
    return result
