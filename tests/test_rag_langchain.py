"""LangChain in both directions, on LangChain's own classes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from langchain_core.documents import Document as LangChainDocument
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore

from domains.records import Document
from rag.citations import check_quotes
from rag.embed import WordHashEmbedder, as_langchain
from rag.index import Index, open_index, update_index
from rag.langchain import LangChainRetriever, PreceptorRetriever
from rag.retrieve import Retriever


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    folder = tmp_path_factory.mktemp("index")
    texts = {
        "gout": "## Cause\nUrate crystals cause gout.",
        "asthma": "## Cause\nNarrow airways cause asthma.",
    }
    documents = [Document(doc_id=k, title=k.title(), text=v, source=f"{k}.md") for k, v in texts.items()]
    embedder = WordHashEmbedder()
    update_index(folder, documents, embedder=embedder, max_chars=200, overlap_chars=0)
    index = open_index(folder, embedder=embedder)
    yield index
    index.close()


def test_our_retriever_works_in_a_chain(index: Index) -> None:
    ours = Retriever(index, candidates=10, rrf_k=60, lexical_weight=1, dense_weight=1)
    chain = PreceptorRetriever(retriever=ours, top_k=1) | RunnableLambda(
        lambda documents: [(d.page_content, d.metadata) for d in documents]
    )
    (hit,) = ours.retrieve("urate crystals", top_k=1)
    assert chain.invoke("urate crystals") == [
        (
            "Urate crystals cause gout.",
            {
                "doc_id": "gout",
                "title": "Gout",
                "heading": "Cause",
                "start": 9,
                "end": 35,
                "score": hit.score,
            },
        )
    ]


def test_a_vector_store_of_langchain_finds_passages_for_us() -> None:
    store = InMemoryVectorStore(as_langchain(WordHashEmbedder()))
    store.add_documents([
        LangChainDocument(id="a", page_content="Urate crystals cause gout.", metadata={"source": "gout.pdf"}),
        LangChainDocument(id="b", page_content="Blue sky.", metadata={"doc_id": "sky", "title": "Sky"}),
        LangChainDocument(id="c", page_content=" "),
    ])  # fmt: skip
    hits = LangChainRetriever(store).retrieve("crystals of urate", top_k=3)
    assert [(hit.passage.doc_id, hit.passage.title) for hit in hits] == [
        ("gout.pdf", "gout.pdf"),
        ("sky", "Sky"),
    ]
    assert (hits[0].passage.start, hits[0].passage.end) == (0, len("Urate crystals cause gout."))
    assert hits[0].ranks == {"langchain": 1}
    assert hits[0].score > hits[1].score
    citations, _ = check_quotes([("urate crystals cause gout", 1)], [hit.passage for hit in hits])
    assert (citations[0].doc_id, citations[0].start) == ("gout.pdf", 0)


def test_a_retriever_of_langchain_is_cut_to_top_k_without_repeats() -> None:
    class Fixed(BaseRetriever):
        def _get_relevant_documents(self, query: str, **_: object) -> list[LangChainDocument]:
            return [LangChainDocument(id=i, page_content=f"{query} {i}") for i in ("x", "x", "y", "z")]

    retriever = LangChainRetriever(Fixed())
    assert [hit.passage.passage_id for hit in retriever.retrieve("text", top_k=2)] == ["x", "y"]
    assert retriever.retrieve("  ", top_k=2) == []
    assert [len(hits) for hits in retriever.retrieve_many(["a", "", "b"], top_k=3)] == [3, 0, 3]


def test_our_store_is_a_langchain_store(index: Index) -> None:
    (document,) = index.store.similarity_search("urate crystals", k=1)
    assert document.metadata["doc_id"] == "gout"
    hits = LangChainRetriever(index.store).retrieve("urate crystals", top_k=1)
    assert hits[0].passage.doc_id == "gout"
