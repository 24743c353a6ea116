"""Retrieve, ask, check: one question in, one `Answer` with checked citations out.

The exam uses this very code, so that what is examined is what users get.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from domains.config import AnswersBy, OnUnsupported
from domains.errors import ContextOverflow
from domains.records import Answer, Hit, Message, Reflection
from rag.answers import one_reply, parse_reply
from rag.prompt import neutralise, stem_of, student_messages
from serve.checking import Checked, check_reply
from serve.confidence import Calibration
from serve.engine import Completion, Engine
from serve.options import pick_option
from serve.reflection import Reflected, Reflector
from serve.signals import likelihood_of, measure
from serve.streaming import ReplyStream
from serve.vote import GREEDY, Votes, elect
from serve.yes_no import FittedYesNo, pick_yes_no


class Retrieves(Protocol):
    """Anything that finds passages for a query, such as `rag.retrieve.Retriever`."""

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        """The ``top_k`` best passages, best first."""


@dataclass(frozen=True)
class Asked:
    """A question ready for the model: its tokens and the evidence shown with it.

    ``max_tokens`` is the most the reply may have, ``dropped_turns`` how many of the oldest turns of the
    history were left out to make room; ``history`` is the rest.
    """

    question: str
    query: str
    tokens: list[int]
    hits: list[Hit]
    max_tokens: int
    dropped_turns: int = 0
    history: tuple[Message, ...] = ()


class Assistant:
    """Answers questions from a model and, where there is one, a retriever. Threads may share it.

    Args:
        engine: the model.
        retriever: finds the evidence; None asks closed-book.
        system: the domain's system prompt.
        abstain: the sentence that says "I don't know" in this domain.
        top_k: passages shown to the model.
        max_tokens: most tokens of a reply.
        unsupported: what becomes of text that no shown passage supports, see ``[serve]``.
        calibration: says how sure an answer is; None leaves its confidence open.
        threshold: abstain where the confidence is lower.
        signals: measure an answer's signals although there is no calibration.
        reflector: judges evidence while answering, see `serve.reflection`; None shows the passages and answers.
        options: who answers questions with options: the model, or the ``evidence`` (see `serve.options`).
        yes_no: answers yes/no questions by evidence (see `serve.yes_no`); None leaves them to the model.
        votes: how many replies are written to a question that is not reflected upon, see `serve.vote`.
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
        unsupported: OnUnsupported,
        calibration: Calibration | None = None,
        threshold: float = 0.0,
        signals: bool = False,
        reflector: Reflector | None = None,
        votes: Votes = GREEDY,
        options: AnswersBy = "student",
        yes_no: FittedYesNo | None = None,
    ) -> None:
        self.engine = engine
        self.retriever = retriever
        self._system = system
        self.abstention = self._abstain = abstain
        self.top_k = top_k
        self._max_tokens = max_tokens
        self._unsupported = unsupported
        self._reflector = reflector
        self._votes = votes
        self._calibration = calibration
        self._threshold = threshold if calibration is not None and calibration.signals else 0.0
        # What is picked has no confidence: where the owner wants a bound on wrong answers, the model answers.
        by_evidence = retriever is not None and not self._threshold
        self._picks = options == "evidence" and by_evidence
        self._yes_no = yes_no if by_evidence else None
        self.watch = self._abstaining_token() if signals or calibration is not None else None
        self._retrieving = threading.Lock()  # stores and stemmers need not be safe to share

    def close(self) -> None:
        """Free what the back-end opened; model and retriever are the caller's."""
        if self._reflector is not None:
            self._reflector.close()

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
            query: as given to the retriever; when None the question, a closed one without its options.
            history: earlier turns, oldest first (untrusted); they stand before the question, without
                evidence.
            max_tokens: most tokens of the reply; never more than the assistant's own limit.
            drop_old_turns: leave out the oldest turns, two at a time, where they do not all fit.

        Raises:
            ContextOverflow: prompt and reply do not fit; says how many tokens there are and may be.
        """
        limit = min(max_tokens or self._max_tokens, self._max_tokens)
        query = query or stem_of(question)
        shows = self._reflector is None or self._reflector.retrieves_first
        hits = self.find(query, top_k=self.top_k) if shows else []
        dropped = 0
        while True:
            tokens = self.prompt(question, hits, history[dropped:])
            try:
                self.engine.check_fits(len(tokens), limit)
            except ContextOverflow:
                if not drop_old_turns or dropped >= len(history):
                    raise
                dropped = min(dropped + 2, len(history))
            else:
                return Asked(question, query, tokens, hits, limit, dropped, tuple(history[dropped:]))

    @property
    def has_retriever(self) -> bool:
        """False where questions are asked closed-book."""
        return self.retriever is not None

    def find(self, query: str, *, top_k: int) -> list[Hit]:
        """The best passages for a query, best first; none without a retriever."""
        if self.retriever is None:
            return []
        with self._retrieving:
            return self.retriever.retrieve(query, top_k=top_k)

    def prompt(self, question: str, hits: Sequence[Hit], history: Sequence[Message]) -> list[int]:
        """The tokens that the reply is written to: system, earlier turns, passages, question."""
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
        """Answer prepared questions together, in the given order; greedy, or by vote."""
        if not asked:
            return []
        picked = [self._pick(item) for item in asked]
        rest = [item for item, answer in zip(asked, picked, strict=True) if answer is None]
        written = iter(self._write_all(rest) if rest else [])
        return [answer if answer is not None else next(written) for answer in picked]

    def _write_all(self, asked: Sequence[Asked]) -> list[Answer]:
        """What the model says to each question, reflected upon where there is a back-end."""
        if self._reflector is not None:
            made = self._reflector.reflect(asked, self)
            return [self._judge_reflected(item, result) for item, result in zip(asked, made, strict=True)]
        return [self.judge(item, reply) for item, reply in zip(asked, self._reply(asked), strict=True)]

    def _pick(self, asked: Asked) -> Answer | None:
        """The answer to a closed question, by evidence; None where the model is to write it.

        Its confidence stays open: the calibration is of what the model writes.
        """

        def find(query: str, count: int) -> list[Hit]:
            return self.find(query, top_k=count)

        picked = pick_option(asked.question, find, asked.hits) if self._picks else None
        if picked is None and self._yes_no is not None:
            picked = pick_yes_no(asked.question, find, asked.hits, self._yes_no)
        if picked is None:
            return None
        completion = Completion(picked.reply, [], 0, "stop")
        answer = self.judge(replace(asked, hits=picked.hits), completion, written=False)
        found = [citation.model_copy(update={"by": "overlap"}) for citation in answer.citations]
        return answer.model_copy(update={"citations": found})  # no model quoted them

    def _reply(self, asked: Sequence[Asked]) -> list[Completion]:
        """The greedy completion of each, or the one that several drawn ones agree with."""
        limit = max(item.max_tokens for item in asked)
        prompts = [item.tokens for item in asked]
        greedy = self.engine.generate(prompts, max_tokens=limit, watch=self.watch)
        more = self._votes.count - 1
        if not more:
            return greedy
        drawn = self.engine.generate(
            [prompt for prompt in prompts for _ in range(more)],
            max_tokens=limit,
            temperature=self._votes.temperature,
            watch=self.watch,
        )
        made = [[first, *drawn[at * more : (at + 1) * more]] for at, first in enumerate(greedy)]
        return [
            replies[elect([each.text for each in replies], question=item.question, abstain=self._abstain)]
            for item, replies in zip(asked, made, strict=True)
        ]

    def stream(self, asked: Asked, *, temperature: float = 0.0, seed: int = 0) -> Iterator[str | Answer]:
        """The answer's text in pieces as soon as they are certain, then the checked `Answer`.

        The pieces are together exactly ``Answer.text``; nothing is shown that is withdrawn later (see
        `serve.streaming`). Pieces may be empty: the model wrote something that can't be shown yet.
        Closing the iterator stops the model. An assistant that reflects or votes weighs several answers, so its
        text comes in one piece, whatever the temperature.
        """
        answer = self._pick(asked)
        if answer is not None:
            yield answer.text
            yield answer
            return
        if self._reflector is not None or self._votes.count > 1:
            (answer,) = self.ask_many([asked])
            yield answer.text
            yield answer
            return
        live = ReplyStream(
            [hit.passage for hit in asked.hits],
            question=asked.question,
            abstain=self._abstain,
            unsupported=self._unsupported,
            hold_back=self._threshold > 0,
        )
        completion = yield from self._write(asked, live, temperature, seed)
        answer = self.judge(asked, completion)
        yield live.rest(answer.text)
        yield answer

    def _write(
        self, asked: Asked, live: ReplyStream, temperature: float, seed: int
    ) -> Generator[str, None, Completion]:
        writing = self.engine.stream(
            asked.tokens,
            max_tokens=asked.max_tokens,
            temperature=temperature,
            seed=seed,
            watch=self.watch,
        )
        try:
            # The log-probabilities come with the end: where they count, a reply that repeats itself goes on.
            while self.watch is not None or not live.over:
                yield live.feed(next(writing))
        except StopIteration as end:
            completion: Completion = end.value
            return completion
        finally:
            writing.close()
        # Stopped where the reply began to repeat itself.
        tokens = self.engine.tokenize(live.text)[self.engine.adds_bos :]
        return Completion(live.text, tokens, len(asked.tokens), "stop")

    def _judge_reflected(self, asked: Asked, made: Reflected) -> Answer:
        """`judge` on the evidence that the back-end let stand; numbers are those of all passages shown."""
        kept = replace(asked, hits=[made.shown[number - 1] for number in made.evidence])
        answer = self.judge(kept, made.completion, made.reflection, answer_from=made.answer_from)
        citations = [
            citation.model_copy(update={"number": made.evidence[citation.number - 1]})
            for citation in answer.citations
        ]
        return answer.model_copy(
            update={
                "citations": citations,
                "passages": made.shown,
                "evidence": made.evidence,
                "raw": made.raw,
                "reflection": made.reflection,
            }
        )

    def judge(
        self,
        asked: Asked,
        completion: Completion,
        reflection: Reflection | None = None,
        *,
        written: bool = True,
        answer_from: int | None = None,
    ) -> Answer:
        """Check a completion against the evidence it was shown, and say how sure it is.

        ``written`` is False where no model wrote it: then nothing says how sure it is. ``answer_from`` is that of
        `serve.reflection.Reflected`.
        """
        checked = check_reply(
            completion.text,
            question=asked.question,
            passages=[hit.passage for hit in asked.hits],
            abstain=self._abstain,
            unsupported=self._unsupported,
            closed_book=self.retriever is None
            or reflection is not None,  # a back-end decides what may stand alone
        )
        signals = self._signals(asked, completion, checked, reflection, answer_from) if written else {}
        confidence = None
        if signals and self._calibration is not None and checked.given:
            confidence = self._calibration.confidence(signals)
        if confidence is not None and confidence < self._threshold:
            checked = checked.withheld_as_unsure(self._abstain)
        return Answer(
            question=asked.question,
            text=checked.text,
            raw=completion.text,
            support=checked.support,
            citations=checked.citations,
            rejected_quotes=checked.rejected,
            passages=list(asked.hits),
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=len(completion.tokens),
            statements=checked.statements,
            withheld=checked.withheld,
            confidence=confidence,
            signals=signals,
        )

    def _signals(
        self,
        asked: Asked,
        completion: Completion,
        checked: Checked,
        reflection: Reflection | None,
        answer_from: int | None,
    ) -> dict[str, float]:
        """The signals of an answer, rounded to what a file keeps; none where they are not measured."""
        if self.watch is None:
            return {}
        reply = one_reply(completion.text).rstrip()
        answer = parse_reply(reply).answer
        signals = measure(
            question=asked.question,
            answer=answer,
            hits=asked.hits,
            citations=checked.citations,
            rejected=len(checked.rejected),
            likelihood=likelihood_of(
                completion,
                reply=reply,
                answer=answer,
                detokenize=self.engine.detokenize,
                answer_from=answer_from,
            ),
            reflection=reflection,
        )
        return {name: round(value, 6) for name, value in signals.items()}

    def _abstaining_token(self) -> tuple[int, ...]:
        """The first token of the abstention as it stands behind "Answer:"."""
        begin = len(self.engine.tokenize("Answer:"))
        return tuple(self.engine.tokenize(f"Answer: {self._abstain}")[begin : begin + 1])
