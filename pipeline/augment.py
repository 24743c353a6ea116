"""Self-RAG's augmentation: an answer becomes segments with reflection tokens (arXiv 2310.11511 §3.2.2).

The order of calls and the sampling are those of the release (spec §2.5):

    1  the critic says whether the question needs retrieval, and how useful the whole answer is
    2  passages are found with the question and the sentence of the answer
    3  from the second sentence on it says: retrieve, nothing to verify, or the evidence at hand suffices
    4  it judges relevance and support of every passage for the sentences that retrieve
    5  per sentence one passage is drawn: the first that fully supports; else the first that partly does
       (p = 0.7); else, where there is neither, the first without support (p = 0.25); else a random irrelevant one

Answers that need no retrieval are kept with p = 0.4. What differs: the random irrelevant passage really is one (the
release takes an index into the irrelevant ones for one into all); a sentence for which no passage is drawn, and all
that is left out, is counted; one that is too short to judge is joined to its neighbour instead of standing bare
between tokens, for which the grammar has no place; a label that could not be had takes its passage out of the draw.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from domains.records import Critique, Example, Message, Passage, Question, Segment
from pipeline.critic import Ask, Critic
from pipeline.rows import Origin, row_id
from rag.reflection import render_segments
from rag.words import sentence_spans

_SHORT_CHARS, _FEW_SENTENCES = 30, 2

Find = Callable[[str, int], list[Passage]]
Decision = Literal["retrieve", "no_retrieval", "continue"]
Support = Literal["full", "partial", "none"]


@dataclass(frozen=True)
class Sampling:
    """The published probabilities. ``seed`` and a draft's key decide every draw."""

    no_retrieval_share: float = 0.4
    partial_share: float = 0.7
    unsupported_share: float = 0.25
    seed: int = 0


@dataclass(frozen=True)
class Draft:
    """An answer to be augmented. ``key`` names it among all drafts."""

    key: str
    question: Question
    sentences: list[str]

    @property
    def output(self) -> str:
        """The whole answer."""
        return " ".join(self.sentences)


@dataclass(frozen=True)
class Judged:
    """A passage for one sentence. ``support`` goes with a relevant one."""

    passage: Passage
    relevant: bool
    support: Support | None


