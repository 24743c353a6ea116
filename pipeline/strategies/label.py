"""KARD's labelling (arXiv 2305.18395 §3.1): the teacher sees the right answer and explains it, n times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from domains.steps import StepOptions
from pipeline.strategies.context import Ask, Ctx
from pipeline.strategies.outcome import failed, question_of
from pipeline.strategies.row import Row, child
from pipeline.strategies.strategy import Cost
from pipeline.teacher_prompt import read_reply, teacher_messages


def asks(rows: Sequence[Row], ctx: Ctx) -> list[tuple[Ask, list[str]]]:
    """A request per row, with the ids of the passages that it shows."""
    made = []
    for row in rows:
        shown = ctx.material.evidence(question_of(row))
        messages = teacher_messages(ctx.material.instruction, question_of(row), shown)
        made.append((Ask(messages, n=ctx.material.samples), [passage.passage_id for passage in shown]))
    return made


def label(rows: Iterable[Row], ctx: Ctx) -> Iterator[Row]:
    """One row per question and sample; whether it carries the answer is for curation to judge."""
    seeds = ctx.affordable(rows)
    requests = asks(seeds, ctx)
    heard = ctx.ask([ask for ask, _ in requests], tell=True)
    ctx.propose(sum(len(replies) for replies in heard))
    for row, (_, shown), replies in zip(seeds, requests, heard, strict=True):
        for said in replies:
            made = ctx.made(said)
            if said.error:
                yield failed(child(row, made=made, kind="task", passages=shown), said)
                continue
            rationale, answer = read_reply(said.text)
            yield child(row, made=made, kind="task", passages=shown, rationale=rationale, output=answer)


def estimate(n_rows: int, options: StepOptions, samples: int) -> Cost:  # noqa: ARG001
    """One request per question and sample."""
    return Cost(n_rows * samples, 700 * n_rows * samples, 300 * n_rows * samples, n_rows * samples)
