"""New seed questions from passages, each with the sentence that answers it.

Only passages of documents that no exam question is about. A question is kept if its quote stands literally in the
passage and carries the answer, if it clears the exam and equals no question there is, and if a second
request answers it from the passage in the same way (answerability).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from domains.records import Message, Passage, Question, Quote
from domains.steps import GenerateQuestionsStep, StepOptions
from domains.words import find_literal, numbers, squash
from pipeline.decontaminate import ExamGuard
from pipeline.near_duplicates import NearDuplicates, grams
from pipeline.negation import opposed
from pipeline.strategies.context import Ask, Ctx, Said
from pipeline.strategies.outcome import ended, failed, question_of, rejected, unparsed
from pipeline.strategies.parse import Unparsed, json_objects
from pipeline.strategies.refusal import refusal
from pipeline.strategies.row import Check, Made, Row, child
from pipeline.strategies.strategy import Cost
from pipeline.wording import content_stems, content_words, recall
from rag.answers import is_abstention, parse_reply
from rag.untrusted import fenced
from rag.words import words

PROMPTS = {
    "generate_questions": """Write {count} questions that the passage below answers, for people who do not have it before them.

Title: {title}
Passage:
{passage}

Each question asks for one thing, names what it is about, and never speaks of "the passage" or "the text". The
answer is short and complete. The quote is the sentence of the passage that decides the answer, copied word for
word. Reply with a JSON array:
[{"question": "...?", "answer": "...", "quote": "..."}]""",
    "answer_question": """Answer the question from the passage only.

Title: {title}
Passage:
{passage}

Question:
{question}

