"""A small critic that learns from a sample of the teacher's labels and labels the rest (arXiv 2310.11511 §3.2.1).

The paper fine-tunes a 7B model, without special tokens, because a million calls of a paid teacher are too many.
Beside a student of 135M parameters no model of that size is at hand; here it is one multinomial logistic
regression per kind of label, over overlap of words, numbers and names, and over vectors of the embedder. It
fits in a second, is deterministic, and says how sure it is. Whether a request needs a document at all is read
from its vector: there is nothing yet that its words could overlap with.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from domains.records import Critique, Passage
from domains.routes import LEAST_LABELS
from domains.words import numbers
from pipeline.critic import Ask, Critic, evidence_text
from pipeline.logistic import Fit, Floats, fit_labels
from pipeline.wording import content_words
from rag.citations import find_support
from rag.prompt import render_question
from rag.words import sentence_spans

# Texts -> unit vectors, one row each.
Embed = Callable[[Sequence[str]], NDArray[np.float32]]
_FLOORS = (0.3, 0.45, 0.6, 0.8)


class TrainedCritic:
    """Judges with what `train_critic` learned. A task that had too few labels is None throughout.

    Args:
        fits: per kind of question, see `kind_of`.
        embed: the embedder of training, or None if it had none.
        teacher: whose labels were learned.
    """

    def __init__(self, fits: dict[str, Fit], embed: Embed | None, *, teacher: str) -> None:
        self.name = f"logistic regression on labels of {teacher}"
        self.fits, self._embed = fits, embed

    def judge(self, asks: Sequence[Ask]) -> list[Critique | None]:
        """The likeliest label each; the explanation is its probability."""
        found: list[Critique | None] = [None] * len(asks)
        for kind, fit in self.fits.items():
            places = [place for place, ask in enumerate(asks) if kind_of(ask) == kind]
            if not places:
                continue
            shares = fit.probabilities(features([asks[place] for place in places], self._embed))
            for place, share in zip(places, shares, strict=True):
                best = int(share.argmax())
                said = f"probability {share[best]:.2f}"
                found[place] = asks[place].labelled(fit.labels[best], said, self.name)
        return found


def kind_of(ask: Ask) -> str:
    """What shares a model: the task, with the two retrieve decisions apart."""
    return "input" if ask.task == "retrieve" and ask.passage is None else ask.task


def train_critic(
    labelled: Sequence[tuple[Ask, str]], embed: Embed | None, *, teacher: str, least: int = LEAST_LABELS
) -> TrainedCritic:
    """Fit one model per kind of question that has at least ``least`` labels."""
    groups: defaultdict[str, list[tuple[Ask, str]]] = defaultdict(list)
    for ask, label in labelled:
        groups[kind_of(ask)].append((ask, label))
    fits = {}
    for kind, pairs in sorted(groups.items()):
        if len(pairs) >= least:
            rows = features([ask for ask, _ in pairs], embed)
            fits[kind] = fit_labels(rows, [label for _, label in pairs])
    return TrainedCritic(fits, embed, teacher=teacher)


def features(asks: Sequence[Ask], embed: Embed | None) -> Floats:
    """[asks, features] of asks of one kind: overlaps of output, question and passage, and three cosines.

    For the decision at the beginning of an answer it is the question's vector. Without an embedder: overlaps alone.
    """
    if embed is not None and asks and kind_of(asks[0]) == "input":
        return np.asarray(embed([render_question(ask.question) for ask in asks]), dtype=np.float64)
    rows = np.array([_overlaps(ask) for ask in asks], dtype=np.float64).reshape(len(asks), -1)
    if embed is None or not asks:
        return rows
    texts = [_texts(ask) for ask in asks]
    vectors = np.asarray(embed([text or "-" for triple in texts for text in triple]), dtype=np.float64)
    question, evidence, output = vectors.reshape(len(asks), 3, -1).swapaxes(0, 1)
    pairs = ((question, evidence), (output, evidence), (question, output))
    cosines = np.stack([(one * other).sum(axis=1) for one, other in pairs], axis=1)
    return np.concatenate([rows, cosines], axis=1)


def _texts(ask: Ask) -> tuple[str, str, str]:
    return render_question(ask.question), evidence_text(ask.passage) if ask.passage else "", ask.output


def _overlaps(ask: Ask) -> list[float]:
    question, evidence, output = _texts(ask)
    asked, shown, said = content_words(question), content_words(evidence), content_words(output)
    sentences = [content_words(evidence[start:end]) for start, end in sentence_spans(evidence)]
    figures = numbers(output)
    return [
        _share(said, shown),
        max((_share(said, each) for each in sentences), default=0.0),
        _share(asked, shown),
        max((_share(asked, each) for each in sentences), default=0.0),
        _share(said - asked, shown),
        _share(said, asked | content_words(ask.preceding)),
        len(figures & numbers(evidence)) / len(figures) if figures else 1.0,
        float(bool(figures)),
        *_supported(output, ask.passage),
        float(np.log1p(len(said))),
        float(np.log1p(len(shown))),
    ]


def _supported(output: str, passage: Passage | None) -> list[float]:
    """The rules' own judgement at several thresholds: it minds numbers, names and negations."""
    if passage is None or not output:
        return [0.0] * len(_FLOORS)
    return [float(find_support(output, [passage], min_overlap=floor) is not None) for floor in _FLOORS]


def _share(wanted: set[str], found: set[str]) -> float:
    return len(wanted & found) / len(wanted) if wanted else 0.0


class SampledCritic:
    """The teacher for the first questions, a critic trained on its labels for all others.

    Which questions are asked depends on the questions alone: ``sample`` are taken as they come (the caller
    puts them in an order by hash). Every call trains on all labels so far.

    Args:
        teacher: labels the sample.
        sample: ids of the questions that the teacher labels.
        embed: of the trained critic.
        counts: gets ``labels_by_teacher`` and ``labels_by_trained``.
    """

    def __init__(
        self, teacher: Critic, sample: set[str], embed: Embed | None, *, counts: Counter[str]
    ) -> None:
        self.name = teacher.name
        self.counts = counts
        self._teacher, self._sample, self._embed = teacher, sample, embed
        self._learned: list[tuple[Ask, str]] = []

    def judge(self, asks: Sequence[Ask]) -> list[Critique | None]:
        """See `pipeline.critic.Critic.judge`."""
        mine = [ask for ask in asks if ask.question.id in self._sample]
        given = iter(self._teacher.judge(mine))
        found = {id(ask): next(given) for ask in mine}
        self._learned += [(ask, label.label) for ask in mine if (label := found[id(ask)]) is not None]
        others = [ask for ask in asks if ask.question.id not in self._sample]
        if others:
            trained = train_critic(self._learned, self._embed, teacher=self._teacher.name)
            found |= {id(ask): label for ask, label in zip(others, trained.judge(others), strict=True)}
        self.counts["labels_by_teacher"] += len(mine)
        self.counts["labels_by_trained"] += len(others)
        return [found[id(ask)] for ask in asks]
