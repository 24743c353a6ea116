"""Training rows: which passages a row shows, and what the student shall write about them.

    gold          the teacher's passages → quotes and the answer
    rationale     what BM25 finds with the rationale (KARD, arXiv 2305.18395 §3.2) → quotes and the answer
    retrieved     the question's own retrieval, as in serving → quotes and the answer
    irrelevant    passages that do not answer (retrieval missed, or chosen so) → the abstention
    unanswerable  a question that no document answers, with its own retrieval → the abstention

Showing what retrieval really finds closes the gap between training and serving; rows that do not
answer teach the student to say so (RAFT, arXiv 2403.10131; SAIL, arXiv 2305.15225).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Literal, TypeVar

from domains.records import Example, Message, Passage, Question, Rationale, Verification
from domains.words import find_literal, numbers, squash
from pipeline.verify import as_shown, prose
from pipeline.wording import recall
from rag.answers import format_reply, parse_reply, reference_answer
from rag.citations import check_quotes
from rag.prompt import neutralise, render_question, student_messages

_ANSWERED_RECALL = 0.5
_QUOTE_CHARS = (8, 600)

Origin = Literal["gold", "rationale", "retrieved", "irrelevant", "unanswerable", "general"]
Retrieve = Callable[[str, int], list[Passage]]
NumberedQuote = tuple[str, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A rationale that passed every check, with its question and the passages that the teacher saw.

    ``verifier`` is what it was passed by; None where it was not judged.
    """

    question: Question
    rationale: Rationale
    passages: list[Passage]
    verifier: Verification | None = None


def gold_quotes(question: Question, passages: Sequence[Passage]) -> list[NumberedQuote]:
    """The question's gold quotes that stand in these passages, with the passages' numbers from 1."""
    found = []
    for gold in question.gold:
        places = [
            (passage.doc_id != gold.doc_id, number, literal)
            for number, passage in enumerate(passages, 1)
            if (literal := find_literal(gold.quote, passage.text)) is not None
        ]
        if places:
            _, number, literal = min(places)
            if spoken := speakable(literal):
                found.append((spoken, number))
    return list(dict.fromkeys(found))


def own_quotes(rationale: Rationale, passages: Sequence[Passage]) -> list[NumberedQuote]:
    """The rationale's quotes that stand in the passages, as they stand there, with the right numbers."""
    citations, _ = check_quotes(parse_reply(rationale.text).quotes, as_shown(passages))
    found = [(speakable(citation.quote), citation.number) for citation in citations]
    return list(dict.fromkeys((quote, number) for quote, number in found if quote))


def speakable(quote: str) -> str:
    """``quote`` as it can stand between quotation marks on one line; empty where nothing is left.

    White space becomes single blanks, control tokens are taken apart as in the prompt, and of a quote
    that has quotation marks inside, the longest piece between them is taken.
    """
    plain = squash(neutralise(quote)).translate({ord("“"): '"', ord("”"): '"'})
    piece = max(plain.split('"'), key=len).strip()
    low, high = _QUOTE_CHARS
    if len(piece) > high:
        piece = piece[:high].rpartition(" ")[0]
    return piece if len(piece) >= low else ""


def target(
    question: Question, rationale: Rationale, passages: Sequence[Passage], *, rationale_in_target: bool
) -> str | None:
    """The completion for passages that answer, or None where no quote can be given.

    Quotes are the gold ones, else the rationale's own. Only an open question needs one: its answer would
    stand unsupported otherwise.
    """
    quotes = gold_quotes(question, passages) or own_quotes(rationale, passages)
    if not quotes and (question.gold or question.kind == "open"):
        return None
    text = squash(prose(rationale.text)) if rationale_in_target else ""
    return format_reply(
        quotes=quotes, rationale=neutralise(text), answer=neutralise(reference_answer(question))
    )


def rationale_query(question: Question, rationale: Rationale) -> str:
    """What KARD searches training passages with, and scores the reranker's pools by (arXiv 2305.18395 §3.2).

    The rationale's own words and the gold answer, as in the release's ``reasoning`` field; never at answering time. The
    quotes are left out: they would find the passage that they were taken from, whatever the rationale says.
    """
    return f"{squash(prose(rationale.text))}\nAnswer: {reference_answer(question)}"


