"""Orca's explanation tuning (arXiv 2306.02707): labelling under varied system messages.

As in the paper's Algorithm 1, a kind of question is drawn evenly among those left, then one of its questions;
each gets one message among those allowed for its kind. Unlike there, the teacher sees passages and the right
answer, and what does not carry that answer is rejected. The message stays in ``system`` and in ``made.op``.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from domains.records import Question
from domains.steps import OrcaStep, StepOptions
from pipeline.strategies.context import Ask, Ctx, Said
from pipeline.strategies.outcome import ended, gold_checked, question_of, unparsed
from pipeline.strategies.parse import Unparsed
from pipeline.strategies.row import Row, child
from pipeline.strategies.strategy import Cost
from pipeline.teacher_prompt import read_reply, teacher_messages
from rag.answers import parse_reply

PREFIX = "orca_"
# Intents of the paper's messages 1, 7/11, 4, 5 and 8/10, in our own words. "none" asks as `label` does.
MESSAGES: Mapping[str, str] = {
    "none": "",
    "steps": "Explain this one step by step: say what the question asks for, which passage speaks of it, and how "
    "that passage leads to the answer. Name the passage of each step by its number.",
    "plain": "Explain this one to somebody without any training in the subject: short words, no jargon, and each "
    "special term of the passages said in plain language.",
    "brief": "Be as brief as you can: one short sentence, nothing that the question did not ask for.",
    "options_first": "Begin with the words of the right option and what in the passages makes it right. Then say what "
    "somebody overlooks who takes another option, without naming the others.",
}
CLOSING = "Explain why the right answer is right, in the way described. Then write the last line, Answer: and the right answer."


def prompts(options: StepOptions) -> dict[str, str | None]:
    """Built-in text of the messages that a step names; None for those that only the domain can bring."""
    assert isinstance(options, OrcaStep)
    return {f"{PREFIX}{name}": MESSAGES.get(name) for name in options.messages}


def orca(rows: Iterable[Row], ctx: Ctx) -> Iterator[Row]:
    """One explained answer per drawn question: a row with its system message."""
    options = ctx.options_as(OrcaStep)
    for batch in ctx.rounds(rows):
        ctx.propose(len(batch))
        named = [(row, _draw(row, options.messages, ctx)) for row in batch]
        shown = [ctx.material.evidence(question_of(row)) for row in batch]
        heard = ctx.ask(
            [
                Ask(
                    teacher_messages(
                        f"{ctx.material.instruction}\n\n{text}" if text else ctx.material.instruction,
                        question_of(row),
                        passages,
                        closing=CLOSING if text else "",
                    ),
                    max_tokens=options.max_tokens if text else None,
                )
                for (row, (_, text)), passages in zip(named, shown, strict=True)
            ]
        )
        for (row, (name, text)), passages, [said] in zip(named, shown, heard, strict=True):
            ids = [passage.passage_id for passage in passages]
            yield _read(row, said, name, text, ids, ctx)


def choose(rows: Sequence[Row], ctx: Ctx) -> list[Row]:
    """The questions that are drawn."""
    count = ctx.options_as(OrcaStep).questions
    return sample_evenly(rows, count=count, rng=ctx.rng("questions"))


def allowed(question: Question, messages: Sequence[str]) -> list[str]:
    """The messages that fit a question: those about options need options."""
    return [name for name in messages if not name.startswith("options") or question.kind == "options"]


def sample_evenly(rows: Sequence[Row], *, count: int, rng: random.Random) -> list[Row]:
    """Algorithm 1: draw a kind evenly among those left, then one of its rows, ``count`` times (0: until none)."""
    left: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        left[question_of(row).kind].append(row)
    drawn: list[Row] = []
    while left and (count == 0 or len(drawn) < count):
        kind = rng.choice(sorted(left))
        drawn.append(left[kind].pop(rng.randrange(len(left[kind]))))
        if not left[kind]:
            del left[kind]
    places = {row.id: place for place, row in enumerate(rows)}
    return sorted(drawn, key=lambda row: places[row.id])


def _draw(row: Row, messages: Sequence[str], ctx: Ctx) -> tuple[str, str]:
    name = ctx.rng(row.id).choice(allowed(question_of(row), messages) or ["none"])
    template = ctx.templates.get(f"{PREFIX}{name}")
    return name, template.text if template is not None else ""


def _read(row: Row, said: Said, name: str, text: str, shown: list[str], ctx: Ctx) -> Row:
    file = f"{PREFIX}{name}"
    made = ctx.made(said, op=name, prompt=file if file in ctx.templates else "")
    rationale, answer = read_reply(said.text)
    task = child(row, made=made, kind="task", system=text, passages=shown, rationale=rationale, output=answer)
    if end := ended(task, said):
        return end
    if said.truncated or not parse_reply(said.text).has_answer_line:
        return unparsed(task, Unparsed("truncated" if said.truncated else "no_answer_line", said.text[-80:]))
    return gold_checked(task)


def estimate(n_rows: int, options: StepOptions, samples: int) -> Cost:  # noqa: ARG001
    """One request for each drawn question."""
    assert isinstance(options, OrcaStep)
    calls = min(n_rows, options.questions or n_rows)
    return Cost(calls, 750 * calls, options.max_tokens * calls, calls)
