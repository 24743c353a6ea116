"""Retrieve, ask, check: one question in, one `Answer` with checked citations out.

The exam uses this very code, so that what is examined is what users get.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from domains.errors import ContextOverflow
from domains.records import Answer, Citation, Hit, Message, Passage
from rag.answers import is_abstention, one_reply, parse_reply
from rag.citations import check_quotes, find_support
from rag.prompt import neutralise, student_messages
from serve.engine import Completion, Engine
from serve.streaming import ReplyStream


class Retrieves(Protocol):
    """Anything that finds passages for a query, such as `rag.retrieve.Retriever`."""

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        """The ``top_k`` best passages, best first."""


@dataclass(frozen=True)
class Asked:
    """A question ready for the model: its tokens and the evidence shown with it.

    ``max_tokens`` is the most the reply may have, ``dropped_turns`` how many of the oldest turns of the
    history were left out to make room.
    """

    question: str
    query: str
    tokens: list[int]
    hits: list[Hit]
    max_tokens: int
    dropped_turns: int = 0


class Assistant:
    """Answers questions from a model and, where there is one, a retriever. Threads may share it.

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
        self._retrieving = threading.Lock()  # stores and stemmers need not be safe to share

    def prepare(
        self,
        question: str,
        *,
        query: str | None = None,
        history: Sequence[Message] = (),
        max_tokens: int | None = None,
        drop_old_turns: bool = False,
    ) -> Asked:
        """Find evidence and render the prompt.

        Args:
            question: as shown to the model, with options if any.
            query: as given to the retriever; the question itself when None.
            history: earlier turns, oldest first (untrusted); they stand before the question, without
                evidence.
            max_tokens: most tokens of the reply; never more than the assistant's own limit.
            drop_old_turns: leave out the oldest turns, two at a time, where they do not all fit.

        Raises:
            ContextOverflow: prompt and reply do not fit; says how many tokens there are and may be.
        """
        limit = min(max_tokens or self._max_tokens, self._max_tokens)
        query = query or question
        hits = self._find(query)
        dropped = 0
        while True:
            tokens = self._prompt(question, hits, history[dropped:])
            try:
                self.engine.check_fits(len(tokens), limit)
            except ContextOverflow:
                if not drop_old_turns or dropped >= len(history):
                    raise
                dropped = min(dropped + 2, len(history))
            else:
                return Asked(question, query, tokens, hits, limit, dropped)

    def _find(self, query: str) -> list[Hit]:
        if self.retriever is None:
            return []
        with self._retrieving:
            return self.retriever.retrieve(query, top_k=self._top_k)

    def _prompt(self, question: str, hits: Sequence[Hit], history: Sequence[Message]) -> list[int]:
        system, *turn = student_messages(self._system, question, [hit.passage for hit in hits])
        earlier = [Message(role=old.role, content=neutralise(old.content)) for old in history]
        return self.engine.tokenize(self.engine.render([system, *earlier, *turn]))

    def ask(self, question: str, *, query: str | None = None, history: Sequence[Message] = ()) -> Answer:
        """Answer one question.

        Raises:
            ContextOverflow: see `prepare`.
        """
        return self.ask_many([self.prepare(question, query=query, history=history)])[0]

    def ask_many(self, asked: Sequence[Asked]) -> list[Answer]:
        """Answer prepared questions together; greedy, in the given order."""
        if not asked:
            return []
        limit = max(item.max_tokens for item in asked)
        completions = self.engine.generate([item.tokens for item in asked], max_tokens=limit)
        return [self.judge(item, completion) for item, completion in zip(asked, completions, strict=True)]

    def stream(self, asked: Asked, *, temperature: float = 0.0, seed: int = 0) -> Iterator[str | Answer]:
        """The answer's text in pieces as soon as they are certain, then the checked `Answer`.

        The pieces are together exactly ``Answer.text``; nothing is shown that is withdrawn later (see
        `serve.streaming`). Pieces may be empty: the model wrote something that can't be shown yet.
        Closing the iterator stops the model.
        """
        live = ReplyStream(
            [hit.passage for hit in asked.hits], abstain=self._abstain, withdraw_unsupported=self._withdraw
        )
        completion = yield from self._write(asked, live, temperature, seed)
        answer = self.judge(asked, completion)
        yield live.rest(answer.text)
        yield answer

    def _write(
        self, asked: Asked, live: ReplyStream, temperature: float, seed: int
    ) -> Generator[str, None, Completion]:
        writing = self.engine.stream(
            asked.tokens, max_tokens=asked.max_tokens, temperature=temperature, seed=seed
        )
        try:
            while not live.over:
                yield live.feed(next(writing))
        except StopIteration as end:
            completion: Completion = end.value
            return completion
        finally:
            writing.close()
        # Stopped where the reply began to repeat itself.
        tokens = self.engine.tokenize(live.text)[self.engine.adds_bos :]
        return Completion(live.text, tokens, len(asked.tokens), "stop")

    def judge(self, asked: Asked, completion: Completion) -> Answer:
        """Check a completion against the evidence it was shown."""
        passages = [hit.passage for hit in asked.hits]
        reply = parse_reply(one_reply(completion.text))
        citations, rejected = check_quotes(reply.quotes, passages)
        text = reply.answer
        abstained = not text or is_abstention(text, abstain=self._abstain)
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


def _found_support(question: str, answer: str, rationale: str, passages: Sequence[Passage]) -> list[Citation]:
    """A passage sentence that carries the answer; a short answer is read together with its question."""
    claim = answer if len(answer.split()) >= 4 else f"{question} {rationale} {answer}"
    citation = find_support(claim, passages)
    return [citation] if citation else []
