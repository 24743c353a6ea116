"""The signals that say how sure an answer is: what serving knows of it anyway.

The model's own probabilities (of the answer, of the whole reply, of abstaining instead), what retrieval scored,
and how far the evidence carries question and answer. `serve.confidence` weighs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from domains.records import Citation, Hit, Reflection
from rag.citations import best_overlap, coverage
from rag.prompt import stem_of
from rag.sentences import in_words
from serve.engine import Completion

# Of the first token of the abstention, where it was so unlikely that its size says nothing more.
_LEAST_LOG_PROB = -20.0
LIKELIHOOD = "answer_mean_log_prob"  # what a model without calibration is ranked by
# Judgements of a reflecting student in [0, 1], where there are any; half is what is not known.
_REFLECTED = ("relevance", "support", "utility")
SIGNALS = (
    LIKELIHOOD,
    "answer_min_log_prob",
    "reply_mean_log_prob",
    "reply_min_log_prob",
    "abstain_log_prob",
    "fused_top",
    "fused_margin",
    "dense_top",
    "lexical_top",
    "both_lists",
    "quotes_standing",
    "quoted",
    "answer_overlap",
    "question_coverage",
    "answer_words",
    "reflected",
    *(f"reflected_{name}" for name in _REFLECTED),
)


def measure(
    *,
    question: str,
    answer: str,
    hits: Sequence[Hit],
    citations: Sequence[Citation],
    rejected: int,
    likelihood: Mapping[str, float],
    reflection: Reflection | None = None,
) -> dict[str, float]:
    """The signals of one answer, by name.

    Args:
        question: as it was asked.
        answer: what the model answered.
        hits: what it was shown.
        citations: what the answer rests on.
        rejected: how many of the model's quotes stand nowhere.
        likelihood: see `likelihood_of`.
        reflection: a reflecting student's judgements of it.
    """
    passages = [hit.passage for hit in hits]
    scores = [hit.score for hit in hits]
    quoted = sum(item.by == "model" for item in citations)
    judged = _judgements(reflection)
    return {
        **likelihood,
        "fused_top": scores[0] if scores else 0.0,
        "fused_margin": scores[0] - scores[1] if len(scores) > 1 else 0.0,
        "dense_top": max((hit.scores.get("dense", 0.0) for hit in hits), default=0.0),
        "lexical_top": math.log1p(max((hit.scores.get("lexical", 0.0) for hit in hits), default=0.0)),
        "both_lists": float(bool(hits) and len(hits[0].ranks) > 1),
        "quotes_standing": quoted / (quoted + rejected) if quoted + rejected else 0.0,
        "quoted": float(quoted > 0),
        "answer_overlap": best_overlap(in_words(answer, question), passages),
        "question_coverage": max((coverage(stem_of(question), passage) for passage in passages), default=0.0),
        "answer_words": math.log1p(len(answer.split())),
        "reflected": float(bool(judged)),
        **{f"reflected_{name}": judged.get(name, 0.5) for name in _REFLECTED},
    }


def _judgements(reflection: Reflection | None) -> dict[str, float]:
    """The mean judgement of the answer's segments, each in [0, 1]; what was not judged is left out."""
    found: dict[str, float] = {}
    for name in _REFLECTED:
        values = [getattr(segment, name) for segment in reflection.segments] if reflection else []
        values = [value for value in values if value is not None]
        if values:
            mean = sum(values) / len(values)
            found[name] = (mean + 1) / 2 if name == "utility" else mean
    return found


def likelihood_of(
    completion: Completion,
    *,
    reply: str,
    answer: str,
    detokenize: Callable[[Sequence[int]], str],
    answer_from: int | None = None,
) -> dict[str, float]:
    """Log-probabilities (natural, per token) of a reply and of the answer in it; the least there is where none were recorded.

    Args:
        completion: generated with ``watch`` set to the abstention's first token.
        reply: the part of its tokens' text that counts; what stands before it (a verdict) is left out.
        answer: the last part of ``reply``.
        detokenize: of the engine; says which token a character comes from.
        answer_from: the token with which the answer begins, where ``reply`` is not the tokens' text.
    """
    log_probs = completion.log_probs
    if log_probs is None or not len(log_probs.taken):
        return dict.fromkeys((*SIGNALS[:4], "abstain_log_prob"), _LEAST_LOG_PROB)
    if answer_from is None:
        begin, first, last = _places(completion.tokens, reply, answer, detokenize)
    else:
        begin, first, last = 0, answer_from, len(completion.tokens)
    taken = log_probs.taken.astype(np.float64)
    # The end token belongs to the answer: stopping there was a choice too.
    whole = taken[begin : last + 1] if begin < len(taken) else taken[-1:]
    tail = taken[first : last + 1] if first < min(last + 1, len(taken)) else whole[-1:]
    instead = log_probs.watched[min(first, len(taken) - 1)]
    return {
        LIKELIHOOD: float(tail.mean()),
        "answer_min_log_prob": float(tail.min()),
        "reply_mean_log_prob": float(whole.mean()),
        "reply_min_log_prob": float(whole.min()),
        "abstain_log_prob": max(_LEAST_LOG_PROB, float(instead[0])) if instead.size else _LEAST_LOG_PROB,
    }


def token_at(tokens: Sequence[int], char: int, detokenize: Callable[[Sequence[int]], str]) -> int:
    """The first token whose text reaches beyond a character; ``len(tokens)`` where none does."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if len(detokenize(tokens[: middle + 1])) > char:
            high = middle
        else:
            low = middle + 1
    return low


def _places(
    tokens: Sequence[int], reply: str, answer: str, detokenize: Callable[[Sequence[int]], str]
) -> tuple[int, int, int]:
    """The tokens with which the reply begins, the answer begins, and the one behind the reply."""
    text = detokenize(tokens)
    begin = text.find(reply)
    # Where control tokens stood in the midst of it, the reply differs from the tokens' text by white space.
    begin, ends = (begin, begin + len(reply)) if begin >= 0 else (0, len(text))
    at = max(begin, text.rfind(answer, begin, ends)) if answer else ends
    return (
        token_at(tokens, begin, detokenize),
        token_at(tokens, at, detokenize),
        token_at(tokens, ends, detokenize),
    )
