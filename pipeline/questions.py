"""The questions that a run works with: the domain's, and those that its teacher wrote."""

from __future__ import annotations

from domains.domain import Domain
from domains.errors import DataError
from domains.jsonl import read_jsonl
from domains.records import Question
from pipeline.run_folder import Run


def read_all_questions(domain: Domain, run: Run) -> list[Question]:
    """The domain's seed and exam questions, then the generated ones, which are seed questions only.

    Raises:
        ConfigError: the domain has no questions.
        DataError: a file is wrong, or a generated question is an exam question or has the id of another.
    """
    questions = domain.read_questions()
    generated = read_jsonl(run.generated, Question) if run.generated.exists() else []
    known = {question.id for question in questions}
    for question in generated:
        if question.split != "seed" or question.id in known:
            raise DataError(
                f"{run.generated}: question {question.id!r} "
                + ("is no seed question" if question.split != "seed" else "has the id of another"),
                expected="seed questions with ids of their own",
                next_step="preceptor elicit DOMAIN --force",
            )
        known.add(question.id)
    return [*questions, *generated]
