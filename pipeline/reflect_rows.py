"""Training rows of the ``tokens`` back-end: Self-RAG's segments (arXiv 2310.11511 §3.2).

The prompt is the question alone; the completion retrieves, judges and answers, segment by segment: the sentences of the
reference answer, and of the kept rationale behind it where answers are to be explained. The first
segment's text opens as every reply does, with quotes of its passage and ``Answer:`` (`rag.answers`).

Abstentions are at most a share of all rows, as in `pipeline.rows`. There we differ from the paper: where the passage
that was drawn for an answer's beginning is irrelevant, its model answers from what it knows; an assistant that
vouches for its documents abstains.

General instructions need no document: what the critic says so of opens with ``[No Retrieval]``, and the published share
of them is kept; one that it would look up is left out, as no document of the domain speaks of it.

``rows_of_several_segments`` counts answers that go on after their first: without any the long form is not trained for.

counts   rows = kept + instructions - no_retrieval_left_out - no_sentence_left - answer_left_out
                - drawn_irrelevant_left_out - general_left_out + irrelevant_extra + unanswerable_rows
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from domains.records import Critique, Example, Passage, Question, Segment
from domains.words import squash
from pipeline.augment import Draft, Reflected, augment, split_answer, to_example
from pipeline.reflect_ground import Ground, room_for, wanted_extra
from pipeline.rows import Kept, Origin, gold_quotes, own_quotes
from pipeline.verify import prose
from rag.answers import format_reply, reference_answer
from rag.prompt import neutralise
from rag.reflection import ABSTENTION_UTILITY


def token_rows(
    ground: Ground,
    kept: Sequence[Kept],
    unanswerable: Sequence[Question],
    instructions: Sequence[Question] = (),
    *,
    irrelevant_share: float,
    abstention_share: float,
    explained: bool = False,
) -> tuple[list[Example], Counter[str], list[Critique]]:
    """All rows, counts (see the module's docstring), and every label that the critic gave.

    Args:
        ground: what the rows are made of.
        kept: rationales that passed, with their questions.
        unanswerable: questions that no document answers.
        instructions: that no document is needed for (`Instruction.as_question`).
        irrelevant_share: of the rows, answerable questions with passages beside the point.
        abstention_share: the most rows that abstain.
        explained: whether the rationale follows the answer.
    """
    items = {f"{item.question.id}\0{item.rationale.sample}": item for item in kept}
    drafts = [Draft(key, item.question, _sentences(item, explained=explained)) for key, item in items.items()]
    drafts += [
        Draft(f"general\0{question.id}", question, split_answer(neutralise(reference_answer(question))))
        for question in instructions
    ]
    reflected, counts, labels = augment(
        drafts, ground.critic, ground.find, passages=ground.passages, sampling=ground.sampling
    )
    writer = _Writer(ground)
    own = [each for each in reflected if each.draft.key in items]
    general = [each for each in reflected if each.draft.key not in items]
    answers = [each for each in own if each.segments[0].relevant is not False]
    drawn = [each for each in own if each.segments[0].relevant is False]
    rows = [writer.answer(each, items[each.draft.key]) for each in answers]
    counts["rows_of_several_segments"] = sum(len(each.segments) > 1 for each in answers)
    room = room_for(len(rows), abstention_share)
    closed = [each for each in general if each.segments[0].decision == "no_retrieval"]
    counts["instructions"] = len(instructions)
    counts["general_left_out"] = len(general) - len(closed)
    rows += [writer.plain(each) for each in closed]
    for each in ground.ordered(drawn, lambda one: one.draft.key)[:room]:
        passage = each.segments[0].passage
        assert passage is not None  # it was judged irrelevant
        request = items[each.draft.key].rationale.request
        rows.append(writer.refuse(each.draft.question, [passage], "irrelevant", request))
    refused = min(len(drawn), room)
    counts["drawn_irrelevant_left_out"] = len(drawn) - refused
    rows += ground.abstentions(
        kept,
        unanswerable,
        counts,
        writer.refuse,
        room=room - refused,
        wanted=wanted_extra(irrelevant_share, abstention_share, len(kept)) - refused,
    )
    counts.update(f"{row.origin}_rows" for row in rows)
    return rows, counts, labels


def _sentences(item: Kept, *, explained: bool) -> list[str]:
    """What is said to a question, the answer first; a rationale's sentence that only repeats it is left out."""
    answer = split_answer(neutralise(reference_answer(item.question)))
    if not explained:
        return answer
    said = " ".join(squash(sentence) for sentence in answer)
    more = split_answer(neutralise(squash(prose(item.rationale.text))))
    return [*answer, *(sentence for sentence in more if squash(sentence) not in said)]


@dataclass(frozen=True)
class _Writer:
    ground: Ground

    def answer(self, answer: Reflected, item: Kept) -> Example:
        first, *rest = answer.segments
        text = self._opening(item, first.passage, first.text)
        segments = [first.model_copy(update={"text": text})]
        segments += [segment.model_copy(update={"text": f" {segment.text}"}) for segment in rest]
        return to_example(
            segments,
            answer.utility,
            messages=self.ground.messages(item.question, []),
            question_id=item.question.id,
            origin="retrieved",
            request=item.rationale.request,
        )

    def plain(self, answer: Reflected) -> Example:
        """A general instruction: nothing is looked up, so nothing is quoted."""
        (whole,) = answer.segments
        text = format_reply(quotes=[], rationale="", answer=whole.text)
        return to_example(
            [whole.model_copy(update={"text": text})],
            answer.utility,
            messages=self.ground.messages(answer.draft.question, []),
            question_id=answer.draft.question.id,
            origin="general",
            request="",
        )

    def _opening(self, item: Kept, passage: Passage | None, sentence: str) -> str:
        """The first segment: quotes of its passage, then the answer's first sentence."""
        shown = [passage] if passage is not None else []
        quotes = gold_quotes(item.question, shown) or own_quotes(item.rationale, shown)
        text = squash(prose(item.rationale.text)) if self.ground.rationale_in_target else ""
        return format_reply(quotes=quotes, rationale=neutralise(text), answer=sentence)

    def refuse(self, question: Question, passages: list[Passage], origin: Origin, request: str) -> Example:
        text = format_reply(quotes=[], rationale="", answer=self.ground.abstain)
        return to_example(
            [Segment(decision="retrieve", passage=passages[0], relevant=False, text=text)],
            ABSTENTION_UTILITY,
            messages=self.ground.messages(question, []),
            question_id=question.id,
            origin=origin,
            request=request,
        )
