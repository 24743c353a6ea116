"""Retrieve, ask, check: one question in, one `Answer` with checked citations out.

The exam uses this very code, so that what is examined is what users get.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from domains.records import Answer, Citation, Hit, Message, Passage
from rag.answers import is_abstention, parse_reply
from rag.citations import check_quotes, find_support
from rag.prompt import student_messages
from serve.engine import Completion, Engine


class Retrieves(Protocol):
    """Anything that finds passages for a query, such as `rag.retrieve.Retriever`."""

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        """The ``top_k`` best passages, best first."""


@dataclass(frozen=True)
class Asked:
    """A question ready for the model: its tokens and the evidence shown with it."""

    question: str
    tokens: list[int]
    hits: list[Hit]


class Assistant:
    """Answers questions from a model and, where there is one, a retriever.

    Args:
        engine: the model.
        retriever: finds the evidence; None asks closed-book.
        system: the domain's system prompt.
        abstain: the sentence that says "I don't know" in this domain.
        top_k: passages shown to the model.
        max_tokens: most tokens of a reply.
        withdraw_unsupported: replace an answer that no shown passage supports by ``abstain``.
    """

    def __init__(
        self,
        engine: Engine,
        retriever: Retrieves | None,
        *,
        system: str,
        abstain: str,
        top_k: int,
        max_tokens: int,
        withdraw_unsupported: bool,
    ) -> None:
        self.engine = engine
        self.retriever = retriever
        self._system = system
        self._abstain = abstain
        self._top_k = top_k
        self._max_tokens = max_tokens
        self._withdraw = withdraw_unsupported

    def prepare(self, question: str, *, query: str | None = None, history: Sequence[Message] = ()) -> Asked:
        """Find evidence and render the prompt.

        Args:
            question: as shown to the model, with options if any.
            query: as given to the retriever; the question itself when None.
            history: earlier turns, oldest first; they stand before the question, without evidence.

        Raises:
            ContextOverflow: prompt and reply do not fit; says how many tokens are too many.
        """
        hits = self.retriever.retrieve(query or question, top_k=self._top_k) if self.retriever else []
        messages = student_messages(self._system, question, [hit.passage for hit in hits])
        rendered = self.engine.render([messages[0], *history, *messages[1:]])
        return Asked(question=question, tokens=self.engine.tokenize(rendered), hits=hits)

    def ask(self, question: str, *, query: str | None = None, history: Sequence[Message] = ()) -> Answer:
        """Answer one question.

        Raises:
            ContextOverflow: see `prepare`.
        """
        return self.ask_many([self.prepare(question, query=query, history=history)])[0]

    def ask_many(self, asked: Sequence[Asked]) -> list[Answer]:
        """Answer prepared questions together; greedy, in the given order."""
        completions = self.engine.generate([item.tokens for item in asked], max_tokens=self._max_tokens)
        return [self.judge(item, completion) for item, completion in zip(asked, completions, strict=True)]

    def stream(self, asked: Asked, *, temperature: float = 0.0, seed: int = 0) -> Iterator[str | Answer]:
        """The model's text in pieces as it writes, then the checked `Answer`."""
        pieces = []
        for piece in self.engine.stream(
            asked.tokens, max_tokens=self._max_tokens, temperature=temperature, seed=seed
        ):
            pieces.append(piece)
            yield piece
        text = "".join(pieces)
        tokens = len(self.engine.tokenize(text)) if text else 0
        yield self.judge(asked, Completion(text, [0] * tokens, len(asked.tokens), "stop"))

    def judge(self, asked: Asked, completion: Completion) -> Answer:
        """Check a completion against the evidence it was shown."""
        passages = [hit.passage for hit in asked.hits]
        reply = parse_reply(completion.text)
        citations, rejected = check_quotes(reply.quotes, passages)
        text = reply.answer
        abstained = is_abstention(text, abstain=self._abstain)
        if not abstained and passages and not citations:
            citations = _found_support(asked.question, text, reply.rationale, passages)
        supported = bool(citations) and not abstained
        if abstained:
            text, citations = self._abstain, []
        elif passages and not supported and self._withdraw:
            text = self._abstain
        return Answer(
            question=asked.question,
            text=text,
            raw=completion.text,
            support="abstained" if abstained else "supported" if supported else "unsupported",
            citations=citations,
            rejected_quotes=rejected,
            passages=list(asked.hits),
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=len(completion.tokens),
        )


def _found_support(
    question: str, answer: str, rationale: str, passages: Sequence[Passage]
) -> list[Citation]:
    """A passage sentence that carries the answer; a short answer is read together with its question."""
    claim = answer if len(answer.split()) >= 4 else f"{question} {rationale} {answer}"
    citation = find_support(claim, passages)
    return [citation] if citation else []