def may_answer(question: Question, passages: Sequence[Passage]) -> bool:
    """Whether passages without the gold quote could still answer: then the row's label would be a guess."""
    if question.kind == "yes_no":
        homes = {question.about, *(gold.doc_id for gold in question.gold)}
        return any(passage.doc_id in homes for passage in passages)
    wanted = question.options[question.answer or ""] if question.options else question.answer or ""
    return any(
        numbers(wanted) <= numbers(passage.text) and recall(wanted, passage.text) >= _ANSWERED_RECALL
        for passage in passages
    )


def distractors(question: Question, retrieve: Retrieve, *, top_k: int) -> list[Passage]:
    """The nearest passages of other documents that do not answer, at most ``top_k``."""
    homes = {question.about, *(gold.doc_id for gold in question.gold)}
    others = [
        passage
        for passage in retrieve(question.question, 8 * top_k)
        if passage.doc_id not in homes
        and not gold_quotes(question, [passage])
        and not may_answer(question, [passage])
    ]
    return others[:top_k]


@dataclass(frozen=True)
class RowBuilder:
    """Makes rows of one domain.

    Attributes:
        system: the student's system prompt.
        abstain: the domain's abstention.
        retrieve: (query, top_k) → passages, best first.
        by_rationale: finds passages with a rationale for those rows that do not take them from the question's
            own retrieval; None shows the teacher's passages.
        top_k: passages of a row that are taken from retrieval.
        rationale_in_target: whether the student learns to write the rationale too.
        seed: orders what is chosen.
    """

    system: str
    abstain: str
    retrieve: Retrieve
    top_k: int
    rationale_in_target: bool
    seed: int
    by_rationale: Retrieve | None = None

    def build(
        self,
        kept: Sequence[Kept],
        unanswerable: Sequence[Question],
        *,
        retrieved_share: float,
        irrelevant_share: float,
        abstention_share: float,
    ) -> tuple[list[Example], Counter[str]]:
        """All rows, and counts of what became what.

        ``retrieved_share`` is of the rows that come from rationales, ``irrelevant_share`` of all rows.
        Every rationale gives exactly one row; further ``irrelevant`` rows show the same questions with
        other documents' passages, so that rows = rationales + ``irrelevant_extra`` + ``unanswerable_rows``.
        Abstentions are at most ``abstention_share`` of all rows; what is left out is counted.
        """
        counts: Counter[str] = Counter()
        rows, missed = self._from_rationales(
            kept, retrieved_share, counts, allowed=int(abstention_share * len(kept))
        )
        answers = len(kept) - missed
        room = int(answers * abstention_share / (1 - abstention_share) + 1e-9) - missed
        share = min(irrelevant_share, abstention_share)
        wanted = max(round(share / (1 - share) * len(kept)) - missed, 0)
        extra = min(wanted, max(room // 2, room - len(unanswerable)))
        more = self._irrelevant(kept, extra, set(map(_shown, rows)))
        counts["irrelevant_left_out"] = wanted - len(more)
        chosen = self._ordered(unanswerable, lambda question: question.id)[: room - len(more)]
        counts["unanswerable_left_out"] = len(unanswerable) - len(chosen)
        rows += more
        rows += [
            self._abstention(question, self._retrieved(question), "unanswerable", request="")
            for question in chosen
        ]
        counts["irrelevant_extra"] = len(more)
        counts.update(f"{row.origin}_rows" for row in rows)
        return rows, counts

    def _from_rationales(
        self, kept: Sequence[Kept], share: float, counts: Counter[str], *, allowed: int
    ) -> tuple[list[Example], int]:
        """One row per rationale; also how many of them are abstentions because retrieval missed."""
        ordered = self._ordered(kept, lambda item: f"{item.question.id}\0{item.rationale.sample}")
        made: dict[int, Example] = {}
        rows: set[str] = set()
        missed = 0
        for item in ordered[: round(share * len(kept))]:
            passages = self._retrieved(item.question)
            if _answers(item, passages) or (_quoteless(item) and may_answer(item.question, passages)):
                row = self._answer(item, passages, "retrieved")
                if row.id in rows:  # another rationale of the question gave the same one
                    counts["retrieved_repeated"] += 1
                    continue
                rows.add(row.id)
                made[id(item)] = row
            elif not item.question.gold or may_answer(item.question, passages):
                counts["retrieved_unclear"] += 1
            elif missed >= allowed:
                counts["retrieved_missed_left_out"] += 1
            else:
                row = self._abstention(item.question, passages, "irrelevant", request=item.rationale.request)
                if row.id in rows:
                    counts["retrieved_repeated"] += 1
                    continue
                rows.add(row.id)
                missed += 1
                made[id(item)] = row
        counts["retrieved_missed"] = missed
        refused = {_shown(row) for row in made.values() if row.origin == "irrelevant"}
        return [made.get(id(item)) or self._taught(item, counts, refused) for item in kept], missed

    def _taught(
        self, item: Kept, counts: Counter[str], refused: Set[tuple[str, ...]] = frozenset()
    ) -> Example:
        """A row that answers: KARD's passages where they carry a quote or nothing can, else those that the teacher saw.

        ``refused`` are questions with the passages of a row that abstains: one prompt has one completion.
        """
        if self.by_rationale is not None:
            passages = self.by_rationale(rationale_query(item.question, item.rationale), self.top_k)
            quotes = gold_quotes(item.question, passages) or own_quotes(item.rationale, passages)
            if (quotes or _quoteless(item)) and _prompt(item.question, passages) not in refused:
                return self._answer(item, passages, "rationale")
            counts["rationale_missed"] += 1
        return self._answer(item, item.passages, "gold")

    def row_of(self, item: Kept) -> str:
        """The id of the row that a rationale makes where it is not drawn to show the question's own retrieval."""
        return self._taught(item, Counter()).id

    def _irrelevant(self, kept: Sequence[Kept], wanted: int, answered: Set[tuple[str, ...]]) -> list[Example]:
        """Up to ``wanted`` rows of answerable questions with the nearest passages that do not answer.

        ``answered`` are questions with the passages of a row that is there already: one prompt has one completion.
        """
        rows: list[Example] = []
        seen: set[str] = set()
        for item in self._ordered(kept, lambda item: f"irrelevant\0{item.question.id}"):
            if len(rows) >= wanted:
                break
            question = item.question
            if question.id in seen:
                continue
            seen.add(question.id)
            others = distractors(question, self.retrieve, top_k=self.top_k)
            if others and _prompt(question, others) not in answered:
                request = item.rationale.request
                rows.append(self._abstention(question, others, "irrelevant", request=request))
        return rows

    def _retrieved(self, question: Question) -> list[Passage]:
        return self.retrieve(question.question, self.top_k)

    def _answer(self, item: Kept, passages: list[Passage], origin: Origin) -> Example:
        completion = target(
            item.question, item.rationale, passages, rationale_in_target=self.rationale_in_target
        )
        # Checked before the rationale was kept, or a quote was found, or none is needed.
        assert completion is not None
        return self._row(item.question, passages, completion, origin, item.rationale.request)

    def _abstention(
        self, question: Question, passages: list[Passage], origin: Origin, *, request: str
    ) -> Example:
        completion = format_reply(quotes=[], rationale="", answer=self.abstain)
        return self._row(question, passages, completion, origin, request)

    def _row(
        self, question: Question, passages: list[Passage], completion: str, origin: Origin, request: str
    ) -> Example:
        messages = student_messages(self.system, render_question(question), passages)
        return Example(
            id=row_id(messages, completion),
            question_id=question.id,
            messages=messages,
            completion=completion,
            passages=[passage.passage_id for passage in passages],
            origin=origin,
            request=request,
        )

    def _ordered(self, items: Sequence[T], key: Callable[[T], str]) -> list[T]:
        return sorted(items, key=lambda item: hashlib.sha256(f"{self.seed}\0{key(item)}".encode()).digest())


def _answers(item: Kept, passages: Sequence[Passage]) -> bool:
    """Whether passages answer for certain: with a gold quote or, where the question has none, the rationale's own."""
    if item.question.gold:
        return bool(gold_quotes(item.question, passages))
    return bool(own_quotes(item.rationale, passages))


def _prompt(question: Question, passages: Sequence[Passage]) -> tuple[str, ...]:
    return (question.id, *(passage.passage_id for passage in passages))


def _shown(row: Example) -> tuple[str, ...]:
    return (row.question_id, *row.passages)


def _quoteless(item: Kept) -> bool:
    """Whether the row can have no quote, whatever its passages: then they are taken as they come, as KARD takes them."""
    question = item.question
    return not question.gold and question.kind != "open" and not own_quotes(item.rationale, item.passages)


def row_id(messages: Sequence[Message], completion: str) -> str:
    """A row's id from its content: the same row has the same id in every run."""
    content = json.dumps([[message.role, message.content] for message in messages] + [completion])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
