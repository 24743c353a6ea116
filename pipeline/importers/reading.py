"""What an importer hands over: documents, drafts of questions, and what it left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from domains.records import Document, QuestionKind, Quote


@dataclass(frozen=True)
class Draft:
    """A question before it is shortened, deduplicated and put on one side of the split.

    ``group`` names what must stay on one side together: the document, or a topic of several documents.
    ``terms`` are the names of that topic, see `pipeline.importers.split.hold_out`.
    """

    id: str
    kind: QuestionKind
    question: str
    answer: str | None
    about: str
    group: str
    options: dict[str, str] | None = None
    gold: tuple[Quote, ...] = ()
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """What the user may say beside format and source.

    Attributes:
        fields: our field name → the source's key (or column).
        document_fields: the same for documents that lie apart.
        documents: file or folder with documents, where the format has them apart.
        questions: file with questions, where the source is a folder.
        cop_base: number of the first option where the answer is a number (0 or 1).
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    document_fields: Mapping[str, str] = field(default_factory=dict)
    documents: Path | None = None
    questions: Path | None = None
    cop_base: int | None = None


@dataclass(frozen=True)
class Reading:
    """A set as read. Every question row is in ``drafts`` or counted in ``skipped``.

    Attributes:
        documents: in the order of the source; ids unique.
        drafts: questions in the order of the source.
        skipped: reason → number of question rows left out.
        skipped_documents: reason → number of document rows left out.
        changed: what was altered on the way in → how often ("gold quote not found in the document").
        notes: what a reader of the numbers must know.
    """

    documents: list[Document]
    drafts: list[Draft]
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_documents: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
