"""Opens the critic that ``[reflect] critic`` names; what ``auto`` took is said."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from domains.config import TeacherSection
from pipeline.critic import Critic
from pipeline.critic_rules import RuleCritic
from pipeline.critic_teacher import TeacherCritic
from pipeline.critic_trained import Embed, SampledCritic
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.teacher import Teacher
from pipeline.teacher_endpoint import EndpointTeacher
from pipeline.teacher_local import LocalTeacher

Choice = Literal["auto", "teacher", "rules", "trained"]
# Of the teacher's sample, those that need no document: 15 tell them from a domain's questions, 8 not quite.
_GENERAL_SHARE = 0.25


@contextmanager
def open_critic(
    choice: Choice,
    *,
    teacher: TeacherSection,
    ledger: Path,
    question_ids: Iterable[str],
    general_ids: Iterable[str] = (),
    sample: int,
    max_unparsed: float,
    embed: Embed,
    seed: int,
    progress: Progress,
) -> Iterator[tuple[Critic, Counter[str]]]:
    """The critic, and what it counts while it judges.

    Args:
        choice: ``auto`` is rules for a local teacher (too weak to grade), else trained.
        teacher: ``[teacher]``.
        ledger: the domain's; labels are asked and paid once.
        question_ids: the domain's questions that will be judged.
        general_ids: the general instructions that will be judged; without some of them in the sample, what is trained
            on it would never have seen a request that needs no document.
        sample: how many of them the teacher labels where a critic is trained on its labels.
        max_unparsed: see `TeacherCritic`.
        embed: of the trained critic.
        seed: orders the questions for the sample.
        progress: told of the choice and of the asking.
    """
    kind = _kind(teacher)
    if choice == "auto":
        choice = "rules" if kind == "local" else "trained"
        why = "a small local teacher can't grade" if kind == "local" else f"{teacher.model} labels a sample"
        progress.say(f"Critic: {choice}, because {why}.")
    if choice == "rules":
        yield RuleCritic(), Counter()
        return
    with Ledger(ledger) as book:
        asked = TeacherCritic(
            open_teacher(teacher, kind),
            book,
            max_cost=teacher.max_cost,
            currency=teacher.currency,
            max_unparsed=max_unparsed,
            progress=progress,
        )
        if choice == "teacher":
            yield asked, asked.counts
            return
        chosen = draw_sample(question_ids, general_ids, count=sample, seed=seed)
        yield SampledCritic(asked, chosen, embed, counts=asked.counts), asked.counts


def draw_sample(
    question_ids: Iterable[str], general_ids: Iterable[str], *, count: int, seed: int
) -> set[str]:
    """``count`` ids: a quarter general ones, the others the domain's; where one kind is short the other fills up."""

    def ordered(names: Iterable[str]) -> list[str]:
        return sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())

    own, general = ordered(question_ids), ordered(general_ids)
    few = min(len(general), max(round(_GENERAL_SHARE * count), count - len(own)))
    return {*general[:few], *own[: count - few]}


def open_teacher(teacher: TeacherSection, kind: Literal["endpoint", "local"]) -> Teacher:
    """The teacher of a domain.

    Raises:
        ModelError: the local teacher's file is missing or damaged.
    """
    if kind == "local":
        from serve.models import inference_gguf

        return LocalTeacher(inference_gguf(teacher.gguf), name=teacher.gguf)
    return EndpointTeacher(
        base_url=teacher.base_url,
        model=teacher.model,
        api_key_env=teacher.api_key_env,
        concurrency=teacher.concurrency,
        timeout_s=teacher.timeout_s,
        max_retries=teacher.max_retries,
        price_prompt=teacher.price_prompt,
        price_completion=teacher.price_completion,
    )


def _kind(teacher: TeacherSection) -> Literal["endpoint", "local"]:
    if teacher.kind != "auto":
        return teacher.kind
    key = teacher.api_key_env
    return "endpoint" if key and os.environ.get(key, "").strip() else "local"
