"""``[[elicit.steps]]``: which strategies the elicit stage runs, in order, each with its own options; the judge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from domains.records import Record

_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=1)]


_OF_ENDPOINT = ("base_url", "model", "api_key_env", "price_prompt", "price_completion")


class JudgeOptions(Record):
    """Who grades, criticises and cross-checks, where that is not the teacher; what is left out is the teacher's.

    Where ``kind`` is left out, ``gguf`` says ``local``; ``base_url``, ``model``, ``api_key_env`` or a price say ``endpoint``.
    """

    kind: Literal["endpoint", "local"] | None = None
    base_url: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    gguf: str | None = None
    price_prompt: float | None = Field(default=None, ge=0)
    price_completion: float | None = Field(default=None, ge=0)
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0

    @model_validator(mode="after")
    def _of_one_kind(self) -> JudgeOptions:
        remote = [name for name in _OF_ENDPOINT if getattr(self, name) is not None]
        if remote and (self.kind == "local" or self.gguf is not None):
            other = f"gguf = {self.gguf!r}" if self.gguf is not None else "kind = 'local'"
            raise ValueError(
                f"{remote[0]} = {getattr(self, remote[0])!r} is an endpoint's and does nothing beside {other}: leave one of them out"
            )
        if self.kind == "endpoint" and self.gguf is not None:
            raise ValueError(
                f"gguf = {self.gguf!r} does nothing beside kind = 'endpoint': leave one of them out"
            )
        return self

    def chosen_kind(self) -> Literal["endpoint", "local"] | None:
        """What the keys say; None where they name nobody."""
        if self.kind is not None or self.gguf is not None:
            return self.kind or "local"
        return "endpoint" if any(getattr(self, name) is not None for name in _OF_ENDPOINT) else None


class Budget(Record):
    """The most that a step may take; left out: no cap but ``[teacher] max_cost``.

    ``calls`` are requests to teacher and judge, those that the ledger answers too. Where the next row might not fit any more
    the step ends with what it has: the rows that it did not get to go no further, and the report counts them.
    """

    calls: int | None = Field(default=None, ge=1)


class StepOptions(Record):
    """The options of any step."""

    budget: Budget = Budget()


class GuardedStep(StepOptions):
    """A step that refuses to go on with a teacher that can't play its part.

    The first rows run alone: the step stops where more than ``max_unparsed`` of the replies can't be read or
    fewer than ``min_kept`` of the rows are kept.
    """

    max_unparsed: _Share = 0.2
    min_kept: _Share = 0.1


class RoundsStep(GuardedStep):
    """A step that works in rounds: where the last 50 proposals brought less than ``min_yield``, it ends early."""

    min_yield: _Share = 0.05


class LabelStep(StepOptions):
    """KARD's labelling (arXiv 2305.18395 §3.1): ``[elicit] samples`` rationales per question."""

    use: Literal["label"] = "label"


class OrcaStep(RoundsStep):
    """Orca (arXiv 2306.02707): one of several system messages per question, drawn by chance.

    ``questions`` are drawn evenly over the kinds of question (0 = all). A message's text is that of
    ``prompts/orca_NAME.md``, or the built-in one; names that begin with ``options`` are for questions with
    options only.
    """

    use: Literal["orca"]
    questions: Annotated[int, Field(ge=0)] = 0
    messages: Annotated[list[str], Field(min_length=1)] = ["none", "steps", "plain", "brief", "options_first"]
    max_tokens: _Count = 400


class ExplainOptionsStep(RoundsStep):
    """PMC-LLaMA (arXiv 2304.14454): why the right option is right, and why each other one is not."""

    use: Literal["explain_options"]
    max_tokens: _Count = 500


class GenerateQuestionsStep(RoundsStep):
    """New seed questions from passages of documents that the exam does not ask about.

    ``per_passage`` questions from each of ``passages`` passages (0 = all). ``near_duplicate`` and
    ``decontaminate_ngram`` as in ``[curate]``: against all questions there are, and against the exam.
    """

    use: Literal["generate_questions"]
    passages: Annotated[int, Field(ge=0)] = 100
    per_passage: Annotated[int, Field(ge=1, le=10)] = 2
    near_duplicate: _Share = 0.85
    decontaminate_ngram: _Count = 8
    max_tokens: _Count = 600


class CritiqueReviseStep(RoundsStep):
    """SelFee and Reflection-Tuning (arXiv 2310.11716): a critic asks for revisions until it has none.

    ``keep_unsettled``: keep the best answer also where the critic was still not content after
    ``max_rounds`` revisions.
    """

    use: Literal["critique_revise"]
    max_rounds: Annotated[int, Field(ge=1, le=5)] = 2
    keep_unsettled: bool = False
    max_tokens: _Count = 400


class RateStep(GuardedStep):
    """AlpaGasus (arXiv 2307.08701): the judge rates with a written reason; the best share is kept.

    Kept is what has at least ``min_score`` of 5 and belongs to the ``keep_share`` best; ``samples`` ratings
    are averaged (one at temperature 0).
    """

    use: Literal["rate"]
    dimension: str = (
        "accuracy: is the explanation right, grounded in the passages, and does it support the right answer"
    )
    keep_share: Annotated[float, Field(gt=0, le=1)] = 0.6
    min_score: Annotated[float, Field(ge=1, le=5)] = 4.0
    samples: _Count = 1
    max_tokens: _Count = 256


Step = Annotated[
    LabelStep | OrcaStep | ExplainOptionsStep | GenerateQuestionsStep | CritiqueReviseStep | RateStep,
    Field(discriminator="use"),
]
STEPS: dict[str, type[StepOptions]] = {
    "label": LabelStep,
    "orca": OrcaStep,
    "explain_options": ExplainOptionsStep,
    "generate_questions": GenerateQuestionsStep,
    "critique_revise": CritiqueReviseStep,
    "rate": RateStep,
}
