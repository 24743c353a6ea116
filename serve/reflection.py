"""Four ways to judge evidence while answering, behind one interface.

none     the passages go into the prompt, the answer is checked afterwards: no reflection
text     the student says in words which passages are informative (SAIL, arXiv 2305.15225)
tokens   the student judges by reflection tokens (Self-RAG, arXiv 2310.11511)
grader   someone else judges passages and answer: rules, an endpoint, or a second model

`serve.assistant.Assistant` asks a back-end for what the model finally said and on which evidence, and checks
that as it checks every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from domains.config import ReflectSection
from domains.records import Hit, Message, Reflection
from serve.engine import Completion, Engine

if TYPE_CHECKING:
    from serve.assistant import Asked


@dataclass(frozen=True)
class Reflected:
    """What a back-end made of a question.

    ``shown`` are all passages that were looked at, in the order of their numbers; ``evidence`` are the numbers
    of those that the answer may rest on. ``completion`` is the one that won, its text without control tokens and
    verdicts; ``raw`` is what the model wrote where that is more. ``answer_from`` is the token of ``completion`` with
    which the answer begins, None where it is found by its text.
    """

    shown: list[Hit]
    evidence: list[int]
    completion: Completion
    raw: str
    reflection: Reflection
    answer_from: int | None = None


class Ground(Protocol):
    """What a back-end may use of the assistant."""

    engine: Engine
    # The domain's sentence that says "I don't know".
    abstention: str
    # Passages of one retrieval where the back-end has no number of its own.
    top_k: int
    # The token ids whose log-probabilities are recorded where the confidence is measured, else None.
    watch: tuple[int, ...] | None

    @property
    def has_retriever(self) -> bool:
        """False where the questions are asked closed-book."""

    def find(self, query: str, *, top_k: int) -> list[Hit]:
        """Passages for a query, best first; none without a retriever."""

    def prompt(self, question: str, hits: Sequence[Hit], history: Sequence[Message]) -> list[int]:
        """The tokens of the prompt, ending where the reply begins."""


class Reflector(Protocol):
    """A back-end. Greedy: the same questions give the same answers."""

    name: str
    # Whether passages are found and shown before the back-end is asked.
    retrieves_first: bool

    def reflect(self, asked: Sequence[Asked], ground: Ground) -> list[Reflected]:
        """Answer prepared questions, in the given order.

        Raises:
            ModelError: the model can't do what the back-end needs.
        """

    def close(self) -> None:
        """Free what the back-end opened."""


def retrieval_depth(reflect: ReflectSection, top_k: int) -> int:
    """The most passages that one retrieval of an answer asks for.

    Args:
        reflect: ``tokens`` has a number of its own.
        top_k: what the other back-ends ask for.
    """
    return max(top_k, reflect.passages) if reflect.backend == "tokens" else top_k


def open_reflector(reflect: ReflectSection, engine: Engine) -> Reflector | None:
    """The back-end that ``[reflect]`` names; None for ``none``.

    Raises:
        ModelError: the model has no reflection tokens, or the judge's model can't be opened.
    """
    if reflect.backend == "tokens":
        from serve.reflection_tokens import open_tokens

        return open_tokens(reflect, engine)
    if reflect.backend == "text":
        from serve.reflection_text import TextReflector

        return TextReflector(distracting=reflect.distracting)
    if reflect.backend == "grader":
        from serve.reflection_grader import open_grader

        return open_grader(reflect)
    return None


def abstained(ground: Ground, prompt_tokens: int) -> Completion:
    """A completion that is the abstention: the back-end has nothing that it may say."""
    return Completion(f"Answer: {ground.abstention}", [], prompt_tokens, "stop")
