"""Does a text affirm or deny? Cues of a yes/no question's evidence that a small model does not weigh by itself.

Counts of denied findings ("no significant difference", "did not"), of affirmed ones, of p-values on either side of
0.05; each over the whole text and weighed by how many of the question's words a sentence has. They are features
for a fitted model, not an answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rag.words import index_terms, sentence_spans

_FOUND = (
    "significan differen associat correlat effect relat chang increas predict improv affect influenc recommend "
    "requir allow support"
)
_DENIED = re.compile(
    rf"\b(?:no|not|nor|without|neither|non)[\s-]+(?:\w+\s+){{0,3}}?(?:{'|'.join(_FOUND.split())})\w*"
    r"|\b(?:no|not|nor|without|neither|non)[\s-]+(?:\w+\s+){0,3}?differ\b|\b(?:similar|comparable|did not)\b",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(
    r"\b(?:no|not|neither|nor|without|none|unlikely|fail(?:ed|s)?|lack(?:ed|s)?|unchanged|unrelated|similar(?:ly)?"
    r"|comparable|equivalent|same|cannot|never|avoid(?:ed)?|must not)\b|n't\b",
    re.IGNORECASE,
)
_SIGNIFICANT = re.compile(r"(?<!not )(?<!no )(?<!non)\bsignificant(?:ly)?\b", re.IGNORECASE)
_AFFIRMED = re.compile(
    r"\b(?:higher|lower|increas\w*|decreas\w*|greater|improv\w*|reduc\w*|better|associated|correlat\w*|predict\w*"
    r"|more|independent(?:ly)?)\b",
    re.IGNORECASE,
)
_P_VALUE = re.compile(r"\bp\s*-?(?:\s*value)?\s*([<>=≤≥])\s*(0?\.\d+)", re.IGNORECASE)
# "Are they the same?" is asked by those who think not: 13 of 14 such questions in PubMedQA and BioASQ have "no".
_EQUALITY = re.compile(
    r"\bas \w+ as\b|\b(?:equivalent|comparable|similar|identical)\b|\bthe same\b", re.IGNORECASE
)
_LEVEL = 0.05
_MOST = 2  # cues of one sentence that count
NAMES = (
    "denied", "denied_near", "denied_share", "denied_last", "denied_nearest", "negative", "negative_near",
    "significant", "significant_near", "significant_share", "affirmed", "affirmed_near", "p_below", "p_above",
    "nearest", "sentences", "equality_asked",
)  # fmt: skip


def polarity(question: str, text: str) -> list[float]:
    """The cues in the order of `NAMES`; ``…_near`` weighs sentences by the question's words in them.

    Args:
        question: its words decide which sentences count more, and whether it asks for sameness.
        text: the evidence.
    """
    sentences = [text[start:end] for start, end in sentence_spans(text)] or [""]
    near = nearness(question, sentences)
    weight = near / near.sum() if near.sum() > 0 else np.full(len(sentences), 1 / len(sentences))
    denied, negative, significant, affirmed = (
        np.array([len(cue.findall(each)) for each in sentences], dtype=np.float64)
        for cue in (_DENIED, _NEGATIVE, _SIGNIFICANT, _AFFIRMED)
    )
    below, above = _p_values(text)

    def weighed(counts: Sequence[float] | np.ndarray) -> float:
        return float(weight @ np.minimum(counts, _MOST))

    return [
        math.log1p(denied.sum()), weighed(denied), float((denied > 0).mean()), min(_MOST, float(denied[-1])),
        min(_MOST, float(denied[int(near.argmax())])), math.log1p(negative.sum()), weighed(negative),
        math.log1p(significant.sum()), weighed(significant), float((significant > 0).mean()),
        math.log1p(affirmed.sum()), weighed(affirmed), math.log1p(below), math.log1p(above),
        float(near.max()), math.log1p(len(sentences)), float(bool(_EQUALITY.search(question))),
    ]  # fmt: skip


def nearness(question: str, sentences: Sequence[str]) -> NDArray[np.float64]:
    """The share of the question's words that each sentence has, [sentences], in [0, 1]; stop words do not count."""
    wanted = set(index_terms(question))
    shares = [len(wanted & set(index_terms(each))) / max(1, len(wanted)) for each in sentences]
    return np.array(shares, dtype=np.float64)


def speaks_for(answer: str, sentence: str) -> bool:
    """Whether a sentence has a cue of its own for ``yes`` or for ``no``; for "maybe", of either."""
    denies = bool(_DENIED.search(sentence) or _NEGATIVE.search(sentence))
    affirms = bool(_SIGNIFICANT.search(sentence) or _AFFIRMED.search(sentence)) and not denies
    return {"yes": affirms, "no": denies}.get(answer, affirms or denies)


def _p_values(text: str) -> tuple[int, int]:
    """How many p-values are significant, and how many are not."""
    found = [(match[1], float(match[2])) for match in _P_VALUE.finditer(text)]
    below = sum(sign in "<≤=" and value <= _LEVEL for sign, value in found)
    above = sum(value > _LEVEL or (sign in ">≥" and value >= _LEVEL) for sign, value in found)
    return below, above
