"""Answers worth showing: the first one of a run, and a cited one from its exam."""

from __future__ import annotations

from contextlib import suppress

from domains.domain import Domain
from domains.errors import ContextOverflow
from domains.records import Answer
from pipeline.run_folder import Run
from serve.models import SMOLLM2

ASKED = 4


def first_answer(domain: Domain, run: Run) -> Answer | None:
    """The untrained student's answer to one of the first open seed questions; a cited one if there is any.

    None where the domain has no such question, or a base of which there is no GGUF file yet.
    """
    from serve.bundle import open_base

    if domain.questions is None or domain.config.student.base != SMOLLM2:
        return None
    questions = [item for item in domain.read_questions() if item.kind == "open" and item.split == "seed"]
    if not questions:
        return None
    asked = []
    with open_base(domain, run.index, parallel=ASKED) as bundle:
        for item in questions[:ASKED]:
            with suppress(ContextOverflow):  # the exam and training report those that are too long
                asked.append(bundle.assistant.prepare(item.question))
        answers = bundle.assistant.ask_many(asked)
    if not answers:
        return None
    return next((answer for answer in answers if answer.citations), answers[0])


def cited_sample(run: Run, domain: Domain) -> tuple[Answer | None, str]:
    """The exported student's first answer to an open exam question that rests on a checked quote, and the reference.

    Right or wrong: it is a sample, not the best one. (None, "") where there is no such answer.
    """
    from domains.jsonl import read_jsonl
    from pipeline.arms import Row

    path = run.exam / "exported_rag.jsonl"
    rows = read_jsonl(path, Row) if path.exists() else []
    references = {item.id: item.answer or "" for item in domain.read_questions() if item.kind == "open"}
    for row in rows:
        if row.answer is not None and row.answer.support == "supported" and row.question_id in references:
            return row.answer, references[row.question_id]
    return None, ""
