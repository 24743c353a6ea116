"""Self-RAG at serving (arXiv 2310.11511 §3.3): the student decides whether to look, and judges what it wrote.

The question goes in without passages. Retrieval is decided by the normalised probability of ``[Retrieval]`` at the
first generated position. Then either one answer per passage is written greedily and the best scored one is given
(short form), or segments are searched by beam with fresh retrieval before each (long form). Ids are compared, never
text, and only the probabilities of the 13 ids that carry a judgement are read (and, where the confidence is measured,
that of the abstention's first token).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from domains.config import ReflectSection
from domains.errors import ContextOverflow
from domains.records import Hit, JudgedSegment, Reflection
from rag.answers import is_abstention, parse_option, parse_reply, parse_yes_no
from rag.prompt import closed_form
from rag.reflection import render_passage
from serve.engine import Completion, Engine
from serve.reflection import Ground, Reflected, abstained
from serve.reflection_long import LongForm
from serve.reflection_run import Decision, Stretch, Vocabulary, Wish, judged, read_stretch, rounded
from serve.reflection_scores import Weights, best, may_win, p_retrieve, segment_score, wants_retrieval

if TYPE_CHECKING:
    from serve.assistant import Asked


@dataclass(frozen=True)
class Settings:
    """Of the back-end; see ``[reflect]``."""

    threshold: float = 0.2
    weights: Weights = field(default_factory=Weights)
    passages: int = 5
    form: str = "short"
    beam: int = 2
    depth: int = 6
    drop_unsupported: bool = True


def open_tokens(reflect: ReflectSection, engine: Engine) -> TokenReflector:
    """The back-end as ``[reflect]`` wants it.

    Raises:
        ModelError: the model lacks reflection tokens.
    """
    weights = Weights(
        relevance=reflect.relevance_weight,
        support=reflect.support_weight,
        utility=reflect.utility_weight,
        sequence=reflect.sequence_weight,
    )
    settings = Settings(
        threshold=reflect.threshold,
        weights=weights,
        passages=reflect.passages,
        form=reflect.form,
        beam=reflect.beam,
        depth=reflect.depth,
        drop_unsupported=reflect.drop_unsupported,
    )
    return TokenReflector(Vocabulary.of(engine), settings)


@dataclass(frozen=True)
class Plan:
    """A question after the decision to retrieve: its candidates' prompts, one per passage, or one without."""

    wish: Wish
    hits: tuple[Hit, ...]
    prompts: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]

    @property
    def retrieved(self) -> bool:
        """Whether there are passages."""
        return bool(self.hits)


@dataclass(frozen=True)
class Candidate:
    """One answer: ``number`` is its passage's (from 1), None without."""

    number: int | None
    stretch: Stretch
    completion: Completion
    score: float

    def judged(self) -> JudgedSegment:
        """As it is shown to people."""
        decision: Decision = "no_retrieval" if self.number is None else "retrieve"
        return judged(self.stretch, decision=decision, score=self.score, number=self.number)


