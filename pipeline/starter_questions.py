"""Starter questions made from documents by rule, so that a new domain runs before anyone wrote questions.

    answerable     "What does TITLE say about HEADING?"  answer: the section's first sentence
    unanswerable   the same with a heading of another document none of whose words occurs in this one

Where a document has no headings, a paragraph stands for a section, and its two most telling words for
the heading. No model is involved; the team's own questions should replace these.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from domains.errors import DataError
from domains.records import Document, Question, Quote
from domains.words import squash
from pipeline.importers.quotes import lead
from pipeline.importers.reading import Draft
from pipeline.importers.split import assign_split, drop_duplicates, seeded_order
from pipeline.wording import content_words
from rag.words import words

PER_DOCUMENT = 6
MAX_QUESTIONS = 400
UNANSWERABLE_SHARE = 0.2
MIN_SECTION_CHARS = 60
_HEADING = re.compile(r"^#{2,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
_MARKUP = re.compile(r"[*_`]+|\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True)
class _Section:
    document: Document
    heading: str
    text: str


def starter_questions(
    documents: Sequence[Document], *, seed: int = 0, seed_share: float = 0.6
) -> list[Question]:
    """Questions with literal gold quotes, split by document; the same documents give the same questions.

    A document and the one it ``supersedes`` (in its front matter) stay on one side. A single document is
    split by section instead, else it would have no exam.

    Raises:
        DataError: no section of any document holds a sentence that can be quoted.
    """
    rarity = _rarity(documents)
    sections = {document.doc_id: _sections(document, rarity) for document in documents}
    drafts: list[Draft] = []
    for document in documents:
        order = seeded_order((section.heading for section in sections[document.doc_id]), seed=seed)
        by_heading = {section.heading: section for section in sections[document.doc_id]}
        made = [draft for heading in order if (draft := _answerable(by_heading[heading])) is not None]
        drafts += made[:PER_DOCUMENT]
    drafts = drop_duplicates(drafts, Counter())[:MAX_QUESTIONS]
    if not drafts:
        raise DataError(
            f"none of the {len(documents)} documents has a section with a sentence that can be quoted",
            expected="documents with some sentences of text (scanned PDFs have none)",
            next_step="write questions.jsonl by hand and give it with --questions FILE",
        )
    drafts += _unanswerable(drafts, documents, sections, seed=seed)
    family = _families(documents)
    drafts = [replace(draft, group=family[draft.about]) for draft in drafts]
    if len(documents) == 1:
        drafts = [replace(draft, group=draft.id) for draft in drafts]
    return assign_split(drafts, seed=seed, seed_share=seed_share)


def _sections(document: Document, rarity: Mapping[str, float]) -> list[_Section]:
    marks = [*_HEADING.finditer(document.text)]
    found = []
    ends = [*(mark.start() for mark in marks[1:]), len(document.text)]
    for mark, end in zip(marks, ends, strict=False):
        body = document.text[mark.end() : end]
        found.append(_Section(document, squash(_MARKUP.sub(r"\1", mark[1])), body.strip()))
    if not found:
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", document.text)]
        found = [_Section(document, _topic(part, document.title, rarity), part) for part in paragraphs]
    kept: dict[str, _Section] = {}
    for section in found:
        if section.heading and len(section.text) >= MIN_SECTION_CHARS:
            kept.setdefault(section.heading, section)
    return [*kept.values()]


def _families(documents: Sequence[Document]) -> dict[str, str]:
    """Document id → the oldest version of the document."""
    former = {document.doc_id: document.meta.get("supersedes", "") for document in documents}
    family = {}
    for doc_id in former:
        seen = [doc_id]
        while (older := former[seen[-1]]) in former and older not in seen:
            seen.append(older)
        family[doc_id] = seen[-1]
    return family


def _rarity(documents: Sequence[Document]) -> dict[str, float]:
    counts = Counter(word for document in documents for word in set(words(document.text)))
    return {word: math.log(1 + len(documents) / count) for word, count in counts.items()}


def _topic(paragraph: str, title: str, rarity: Mapping[str, float]) -> str:
    """The paragraph's two words with the highest count times rarity, in the order they first occur."""
    known = content_words(title)
    tokens = [word for word in words(paragraph) if len(word) > 3 and not word.isdigit()]
    counts = Counter(word for word in tokens if content_words(word) and not content_words(word) & known)
    best = sorted(counts, key=lambda word: (-counts[word] * rarity[word], word))[:2]
    return " and ".join(sorted(best, key=tokens.index))


def _ask(document: Document, heading: str) -> str:
    topic = heading if heading.isupper() or heading[1:2].isupper() else heading[0].lower() + heading[1:]
    return f"What does {document.title} say about {topic.rstrip('?!. ')}?"


def _answerable(section: _Section) -> Draft | None:
    cut = lead(section.text)
    if cut is None:
        return None
    doc_id = section.document.doc_id
    return Draft(
        id=_question_id(doc_id, section.heading),
        kind="open",
        question=_ask(section.document, section.heading),
        # One sentence, so that a teacher's one sentence can carry it.
        answer=squash(cut[1]),
        about=doc_id,
        group=doc_id,
        gold=(Quote(doc_id=doc_id, quote=cut[1]),),
    )


def _question_id(doc_id: str, heading: str) -> str:
    return f"starter-{hashlib.sha256(f'{doc_id}{chr(0)}{heading}'.encode()).hexdigest()[:12]}"


def _unanswerable(
    drafts: Sequence[Draft],
    documents: Sequence[Document],
    sections: dict[str, list[_Section]],
    *,
    seed: int,
) -> list[Draft]:
    wanted = round(len(drafts) * UNANSWERABLE_SHARE / (1 - UNANSWERABLE_SHARE))
    by_id = {document.doc_id: document for document in documents}
    stems = {
        section.heading: content_words(section.heading) for found in sections.values() for section in found
    }
    made: list[Draft] = []
    for doc_id in seeded_order((draft.about for draft in drafts), seed=seed + 3):
        document = by_id[doc_id]
        own = content_words(f"{document.title} {document.text}")
        free = [heading for heading, words_of in stems.items() if words_of and not words_of & own]
        ids = {_question_id(doc_id, heading): heading for heading in free}
        made += [
            Draft(question_id, "unanswerable", _ask(document, ids[question_id]), None, doc_id, group=doc_id)
            for question_id in sorted(ids)[:2]
        ]
        if len(made) >= wanted:
            break
    return made[:wanted]
