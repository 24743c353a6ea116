"""Yes/no questions, answered by what the documents affirm or deny instead of by the model.

A student of 135M parameters says yes and no no better than chance (docs/results.md). The cues of `rag.polarity` in
the document that is found first decide, with the weights that the calibrate stage fitted to the domain's seed
questions; the sentence of it that is nearest to the question and speaks for the answer is quoted.

All passages found of that one document are read, in its order: what another document denies is another finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError, model_validator

from domains.errors import DataError
from domains.records import Hit, Record
from rag.answers import Reply, format_reply, one_reply, parse_reply
from rag.citations import check_quotes
from rag.polarity import NAMES, nearness, polarity, speaks_for
from rag.prompt import closed_form, stem_of
from rag.words import sentence_spans
from serve.options import Find, Picked, evidence_first

_LOOKED_AT = 10  # passages, of which those of the first one's document are read


class FittedYesNo(Record):
    """``yes_no.json``: a multinomial logistic model of the answer, from the cues of `rag.polarity`.

    ``weights`` is [1 + cues, labels], the bias first; cues are centred by ``means`` and scaled by ``scales``.
    ``accuracy`` is that on ``questions`` seed questions, out of fold, ``majority`` that of always saying their
    commonest answer, ``gain`` the difference with its 95 % interval [mean, low, high].
    """

    schema_version: Literal[1] = 1
    labels: list[Literal["yes", "no", "maybe"]] = Field(min_length=2)
    cues: list[str]
    means: list[FiniteFloat]
    scales: list[FiniteFloat]
    weights: list[list[FiniteFloat]]
    questions: int = Field(ge=1)
    accuracy: FiniteFloat
    majority: FiniteFloat
    gain: list[FiniteFloat] = Field(min_length=3, max_length=3)

    @model_validator(mode="after")
    def _fits_together(self) -> FittedYesNo:
        if tuple(self.cues) != NAMES:
            raise ValueError(f"fitted to other cues than the {len(NAMES)} of rag/polarity.py")
        n = len(self.cues)
        if len(self.means) != n or len(self.scales) != n or min(self.scales) <= 0:
            raise ValueError(f"expected {n} means and {n} scales > 0")
        if len(self.weights) != n + 1 or {len(row) for row in self.weights} != {len(self.labels)}:
            raise ValueError(f"expected weights of {n + 1} rows with {len(self.labels)} numbers each")
        return self

    def answer(self, question: str, text: str) -> str:
        """The likeliest label of a bare question whose evidence is ``text``."""
        cues = (np.array(polarity(question, text)) - np.array(self.means)) / np.array(self.scales)
        scores = np.concatenate([[1.0], cues]) @ np.array(self.weights)
        return self.labels[int(scores.argmax())]


def read_yes_no(path: Path) -> FittedYesNo:
    """A bundle's fitted weights.

    Raises:
        DataError: the file is missing, damaged, or was fitted to other cues.
    """
    try:
        return FittedYesNo.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        detail = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise DataError(
            f"can't read {str(path)!r}: {detail}",
            expected="the weights of the cues that answer yes/no questions, schema version 1",
            next_step='preceptor calibrate DOMAIN --force, or [serve] yes_no = "student"',
        ) from None


@dataclass(frozen=True)
class Evidence:
    """What is read for a question: the passages found of one document, in its order, and their ``text``."""

    hits: list[Hit]
    text: str


def read_evidence(question: str, find: Find) -> Evidence | None:
    """The document that is found first, as far as its passages are found; None where nothing is.

    Args:
        question: bare, without the line that asks for yes or no.
        find: looks for passages.
    """
    found = find(question, _LOOKED_AT)
    if not found:
        return None
    hits = [hit for hit in found if hit.passage.doc_id == found[0].passage.doc_id]
    hits.sort(key=lambda hit: hit.passage.start)
    parts, end = [], 0
    for passage in (hit.passage for hit in hits):  # passages may overlap, and nothing counts twice
        parts.append(passage.text[max(0, end - passage.start) :])
        end = max(end, passage.end)
    return Evidence(hits, "\n".join(part for part in parts if part.strip()))


def pick_yes_no(question: str, find: Find, shown: Sequence[Hit], fitted: FittedYesNo) -> Picked | None:
    """The answer that the cues speak for; None where no yes or no is asked for, or nothing found has a word of the question.

    Args:
        question: as asked, with the line that asks for yes or no.
        find: looks for passages.
        shown: what the bare question found.
        fitted: the weights of the cues.
    """
    if closed_form(question) != "yes_no":
        return None
    bare = stem_of(question)
    evidence = read_evidence(bare, find)
    if evidence is None:
        return None
    sentences = [
        (hit, hit.passage.text[start:end])
        for hit in evidence.hits
        for start, end in sentence_spans(hit.passage.text)
    ]
    near = nearness(bare, [text for _, text in sentences])
    if not near.any():
        return None
    label = fitted.answer(bare, evidence.text)
    speaking = np.array([speaks_for(label, text) for _, text in sentences]) & (near > 0)
    order = [sentences[i] for i in np.lexsort((-near, ~speaking))]
    hit, reply = next(
        ((hit, reply) for hit, text in order if (reply := _quoting(text, hit, label))),
        (order[0][0], f"Answer: {label}"),
    )
    return Picked(reply, evidence_first(hit, shown))


def _quoting(sentence: str, hit: Hit, label: str) -> str:
    """The reply with its quote; empty where a reader would take it for another: documents may hold quotes and answers."""
    quote = (" ".join(sentence.split()), 1)
    reply = format_reply(quotes=[quote], rationale="", answer=label)
    read = parse_reply(one_reply(reply))
    if read != Reply(rationale="", quotes=(quote,), answer=label, has_answer_line=True):
        return ""
    return reply if check_quotes([quote], [hit.passage])[0] else ""
