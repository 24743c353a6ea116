"""elicit: the teacher explains the answers of the seed questions. Asked once, paid once.

reads    the domain's seed questions, the index
writes   rationales.jsonl (one `Rationale` per answered request), the domain's ledger

Counts: ``seed_questions = questions + unanswerable + not_chosen`` and ``requests = answered + failed``;
``cached`` and ``truncated`` are parts of ``answered``. Unanswerable questions have nothing to explain: curation
makes their rows.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from domains.domain import Domain
from domains.errors import StageError
from domains.jsonl import write_jsonl
from domains.records import Passage, Question, Rationale
from pipeline.asking import Answers, Estimate, answer_all, estimate, raise_for_failures
from pipeline.ledger import Ledger
from pipeline.progress import Progress
from pipeline.run_folder import Report, Run, disk_errors, need
from pipeline.teacher import Request, Teacher
from pipeline.teacher_endpoint import EndpointTeacher
from pipeline.teacher_local import LocalTeacher
from pipeline.teacher_passages import Find, teacher_passages
from pipeline.teacher_prompt import read_reply, reference, teacher_messages

TERMS = (
    "Note: the terms of many providers, OpenAI among them, restrict training models that compete with theirs "
    "on the outputs of their models. Read the terms of {host} before you go on."
)


@dataclass(frozen=True)
class Asked:
    """A request with what it was made from."""

    request: Request
    question: Question
    passages: list[Passage]


def run(domain: Domain, run: Run, progress: Progress) -> Report:
    """Ask the teacher for rationales of the chosen seed questions.

    Raises:
        StageError: no seed questions, no index, or more than half of the requests failed.
        BudgetExceeded: the cap would be passed; what was answered is kept.
        TeacherError: the teacher can't be asked.
    """
    teacher = choose_teacher(domain, progress)
    chosen, counts = _questions(domain)
    asked = _requests(domain, run, teacher, chosen, progress)
    config = domain.config
    with disk_errors(run.folder), Ledger(run.ledger) as ledger:
        before = estimate([item.request for item in asked], teacher, ledger, currency=config.teacher.currency)
        progress.say(describe(before, teacher.name))
        if isinstance(teacher, EndpointTeacher) and before.cached < before.requests:
            progress.say(TERMS.format(host=teacher.host))
        answers = answer_all(
            [item.request for item in asked],
            teacher,
            ledger,
            max_cost=config.teacher.max_cost,
            currency=config.teacher.currency,
            progress=progress,
        )
        spent = ledger.totals(config.teacher.currency)
        if len(answers.failures) * 2 > before.requests:
            raise_for_failures(answers, total=before.requests)
        write_jsonl(run.rationales, _rationales(asked, answers, teacher))
    facts = {
        "teacher": teacher.name,
        "cost": sum(entry.cost for entry in answers.entries.values()),
        "spent_on_domain": spent.cost,
        "currency": config.teacher.currency,
        "failures": dict(Counter(answers.failures.values()).most_common()),
    }
    return Report(counts={**counts, **_count(asked, answers)}, facts=facts)


def plan(domain: Domain, run: Run, progress: Progress | None = None) -> tuple[list[Request], Estimate]:
    """The requests that `run` would make, and what they may cost; asks nothing.

    Raises:
        StageError: no seed questions, or no index.
    """
    teacher = choose_teacher(domain, progress)
    chosen, _ = _questions(domain)
    asked = _requests(domain, run, teacher, chosen, progress)
    requests = [item.request for item in asked]
    with Ledger(run.ledger) as ledger:
        return requests, estimate(requests, teacher, ledger, currency=domain.config.teacher.currency)


def describe(estimate: Estimate, teacher: str) -> str:
    """An estimate in one line."""
    new = estimate.requests - estimate.cached
    return (
        f"{estimate.requests} requests to {teacher}, {estimate.cached} of them answered before. "
        f"The other {new}: about {estimate.prompt_tokens:,} tokens of prompts, at most "
        f"{estimate.max_completion_tokens:,} of replies, at most {estimate.max_cost:.4f} {estimate.currency}."
    )


def choose_teacher(domain: Domain, progress: Progress | None = None) -> Teacher:
    """The teacher that the config names; what ``auto`` took is said.

    Raises:
        ModelError: the local teacher's file is missing or damaged.
    """
    config = domain.config
    kind, key_env = config.teacher.kind, config.teacher.api_key_env
    if kind == "auto":
        kind = "endpoint" if key_env and os.environ.get(key_env, "").strip() else "local"
        if progress is not None:
            why = f"{key_env} is set" if kind == "endpoint" else f"{key_env or 'no key'} is not set"
            weak = "" if kind == "endpoint" else "; a small local teacher explains far worse than a large one"
            name = config.teacher.model if kind == "endpoint" else config.teacher.gguf
            progress.say(f"Teacher: {name} ({kind}), because {why}{weak}.")
    if kind == "endpoint":
        return EndpointTeacher(
            base_url=config.teacher.base_url,
            model=config.teacher.model,
            api_key_env=key_env,
            concurrency=config.teacher.concurrency,
            timeout_s=config.teacher.timeout_s,
            max_retries=config.teacher.max_retries,
            price_prompt=config.teacher.price_prompt,
            price_completion=config.teacher.price_completion,
        )
    from serve.models import inference_gguf

    return LocalTeacher(inference_gguf(config.teacher.gguf), name=config.teacher.gguf)


def choose_questions(questions: Sequence[Question], *, count: int, seed: int) -> list[Question]:
    """``count`` questions (0: all), every kind in proportion, in the given order.

    Within a kind the order is a hash of seed and id: adding questions changes the choice little, so that
    little of what is in the ledger is lost.
    """
    if count == 0 or count >= len(questions):
        return list(questions)
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for question in questions:
        kinds[question.kind].append(question.id)
    ranked = []
    for ids in kinds.values():
        ids.sort(key=lambda each: hashlib.sha256(f"{seed}:{each}".encode()).digest())
        ranked += [((rank + 0.5) / len(ids), each) for rank, each in enumerate(ids)]
    taken = {each for _, each in sorted(ranked)[:count]}
    return [question for question in questions if question.id in taken]


def _questions(domain: Domain) -> tuple[list[Question], dict[str, int]]:
    """The questions to put, and the counts of the others."""
    questions = [question for question in domain.read_questions() if question.split == "seed"]
    answerable = [question for question in questions if question.kind != "unanswerable"]
    if not answerable:
        raise StageError(
            f"the domain {domain.name!r} has 0 answerable seed questions in {domain.questions}",
            expected='questions with split "seed" and an answer',
            next_step="preceptor import, or write some: README, Add a domain, shows the format",
        )
    chosen = choose_questions(
        answerable, count=domain.config.elicit.questions, seed=domain.config.elicit.seed
    )
    return chosen, {
        "seed_questions": len(questions),
        "unanswerable": len(questions) - len(answerable),
        "not_chosen": len(answerable) - len(chosen),
        "questions": len(chosen),
    }


def _requests(
    domain: Domain, run: Run, teacher: Teacher, chosen: Sequence[Question], progress: Progress | None
) -> list[Asked]:
    from rag.retrieve import open_retriever

    with open_retriever(need(run.index, stage="index"), domain.config.retrieve) as retriever:
        passages = retriever.index.passages
        return build_requests(domain, passages, retriever.find, teacher, chosen, progress)


def build_requests(
    domain: Domain,
    passages: Sequence[Passage],
    find: Find,
    teacher: Teacher,
    chosen: Sequence[Question],
    progress: Progress | None,
) -> list[Asked]:
    """One request per question and sample (one sample at temperature 0: the others would be copies)."""
    config = domain.config
    samples = config.elicit.samples if config.teacher.temperature > 0 else 1
    if progress is not None:
        progress.start("finding passages for the teacher", len(chosen))
    asked = []
    shown = teacher_passages(passages, find, top_k=config.retrieve.top_k)
    for question in chosen:
        evidence = shown(question, reference(question))
        messages = teacher_messages(domain.prompts["teacher"], question, evidence)
        for sample in range(samples):
            request = Request(
                model=teacher.identity,
                messages=messages,
                temperature=config.teacher.temperature,
                max_tokens=config.teacher.max_tokens,
                sample=sample,
            )
            asked.append(Asked(request, question, evidence))
        if progress is not None:
            progress.advance()
    return asked


def _rationales(asked: Sequence[Asked], answers: Answers, teacher: Teacher) -> list[Rationale]:
    rationales = []
    for item in asked:
        entry = answers.entries.get(item.request.key)
        if entry is None:
            continue
        text, answer = read_reply(entry.text)
        rationales.append(
            Rationale(
                question_id=item.question.id,
                sample=item.request.sample,
                text=text,
                answer=answer,
                passages=[passage.passage_id for passage in item.passages],
                teacher=teacher.name,
                request=entry.key,
            )
        )
    return rationales


def _count(asked: Sequence[Asked], answers: Answers) -> dict[str, int]:
    keys = {item.request.key for item in asked}
    return {
        "requests": len(keys),
        "cached": answers.cached,
        "answered": len(answers.entries),
        "failed": len(answers.failures),
        "truncated": sum(entry.truncated for entry in answers.entries.values()),
    }
