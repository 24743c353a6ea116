"""The long form of Self-RAG's inference: a beam over segments, each with passages found for it afresh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from domains.records import Hit, JudgedSegment, Reflection
from rag.answers import format_reply, parse_reply
from serve.engine import Completion, Engine, LogProbs
from serve.reflection import Ground, Reflected, abstained
from serve.reflection_beam import Hypothesis, Opening, Step, context_tokens, search
from serve.reflection_run import Stretch, Wish, judged, read_stretch, rounded
from serve.reflection_scores import segment_score, wants_retrieval
from serve.signals import token_at

if TYPE_CHECKING:
    from serve.assistant import Asked
    from serve.reflection_tokens import TokenReflector


class LongForm:
    """Searches answers of several segments. One question at a time; its hypotheses are written together."""

    def __init__(self, reflector: TokenReflector, ground: Ground) -> None:
        self._reflector = reflector
        self._ground = ground
        self._settings = reflector.settings
        self._vocabulary = reflector.vocabulary

    def answer(self, item: Asked, wish: Wish) -> Reflected:
        """The best hypothesis for a question.

        Args:
            item: the question.
            wish: see `TokenReflector.decide`.
        """
        tally = _Tally()
        tally.judge(wish)
        retrieve = self._ground.has_retriever and wants_retrieval(wish.p_retrieve, self._settings.threshold)
        root = Hypothesis(wants="retrieve" if retrieve else "no_retrieval")
        won = search(
            root,
            lambda open_: self._expand(item, open_, tally),
            beam=self._settings.beam,
            depth=self._settings.depth,
        )
        reflection = Reflection(
            backend=self._reflector.name,
            retrieved=retrieve and tally.found,
            p_retrieve=rounded(wish.p_retrieve),
            expected=dict(sorted(tally.expected.items())),
            missing=dict(sorted(tally.missing.items())),
            passes=tally.passes + self._ground.has_retriever,
            tokens=tally.tokens,
            notes=sorted(tally.notes),
        )
        if won is None:
            notes = [*reflection.notes, "no segment is left that its passage supports"]
            nothing = abstained(self._ground, len(item.tokens))
            return Reflected([], [], nothing, "", reflection.model_copy(update={"notes": notes}))
        return _reflected(won, item, reflection, self._ground.engine)

    def _expand(self, item: Asked, open_: Sequence[Hypothesis], tally: _Tally) -> list[list[Hypothesis]]:
        """The children of every hypothesis; those that may still be equally long are written in one call."""
        jobs: list[tuple[int, Opening, list[int]]] = []
        for at, hypothesis in enumerate(open_):
            jobs += [(at, opening, prompt) for opening, prompt in self._openings(item, hypothesis, tally)]
        lengths = [self._left(item, hypothesis) for hypothesis in open_]
        children: list[list[Hypothesis]] = [[] for _ in open_]
        for at, opening, stretch in self._write(jobs, lengths):
            tally.count(stretch)
            if self._settings.drop_unsupported and stretch.label == "none":
                continue
            score = segment_score(stretch.parts, self._settings.weights)
            child = open_[at].with_step(Step(opening, stretch, score))
            over = self._left(item, child) < 1 or not stretch.written
            children[at].append(replace(child, wants=None) if over else child)
        return children

    def _write(
        self, jobs: Sequence[tuple[int, Opening, list[int]]], lengths: Sequence[int]
    ) -> Iterator[tuple[int, Opening, Stretch]]:
        engine = self._ground.engine
        for length in sorted(set(lengths), reverse=True):
            group = [job for job in jobs if lengths[job[0]] == length]
            completions = engine.generate(
                [prompt for _, _, prompt in group],
                max_tokens=length,
                watch=(*self._vocabulary.watch, *(self._ground.watch or ())),
                stop=self._vocabulary.long_stop,
            )
            for (at, opening, _), completion in zip(group, completions, strict=True):
                has_passage = opening.hit is not None
                yield (
                    at,
                    opening,
                    read_stretch(completion, self._vocabulary, engine, has_passage=has_passage),
                )

    def _openings(
        self, item: Asked, hypothesis: Hypothesis, tally: _Tally
    ) -> list[tuple[Opening, list[int]]]:
        """How a hypothesis goes on: one way per passage found for it, or one without."""
        decision = hypothesis.wants or "no_retrieval"
        ids = self._vocabulary.decisions
        made: list[tuple[Opening, list[int]]] = []
        if decision == "retrieve":
            last = parse_reply(hypothesis.steps[-1].stretch.text).answer if hypothesis.steps else ""
            for hit in self._ground.find(f"{item.query} {last}".strip(), top_k=self._settings.passages):
                tokens = tuple(self._reflector.opening(hit, self._ground.engine))
                opening = Opening(decision, tokens, (ids["continue"],), hit)
                prompt = self._fitted(item, hypothesis, opening, tally)
                if prompt is None:
                    tally.notes.add("a passage does not fit into the context")
                else:
                    made.append((opening, prompt))
            tally.found = tally.found or bool(made)
            decision = "no_retrieval"  # where nothing is found, or nothing fits: as in the short form
        if not made:
            bare = Opening(decision, (ids[decision],), (ids[decision],))
            prompt = self._fitted(item, hypothesis, bare, tally)
            made = [] if prompt is None else [(bare, prompt)]
        return made

    def _fitted(
        self, item: Asked, hypothesis: Hypothesis, opening: Opening, tally: _Tally
    ) -> list[int] | None:
        """The prompt with as many of the earlier passages as fit, the latest kept longest; None: not even bare."""
        room = self._ground.engine.context - self._left(item, hypothesis)
        for dropped in range(len(hypothesis.steps) + 1):
            prompt = [*context_tokens(item.tokens, hypothesis, without_passages=dropped), *opening.tokens]
            if len(prompt) <= room:
                if dropped:
                    tally.notes.add("earlier passages left the context to make room")
                return prompt
        return None

    @staticmethod
    def _left(item: Asked, hypothesis: Hypothesis) -> int:
        """Tokens that the answer may still have."""
        return item.max_tokens - sum(len(step.stretch.written) for step in hypothesis.steps)


class _Tally:
    """What one search cost, and which judgements it lacked."""

    def __init__(self) -> None:
        self.passes = self.tokens = 0
        self.found = False
        self.expected: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.notes: set[str] = set()

    def count(self, stretch: Stretch) -> None:
        self.passes += 1
        self.tokens += len(stretch.written)
        self.judge(stretch)

    def judge(self, read: Stretch | Wish) -> None:
        self.expected.update(read.expected)
        self.missing.update(read.missing)


def _reflected(won: Hypothesis, item: Asked, reflection: Reflection, engine: Engine) -> Reflected:
    """The hypothesis as one reply: all quotes first, then the answers, each with the mark ``[n]`` of its passage.

    Its tokens are those that the model wrote, in this order: what stands before the answers, then the answers.
    """
    shown: list[Hit] = []
    segments: list[JudgedSegment] = []
    quotes: list[tuple[str, int]] = []
    answers: list[str] = []
    for step in won.steps:
        number = None if step.opening.hit is None else _number(step.opening.hit, shown)
        segments.append(judged(step.stretch, decision=step.opening.decision, score=step.score, number=number))
        reply = parse_reply(step.stretch.text)
        quotes += [(text, number or 1) for text, _ in reply.quotes if reply.has_answer_line]
        if reply.answer:
            answers.append(f"{reply.answer} [{number}]" if number else reply.answer)
    text = format_reply(quotes=quotes, rationale="", answer=" ".join(answers))
    completion, answer_from = _joined([step.stretch for step in won.steps], text, len(item.tokens), engine)
    relevant = sorted(
        {one.number for one in segments if one.number and one.relevance is not None and one.relevance >= 0.5}
    )
    return Reflected(
        shown,
        list(range(1, len(shown) + 1)),
        completion,
        text,
        reflection.model_copy(update={"segments": segments, "relevant": relevant}),
        answer_from,
    )


def _joined(
    stretches: Sequence[Stretch], text: str, prompt_tokens: int, engine: Engine
) -> tuple[Completion, int]:
    """The stretches as one completion, and the token with which its answers begin."""
    before: list[tuple[Stretch, slice]] = []
    answers: list[tuple[Stretch, slice]] = []
    for stretch in stretches:
        answer = parse_reply(stretch.text).answer
        at = engine.detokenize(stretch.plain).rfind(answer) if answer else -1
        cut = len(stretch.plain) if at < 0 else token_at(stretch.plain, at, engine.detokenize)
        before.append((stretch, slice(0, cut)))
        answers.append((stretch, slice(cut, None)))
    parts = [*before, *answers]
    log_probs = LogProbs(
        np.concatenate([stretch.plain_log_probs.taken[part] for stretch, part in parts]),
        np.concatenate([stretch.plain_log_probs.watched[part] for stretch, part in parts]),
    )
    tokens = [token for stretch, part in parts for token in stretch.plain[part]]
    first = sum(part.stop for _, part in before)
    return Completion(text, tokens, prompt_tokens, "stop", log_probs), first


def _number(hit: Hit, shown: list[Hit]) -> int:
    """The place (from 1) of a passage among those shown; it is added where it is new."""
    ids = [other.passage.passage_id for other in shown]
    if hit.passage.passage_id not in ids:
        shown.append(hit)
        return len(shown)
    return ids.index(hit.passage.passage_id) + 1
