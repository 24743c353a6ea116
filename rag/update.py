"""Bringing an index up to date: only what changed is embedded, and a killed update does no harm."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domains.errors import DataError, IndexMismatch, RunLocked
from domains.jsonl import write_jsonl, write_text_atomic
from domains.records import Document, Passage
from rag.embed import Embedder
from rag.lexical import LexicalIndex, passage_text
from rag.manifest import (
    FORMAT,
    REBUILD,
    Manifest,
    collection_name,
    generation_of,
    open_client,
    open_store,
    read_manifest,
    text_digest,
)
from rag.passages import split_document

if TYPE_CHECKING:
    from langchain_chroma import Chroma

_BATCH = 64  # passages embedded and stored at a time: what a kill can cost


@dataclass(frozen=True)
class IndexReport:
    """What an update did: ``added + changed + unchanged`` documents are in the index now."""

    added: int
    changed: int
    removed: int
    unchanged: int
    passages: int
    embedded: int
    seconds: float
    size_bytes: int


def update_index(
    folder: Path,
    documents: Sequence[Document],
    *,
    embedder: Embedder,
    max_chars: int,
    overlap_chars: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> IndexReport:
    """Make the index in ``folder`` hold exactly these documents.

    Passages whose text, title and heading are already there with this embedder keep their vectors.

    Args:
        folder: where the index lies; made when missing.
        documents: all of them, not only the new ones.
        embedder: encodes the passages; another one than before means that all are embedded again.
        max_chars: see `split_document`.
        overlap_chars: see `split_document`.
        on_progress: called with (passages embedded so far, passages to embed).

    Raises:
        RunLocked: another process writes this index.
        DataError: no documents, or two of one id.
    """
    began = time.monotonic()
    hashes = _document_hashes(documents, max_chars=max_chars, overlap_chars=overlap_chars)
    passages = [
        passage
        for document in sorted(documents, key=lambda document: document.doc_id)
        for passage in split_document(document, max_chars=max_chars, overlap_chars=overlap_chars)
    ]
    settings = {"max_chars": max_chars, "overlap_chars": overlap_chars}
    folder.mkdir(parents=True, exist_ok=True)
    with _writing(folder):
        former = _former(folder, embedder)
        embedded = _write(folder, passages, hashes, settings, embedder, on_progress)
    before = former.documents if former else {}
    return IndexReport(
        added=len(hashes.keys() - before.keys()),
        changed=sum(before[key] != digest for key, digest in hashes.items() if key in before),
        removed=len(before.keys() - hashes.keys()),
        unchanged=sum(before.get(key) == digest for key, digest in hashes.items()),
        passages=len(passages),
        embedded=embedded,
        seconds=time.monotonic() - began,
        size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


def _write(
    folder: Path,
    passages: Sequence[Passage],
    hashes: dict[str, str],
    settings: dict[str, int],
    embedder: Embedder,
    on_progress: Callable[[int, int], None] | None,
) -> int:
    """Vectors first, then the words, then ``index.json``, then the cleaning; returns how many were embedded."""
    client = _open_or_reset(folder)
    try:
        name = collection_name(embedder)
        store = open_store(client, name=name, embedder=embedder, create=True)
        collection = client.get_collection(name, embedding_function=None)
        embedded = _embed_missing(collection, store, passages, on_progress)
        manifest = Manifest(
            embedder=embedder.name,
            dimensions=embedder.dimensions,
            **settings,
            generation=_write_generation(folder, passages),
            passages=len(passages),
            documents=hashes,
        )
        write_text_atomic(folder / "index.json", manifest.model_dump_json(indent=1) + "\n")
        _clean(folder, client, collection, manifest, {passage.passage_id for passage in passages})
    finally:
        client.close()
    return embedded


def _document_hashes(documents: Sequence[Document], *, max_chars: int, overlap_chars: int) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for document in sorted(documents, key=lambda document: document.doc_id):
        if document.doc_id in hashes:
            raise DataError(
                f"two documents have the id {document.doc_id!r}",
                expected="ids that name one document each",
                next_step="rename one of them",
            )
        content = f"{FORMAT} {max_chars} {overlap_chars} {document.model_dump_json(exclude={'source'})}"
        hashes[document.doc_id] = hashlib.sha256(content.encode()).hexdigest()[:32]
    if not hashes:
        raise DataError(
            "there are no documents to index", expected="at least one", next_step="check [corpus] documents"
        )
    return hashes


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    handle = os.open(folder / "writer.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(
                f"another process writes the index in {str(folder)!r}",
                expected="one writer at a time",
                next_step="wait for it and run the command again",
            ) from None
        yield
    finally:
        os.close(handle)


def _former(folder: Path, embedder: Embedder) -> Manifest | None:
    """The index so far, or None where nothing of it can be kept (damaged, other format or embedder)."""
    try:
        former = read_manifest(folder)
    except (DataError, IndexMismatch):
        return None
    if former and (former.embedder, former.dimensions) != (embedder.name, embedder.dimensions):
        return None
    return former


def _open_or_reset(folder: Path) -> Any:
    """Chroma's client; vectors that can't be opened are made anew, they are only a cache of the documents."""
    try:
        return open_client(folder)
    except Exception as error:  # Chroma has no common exception for a damaged file
        if not (folder / "chroma").exists():
            raise
        try:
            shutil.rmtree(folder / "chroma")
        except OSError:
            raise DataError(
                f"{str(folder / 'chroma')!r} can't be opened ({type(error).__name__})",
                expected="the files that the index stage wrote",
                next_step=f"delete the folder, then {REBUILD}",
            ) from error
        return open_client(folder)


def _embed_missing(
    collection: Any,
    store: Chroma,
    passages: Sequence[Passage],
    on_progress: Callable[[int, int], None] | None,
) -> int:
    held = collection.get(include=["metadatas"])
    digests = {
        key: (meta or {}).get("digest") for key, meta in zip(held["ids"], held["metadatas"], strict=True)
    }
    missing = [passage for passage in passages if digests.get(passage.passage_id) != text_digest(passage)]
    # Similar lengths together: the embedder wastes less, and a batch's vectors do not hang on chance.
    missing.sort(key=lambda passage: (len(passage.text), passage.passage_id))
    for start in range(0, len(missing), _BATCH):
        batch = missing[start : start + _BATCH]
        store.add_texts(
            [passage_text(passage) for passage in batch],
            metadatas=[_metadata(passage) for passage in batch],
            ids=[passage.passage_id for passage in batch],
        )
        if on_progress:
            on_progress(start + len(batch), len(missing))
    return len(missing)


def _metadata(passage: Passage) -> dict[str, str | int]:
    return {**passage.model_dump(exclude={"passage_id", "text"}), "digest": text_digest(passage)}


def _write_generation(folder: Path, passages: Sequence[Passage]) -> str:
    generation = generation_of(passages)
    target = folder / generation
    temporary = folder / f".{generation}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    write_jsonl(temporary / "passages.jsonl", passages)
    LexicalIndex.build(passages).save(temporary / "lexical")
    # The same name means the same passages; still rewritten, in case someone damaged the files.
    if target.exists():
        target.replace(folder / f".{generation}.old")
    temporary.replace(target)
    return generation


def _clean(folder: Path, client: Any, collection: Any, manifest: Manifest, valid: set[str]) -> None:
    """Take away what ``index.json`` no longer names; a kill in here leaves it to the next update."""
    stale = sorted(set(collection.get(include=[])["ids"]) - valid)
    for start in range(0, len(stale), 1000):
        collection.delete(ids=stale[start : start + 1000])
    for other in client.list_collections():
        if other.name != collection.name:
            client.delete_collection(other.name)
    keep = {manifest.generation, "chroma"}
    for path in folder.iterdir():
        if path.is_dir() and path.name not in keep:
            shutil.rmtree(path)
