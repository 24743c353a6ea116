"""PMC-LLaMA's option-wise rationales (arXiv 2304.14454): why the right option is right, and each other not.

The explanation of the right option becomes the rationale, after the gold check; those of the others stay in
``notes`` (curation refuses a rationale that names another option, so that students do not learn to).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from domains.records import Message, Passage
from domains.steps import ExplainOptionsStep, StepOptions
from domains.words import squash
from pipeline.strategies.context import Ask, Ctx, Said
from pipeline.strategies.outcome import ended, gold_checked, question_of, reference_text, rejected, unparsed
from pipeline.strategies.parse import Unparsed, fields
from pipeline.strategies.row import Row, child
from pipeline.strategies.strategy import Cost
from pipeline.strategies.templates import numbered
from rag.untrusted import fenced

MIN_WORDS = 3
PROMPTS = {
    "explain_options": """You explain the options of a question, using only the passages below.

Passages:
{passages}

Question:
{question}

Options:
{options}

Right answer: {answer}

Write one or two sentences about every option. About the right one: what in the passages makes it right, in the
words of the passages. About each other one: why it is not the answer. In one option's explanation do not
mention another option. Reply with one JSON object whose keys are the letters of all options, like
{"A": "why A is right or not", "B": "why B is right or not"}"""
}


def choose(rows: Sequence[Row], ctx: Ctx) -> list[Row]:  # noqa: ARG001
    """The questions with options."""
    return [row for row in rows if question_of(row).kind == "options"]


def explain_options(rows: Iterable[Row], ctx: Ctx) -> Iterator[Row]:
    """One row per question with options."""
    options = ctx.options_as(ExplainOptionsStep)
    for batch in ctx.rounds(rows):
        ctx.propose(len(batch))
        shown = [ctx.material.evidence(question_of(row)) for row in batch]
        asks = [
            Ask((Message(role="user", content=_prompt(row, passages, ctx)),), max_tokens=options.max_tokens)
            for row, passages in zip(batch, shown, strict=True)
        ]
        for row, passages, [said] in zip(batch, shown, ctx.ask(asks), strict=True):
            yield _read(row, said, [passage.passage_id for passage in passages], ctx)


def _prompt(row: Row, passages: list[Passage], ctx: Ctx) -> str:
    question = question_of(row)
    listed = "\n".join(f"{letter}. {text}" for letter, text in (question.options or {}).items())
    return ctx.templates["explain_options"].fill(
        passages=numbered(passages),
        question=fenced(question.question),
        options=fenced(listed),
        answer=squash(reference_text(row)),
    )


def _read(row: Row, said: Said, shown: list[str], ctx: Ctx) -> Row:
    question = question_of(row)
    made = ctx.made(said, prompt="explain_options")
    task = child(row, made=made, kind="task", passages=shown)
    if end := ended(task, said):
        return end
    letters = list(question.options or {})
    found = fields(said.text, letters, truncated=said.truncated)
    if isinstance(found, Unparsed):
        return unparsed(task, found)
    gold = question.answer or ""
    task = child(row, made=made, kind="task", passages=shown, notes=found, rationale=found[gold], output=gold)
    short = [letter for letter in letters if len(found[letter].split()) < MIN_WORDS]
    if short:
        return rejected(task, "no_explanation", f"{short[0]}: {found[short[0]]!r}")
    if len({squash(text).lower() for text in found.values()}) < len(found):
        return rejected(task, "same_explanation", "two options are explained by the same words")
    return gold_checked(task)


def estimate(n_rows: int, options: StepOptions, samples: int) -> Cost:  # noqa: ARG001
    """One request per question with options; all rows are counted, the others cost nothing."""
    assert isinstance(options, ExplainOptionsStep)
    return Cost(n_rows, 750 * n_rows, options.max_tokens * n_rows, n_rows)
