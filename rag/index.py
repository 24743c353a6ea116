"""The passage index on disk: Chroma for vectors, BM25 for words, one file that says what is valid.

index/
    index.json             what is current: embedder, settings, document hashes; replaced last
    <generation>/          passages.jsonl and lexical/, named by their content
    chroma/                vectors of all passages, and perhaps of some that no longer count
    writer.lock            held by the one process that writes

A reader opens what ``index.json`` names and ignores everything else, so a writer killed anywhere
leaves the former index in working order, and the next update goes on from the vectors it finds.
Nothing in the folder holds an absolute path: it can be copied or moved.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from domains.errors import DataError, IndexMismatch
from domains.jsonl import read_jsonl
from domains.records import Passage
from rag.embed import Embedder, Vectors
from rag.lexical import LexicalIndex, best_positions
from rag.manifest import (
    REBUILD,
    Manifest,
    collection_name,
    generation_of,
    open_client,
    open_store,
    read_manifest,
)
from rag.update import IndexReport, update_index

if TYPE_CHECKING:
    from langchain_chroma import Chroma

__all__ = ["Index", "IndexReport", "open_index", "update_index"]


class Index:
    """An index opened for reading. Several processes may read at once; close it after use.

    Args:
        passages: all passages, in the order of the lexical index.
        lexical: BM25 over them.
        store: Chroma behind LangChain's ``VectorStore`` interface.
        embedder: encodes the queries.
        manifest: what ``index.json`` says.
        opened: closed with the index.
    """

    def __init__(
        self,
        *,
        passages: Sequence[Passage],
        lexical: LexicalIndex,
        store: Chroma,
        embedder: Embedder,
        manifest: Manifest,
        opened: ExitStack,
    ) -> None:
        self.passages = list(passages)
        self.by_id = {passage.passage_id: passage for passage in passages}
        self.store = store
        self.embedder = embedder
        self.manifest = manifest
        self._lexical = lexical
        self._opened = opened

    def search_lexical(self, query: str, *, top_k: int) -> list[str]:
        """Ids of the passages by BM25, best first."""
        return list(self.score_lexical(query, top_k=top_k))

    def score_lexical(self, query: str, *, top_k: int) -> dict[str, float]:
        """BM25 of the passages that `search_lexical` finds, best first."""
        scores = self._lexical.scores(query)
        found = best_positions(scores, top_k=top_k)
        return {self.passages[i].passage_id: float(scores[i]) for i in found}

    def search_dense(self, vectors: Vectors, *, top_k: int) -> list[list[str]]:
        """Ids of the passages nearest to each query vector [queries, dimensions] by cosine, best first."""
        return [list(found) for found in self.score_dense(vectors, top_k=top_k)]

    def score_dense(self, vectors: Vectors, *, top_k: int) -> list[dict[str, float]]:
        """Cosines of the passages that `search_dense` finds, best first."""
        return [self._nearest(vector.tolist(), top_k) for vector in vectors]

    def _nearest(self, vector: list[float], top_k: int) -> dict[str, float]:
        found = self.store.similarity_search_by_vector_with_relevance_scores(
            vector, k=min(top_k, len(self.passages))
        )
        ranked = sorted(found, key=lambda pair: (pair[1], pair[0].id))
        # A vector that index.json does not count (a newer or an unfinished update's) is not there.
        return {document.id: 1 - distance for document, distance in ranked if document.id in self.by_id}

    def close(self) -> None:
        """Give Chroma's files back."""
        self._opened.close()


def open_index(folder: Path, *, embedder: Embedder) -> Index:
    """Open an index for reading.

    Raises:
        DataError: there is none, or it is damaged.
        IndexMismatch: it was built with another embedder or format (names both, and what rebuilds it).
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(
            f"no index in {str(folder)!r}", expected="a folder that the index stage wrote", next_step=REBUILD
        )
    if (manifest.embedder, manifest.dimensions) != (embedder.name, embedder.dimensions):
        raise IndexMismatch(
            f"the index in {str(folder)!r} was built with embedder {manifest.embedder!r}"
            f" ({manifest.dimensions} dimensions)",
            expected=f"embedder {embedder.name!r} ({embedder.dimensions} dimensions), as configured",
            next_step=f"{REBUILD}   (rebuilds it)",
        )
    try:
        return _open(folder, manifest, embedder)
    except Exception as error:  # whatever Chroma, numpy or the disk make of a damaged file
        now = read_manifest(folder)
        if now is not None and now.generation != manifest.generation:
            return open_index(folder, embedder=embedder)  # a writer finished in between
        detail = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"the index in {str(folder)!r} can't be opened: it is damaged ({type(error).__name__}: {detail})",
            expected="the files that the index stage wrote",
            next_step="check the permissions"
            if isinstance(error, PermissionError)
            else f"delete the folder, then {REBUILD}",
        ) from error


def _open(folder: Path, manifest: Manifest, embedder: Embedder) -> Index:
    current = folder / manifest.generation
    passages = read_jsonl(current / "passages.jsonl", Passage)
    if len(passages) != manifest.passages or generation_of(passages) != manifest.generation:
        raise ValueError(f"{len(passages)} passages that are not those of index.json")
    lexical = LexicalIndex.load(current / "lexical")
    name = collection_name(embedder)
    with ExitStack() as opened:
        client = open_client(opened.enter_context(_writable(folder)))
        opened.callback(client.close)
        store = open_store(client, name=name, embedder=embedder, create=False)
        vectors = client.get_collection(name, embedding_function=None).count()
        if vectors < len(passages):
            raise ValueError(f"{vectors} vectors for {len(passages)} passages")
        return Index(
            passages=passages,
            lexical=lexical,
            store=store,
            embedder=embedder,
            manifest=manifest,
            opened=opened.pop_all(),
        )


@contextmanager
def _writable(folder: Path) -> Iterator[Path]:
    """The folder, or a copy of its vectors where it is read-only: Chroma writes even to read."""
    chroma = folder / "chroma"
    if all(os.access(path, os.W_OK) for path in (chroma, *chroma.rglob("*"))):
        yield folder
        return
    with TemporaryDirectory(prefix="preceptor-") as name:
        copy = Path(name) / "chroma"
        copy.mkdir()
        for path in sorted(chroma.rglob("*")):
            target = copy / path.relative_to(chroma)
            if path.is_dir():
                target.mkdir()
            else:
                shutil.copyfile(path, target)  # without the permissions
        yield Path(name)
