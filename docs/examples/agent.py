"""A LangChain agent that looks things up in a Preceptor index before it answers.

    pip install langchain-openai
    preceptor index medical
    python docs/examples/agent.py runs/medical/quick/bundle/index openai:gpt-4o-mini "How is gout treated?"

The model is any that LangChain knows by name and that can call tools; each provider has a package of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.prompts import PromptTemplate
from langchain_core.tools import BaseTool, create_retriever_tool

from rag.embed import MiniLMEmbedder
from rag.index import open_index
from rag.langchain import PreceptorRetriever
from rag.retrieve import Retriever

SYSTEM = (
    "Answer only from what search_documents finds, and name the document each fact is from. "
    "If it finds nothing that answers, say that the documents do not say."
)


def search_tool(retriever: Retriever, *, top_k: int = 3) -> BaseTool:
    """The retriever as a tool: a query in, numbered passages with their source out."""
    return create_retriever_tool(
        PreceptorRetriever(retriever=retriever, top_k=top_k),
        name="search_documents",
        description="Finds the passages of the document collection that are nearest to a query.",
        document_prompt=PromptTemplate.from_template(
            "{title} - {heading} ({doc_id}, characters {start} to {end})\n{page_content}"
        ),
    )


def answer(question: str, *, retriever: Retriever, model: str | BaseChatModel) -> dict[str, Any]:
    """Let the agent search as often as it wants, then answer; the last message is its answer."""
    agent = create_agent(model, tools=[search_tool(retriever)], system_prompt=SYSTEM)
    result: dict[str, Any] = agent.invoke({"messages": [{"role": "user", "content": question}]})
    return result


def main(index_folder: str, model: str, question: str) -> None:
    """Open the index, ask, print the conversation."""
    index = open_index(Path(index_folder), embedder=MiniLMEmbedder())
    try:
        retriever = Retriever(index, candidates=50, rrf_k=60, lexical_weight=1.0, dense_weight=1.0)
        for message in answer(question, retriever=retriever, model=model)["messages"]:
            message.pretty_print()
    finally:
        index.close()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
