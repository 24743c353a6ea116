"""Several replies to one question, and the one that most of them agree with.

KARD's inference by n samples (arXiv 2305.18395 §3.3), which is self-consistency (arXiv 2203.11171): the reasoning
differs from sample to sample, the answer is voted on. Open answers are rarely the same words, so there the reply
that has most in common with the others wins (the medoid).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rag.answers import is_abstention, one_reply, parse_option, parse_reply, parse_yes_no
from rag.prompt import closed_form
from rag.words import words

_ABSTAINED = "\0abstained"  # no option's letter and no answer's text is this


@dataclass(frozen=True)
class Votes:
    """``count`` replies a question: the greedy one, the others drawn at ``temperature``."""

    count: int = 1
    temperature: float = 0.7


GREEDY = Votes()


def elect(replies: Sequence[str], *, question: str, abstain: str) -> int:
    """The place of the reply to take: the first one that gives the elected answer.

    Replies whose closed answer can't be read have no vote unless none can. Of answers with as many votes, that of
    the earliest reply wins: the greedy one comes first.

    Args:
        replies: at least one, as the model wrote them.
        question: as shown to the model; says whether the answer is closed.
        abstain: the domain's sentence for "I don't know".
    """
    answers = [parse_reply(one_reply(reply).rstrip()).answer for reply in replies]
    keys = [_key(answer, question, abstain) for answer in answers]
    readable = [place for place, key in enumerate(keys) if key is not None]
    if not readable:
        return 0
    silent = [place for place in readable if keys[place] == _ABSTAINED]
    if closed_form(question) is None:
        if 2 * len(silent) > len(readable):
            return silent[0]
        return _medoid(answers, [place for place in readable if place not in silent] or silent)
    votes = Counter(keys[place] for place in readable)
    return max(readable, key=lambda place: (votes[keys[place]], -place))


def _key(answer: str, question: str, abstain: str) -> str | None:
    if is_abstention(answer, abstain=abstain):
        return _ABSTAINED
    form = closed_form(question)
    if form is None:
        return answer or None
    return parse_yes_no(answer) if form == "yes_no" else parse_option(answer, form)


def _medoid(answers: Sequence[str], places: Sequence[int]) -> int:
    """Of ``places`` the one whose answer shares most words with the others; the first of equals."""
    bags = {place: Counter(words(answers[place])) for place in places}
    agreement = {
        place: sum(_overlap(bags[place], bags[other]) for other in places if other != place)
        for place in places
    }
    return max(places, key=lambda place: (agreement[place], -place))


def _overlap(one: Counter[str], other: Counter[str]) -> float:
    """F1 of the words that two answers share, counted with repetition."""
    return 2 * (one & other).total() / max(1, one.total() + other.total())
