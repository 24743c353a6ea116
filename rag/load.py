"""A folder of files to documents. What can't be read is listed with its reason; the rest goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from domains.errors import DataError
from domains.records import Document
from rag.formats import READERS, Draft, Unreadable, read_drafts

MAX_BYTES = 50_000_000


@dataclass(frozen=True)
class Skipped:
    """A file, folder or row that is no document, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """Every file (and row of a JSONL file) is in one of the two lists."""

    documents: list[Document]
    skipped: list[Skipped]


def load_documents(path: Path) -> Loaded:
    """Read a file, or all files below a folder in sorted order.

    A document's id is its path below the folder without the suffix, ``/`` written ``--``; ``source``
    is that path (with the line in a JSONL file). Nothing outside the folder is read.

    Where two have one id (``a.docx`` and ``a.pdf``) or one text, the first is taken.

    Raises:
        DataError: the path does not exist, or nothing in it is a document.
    """
    if not path.exists():
        raise DataError(
            f"{str(path)!r} does not exist",
            expected="a folder with documents, or one document",
            next_step="check [corpus] documents in domain.toml",
        )
    documents: list[Document] = []
    skipped: list[Skipped] = []
    for source, item in _files(path):
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        _read_file(source, item, documents, skipped)
    documents = _without_copies(_with_own_id(documents, skipped), skipped)
    if not documents:
        shown = "".join(f"\n  - {entry.source}: {entry.reason}" for entry in skipped[:10])
        raise DataError(
            f"no documents in {str(path)!r} ({len(skipped)} skipped){shown}",
            expected=f"at least one readable file: {', '.join(sorted(READERS))}",
            next_step="check [corpus] documents in domain.toml",
        )
    return Loaded(documents, skipped)


def _files(root: Path) -> Iterator[tuple[str, Path | Skipped]]:
    """(path below the root, file or the reason to skip it), sorted."""
    if not root.is_dir():
        yield root.name, root
        return
    home = root.resolve()
    found: list[tuple[str, Path | Skipped]] = []

    def unlistable(error: OSError) -> None:
        name = Path(str(error.filename)).relative_to(root).as_posix()
        found.append((name, Skipped(name, f"the folder can't be listed: {error.strerror}")))

    for folder, names, files in os.walk(root, onerror=unlistable):
        below = Path(folder)
        for name in list(names):
            source = (below / name).relative_to(root).as_posix()
            reason = "hidden" if name.startswith(".") else "a link" if (below / name).is_symlink() else ""
            if reason:
                names.remove(name)
                found.append((source, Skipped(source, f"{reason} folder")))
        for name in files:
            file = below / name
            source = file.relative_to(root).as_posix()
            reason = _refusal(file, home)
            found.append((source, Skipped(source, reason) if reason else file))
    yield from sorted(found, key=lambda pair: pair[0])


def _refusal(file: Path, home: Path) -> str:
    if file.name.startswith("."):
        return "hidden file"
    if file.is_symlink() and not file.resolve().is_relative_to(home):
        return "a link that leads out of the folder"
    return ""


def _read_file(source: str, file: Path, documents: list[Document], skipped: list[Skipped]) -> None:
    if not file.is_file():
        skipped.append(Skipped(source, "not a regular file"))
        return
    if (size := file.stat().st_size) > MAX_BYTES:
        skipped.append(
            Skipped(source, f"{size / 1e6:,.0f} MB, over the limit of {MAX_BYTES / 1e6:.0f} MB: split it")
        )
        return
    try:
        drafts = list(read_drafts(file))
    except Unreadable as error:
        skipped.append(Skipped(source, str(error)))
        return
    if not drafts:
        skipped.append(Skipped(source, "empty"))
    for draft in drafts:
        place = f"{source}:{draft.row}" if draft.row else source
        if draft.problem or not draft.text.strip():
            skipped.append(Skipped(place, draft.problem or "empty"))
        else:
            documents.append(_document(source, place, draft))


def _document(source: str, place: str, draft: Draft) -> Document:
    own_id = Path(source).with_suffix("").as_posix().replace("/", "--")
    return Document(
        doc_id=draft.doc_id or own_id,
        title=" ".join(draft.title.split()),
        text=draft.text,
        source=place,
        meta=draft.meta,
    )


def _with_own_id(documents: list[Document], skipped: list[Skipped]) -> list[Document]:
    first: dict[str, str] = {}
    kept = []
    for document in documents:
        if document.doc_id in first:
            reason = (
                f"the same id, {document.doc_id!r}, as {first[document.doc_id]}: rename one if both count"
            )
            skipped.append(Skipped(document.source, reason))
        else:
            first[document.doc_id] = document.source
            kept.append(document)
    return kept


def _without_copies(documents: list[Document], skipped: list[Skipped]) -> list[Document]:
    first: dict[str, str] = {}
    kept = []
    for document in documents:
        digest = hashlib.sha256(document.text.strip().encode()).hexdigest()
        if digest in first:
            skipped.append(Skipped(document.source, f"the same text as {first[digest]}"))
        else:
            first[digest] = document.source
            kept.append(document)
    return kept
