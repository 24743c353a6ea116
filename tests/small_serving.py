"""For tests of serving: a small domain with an index, and a scripted model with a fixed retriever."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domains.config import OnUnsupported
from domains.domain import Domain, load_domain
from domains.errors import ContextOverflow
from domains.records import Document, Hit, Message, Passage
from serve.assistant import Assistant
from serve.engine import Completion, LogProbs

ABSTAIN = "I don't know: the documents do not say."
TEXTS = {
    "Brenzal": "Brenzal is a tablet against hay fever. The adult dose of Brenzal is 40 mg once a day.",
    "Corvane": "Corvane treats dry eyes. Corvane drops are kept in the refrigerator and used within 28 days.",
    "Moltrex": "Moltrex is an antibiotic. Moltrex must not be taken with milk, because milk binds it.",
    "Pelidor": "Pelidor is a cough syrup. Children under six years must not be given Pelidor.",
    "Sanivar": "Sanivar is a vaccine. Two doses of Sanivar are given four weeks apart.",
}
TOML = """
[domain]
name = "shelf"
title = "A small shelf"

[corpus]
documents = "documents"

[retrieve]
top_k = 2

[student]
context = 1024

[serve]
max_tokens = 48
parallel = 4
"""
SYSTEM = (
    "You are a reference assistant. Answer only from the numbered passages. First quote the sentence that "
    'decides the answer, in double quotes, followed by its passage number: "..." [1]\n'
    "Then write one line: Answer: and the answer."
)


def write_domain(folder: Path) -> Domain:
    (folder / "prompts").mkdir(parents=True)
    (folder / "domain.toml").write_text(TOML, encoding="utf-8")
    for name in ("system", "teacher"):
        (folder / "prompts" / f"{name}.md").write_text(SYSTEM, encoding="utf-8")
    return load_domain(str(folder))


def write_index(folder: Path) -> None:
    from rag.embed import MiniLMEmbedder
    from rag.index import update_index

    documents = [
        Document(doc_id=name.lower(), title=name, text=text, source=f"{name}.md")
        for name, text in TEXTS.items()
    ]
    update_index(folder, documents, embedder=MiniLMEmbedder(), max_chars=400, overlap_chars=0)


def passage(name: str, text: str | None = None) -> Passage:
    text = TEXTS[name] if text is None else text
    return Passage(
        passage_id=f"{name.lower()}#0",
        doc_id=name.lower(),
        title=name,
        heading="",
        text=text,
        start=0,
        end=len(text),
    )


class FixedRetriever:
    """Finds the same passages whatever is asked; remembers the queries."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.queries: list[str] = []

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        self.queries.append(query)
        return [
            Hit(passage=passage(name), score=1 / (60 + rank), ranks={"dense": rank, "lexical": 3 - rank})
            for rank, name in enumerate(self.names[:top_k], 1)
        ]


class ScriptedEngine:
    """Stands in for an engine: one token is one character, and a function writes the replies."""

    adds_bos = False

    def __init__(self, reply: str | Callable[[str], str], *, context: int = 100_000, piece: int = 3) -> None:
        self.reply = (lambda _prompt: reply) if isinstance(reply, str) else reply
        self.context = context
        self.piece = piece
        self.prompts: list[str] = []
        self.streams_open = 0

    def render(self, messages: Sequence[Message]) -> str:
        return "".join(f"<{message.role}>{message.content}\n" for message in messages)

    def tokenize(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens + max_tokens > self.context:
            raise ContextOverflow(f"{prompt_tokens + max_tokens} tokens", expected=f"at most {self.context}")

    def _complete(
        self, prompt: Sequence[int], max_tokens: int, watch: Sequence[int] | None = None
    ) -> Completion:
        asked = "".join(map(chr, prompt))
        self.prompts.append(asked)
        text = self.reply(asked)
        finish = "length" if len(text) > max_tokens else "stop"
        tokens = self.tokenize(text[:max_tokens])
        return Completion(text[:max_tokens], tokens, len(prompt), finish, self._log_probs(tokens, watch))

    def _log_probs(self, tokens: Sequence[int], watch: Sequence[int] | None) -> LogProbs | None:
        """Vowels were certain, digits hardly, all else in between."""
        if watch is None:
            return None
        sure = {"a": 0.0, "e": 0.0, "i": 0.0, "o": 0.0, "u": 0.0, **dict.fromkeys("0123456789", -4.0)}
        taken = [sure.get(chr(token), -1.0) for token in tokens] + [-0.5]
        watched = np.full((len(taken), len(watch)), -7.0, dtype=np.float32)
        return LogProbs(np.array(taken, dtype=np.float32), watched)

    def detokenize(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        watch: Sequence[int] | None = None,
        **_: Any,
    ) -> list[Completion]:
        return [self._complete(prompt, max_tokens, watch) for prompt in prompts]

    def stream(
        self, prompt: Sequence[int], *, max_tokens: int, watch: Sequence[int] | None = None, **_: Any
    ) -> Generator[str, None, Completion]:
        done = self._complete(prompt, max_tokens, watch)
        self.streams_open += 1
        try:
            for at in range(0, len(done.text), self.piece):
                yield done.text[at : at + self.piece]
            return done
        finally:
            self.streams_open -= 1


def scripted_assistant(
    reply: str | Callable[[str], str],
    *names: str,
    context: int = 100_000,
    max_tokens: int = 4000,
    unsupported: OnUnsupported = "withdraw",
    piece: int = 3,
    **more: Any,
) -> tuple[Assistant, Any, FixedRetriever]:
    """An assistant with a scripted model, the model, and its retriever."""
    engine: Any = ScriptedEngine(reply, context=context, piece=piece)
    retriever = FixedRetriever(*names)
    assistant = Assistant(
        engine,
        retriever if names else None,
        system="Be brief.",
        abstain=ABSTAIN,
        top_k=2,
        max_tokens=max_tokens,
        unsupported=unsupported,
        **more,
    )
    return assistant, engine, retriever
