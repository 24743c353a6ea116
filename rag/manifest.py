"""What an index folder consists of: its manifest, and how its vector store is opened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from domains.errors import DataError, IndexMismatch
from domains.records import Passage, Record
from rag.embed import Embedder, as_langchain
from rag.lexical import passage_text

if TYPE_CHECKING:
    from langchain_chroma import Chroma

FORMAT = 1
REBUILD = "preceptor index DOMAIN"


class Manifest(Record):
    """``index.json``. ``documents`` maps a document's id to the hash of all that its passages depend on."""

    format: Literal[1] = 1
    embedder: str
    dimensions: int
    max_chars: int
    overlap_chars: int
    generation: str
    passages: int
    documents: dict[str, str]


def read_manifest(folder: Path) -> Manifest | None:
    """``index.json``, or None where there is no index yet.

    Raises:
        IndexMismatch: it is of another format version.
        DataError: it is damaged.
    """
    path = folder / "index.json"
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        if any(item["loc"] == ("format",) for item in error.errors()):
            found = next(item["input"] for item in error.errors() if item["loc"] == ("format",))
            raise IndexMismatch(
                f"the index in {str(folder)!r} has format {found!r}",
                expected=f"format {FORMAT}",
                next_step=f"{REBUILD}   (rebuilds it)",
            ) from None
        raise DataError(
            f"{path} is damaged",
            expected="the JSON that the index stage wrote",
            next_step=f"delete the folder, then {REBUILD}",
        ) from None


def generation_of(passages: Iterable[Passage]) -> str:
    """The name of a generation: a hash of its passages."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(f"{passage.passage_id}\0{text_digest(passage)}\n".encode())
    return digest.hexdigest()[:16]


def text_digest(passage: Passage) -> str:
    """A hash of what is embedded of a passage."""
    return hashlib.sha256(passage_text(passage).encode()).hexdigest()[:32]


def collection_name(embedder: Embedder) -> str:
    """Chroma's collection for one vector space; another embedder never overwrites a working one."""
    space = hashlib.sha256(f"{FORMAT} {embedder.name} {embedder.dimensions}".encode()).hexdigest()
    return f"passages-{space[:16]}"


def open_client(folder: Path) -> Any:
    """Chroma embedded, without telemetry and without a server."""
    import chromadb
    from chromadb.config import Settings

    return chromadb.PersistentClient(str(folder / "chroma"), settings=Settings(anonymized_telemetry=False))


def open_store(client: Any, *, name: str, embedder: Embedder, create: bool) -> Chroma:
    """A collection as LangChain's ``VectorStore``; our embedder always, never Chroma's own (it downloads)."""
    from langchain_chroma import Chroma

    return Chroma(
        collection_name=name,
        client=client,
        embedding_function=as_langchain(embedder),
        collection_configuration={"hnsw": {"space": "cosine", "ef_search": 200}},
        create_collection_if_not_exists=create,
    )
