"""One stretch of generation read as a judged segment: which ids it took, and what the watched ones were worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from domains.errors import ModelError
from domains.records import JudgedSegment
from rag.answers import parse_reply
from rag.reflection import PARAGRAPH, RELEVANCE, RETRIEVE, SUPPORT, TOKENS, UTILITY
from serve.engine import Completion, Engine, LogProbs
from serve.reflection_scores import (
    RELEVANCE_WEIGHTS,
    SUPPORT_WEIGHTS,
    UTILITY_WEIGHTS,
    Parts,
    first_of,
    group_mean,
    sequence_score,
)

Label = Literal["full", "partial", "none"]
Decision = Literal["retrieve", "no_retrieval", "continue"]
_LABELS: tuple[Label, Label, Label] = ("full", "partial", "none")


@dataclass(frozen=True)
class Vocabulary:
    """The ids of the 15 tokens in one model's vocabulary."""

    ids: tuple[int, ...]

    @classmethod
    def of(cls, engine: Engine) -> Vocabulary:
        """The ids in a model.

        Raises:
            ModelError: it lacks some of the tokens (names them).
        """
        found = {text: engine.token_id(text) for text in TOKENS}
        lacking = [text for text, number in found.items() if number is None]
        if lacking:
            raise ModelError(
                f"{len(lacking)} of the {len(TOKENS)} reflection tokens are not in the vocabulary of "
                f"{str(getattr(engine, 'path', 'the model'))!r}: {', '.join(lacking[:3])}"
                f"{', …' if len(lacking) > 3 else ''}",
                expected='a student that was trained with [reflect] backend = "tokens"',
                next_step='preceptor run DOMAIN   (trains one), or set [reflect] backend = "none"',
            )
        return cls(tuple(number for number in found.values() if number is not None))

    def _of(self, texts: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.ids[TOKENS.index(text)] for text in texts)

    @cached_property
    def decisions(self) -> dict[Decision, int]:
        """Ids of the Retrieve group by meaning."""
        retrieve, no_retrieval, more = self._of(list(RETRIEVE.values()))
        return {"retrieve": retrieve, "no_retrieval": no_retrieval, "continue": more}

    @cached_property
    def relevance(self) -> tuple[int, ...]:
        """``[Relevant]``, ``[Irrelevant]``."""
        return self._of(list(RELEVANCE.values()))

    @cached_property
    def support(self) -> tuple[int, ...]:
        """Fully, partially, not."""
        return self._of(list(SUPPORT.values()))

    @cached_property
    def utility(self) -> tuple[int, ...]:
        """1 to 5."""
        return self._of(list(UTILITY.values()))

    @cached_property
    def paragraph(self) -> tuple[int, ...]:
        """Opening and closing mark-up."""
        return self._of(PARAGRAPH)

    @cached_property
    def watch(self) -> tuple[int, ...]:
        """The 13 ids whose probabilities are read: all but the mark-up."""
        return (*self.decisions.values(), *self.relevance, *self.support, *self.utility)

    @cached_property
    def short_stop(self) -> tuple[int, ...]:
        """What ends a stretch: a wish for a passage, and the last word (the utility)."""
        return (self.decisions["retrieve"], self.paragraph[0], *self.utility)

    @cached_property
    def long_stop(self) -> tuple[int, ...]:
        """As `short_stop`, and every beginning of another segment."""
        return (*self.decisions.values(), self.paragraph[0], *self.utility)


@dataclass(frozen=True)
class Wish:
    """Whether the student would look for passages, read at its first position.

    ``p_retrieve`` is the normalised probability, None where nobody was asked (``asked``). ``said``: the likeliest token
    of all was one of the two; else the probability is that of a student that was about to do something else.
    """

    p_retrieve: float | None = None
    asked: bool = False
    said: bool = False

    @property
    def expected(self) -> tuple[str, ...]:
        """As of `Stretch`."""
        return ("retrieve",) if self.asked else ()

    @property
    def missing(self) -> tuple[str, ...]:
        """As of `Stretch`."""
        return ("retrieve",) if self.asked and not self.said else ()


@dataclass(frozen=True)
class Stretch:
    """What was read out of a completion.

    ``written`` are its tokens without the one that ended it; ``plain`` those of the text alone,
    ``plain_log_probs`` theirs with what was watched beside the vocabulary's ids. ``next_decision``
    is the Retrieve token that it ended with, None where the answer is over. ``expected`` names the groups that
    the grammar asks for here, ``missing`` those of them that the model did not give.
    """

    parts: Parts
    text: str
    written: tuple[int, ...]
    plain: tuple[int, ...]
    plain_log_probs: LogProbs
    label: Label | None
    next_decision: Decision | None
    expected: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def silent(self) -> bool:
        """Whether there is no answer in it: at most quotes and judgements."""
        return not parse_reply(self.text).answer


