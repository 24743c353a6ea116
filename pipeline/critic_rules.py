"""A stand-in for a critic model: gold quotes and word overlap. No model, no cost, and it says so in every label.

A teacher of 135M parameters can't grade, so these rules are the default for a local one. They know the reference
(a learned critic does not), and are blind to a right paraphrase with few words in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from domains.records import Critique, CritiqueTask, Passage
from domains.words import squash
from pipeline.critic import Ask
from pipeline.negation import opposed
from pipeline.rows import gold_quotes, may_answer
from pipeline.wording import content_words, recall
from rag.answers import reference_answer
from rag.citations import find_support
from rag.prompt import neutralise

NAME = "rules (word overlap, no model)"
# The least shares of a sentence's content words that one sentence of the passage must have. 0.6 is what serving
# calls supported (`rag.citations.find_support`).
FULL, PARTIAL = 0.6, 0.3


class RuleCritic:
    """See the module's docstring."""

    name = NAME

    def judge(self, asks: Sequence[Ask]) -> list[Critique | None]:
        """A label for every question, but for the relevance of a passage that may answer without the gold quote."""
        said = [(ask, _JUDGES[ask.task](ask)) for ask in asks]
        return [ask.labelled(*found, self.name) if found else None for ask, found in said]


def _retrieve(ask: Ask) -> tuple[str, str]:
    if ask.passage is None:
        if not ask.question.about:
            return "no_retrieval", "a general instruction, about no document"
        return "retrieve", "questions of a domain are about its documents"
    if not content_words(ask.output) - content_words(f"{ask.question.question} {ask.preceding}"):
        return "no_retrieval", "the sentence says nothing new that could be looked up"
    if find_support(ask.output, [ask.passage], min_overlap=FULL):
        return "continue", "the evidence at hand has the sentence's words"
    return "retrieve", "the evidence at hand lacks the sentence's words"


def _relevance(ask: Ask) -> tuple[str, str] | None:
    assert ask.passage is not None
    question, passages = ask.question, [ask.passage]
    if question.kind == "unanswerable":
        return "irrelevant", "no document answers the question"
    if gold_quotes(question, passages):
        return "relevant", "a gold quote stands in it"
    if may_answer(question, passages) or (ask.output and find_support(ask.output, passages)):
        # Where the gold quote stands elsewhere, the same words may speak of something else: a label would be a guess.
        return None if question.gold else ("relevant", "it has the words of the answer")
    return "irrelevant", "neither a gold quote nor the words of the answer"


def _support(ask: Ask) -> tuple[str, str]:
    assert ask.passage is not None
    if squash(ask.output) == squash(neutralise(reference_answer(ask.question))) and gold_quotes(
        ask.question, [ask.passage]
    ):
        return "full", "the reference answer, and the quote that decides it"
    return support_by_words(ask.output, ask.passage)


def support_by_words(output: str, passage: Passage) -> tuple[str, str]:
    """How far a passage supports a sentence, by the words that one of its sentences shares with it."""
    if find_support(output, [passage], min_overlap=FULL):
        return "full", f"a sentence has at least {FULL:.0%} of its words"
    if find_support(output, [passage], min_overlap=PARTIAL):
        return "partial", f"a sentence has at least {PARTIAL:.0%} of its words"
    return "none", f"no sentence has {PARTIAL:.0%} of its words"


def _utility(ask: Ask) -> tuple[str, str]:
    reference = reference_answer(ask.question) if ask.question.answer else ""
    if ask.question.kind == "open" and opposed(reference, ask.output):
        return "1", "it says the opposite of the reference"
    share = recall(reference, ask.output) if reference else 0.0
    return str(1 + round(4 * share)), f"{share:.0%} of the reference's words"


_JUDGES: dict[CritiqueTask, Callable[[Ask], tuple[str, str] | None]] = {
    "retrieve": _retrieve,
    "isrel": _relevance,
    "issup": _support,
    "isuse": _utility,
}
