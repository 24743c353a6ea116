"""Who can judge support? Critics against physicians: K-QA's statements, of which an answer entails some.

For IsSup this is the harder half: the claims are by physicians, in their own words. ``Entailment`` counts as support,
``Neutral`` and ``Contradiction`` as none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domains.records import Passage, Question
from pipeline.critic import Ask
from pipeline.critic_rules import support_by_words
from pipeline.critic_trained import Embed, train_critic
from pipeline.progress import Progress
from pipeline.public_sets import Claim, accuracy, drawn
from serve.judges import WordJudge

FOLDS = 5
_ENTAILED = "Entailment"


def measure_support(
    claims: Sequence[Claim],
    progress: Progress,
    *,
    embed: Embed | None = None,
    judge: WordJudge | None = None,
    asked: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Agreement of each critic with the physicians' majority.

    Args:
        claims: with labels.
        progress: one unit per claim that the model judges.
        embed: adds the trained critic with vectors; out of fold by question, as all trained arms.
        judge: a model that is asked for a word; None leaves it out.
        asked: how many claims the model judges, drawn at random; 0 = all.
        seed: of folds, draw and intervals.

    Returns:
        ``majority`` and by arm ``accuracy``, ``interval``, ``n``, ``kappa``: ``rules`` (full support), ``rules_partial``
        (partial support counts too), ``trained``, ``trained_vectors``, ``model`` (an unreadable word counts as wrong;
        ``unreadable`` is their share).
    """
    truth = [claim.label == _ENTAILED for claim in claims]
    groups = [claim.question for claim in claims]
    words = [support_by_words(claim.claim, _passage(claim))[0] for claim in claims]
    result: dict[str, Any] = {
        "questions": len(set(groups)),
        "entailed": round(float(np.mean(truth)), 4),
        "majority": round(max(float(np.mean(truth)), 1 - float(np.mean(truth))), 4),
        "rules": _arm([word == "full" for word in words], truth, groups, seed),
        "rules_partial": _arm([word != "none" for word in words], truth, groups, seed),
        "trained": _arm(_trained(claims, truth, None, seed), truth, groups, seed),
    }
    if embed is not None:
        result["trained_vectors"] = _arm(_trained(claims, truth, embed, seed), truth, groups, seed)
    if judge is not None:
        places = drawn(len(claims), asked, seed=seed)
        result["model"] = _by_model([claims[i] for i in places], judge, progress, seed)
    return result


def kappa(said: Sequence[bool], truth: Sequence[bool]) -> float:
    """Cohen's kappa of two judges; 0 where one of them always says the same."""
    a, b = np.mean(said), np.mean(truth)
    expected = float(a * b + (1 - a) * (1 - b))
    agreed = float(np.mean([x == y for x, y in zip(said, truth, strict=True)]))
    return round((agreed - expected) / (1 - expected), 4) if expected < 1 else 0.0


def _trained(claims: Sequence[Claim], truth: Sequence[bool], embed: Embed | None, seed: int) -> list[bool]:
    """The critic that learns, on labels of other questions."""
    asks = [_ask(claim, i) for i, claim in enumerate(claims)]
    names = sorted({claim.question for claim in claims})
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[i]: place % FOLDS for place, i in enumerate(order.tolist())}
    said: list[bool] = [False] * len(claims)
    for number in range(FOLDS):
        out = [i for i, claim in enumerate(claims) if fold_of[claim.question] == number]
        rest = [i for i, claim in enumerate(claims) if fold_of[claim.question] != number]
        critic = train_critic(
            [(asks[i], "full" if truth[i] else "none") for i in rest], embed, teacher="physicians"
        )
        for i, found in zip(out, critic.judge([asks[i] for i in out]), strict=True):
            said[i] = found is not None and found.label == "full"
    return said


def _by_model(claims: Sequence[Claim], judge: WordJudge, progress: Progress, seed: int) -> dict[str, Any]:
    progress.start("support: the model's word", len(claims))
    said: list[str | None] = []
    for claim in claims:
        said.append(judge.support(claim.question, claim.claim, [_passage(claim)]))
        progress.advance()
    truth = [claim.label == _ENTAILED for claim in claims]
    # What can't be read is no judgement: it is counted against the judge, whatever the truth.
    marks = [(not due) if word is None else word == "full" for word, due in zip(said, truth, strict=True)]
    unreadable = sum(word is None for word in said) / len(said)
    return _arm(marks, truth, [claim.question for claim in claims], seed) | {
        "unreadable": round(unreadable, 4)
    }


def _arm(said: Sequence[bool], truth: Sequence[bool], groups: Sequence[str], seed: int) -> dict[str, Any]:
    right: NDArray[np.bool_] = np.asarray(said) == np.asarray(truth)
    return accuracy(right.tolist(), groups, seed=seed) | {"kappa": kappa(said, truth)}


def _ask(claim: Claim, number: int) -> Ask:
    question = Question(
        id=str(number),
        kind="open",
        question=claim.question,
        answer=claim.answer,
        about=claim.question,
        split="seed",
    )
    return Ask(task="issup", question=question, passage=_passage(claim), output=claim.claim)


def _passage(claim: Claim) -> Passage:
    text = claim.answer or "-"
    return Passage(
        passage_id="answer", doc_id="answer", title="", heading="", text=text, start=0, end=len(text)
    )
