"""Someone else judges: which passages are relevant, and whether the answer stands in them.

The steps of corrective RAG (arXiv 2401.15884) and of the prompted imitation of Self-RAG, but bounded: passages are
graded, at most once looked for again in other words, one answer is written, and it is graded. Where a judge fails,
the answer is given ungraded, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from domains.config import ReflectSection
from domains.errors import PreceptorError
from domains.records import Hit, JudgedSegment, Reflection
from rag.answers import is_abstention, one_reply, parse_reply
from serve.judges import Judge, Label, open_judge
from serve.reflection import Ground, Reflected, abstained

if TYPE_CHECKING:
    from serve.assistant import Asked

_SUPPORT_SCORES: dict[Label, float] = {"full": 1.0, "partial": 0.5, "none": 0.0}


def open_grader(reflect: ReflectSection) -> GraderReflector:
    """The back-end with the judge that ``[reflect]`` names.

    Raises:
        ModelError: the judge's GGUF can't be loaded.
    """
    judge = open_judge(
        reflect.judge,
        base_url=reflect.judge_base_url,
        model=reflect.judge_model,
        api_key_env=reflect.judge_api_key_env,
        gguf=reflect.judge_gguf,
        timeout_s=reflect.judge_timeout_s,
    )
    return GraderReflector(
        judge,
        distracting=reflect.distracting,
        drop_unsupported=reflect.drop_unsupported,
        rewrites=reflect.rewrites,
    )


class GraderReflector:
    """Answers from passages that a judge lets pass, if the judge finds the answer supported.

    Args:
        judge: grades; see `serve.judges`.
        distracting: what happens when no passage is relevant: ``abstain``, or ``answer`` without evidence.
        drop_unsupported: an answer judged unsupported becomes the abstention.
        rewrites: 1 lets the judge reword the query once when no passage is relevant, 0 does not.
    """

    name = "grader"
    retrieves_first = True

    def __init__(
        self,
        judge: Judge,
        *,
        distracting: Literal["abstain", "answer"],
        drop_unsupported: bool,
        rewrites: int,
    ) -> None:
        self._judge = judge
        self._distracting = distracting
        self._drop = drop_unsupported
        self._rewrites = rewrites

    def close(self) -> None:
        """Close the judge."""
        self._judge.close()

    def reflect(self, asked: Sequence[Asked], ground: Ground) -> list[Reflected]:
        """`serve.reflection.Reflector.reflect`."""
        if not asked:
            return []
        cases = [_Case(item) for item in asked]
        for case in cases:
            self._select(case, ground)
        limit = max(item.max_tokens for item in asked)
        completions = ground.engine.generate(
            [case.prompt for case in cases], max_tokens=limit, watch=ground.watch
        )
        reflected = []
        for case, completion in zip(cases, completions, strict=True):
            text = one_reply(completion.text)
            if case.graded and not case.kept and case.item.hits and self._distracting == "abstain":
                text = abstained(ground, 0).text
            elif case.kept:
                text = self._graded(case, text, ground)
            reflected.append(
                Reflected(
                    case.shown,
                    [case.shown.index(hit) + 1 for hit in case.kept],
                    replace(completion, text=text),
                    completion.text,
                    case.reflection(self.name, tokens=len(completion.tokens)),
                )
            )
        return reflected

    def _select(self, case: _Case, ground: Ground) -> None:
        """Keep the relevant passages; look once more where there are none."""
        if not case.item.hits:
            return
        question = case.item.question
        try:
            case.kept = self._relevant(case, case.item.hits)
            if not case.kept and self._rewrites:
                words = self._judge.rewrite(question)
                case.passes += 1
                if words and words != case.item.query:
                    known = {hit.passage.passage_id for hit in case.shown}
                    again = [
                        hit
                        for hit in ground.find(words, top_k=ground.top_k)
                        if hit.passage.passage_id not in known
                    ]
                    case.notes.append(f"looked again for {words!r}: {len(again)} other passages")
                    case.shown += again
                    case.kept = self._relevant(case, again)
        except PreceptorError as error:
            case.fail(error)
        if not case.kept:
            case.notes.append("no passage was judged relevant")
        if case.kept != list(case.item.hits):
            fitting = list(case.kept)  # passages found in the second look may be longer than the first ones
            while True:
                case.prompt = ground.prompt(question, fitting, case.item.history)
                if not fitting or ground.engine.context >= len(case.prompt) + case.item.max_tokens:
                    break
                fitting.pop()
            if len(fitting) < len(case.kept):
                case.notes.append(f"{len(case.kept) - len(fitting)} passages do not fit into the context")
                case.kept = fitting

    def _relevant(self, case: _Case, hits: Sequence[Hit]) -> list[Hit]:
        grades = [self._judge.is_relevant(case.item.question, hit.passage) for hit in hits]
        case.passes += len(hits)
        case.unparsed += sum(grade is None for grade in grades)
        return [hit for hit, grade in zip(hits, grades, strict=True) if grade is not False]

    def _graded(self, case: _Case, text: str, ground: Ground) -> str:
        """The reply, or the abstention where the judge finds no support for it."""
        answer = parse_reply(text).answer
        if not case.graded or not answer or is_abstention(answer, abstain=ground.abstention):
            return text
        try:
            case.label = self._judge.support(case.item.question, answer, [hit.passage for hit in case.kept])
        except PreceptorError as error:
            case.give_up(error)  # what the answer was written from stays its evidence
            return text
        case.passes += 1
        case.unparsed += case.label is None
        case.answer = answer
        if case.label == "none" and self._drop:
            case.notes.append("the answer was judged unsupported")
            return abstained(ground, 0).text
        return text


class _Case:
    """One question on its way through the grader."""

    def __init__(self, item: Asked) -> None:
        self.item = item
        self.shown: list[Hit] = list(item.hits)
        self.kept: list[Hit] = list(item.hits)
        self.prompt: list[int] = item.tokens
        self.graded = True
        self.label: Label | None = None
        self.answer = ""
        self.passes = 1
        self.unparsed = 0
        self.notes: list[str] = []

    def fail(self, error: PreceptorError) -> None:
        """The judge is out before the answer is written: everything that was found first counts as relevant."""
        self.kept = list(self.item.hits)
        self.shown = list(self.item.hits)
        self.give_up(error)

    def give_up(self, error: PreceptorError) -> None:
        """Nothing more is graded."""
        self.graded = False
        self.notes.append(f"not graded: {error.what}")

    def reflection(self, name: str, *, tokens: int) -> Reflection:
        """What is told of it."""
        segments = []
        if self.label is not None:
            segments.append(
                JudgedSegment(
                    decision="retrieve",
                    text=self.answer,
                    support=_SUPPORT_SCORES[self.label],
                    label=self.label,
                )
            )
        return Reflection(
            backend=name,
            retrieved=bool(self.item.hits),
            relevant=[self.shown.index(hit) + 1 for hit in self.kept] if self.graded else [],
            segments=segments,
            unparsed=self.unparsed,
            passes=self.passes,
            tokens=tokens,
            notes=self.notes,
        )