class TokenReflector:
    """Answers by reflection tokens.

    Args:
        vocabulary: the tokens' ids in the model.
        settings: threshold, weights, form.
    """

    name = "tokens"
    retrieves_first = False

    def __init__(self, vocabulary: Vocabulary, settings: Settings) -> None:
        self.vocabulary = vocabulary
        self.settings = settings

    def close(self) -> None:
        """Nothing was opened."""

    def reflect(self, asked: Sequence[Asked], ground: Ground) -> list[Reflected]:
        """`serve.reflection.Reflector.reflect`."""
        if not asked:
            return []
        if self.settings.form == "long":
            long_form = LongForm(self, ground)
            wishes = self.decide(asked, ground)
            return [long_form.answer(item, wish) for item, wish in zip(asked, wishes, strict=True)]
        plans = [
            self.plan(item, wish, ground)
            for item, wish in zip(asked, self.decide(asked, ground), strict=True)
        ]
        found = self.candidates(plans, ground, max_tokens=max(item.max_tokens for item in asked))
        return [
            self._choose(item, plan, candidates, ground)
            for item, plan, candidates in zip(asked, plans, found, strict=True)
        ]

    def decide(self, asked: Sequence[Asked], ground: Ground) -> list[Wish]:
        """Whether each question wants passages; nobody is asked without a retriever."""
        if not ground.has_retriever:
            return [Wish()] * len(asked)
        decisions = self.vocabulary.decisions
        pair = decisions["retrieve"], decisions["no_retrieval"]
        first = ground.engine.generate([item.tokens for item in asked], max_tokens=1, watch=pair)
        wishes = []
        for completion in first:
            assert completion.log_probs is not None
            chance = p_retrieve(*(float(value) for value in completion.log_probs.watched[0]))
            wishes.append(Wish(chance, asked=True, said=completion.tokens[:1] in ([pair[0]], [pair[1]])))
        return wishes

    def plan(self, item: Asked, wish: Wish, ground: Ground, *, retrieve: bool | None = None) -> Plan:
        """The candidates' prompts.

        Args:
            item: the question.
            wish: what `decide` found.
            ground: finds passages.
            retrieve: True and False overrule the threshold.
        """
        wanted = wants_retrieval(wish.p_retrieve, self.settings.threshold) if retrieve is None else retrieve
        hits = (
            ground.find(item.query, top_k=self.settings.passages) if wanted and ground.has_retriever else []
        )
        notes = []
        prompts = [(*item.tokens, *self.opening(hit, ground.engine)) for hit in hits]
        fitting = [at for at, prompt in enumerate(prompts) if fits(prompt, item.max_tokens, ground.engine)]
        if len(fitting) < len(hits):
            notes.append(f"{len(hits) - len(fitting)} passages do not fit into the context")
        if wanted and ground.has_retriever and not fitting:
            notes.append("no passage could be shown")
        if not fitting:
            closed = (*item.tokens, self.vocabulary.decisions["no_retrieval"])
            return Plan(wish, (), (closed,), tuple(notes))
        return Plan(
            wish, tuple(hits[at] for at in fitting), tuple(prompts[at] for at in fitting), tuple(notes)
        )

    def opening(self, hit: Hit, engine: Engine) -> list[int]:
        """``[Retrieval]<paragraph>…</paragraph>``; the passage's own text can't contain a token of either kind."""
        start, end = self.vocabulary.paragraph
        inside = engine.tokenize(render_passage(hit.passage), begin=False)
        return [self.vocabulary.decisions["retrieve"], start, *inside, end]

    def candidates(self, plans: Sequence[Plan], ground: Ground, *, max_tokens: int) -> list[list[Candidate]]:
        """Every plan's answers, all written in one go."""
        prompts = [prompt for plan in plans for prompt in plan.prompts]
        completions = iter(
            ground.engine.generate(
                prompts,
                max_tokens=max_tokens,
                watch=(*self.vocabulary.watch, *(ground.watch or ())),
                stop=self.vocabulary.short_stop,
            )
        )
        found = []
        for plan in plans:
            numbers = range(1, len(plan.hits) + 1) if plan.retrieved else [None]
            found.append([self._candidate(number, next(completions), ground.engine) for number in numbers])
        return found

    def _candidate(self, number: int | None, completion: Completion, engine: Engine) -> Candidate:
        stretch = read_stretch(completion, self.vocabulary, engine, has_passage=number is not None)
        return Candidate(number, stretch, completion, segment_score(stretch.parts, self.settings.weights))

    def _choose(self, item: Asked, plan: Plan, candidates: Sequence[Candidate], ground: Ground) -> Reflected:
        places = may_win(
            [one.stretch.label == "none" for one in candidates],
            [one.stretch.silent for one in candidates],
            drop_unsupported=self.settings.drop_unsupported,
        )
        allowed = [candidates[at] for at in places]
        form = closed_form(item.question)
        keys = [closed_answer(one.stretch.text, form) for one in allowed]
        read: list[Wish | Stretch] = [plan.wish, *(one.stretch for one in candidates)]
        reflection = Reflection(
            backend=self.name,
            retrieved=plan.retrieved,
            p_retrieve=rounded(plan.wish.p_retrieve),
            relevant=[one.number for one in candidates if one.number and is_relevant(one.stretch)],
            candidates=[one.judged() for one in candidates],
            expected=counted(each.expected for each in read),
            missing=counted(each.missing for each in read),
            unparsed=sum(
                form is not None and key is None and not says_nothing(one.stretch.text, ground)
                for one, key in zip(allowed, keys, strict=True)
            ),
            passes=len(candidates) + ground.has_retriever,
            tokens=sum(len(one.completion.tokens) for one in candidates),
            notes=list(plan.notes),
        )
        if not allowed:
            reflection = reflection.model_copy(
                update={"notes": [*plan.notes, "every answer was judged unsupported by its passage"]}
            )
            return Reflected(
                list(plan.hits), [], abstained(ground, candidates[0].completion.prompt_tokens), "", reflection
            )
        won = best(keys, [one.score for one in allowed], closed=form is not None)
        winner = allowed[won]
        backing = [
            one.number
            for one, key in zip(allowed, keys, strict=True)
            if one.number and (one is winner or (key is not None and key == keys[won]))
        ]
        return Reflected(
            list(plan.hits),
            backing,
            spoken(winner.completion, winner.stretch),
            winner.stretch.text,
            reflection.model_copy(update={"segments": [winner.judged()]}),
        )


def counted(groups: Iterable[Sequence[str]]) -> dict[str, int]:
    """How often each group is named."""
    return dict(sorted(Counter(chain.from_iterable(groups)).items()))


def spoken(completion: Completion, stretch: Stretch) -> Completion:
    """A completion without its control tokens, its text and log-probabilities likewise."""
    return replace(
        completion, text=stretch.text, tokens=list(stretch.plain), log_probs=stretch.plain_log_probs
    )


def is_relevant(stretch: Stretch) -> bool:
    """Whether the passage was more likely judged relevant than not."""
    return stretch.parts.relevance is not None and stretch.parts.relevance >= 0.5


def says_nothing(text: str, ground: Ground) -> bool:
    """Whether a text is the abstention."""
    return is_abstention(parse_reply(text).answer, abstain=ground.abstention)


def closed_answer(text: str, form: dict[str, str] | str | None) -> str | None:
    """The answer of a closed question that a text gives; None for an open one, or where none can be read."""
    if form is None:
        return None
    said = parse_reply(text).answer
    return parse_option(said, form) if isinstance(form, dict) else parse_yes_no(said)


def fits(prompt: Sequence[int], max_tokens: int, engine: Engine) -> bool:
    """Whether prompt and reply fit into the context."""
    try:
        engine.check_fits(len(prompt), max_tokens)
    except ContextOverflow:
        return False
    return True