If the passage does not say it, write: Answer: I don't know. Otherwise write one line, Answer: and the answer in
as few words as possible.""",
}
MIN_SUPPORT = 0.5
# "Every month" and "every week" share half of their words.
MIN_AGREEMENT = 0.75
_WORDS = (4, 40)
_MOST_ANSWER_WORDS = 40
_QUOTE_CHARS = 8
_POINTS_AT_TEXT = re.compile(
    r"\b(?:the|this|that) (?:passage|text|paragraph|excerpt|section above|article|document above|author)\b"
    r"|\b(?:mentioned|described|given|listed) (?:above|below|here)\b",
    re.IGNORECASE,
)


def generate_questions(rows: Iterable[Row], ctx: Ctx) -> Iterator[Row]:
    """One row per question that the teacher wrote; one per reply that could not be read."""
    options = ctx.options_as(GenerateQuestionsStep)
    known = _Known(ctx.material.questions, options)
    for batch in ctx.rounds(rows):
        asks = [_ask(row, ctx, options) for row in batch]
        proposals = [
            proposal
            for row, [said] in zip(batch, ctx.ask(asks), strict=True)
            for proposal in _read(row, said, ctx, options.per_passage)
        ]
        ctx.propose(len(proposals))
        # One by one in a fixed order: what is admitted does not depend on which reply came first.
        sifted = [known.sift(row) for row in proposals]
        yield from _answered(sifted, ctx)


def choose(rows: Sequence[Row], ctx: Ctx) -> list[Row]:
    """Passages of documents that the exam leaves alone, as many as the step says, by a hash (0: all)."""
    material, count = ctx.material, ctx.options_as(GenerateQuestionsStep).passages
    exam = [question for question in material.questions if question.split == "exam"]
    held_out = {question.about for question in exam} | {gold.doc_id for each in exam for gold in each.gold}
    free = [row for row in rows if row.group not in held_out]
    if not 0 < count < len(free):
        return free
    order = sorted(free, key=lambda row: hashlib.sha256(f"{material.seed}:{row.id}".encode()).digest())
    taken = {row.id for row in order[:count]}
    return [row for row in free if row.id in taken]


def _passage(row: Row, ctx: Ctx) -> Passage:
    return ctx.material.passages[row.passages[0]]


def _ask(row: Row, ctx: Ctx, options: GenerateQuestionsStep) -> Ask:
    passage = _passage(row, ctx)
    content = ctx.templates["generate_questions"].fill(
        count=str(options.per_passage), title=squash(passage.title), passage=fenced(passage.text)
    )
    return Ask((Message(role="user", content=content),), max_tokens=options.max_tokens)


def _read(row: Row, said: Said, ctx: Ctx, most: int) -> list[Row]:
    made = ctx.made(said, prompt="generate_questions")
    if end := ended(child(row, made=made, kind="seed"), said):
        return [end]
    items = json_objects(said.text, truncated=said.truncated)
    if isinstance(items, Unparsed):
        return [unparsed(child(row, made=made, kind="seed"), items)]
    return [
        _proposal(row, item, ctx.made(said, op=str(number), prompt="generate_questions"), ctx)
        for number, item in enumerate(items[:most])
    ]


def _proposal(row: Row, item: dict[str, object], made: Made, ctx: Ctx) -> Row:
    parts = {name: item.get(name) for name in ("question", "answer", "quote")}
    missing = [name for name, part in parts.items() if not isinstance(part, str) or not part.strip()]
    if missing:
        return unparsed(child(row, made=made, kind="seed"), Unparsed("missing_field", ", ".join(missing)))
    question, answer, quote = (squash(str(part)) for part in parts.values())
    passage = _passage(row, ctx)
    literal = find_literal(quote, passage.text)
    digest = hashlib.sha256(f"{passage.doc_id}\0{question}".encode("utf-8", "surrogatepass")).hexdigest()
    record = Question(
        id=f"generated-{digest[:16]}",
        kind="open",
        question=question,
        answer=answer,
        about=passage.doc_id,
        gold=[Quote(doc_id=passage.doc_id, quote=literal or quote)],
        split="seed",
    )
    made_row = child(row, made=made, kind="seed", question=record)
    if literal is None or len(literal) < _QUOTE_CHARS:
        return rejected(made_row, "quote", f"{quote[:80]!r} does not stand in the passage")
    return _lint(made_row, question, answer, literal)


def _lint(row: Row, question: str, answer: str, quote: str) -> Row:
    low, high = _WORDS
    if not low <= len(question.split()) <= high or not question.endswith("?"):
        return rejected(row, "form", f"{low} to {high} words and a question mark are expected")
    if match := _POINTS_AT_TEXT.search(question):
        return rejected(row, "points_at_text", match[0])
    if len(answer.split()) > _MOST_ANSWER_WORDS:
        return rejected(row, "long_answer", f"{len(answer.split())} words")
    if numbers(answer) - numbers(quote) or recall(answer, quote) < MIN_SUPPORT:
        return rejected(row, "quote_does_not_answer", f"{recall(answer, quote):.0%} of the answer's words")
    if recall(answer, question) == 1:
        return rejected(row, "answer_in_question", answer)
    return row


class _Known:
    """All questions so far, and the exam: what a new question must differ from."""

    def __init__(self, questions: Sequence[Question], options: GenerateQuestionsStep) -> None:
        self._guard = ExamGuard(
            [question for question in questions if question.split == "exam"],
            ngram=options.decontaminate_ngram,
            near_duplicate=options.near_duplicate,
        )
        sets = [grams(question.question) for question in questions]
        self._near = NearDuplicates(sets, threshold=options.near_duplicate)
        self._ids = [question.id for question in questions]
        for item in sets:
            self._near.add(item)

    def sift(self, row: Row) -> Row:
        """The row as it is, and known from now on; or rejected."""
        if row.status != "kept":
            return row
        question = question_of(row)
        verdict = self._guard.check(question.question, f"{question.answer} {question.gold[0].quote}")
        if not verdict.ok:
            return rejected(row, verdict.reason, verdict.detail, check="exam")
        item = grams(question.question)
        twin = self._near.find(item)
        if twin is not None:
            return rejected(row, "near_duplicate", f"of {self._ids[twin]}")
        self._near.add(item)
        self._ids.append(question.id)
        return row


def _answered(rows: Sequence[Row], ctx: Ctx) -> Iterator[Row]:
    """The rows, those not yet rejected after the second request."""
    asks = []
    for row in rows:
        if row.status == "kept":
            passage = _passage(row, ctx)
            content = ctx.templates["answer_question"].fill(
                title=squash(passage.title),
                passage=fenced(passage.text),
                question=fenced(question_of(row).question),
            )
            asks.append(Ask((Message(role="user", content=content),), role="judge"))
    replies = iter(ctx.ask(asks))
    for row in rows:
        if row.status != "kept":
            yield row
            continue
        [said] = next(replies)
        calls = [*row.made.calls, said.call]
        yield _agreed(row.model_copy(update={"made": row.made.model_copy(update={"calls": calls})}), said)


def _agreed(row: Row, said: Said) -> Row:
    if said.error:
        return failed(row, said)
    if refused := refusal(said.text):
        return rejected(row, "refusal", refused)
    reply = parse_reply(said.text)
    if said.truncated or not reply.has_answer_line or not reply.answer:
        return unparsed(row, Unparsed("truncated" if said.truncated else "no_answer_line", said.text[-80:]))
    expected, given = question_of(row).answer or "", squash(reply.answer)
    if is_abstention(given, abstain="I don't know"):
        return rejected(row, "not_answerable", given[:80])
    if not agree(expected, given):
        return rejected(row, "other_answer", f"{given[:80]!r}, expected {expected[:80]!r}")
    return row.model_copy(update={"checks": [*row.checks, Check(name="answerable", ok=True, detail=given)]})


def agree(expected: str, given: str) -> bool:
    """Whether two short answers say the same: numbers, negation, and most words of the shorter one.

    All expected numbers must be given. Further ones may stand beside them, but not before an expected word that
    was expected without: "every 3 months" is not "every month".
    """
    newly_counted = (_counted(given) - _counted(expected)) & content_words(expected)
    if newly_counted or not numbers(expected) <= numbers(given) or opposed(expected, given):
        return False
    return max(recall(expected, given), recall(given, expected)) >= MIN_AGREEMENT


def _counted(text: str) -> set[str]:
    """The content words that stand right behind a number, and are none."""
    said = words(text)
    stems = content_stems(said)
    behind = {stem for word, stem in zip(said, stems[1:], strict=False) if stem and numbers(word)}
    return {stem for stem in behind if not numbers(stem)}


def estimate(n_rows: int, options: StepOptions, samples: int) -> Cost:  # noqa: ARG001
    """One request per passage, and one per question that passes all other checks."""
    assert isinstance(options, GenerateQuestionsStep)
    passages = min(n_rows, options.passages or n_rows)
    questions = passages * options.per_passage
    return Cost(
        passages + questions,
        400 * passages + 300 * questions,
        options.max_tokens * passages + 60 * questions,
        questions,
    )