def read_stretch(
    completion: Completion, vocabulary: Vocabulary, engine: Engine, *, has_passage: bool
) -> Stretch:
    """Read a completion that was generated with ``watch`` = `Vocabulary.watch`, more ids may follow.

    Relevance is read at the position right behind the passage; support and utility at the first position whose
    taken token is one of their group. A stretch without a passage has neither relevance nor support.
    """
    assert completion.log_probs is not None
    probs = completion.log_probs
    ended = _end_token(completion, vocabulary)
    taken = [*completion.tokens, *([] if ended is None else [ended])]

    def group(ids: Sequence[int], weights: Sequence[float], at: int | None) -> float | None:
        if at is None or at >= len(probs.watched):
            return None
        row = probs.watched[at]
        return group_mean([float(row[vocabulary.watch.index(token)]) for token in ids], weights)

    support_at = first_of(taken, vocabulary.support)
    relevance = group(vocabulary.relevance, RELEVANCE_WEIGHTS, 0) if has_passage else None
    support = group(vocabulary.support, SUPPORT_WEIGHTS, support_at) if has_passage else None
    utility = group(vocabulary.utility, UTILITY_WEIGHTS, first_of(taken, vocabulary.utility))
    plain = [at for at, token in enumerate(completion.tokens) if token not in vocabulary.ids]
    following = {token: name for name, token in vocabulary.decisions.items()}
    next_decision = None if ended is None else following.get(ended)
    expected = _expected(relevance, has_passage=has_passage, last=next_decision is None)
    # What stands right behind the passage always has some probability; given is the judgement that was taken.
    judged_first = bool(taken) and taken[0] in vocabulary.relevance
    given = {"relevance": relevance if judged_first else None, "support": support, "utility": utility}
    return Stretch(
        parts=Parts(relevance, support, utility, sequence_score([float(value) for value in probs.taken])),
        text=_text(completion.tokens, vocabulary, engine),
        written=tuple(completion.tokens),
        plain=tuple(completion.tokens[at] for at in plain),
        plain_log_probs=LogProbs(probs.taken[plain], probs.watched[plain, len(vocabulary.watch) :]),
        label=_LABELS[vocabulary.support.index(taken[support_at])]
        if has_passage and support_at is not None
        else None,
        next_decision=next_decision,
        expected=expected,
        missing=tuple(name for name in expected if given[name] is None),
    )


def _expected(relevance: float | None, *, has_passage: bool, last: bool) -> tuple[str, ...]:
    """The groups that the grammar asks for: an irrelevant passage has no support, only an end has a utility."""
    names = []
    if has_passage:
        names.append("relevance")
        if relevance is None or relevance >= 0.5:
            names.append("support")
    if last:
        names.append("utility")
    return tuple(names)


def _end_token(completion: Completion, vocabulary: Vocabulary) -> int | None:
    """The watched id that ended the completion; None for the model's own end token, or where the limit cut."""
    probs = completion.log_probs
    if probs is None or completion.finish != "stop" or len(probs.taken) <= len(completion.tokens):
        return None
    last = probs.taken[-1]
    return next(  # more ids may be watched than the vocabulary's, behind them
        (token for token, value in zip(vocabulary.watch, probs.watched[-1], strict=False) if value == last),
        None,
    )


def _text(tokens: Sequence[int], vocabulary: Vocabulary, engine: Engine) -> str:
    """The words between the control tokens, by id: what the model merely spells out stays text."""
    pieces: list[list[int]] = [[]]
    for token in tokens:
        if token in vocabulary.ids:
            pieces.append([])
        else:
            pieces[-1].append(token)
    texts = [engine.detokenize(piece).strip() for piece in pieces if piece]
    return " ".join(text for text in texts if text)


def judged(stretch: Stretch, *, decision: Decision, score: float, number: int | None) -> JudgedSegment:
    """A stretch as it is shown to people, rounded to 4 digits; ``number`` is its passage's."""
    parts = stretch.parts
    return JudgedSegment(
        decision=decision,
        text=stretch.text,
        number=number,
        relevance=rounded(parts.relevance),
        support=rounded(parts.support),
        label=stretch.label,
        utility=rounded(parts.utility),
        sequence=rounded(parts.sequence),
        score=rounded(score),
    )


def rounded(value: float | None) -> float | None:
    """To 4 digits."""
    return None if value is None else round(value, 4)