@dataclass
class Plan:
    """What the critic said of a draft so far: per sentence a decision and, where it retrieves, the passages."""

    draft: Draft
    retrieves: bool = True
    utility: int | None = None
    found: list[list[Passage]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    judged: list[list[Judged]] = field(default_factory=list)


@dataclass(frozen=True)
class Reflected:
    """An augmented answer; ``places`` are the draft's sentences that the segments hold."""

    draft: Draft
    segments: list[Segment]
    places: list[int]
    utility: int | None


def split_answer(text: str) -> list[str]:
    """The sentences of an answer; of more than two, those under 30 characters are joined to a neighbour."""
    found = [text[start:end] for start, end in sentence_spans(text)]
    if len(found) <= _FEW_SENTENCES:
        return found
    joined: list[str] = []
    for sentence in found:
        if joined and (len(sentence) < _SHORT_CHARS or len(joined[-1]) < _SHORT_CHARS):
            joined[-1] += f" {sentence}"
        else:
            joined.append(sentence)
    return joined


def augment(
    drafts: Sequence[Draft], critic: Critic, find: Find, *, passages: int, sampling: Sampling
) -> tuple[list[Reflected], Counter[str], list[Critique]]:
    """Augment every draft; see the module's docstring.

    Args:
        drafts: each with at least one sentence.
        critic: who judges; asked four times, for all drafts together.
        find: (query, top_k) -> passages, best first.
        passages: how many are found for a sentence (the paper: 10).
        sampling: the draws.

    Returns:
        The answers that were kept; counts, with drafts = answers + ``no_retrieval_left_out`` + ``no_sentence_left``
        + ``answer_left_out``; and every label.
    """
    desk = _Desk(critic)
    plans = [Plan(draft) for draft in drafts]
    _ask_whole(plans, desk)
    for plan in plans:
        if plan.retrieves:
            query = plan.draft.question.question
            plan.found = [find(f"{query} {sentence}", passages) for sentence in plan.draft.sentences]
    _ask_decisions(plans, desk)
    _ask_passages(plans, desk)
    answers = []
    for plan in plans:
        if (answer := assemble(plan, sampling, desk.counts)) is not None:
            answers.append(answer)
    return answers, desk.counts, desk.labels


def assemble(plan: Plan, sampling: Sampling, counts: Counter[str]) -> Reflected | None:
    """The segments of one answer, or None where nothing is left of it; says why in ``counts``."""
    draft, draw = plan.draft, random.Random(f"{sampling.seed}:{plan.draft.key}")  # noqa: S311  # not for secrets
    if not plan.retrieves:
        if draw.random() >= sampling.no_retrieval_share:
            counts["no_retrieval_left_out"] += 1
            return None
        whole = Segment(decision="no_retrieval", text=draft.output)
        return Reflected(draft, [whole], list(range(len(draft.sentences))), plan.utility)
    segments: list[Segment] = []
    places: list[int] = []
    for place, (sentence, decision) in enumerate(zip(draft.sentences, plan.decisions, strict=True)):
        segment = Segment(decision="continue", text=sentence)
        if decision == "no_retrieval":
            segment = Segment(decision=decision, text=sentence)
        elif decision == "retrieve":
            chosen = choose_passage(plan.judged[place], draw, sampling)
            if chosen is None:
                counts["sentences_without_passage"] += 1
                continue
            counts[f"drawn_{chosen.support or 'irrelevant'}"] += 1
            segment = Segment(
                decision=decision,
                passage=chosen.passage,
                relevant=chosen.relevant,
                text=sentence,
                support=chosen.support,
            )
        segments.append(segment)
        places.append(place)
    if not segments:
        counts["no_sentence_left"] += 1
        return None
    if places[0] != 0:  # what stands first is taught as the answer; a later sentence is none
        counts["answer_left_out"] += 1
        return None
    return Reflected(draft, segments, places, plan.utility)


def choose_passage(judged: Sequence[Judged], draw: random.Random, sampling: Sampling) -> Judged | None:
    """The passage that a sentence gets, by the published draw; None where it gets none."""
    bucket: dict[Support, list[Judged]] = {"full": [], "partial": [], "none": []}
    for each in judged:
        if each.relevant and each.support is not None:
            bucket[each.support].append(each)
    irrelevant = [each for each in judged if not each.relevant]
    if bucket["full"]:
        return bucket["full"][0]
    if bucket["partial"]:
        if draw.random() < sampling.partial_share:
            return bucket["partial"][0]
    elif bucket["none"] and draw.random() < sampling.unsupported_share:
        return bucket["none"][0]
    return draw.choice(irrelevant) if irrelevant else None


def to_example(
    segments: Sequence[Segment],
    utility: int | None,
    *,
    messages: list[Message],
    question_id: str,
    origin: Origin,
    request: str,
) -> Example:
    """A training row; its unsupervised ranges come from the pieces, never from looking through the text."""
    pieces = render_segments(segments, utility)
    ranges: list[tuple[int, int]] = []
    at = 0
    for piece in pieces:
        if not piece.supervised:
            ranges.append((at, at + len(piece.text)))
        at += len(piece.text)
    completion = "".join(piece.text for piece in pieces)
    return Example(
        id=row_id(messages, completion),
        question_id=question_id,
        messages=messages,
        completion=completion,
        unsupervised=ranges,
        passages=[segment.passage.passage_id for segment in segments if segment.passage is not None],
        origin=origin,
        request=request,
    )


class _Desk:
    """Puts questions to the critic and keeps every label; what has none is counted."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic
        self.counts: Counter[str] = Counter()
        self.labels: list[Critique] = []

    def ask(self, asks: Iterable[Ask]) -> list[str | None]:
        asked = list(asks)
        found = self._critic.judge(asked)
        self.labels += [label for label in found if label is not None]
        for ask, label in zip(asked, found, strict=True):
            if label is None:
                self.counts[f"without_label.{ask.task}"] += 1
        return [label.label if label is not None else None for label in found]


def _ask_whole(plans: Sequence[Plan], desk: _Desk) -> None:
    needs = desk.ask(Ask("retrieve", plan.draft.question) for plan in plans)
    useful = desk.ask(Ask("isuse", plan.draft.question, output=plan.draft.output) for plan in plans)
    for plan, need, use in zip(plans, needs, useful, strict=True):
        plan.retrieves = need != "no_retrieval"  # unjudged: look it up
        plan.utility = int(use) if use is not None else None


def _ask_decisions(plans: Sequence[Plan], desk: _Desk) -> None:
    """The first sentence retrieves; the critic decides on the others, given the best passage of the first."""
    places: list[tuple[Plan, int]] = []
    asks: list[Ask] = []
    for plan in plans:
        sentences = plan.draft.sentences
        plan.decisions = ["retrieve"] * len(sentences)
        if not plan.retrieves or not plan.found[0]:
            continue
        for place in range(1, len(sentences)):
            before = " ".join(sentences[:place])
            evidence = plan.found[0][0]
            asks.append(Ask("retrieve", plan.draft.question, evidence, before, sentences[place]))
            places.append((plan, place))
    known: dict[str, Decision] = {"no_retrieval": "no_retrieval", "continue": "continue"}
    for (plan, place), said in zip(places, desk.ask(asks), strict=True):
        plan.decisions[place] = known.get(said or "", "retrieve")


def _ask_passages(plans: Sequence[Plan], desk: _Desk) -> None:
    pairs: list[tuple[Plan, int, Ask]] = []
    for plan in plans:
        plan.judged = [[] for _ in plan.draft.sentences]
        for place, sentence in enumerate(plan.draft.sentences if plan.retrieves else []):
            before = " ".join(plan.draft.sentences[:place])
            if plan.decisions[place] == "retrieve":
                pairs += [
                    (plan, place, Ask("isrel", plan.draft.question, passage, before, sentence))
                    for passage in plan.found[place]
                ]
    relevance = desk.ask(ask for _, _, ask in pairs)
    support = desk.ask(
        Ask("issup", ask.question, ask.passage, ask.preceding, ask.output) for _, _, ask in pairs
    )
    known: dict[str | None, Support] = {"full": "full", "partial": "partial", "none": "none"}
    for (plan, place, ask), relevant, supported in zip(pairs, relevance, support, strict=True):
        assert ask.passage is not None
        if relevant == "irrelevant":
            plan.judged[place].append(Judged(ask.passage, False, None))
        elif relevant == "relevant" and supported in known:
            plan.judged[place].append(Judged(ask.passage, True, known[supported]))
