"""Is an answer right? One yes or no for each, where F1 gives shares: what calibration and risk are counted in."""

from __future__ import annotations

from domains.records import Answer, Question
from domains.words import numbers
from pipeline.negation import opposed
from pipeline.wording import recall
from rag.answers import parse_option, parse_yes_no

MIN_RECALL = 0.6  # of the reference's content words, as much as a supporting sentence must have


def is_given(answer: Answer) -> bool:
    """Whether there is an answer to be right or wrong, as it is served: not an abstention, not without support.

    Where no passage may support it (none was shown, or a back-end let none stand and lets it answer alone), it is given.
    """
    evidence = answer.passages if answer.evidence is None else answer.evidence
    return answer.support == "supported" or (answer.support == "unsupported" and not evidence)


def is_right(question: Question, answer: Answer) -> bool:
    """Whether a given answer says what the reference says; to an unanswerable question none does.

    An open answer must have the reference's numbers and most of its content words, and must not say its opposite
    (`pipeline.negation`); that it says more does not make it wrong.
    """
    reference = question.answer or ""
    if question.kind == "unanswerable":
        return False
    if question.kind == "options":
        return parse_option(answer.text, question.options or {}) == reference
    if question.kind == "yes_no":
        return parse_yes_no(answer.text) == reference
    if not numbers(reference) <= numbers(answer.text) or recall(reference, answer.text) < MIN_RECALL:
        return False
    return not opposed(reference, answer.text)


def is_right_and_supported(question: Question, answer: Answer) -> bool:
    """What a confidence is the probability of."""
    return answer.support == "supported" and is_right(question, answer)
