"""Training rows of the ``text`` back-end: SAIL's verdicts in plain words (arXiv 2305.15225 §3).

The prompt shows 0 to 3 passages, drawn at random from those that were found; the completion first says which of
them are informative, then gives the usual reply.

Abstentions are at most a share of all rows, as in `pipeline.rows`. There we differ from the paper: without an
informative passage its model answers from what it knows; an assistant that vouches for its documents abstains. Such
draws may use half of the room for abstentions; beyond that the draw is repaired with an informative passage.

counts   rows = kept - uninformative_left_out + irrelevant_extra + unanswerable_rows
         kept = shown_0 + shown_1 + shown_2 + shown_3 (as drawn; ``draws_repaired`` of them were changed)
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from domains.records import Critique, Example, Passage, Question
from domains.routes import MOST_VERDICTS
from pipeline.critic import Ask
from pipeline.reflect_ground import Ground, room_for, wanted_extra
from pipeline.rows import Kept, Origin, gold_quotes, row_id, target
from rag.answers import format_reply, reference_answer
from rag.verdicts import format_verdict

# How many passages a row shows: below 0.2 none, below 0.3 one, below 0.6 two, else three.
_COUNTS = ((0.2, 0), (0.3, 1), (0.6, 2), (1.0, MOST_VERDICTS))


@dataclass(frozen=True)
class _Pool:
    """The passages that a row may show, and which of them are informative, by id."""

    item: Kept
    passages: list[Passage]
    informative: dict[str, bool]

    def says(self, shown: Sequence[Passage]) -> list[bool]:
        return [self.informative[passage.passage_id] for passage in shown]


def verdict_rows(
    ground: Ground,
    kept: Sequence[Kept],
    unanswerable: Sequence[Question],
    *,
    irrelevant_share: float,
    abstention_share: float,
) -> tuple[list[Example], Counter[str], list[Critique]]:
    """All rows, counts (see the module's docstring), and every label that the critic gave."""
    counts: Counter[str] = Counter()
    labels: list[Critique] = []
    writer = _Writer(ground)
    rows: list[Example] = []
    room, missed = room_for(len(kept), abstention_share), 0
    for pool in _judge(ground, kept, counts, labels):
        item = pool.item
        shown = _draw(ground, pool)
        counts[f"shown_{len(shown)}"] += 1
        if not writer.answers(pool, shown):
            if missed < room // 2 and not any(pool.says(shown)):
                missed += 1
                rows.append(writer.refuse(item.question, shown, "irrelevant", item.rationale.request))
                continue
            shown = writer.repaired(pool, shown)
            counts["draws_repaired"] += bool(shown)
        if shown:
            rows.append(writer.answer(pool, shown))
        else:
            counts["uninformative_left_out"] += 1
    counts["drawn_without_evidence"] = missed
    rows += ground.abstentions(
        kept,
        unanswerable,
        counts,
        writer.refuse,
        room=max(room_for(len(rows) - missed, abstention_share) - missed, 0),
        wanted=wanted_extra(irrelevant_share, abstention_share, len(kept)) - missed,
    )
    counts.update(f"{row.origin}_rows" for row in rows)
    return rows, counts, labels


def draw_passages(pool: Sequence[Passage], draw: random.Random) -> list[Passage]:
    """SAIL's draw: none with probability 0.2, one 0.1, two 0.3, three 0.4; in random order."""
    u = draw.random()
    count = next(count for bound, count in _COUNTS if u < bound)
    return draw.sample(list(pool), min(count, len(pool)))


def _draw(ground: Ground, pool: _Pool) -> list[Passage]:
    key = f"{ground.sampling.seed}:{pool.item.question.id}:{pool.item.rationale.sample}"
    return draw_passages(pool.passages, random.Random(key))  # noqa: S311  # not for secrets


def _judge(
    ground: Ground, kept: Sequence[Kept], counts: Counter[str], labels: list[Critique]
) -> Iterator[_Pool]:
    """Each rationale with the question's own retrieval and what the teacher saw, as far as it could be judged."""
    found = []
    for item in kept:
        shown = [*ground.find(item.question.question, ground.passages), *item.passages]
        found.append(list({passage.passage_id: passage for passage in shown}.values()))
    asks = [
        Ask("isrel", item.question, passage, output=reference_answer(item.question))
        for item, passages in zip(kept, found, strict=True)
        for passage in passages
    ]
    said = iter(ground.critic.judge(asks))
    for item, passages in zip(kept, found, strict=True):
        informative: dict[str, bool] = {}
        for passage in passages:
            if (label := next(said)) is None:
                counts["without_label.isrel"] += 1
                continue
            labels.append(label)
            quoted = bool(gold_quotes(item.question, [passage]))
            informative[passage.passage_id] = quoted or label.label == "relevant"
        judged = [passage for passage in passages if passage.passage_id in informative]
        yield _Pool(item, judged, informative)


@dataclass(frozen=True)
class _Writer:
    ground: Ground

    def answers(self, pool: _Pool, shown: Sequence[Passage]) -> bool:
        """Whether these passages carry the reply: an informative one, and a quote where one is needed."""
        return any(pool.says(shown)) and self._reply(pool.item, shown) is not None

    def repaired(self, pool: _Pool, shown: Sequence[Passage]) -> list[Passage]:
        """The draw with its last passage replaced by one that answers; empty where none does alone."""
        for passage in pool.passages:
            if self.answers(pool, [passage]):
                return [*(each for each in shown[:-1] if each != passage), passage]
        return []

    def answer(self, pool: _Pool, shown: list[Passage]) -> Example:
        reply = self._reply(pool.item, shown)
        assert reply is not None  # checked when the passages were drawn or repaired
        completion = f"{format_verdict(pool.says(shown))}\n{reply}"
        return self._row(pool.item.question, shown, completion, "retrieved", pool.item.rationale.request)

    def refuse(self, question: Question, passages: list[Passage], origin: Origin, request: str) -> Example:
        reply = format_reply(quotes=[], rationale="", answer=self.ground.abstain)
        completion = f"{format_verdict([False] * len(passages))}\n{reply}"
        return self._row(question, passages, completion, origin, request)

    def _reply(self, item: Kept, shown: Sequence[Passage]) -> str | None:
        in_target = self.ground.rationale_in_target
        return target(item.question, item.rationale, shown, rationale_in_target=in_target)

    def _row(
        self, question: Question, passages: list[Passage], completion: str, origin: Origin, request: str
    ) -> Example:
        messages = self.ground.messages(question, passages)
        return Example(
            id=row_id(messages, completion),
            question_id=question.id,
            messages=messages,
            completion=completion,
            passages=[passage.passage_id for passage in passages],
            origin=origin,
            request=request,
        )
