"""The example agent, with a scripted model: its tool finds real passages, and the model gets to see them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, BaseMessage

from domains.records import Document
from rag.embed import MiniLMEmbedder
from rag.index import open_index, update_index
from rag.retrieve import Retriever

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "agent.py"
pytest.importorskip("langchain", reason="needs the langchain extra")


class Scripted(FakeMessagesListChatModel):
    """Answers from a list; keeps the tools it was given and the messages of each call."""

    tools: list[Any] = []
    seen: list[list[BaseMessage]] = []

    def bind_tools(self, tools: Any, **_: Any) -> Scripted:
        self.tools.extend(tools)
        return self

    def _generate(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> Any:
        self.seen.append(list(messages))
        return super()._generate(messages, *args, **kwargs)


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("agent_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_agent_searches_and_answers_from_what_it_found(tmp_path: Path) -> None:
    example = load_example()
    embedder = MiniLMEmbedder()
    texts = {
        "gout": "## Treatment\nAn attack of gout is treated with colchicine.",
        "asthma": "## Treatment\nAn attack of asthma is treated with salbutamol.",
    }
    documents = [Document(doc_id=k, title=k.title(), text=v, source=f"{k}.md") for k, v in texts.items()]
    update_index(tmp_path, documents, embedder=embedder, max_chars=300, overlap_chars=0)
    index = open_index(tmp_path, embedder=embedder)
    call = {"name": "search_documents", "args": {"query": "gout attack medicine"}, "id": "1"}
    model = Scripted(
        responses=[AIMessage(content="", tool_calls=[call]), AIMessage(content="Colchicine, says Gout.")]
    )
    try:
        retriever = Retriever(index, candidates=10, rrf_k=60, lexical_weight=1.0, dense_weight=1.0)
        result = example.answer("What helps in a gout attack?", retriever=retriever, model=model)
    finally:
        index.close()
    assert [tool.name for tool in model.tools][:1] == ["search_documents"]
    shown = model.seen[1][-1].content
    assert shown.startswith(
        "Gout - Treatment (gout, characters 13 to 58)\nAn attack of gout is treated with colchicine."
    )
    assert "salbutamol" in shown  # the second best passage
    assert model.seen[0][0].content == example.SYSTEM
    assert result["messages"][-1].content == "Colchicine, says Gout."
