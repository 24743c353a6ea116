"""LangChain in both directions: our retriever for its chains, its retrievers and stores for our assistant.

`rag.embed` does the same for embeddings (`as_langchain`, `LangChainEmbedder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document as LangChainDocument
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, Field

from domains.records import Hit, Passage
from rag.retrieve import Retriever


class PreceptorRetriever(BaseRetriever):
    """A `Retriever` as a LangChain retriever: ``PreceptorRetriever(retriever=…, top_k=3).invoke(query)``.

    Each document's metadata tell where it stands: ``doc_id``, ``title``, ``heading``, ``start`` and
    ``end`` (characters of the source document), and its ``score``.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    retriever: Retriever
    top_k: int = Field(default=3, ge=1)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002  # LangChain's signature
    ) -> list[LangChainDocument]:
        return [_as_langchain(hit) for hit in self.retriever.retrieve(query, top_k=self.top_k)]


def _as_langchain(hit: Hit) -> LangChainDocument:
    metadata = hit.passage.model_dump(include={"doc_id", "title", "heading", "start", "end"})
    return LangChainDocument(
        id=hit.passage.passage_id, page_content=hit.passage.text, metadata={**metadata, "score": hit.score}
    )


class LangChainRetriever:
    """Any LangChain retriever or vector store in the place of a `Retriever`.

    The passages are LangChain's documents: their offsets count from the start of their own text, and
    ``doc_id`` is the metadata's ``doc_id`` or ``source``, else the document's id.

    Args:
        source: what is asked.
    """

    def __init__(self, source: BaseRetriever | VectorStore) -> None:
        self._source = source

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        """The first ``top_k`` documents of the source, none twice; the score is 1 / rank.

        Empty documents are passed over, and an empty query finds nothing.
        """
        if not query.strip():
            return []
        passages: dict[str, Passage] = {}
        for number, document in enumerate(self._ask(query, top_k), start=1):
            if document.page_content.strip():
                passage = _as_passage(document, number)
                passages.setdefault(passage.passage_id, passage)
        return [
            Hit(passage=passage, score=1 / rank, ranks={"langchain": rank})
            for rank, passage in enumerate(list(passages.values())[:top_k], start=1)
        ]

    def retrieve_many(self, queries: Sequence[str], *, top_k: int) -> list[list[Hit]]:
        """`retrieve` for each query."""
        return [self.retrieve(query, top_k=top_k) for query in queries]

    def _ask(self, query: str, top_k: int) -> list[LangChainDocument]:
        if isinstance(self._source, BaseRetriever):
            return self._source.invoke(query)
        return self._source.similarity_search(query, k=top_k)


def _as_passage(document: LangChainDocument, number: int) -> Passage:
    meta: dict[str, Any] = document.metadata
    doc_id = str(meta.get("doc_id") or meta.get("source") or document.id or f"document-{number}")
    text = document.page_content
    return Passage(
        passage_id=str(document.id or f"{doc_id}#{number}"),
        doc_id=doc_id,
        title=str(meta.get("title") or doc_id),
        heading=str(meta.get("heading") or ""),
        text=text,
        start=0,
        end=len(text),
    )
