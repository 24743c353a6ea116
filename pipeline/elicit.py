"""elicit: the teacher explains the answers of the seed questions. Asked once, paid once.

reads    the domain's seed questions, the index, its prompts
writes   rationales.jsonl (one `Rationale` per explained answer that is left at the end), generated.jsonl (new seed
         questions, mostly none), elicit/<n>-<strategy>.jsonl (every row of every step, with its status and reason),
         the domain's ledger

The steps are those of ``[[elicit.steps]]``, in order (`pipeline.strategies`); the default is one, KARD's labelling.
Counts: ``seed_questions = questions + unanswerable + not_chosen`` and ``requests = answered + failed``;
``cached`` and ``truncated`` are parts of ``answered``. For each step
``proposed = kept + rejected + unparsed + error`` (facts). Unanswerable questions have nothing to explain: curation
makes their rows.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from domains.config import DomainConfig
from domains.domain import Domain
from domains.errors import StageError
from domains.jsonl import write_jsonl
from domains.records import Passage, Question
from pipeline.ledger import Ledger
from pipeline.progress import Progress, Silent
from pipeline.run_folder import Report, Run, disk_errors, need
from pipeline.strategies.context import Material, Role
from pipeline.strategies.desk import Desk, Voice
from pipeline.strategies.flow import Flow, rationales_of
from pipeline.strategies.plan import Plan, plan_steps, prepare
from pipeline.strategies.row import passage_row, seed_row
from pipeline.teacher import Teacher
from pipeline.teacher_endpoint import EndpointTeacher
from pipeline.teacher_local import LocalTeacher
from pipeline.teacher_passages import teacher_passages
from rag.answers import reference_answer


def run(domain: Domain, run: Run, progress: Progress) -> Report:
    """Run the steps over the chosen seed questions.

    Raises:
        ConfigError: the steps can't run in this order, or a prompt is wrong (before the first request).
        StageError: no seed questions, no index, most requests failed, or a step's teacher is too weak for it.
        BudgetExceeded: the cap would be passed; what was answered is kept.
        TeacherError: the teacher can't be asked.
    """
    config = domain.config
    steps = prepare(config.elicit.steps, domain.prompts)
    voices = _voices(domain, progress)
    chosen, counts = _questions(domain)
    with (
        disk_errors(run.folder),
        _material(domain, run, chosen, progress) as material,
        Ledger(run.ledger) as ledger,
    ):
        desk = Desk(voices, ledger, config.teacher.max_cost, config.teacher.currency, progress)
        flow = Flow(desk, material, run.steps, progress)
        flow.start(seed=map(seed_row, chosen), doc=map(passage_row, material.passages.values()))
        for step in steps:
            flow.run(step)
        spent = ledger.totals(config.teacher.currency)
        write_jsonl(run.generated, flow.generated())
        write_jsonl(run.rationales, rationales_of(flow.rows["task"]))
    facts = {
        "teacher": voices["teacher"].teacher.name,
        "cost": sum(entry.cost for entry in desk.entries.values()),
        "spent_on_domain": spent.cost,
        "currency": config.teacher.currency,
        "failures": dict(Counter(desk.failures.values()).most_common()),
        "steps": flow.told,
    }
    return Report(counts={**counts, **desk.counts(), **flow.counts()}, facts=facts)


def plan(domain: Domain, run: Run, progress: Progress | None = None) -> Plan:
    """What `run` would ask and what it may cost at most, step by step; asks nothing.

    Raises:
        ConfigError: as `run`.
        StageError: no seed questions, or no index.
    """
    config, progress = domain.config, progress or Silent()
    steps = prepare(config.elicit.steps, domain.prompts)
    voices = _voices(domain, progress)
    chosen, _ = _questions(domain)
    with _material(domain, run, chosen, progress) as material, Ledger(run.ledger) as ledger:
        desk = Desk(voices, ledger, config.teacher.max_cost, config.teacher.currency, progress)
        rows = {
            "seed": [seed_row(question) for question in chosen],
            "doc": [passage_row(passage) for passage in material.passages.values()],
        }
        return plan_steps(steps, rows, material, desk)


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
    return _teacher(config, kind)


def _voices(domain: Domain, progress: Progress) -> dict[Role, Voice]:
    """Who is asked as teacher and who as judge: the same one, but for what ``[elicit.judge]`` says."""
    config = domain.config
    teacher = choose_teacher(domain, progress)
    own = config.elicit.judge.model_dump(exclude_none=True)
    temperature = own.pop("temperature")
    judge, kind = teacher, config.elicit.judge.chosen_kind()
    if kind is not None:
        own.pop("kind", None)
        judge = _teacher(config.model_copy(update={"teacher": config.teacher.model_copy(update=own)}), kind)
    return {
        "teacher": Voice(teacher, config.teacher.temperature, config.teacher.max_tokens),
        "judge": Voice(judge, temperature, config.teacher.max_tokens),
    }


def _teacher(config: DomainConfig, kind: str) -> Teacher:
    if kind == "endpoint":
        return EndpointTeacher(
            base_url=config.teacher.base_url,
            model=config.teacher.model,
            api_key_env=config.teacher.api_key_env,
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


@contextmanager
def _material(domain: Domain, run: Run, chosen: Sequence[Question], progress: Progress) -> Iterator[Material]:
    """What strategies work with; the passages for the chosen questions are found at once, for others when needed."""
    from rag.retrieve import open_retriever

    config = domain.config
    with open_retriever(need(run.index, stage="index"), config.retrieve) as retriever:
        shown = teacher_passages(retriever.index.passages, retriever.find, top_k=config.retrieve.top_k)
        found: dict[str, list[Passage]] = {}

        def evidence(question: Question) -> list[Passage]:
            if question.id not in found:
                found[question.id] = shown(question, reference_answer(question))
            return found[question.id]

        progress.start("finding passages for the teacher", len(chosen))
        for question in chosen:
            evidence(question)
            progress.advance()
        yield Material(
            questions=domain.read_questions(),
            passages=retriever.index.by_id,
            evidence=evidence,
            instruction=domain.prompts["teacher"],
            seed=config.elicit.seed,
            samples=config.elicit.samples,
        )
