"""What becomes of a proposal: the same few endings in every strategy, each with its reason."""

from __future__ import annotations

from domains.records import Question, Rationale
from pipeline.strategies.context import Said
from pipeline.strategies.parse import Unparsed
from pipeline.strategies.refusal import refusal
from pipeline.strategies.row import Check, Row
from pipeline.verify import verify
from rag.answers import reference_answer


def question_of(row: Row) -> Question:
    """The row's question; strategies that need one take no rows without."""
    assert row.question is not None
    return row.question


def failed(row: Row, said: Said) -> Row:
    """The row of a request that brought no reply."""
    return row.model_copy(update={"status": "error", "reason": said.error})


def unparsed(row: Row, why: Unparsed) -> Row:
    """The row of a reply that can't be read."""
    checks = [*row.checks, Check(name="parse", ok=False, detail=why.detail)]
    return row.model_copy(update={"status": "unparsed", "reason": why.reason, "checks": checks})


def rejected(row: Row, reason: str, detail: str = "", *, check: str = "") -> Row:
    """The row of a reply that was read and is not good enough."""
    checks = [*row.checks, Check(name=check or reason, ok=False, detail=detail)]
    return row.model_copy(update={"status": "rejected", "reason": reason, "checks": checks})


def ended(row: Row, said: Said) -> Row | None:
    """The row where the reply is none, or declines; None where it can be read."""
    if said.error:
        return failed(row, said)
    words = refusal(said.text)
    return rejected(row, "refusal", words) if words else None


def gold_checked(row: Row) -> Row:
    """The row after the check that its rationale carries the right answer (`pipeline.verify`)."""
    verdict = verify(question_of(row), rationale_of(row))
    if not verdict.ok:
        return rejected(row, verdict.reason, verdict.detail, check="gold")
    return row.model_copy(update={"checks": [*row.checks, Check(name="gold", ok=True)]})


def rationale_of(row: Row) -> Rationale:
    """A task as the record that curation reads."""
    return Rationale(
        question_id=question_of(row).id,
        sample=row.made.sample,
        text=row.rationale,
        answer=row.output,
        passages=row.passages,
        teacher=row.made.teacher,
        request=row.made.call,
    )


def answer_text(row: Row) -> str:
    """A task's explanation and answer as one text, as a critic or a judge sees it."""
    return f"{row.rationale}\nAnswer: {row.output}".strip()


def reference_text(row: Row) -> str:
    """The right answer in words."""
    return reference_answer(question_of(row))
