"""KARD's verifier (arXiv 2305.18395 §3.1): a model that must find the answer from the rationale alone.

The teacher saw the answer, so its rationale may repeat it without explaining anything. The judge sees the
question and the rationale, with every option letter taken out, and predicts the answer whose words gain most
log-probability from the rationale: nothing is parsed. The paper takes the most probable letter; a 135M judge
says the same letter whatever it reads (measured, docs/log.md), while the words' gain finds the answer. Open
questions have no answers to choose from; rules judge them alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from domains.checks import Verdict
from domains.records import Message, Passage, Question, Rejection, Verification
from pipeline.judge import rejection
from pipeline.progress import Progress
from pipeline.rows import Kept
from pipeline.verify import prose
from rag.prompt import neutralise, student_messages
from serve.engine import Engine

REASON = "verifier"
_LETTER = re.compile(
    r"\b(?i:option|choice|answer)\s*(?:is\s*)?:?\s*\(?[A-H]\b\)?|\([A-H]\)|^[A-H][.)]\s", re.MULTILINE
)
_NOTHING = "N/A"
_OPENING = "So, the answer is"
_ANSWER = "Answer:"  # as `rag.answers.format_reply` writes it
_WORDS = ("yes", "no", "maybe")


def verify_by_model(
    engine: Engine, kept: Sequence[Kept], progress: Progress
) -> tuple[list[Kept], list[Rejection]]:
    """Those whose answer the model finds, and a rejection for each other one; open questions pass.

    Args:
        engine: the judge.
        kept: rationales that passed the rules.
        progress: one unit per closed question.
    """
    closed = [item for item in kept if item.question.kind in {"options", "yes_no"}]
    progress.start("verifier: answers from rationales alone", len(closed))
    said: dict[int, str] = {}
    for item in closed:
        said[id(item)] = predict(engine, item.question, item.rationale.text)
        progress.advance()
    passed: list[Kept] = []
    rejected: list[Rejection] = []
    for item in kept:
        found, gold = said.get(id(item)), item.question.answer
        if found is None:
            passed.append(item)
        elif found == gold:
            passed.append(replace(item, verifier=Verification(pred=found, ok=True, method="model")))
        else:
            verdict = Verdict(ok=False, reason=REASON, detail=f"predicts {found}, gold is {gold}")
            rejected.append(rejection(item.rationale, verdict))
    return passed, rejected


def predict(engine: Engine, question: Question, text: str) -> str:
    """The answer to a closed question that a rationale speaks for.

    Args:
        engine: the judge.
        question: of kind ``options`` or ``yes_no``.
        text: the rationale.
    """
    found = gains(
        engine,
        _words_of(question),
        given=_prompt(engine, question, hide_letters(text)),
        prior=_prompt(engine, question, _NOTHING),
    )
    return max(found, key=lambda answer: found[answer])


def passage_gains(
    engine: Engine, question: Question, passages: Sequence[Passage], *, system: str = ""
) -> dict[str, float]:
    """What each answer to a closed question gains in log-probability from passages, the question alone as the prior.

    Args:
        engine: the judge, or a student.
        question: of kind ``options`` or ``yes_no``; its options are not shown, so no letter is preferred.
        passages: the evidence.
        system: the prompt that a student was trained with; none for an untrained model.

    Raises:
        ContextOverflow: passages and an answer do not fit the context.
    """

    def prompt(evidence: Sequence[Passage]) -> list[int]:
        messages = student_messages(system, question.question, evidence)[0 if system else 1 :]
        opening = Message(role="assistant", content=_ANSWER)
        return engine.tokenize(engine.render([*messages, opening], continue_reply=True))

    return gains(engine, _words_of(question), given=prompt(passages), prior=prompt([]))


def gains(
    engine: Engine, answers: Mapping[str, str], *, given: Sequence[int], prior: Sequence[int]
) -> dict[str, float]:
    """Log-probability of each answer's words behind ``given`` minus that behind ``prior``, by the answers' names.

    Args:
        engine: the model.
        answers: the words of each.
        given: a prompt with evidence.
        prior: the same without.

    Raises:
        ContextOverflow: a prompt and an answer do not fit the context.
    """
    words = [engine.tokenize(f" {neutralise(answer)}", begin=False) for answer in answers.values()]
    found = engine.log_likelihoods(given, words) - engine.log_likelihoods(prior, words)
    return {name: float(value) for name, value in zip(answers, found, strict=True)}


def _words_of(question: Question) -> Mapping[str, str]:
    return question.options or {word: word for word in _WORDS}


def hide_letters(text: str) -> str:
    """A rationale's own words without the names of options: what explains must do without them."""
    return " ".join(_LETTER.sub(" ", prose(text)).split())


def _prompt(engine: Engine, question: Question, explanation: str) -> list[int]:
    user = neutralise(f"{question.question}\n\nExplanation: {explanation}")
    messages = [Message(role="user", content=user), Message(role="assistant", content=_OPENING)]
    return engine.tokenize(engine.render(messages, continue_reply=True))
