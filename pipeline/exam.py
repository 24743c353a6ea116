"""exam: five arms on questions about documents that training never saw, and a verdict in plain words.

base           the untrained student, closed book
base_rag       the untrained student with passages
tuned          the trained student in full precision, closed book
tuned_rag      the trained student in full precision with passages
exported_rag   the file that is served, with passages

reads    the domain's questions, the index, export/student-F16.gguf, bundle/student.gguf
writes   exam/<arm>.jsonl (every answer), bundle/report.json, bundle/report.html
counts   exam_questions = asked + not_drawn
         asked = answered.<arm> + too_long.<arm> for every arm

All arms answer through `serve.assistant` on llama.cpp, which is what users get.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

from domains.config import OnUnsupported
from domains.domain import Domain
from domains.errors import StageError
from domains.jsonl import write_text_atomic
from domains.records import Passage, Question
from pipeline.arms import DEPTH, PARALLEL, Arm, Conditions, Remembered, ask_arms
from pipeline.base_gguf import base_gguf
from pipeline.bundle import adapter_of, note_files
from pipeline.progress import Progress
from pipeline.report import render_report
from pipeline.run_folder import Report, Run, need
from pipeline.summary import Sources, summarise
from serve.assistant import Retrieves
from serve.engine import Engine
from serve.reflection_fit import fitted
from serve.vote import Votes

REPORTS = ("report.json", "report.html")


def run(domain: Domain, run: Run, progress: Progress) -> Report:
    """Ask all arms, mark their answers, write the report into the bundle.

    Raises:
        StageError: a model or the index is missing, or there are no exam questions.
        ModelError: the base model can't be written as GGUF or loaded.
    """
    from rag.retrieve import open_retriever

    config = domain.config
    tuned = need(run.export / "student-F16.gguf", stage="export")
    exported = need(run.bundle / "student.gguf", stage="export")
    pool, seen = exam_questions(domain)
    questions = draw_questions(pool, count=config.exam.questions, seed=config.exam.seed)
    base = base_gguf(config.student.base)
    with open_retriever(need(run.index, stage="index"), config.retrieve, config.rerank) as retriever:
        return examine(
            run,
            questions,
            models={"base": base, "tuned": tuned, "exported": exported},
            retriever=retriever,
            passages=retriever.index.passages,
            conditions=_conditions(domain, run.bundle),
            open_engine=lambda gguf: Engine(
                gguf,
                context=config.student.context,
                parallel=PARALLEL,
                adapter=adapter_of(gguf),
                kv_cache=config.serve.kv_cache,
            ),
            resamples=config.exam.resamples,
            seed=config.exam.seed,
            not_drawn=len(pool) - len(questions),
            seen_documents=seen,
            about={**_about(domain), "base": config.student.base},
            progress=progress,
            unsupported=config.serve.unsupported,
        )


def _conditions(domain: Domain, bundle: Path) -> Conditions:
    config = domain.config
    return Conditions(
        system=domain.prompts["system"],
        abstain=config.domain.abstain,
        top_k=config.retrieve.top_k,
        max_tokens=config.exam.max_tokens,
        context=config.student.context,
        reflect=fitted(config.reflect, bundle),
        votes=Votes(config.serve.votes, config.serve.vote_temperature),
        kv_cache=config.serve.kv_cache,
    )


def _about(domain: Domain) -> dict[str, str]:
    config = domain.config
    return {
        "name": domain.name,
        "title": config.domain.title,
        "disclaimer": config.domain.disclaimer,
        "licence": config.domain.licence,
    }


def examine(
    run: Run,
    questions: Sequence[Question],
    *,
    models: dict[str, Path],
    retriever: Retrieves,
    passages: Sequence[Passage],
    conditions: Conditions,
    open_engine: Callable[[Path], Engine],
    resamples: int,
    seed: int,
    not_drawn: int,
    seen_documents: Set[str],
    about: dict[str, str],
    progress: Progress,
    unsupported: OnUnsupported = "withdraw",
) -> Report:
    """The exam itself, on models that may be anything ``open_engine`` opens.

    Args:
        run: where answers and report go.
        questions: asked of every arm.
        models: the files ``base``, ``tuned`` and ``exported``.
        retriever: finds the passages; asked once per question.
        passages: all of the index; gold quotes are located in them.
        conditions: the same for all arms.
        open_engine: loads a model file.
        resamples: bootstrap samples.
        seed: of the bootstrap and the drawn examples.
        not_drawn: exam questions that the configuration left out.
        seen_documents: ids of the documents that seed questions are about.
        about: the domain as the report names it.
        progress: told what happens.
        unsupported: ``[serve] unsupported``, for the score as served.
    """
    remembered = Remembered(retriever, depth=max(DEPTH, conditions.depth))
    rows = ask_arms(
        arms_of(models),
        questions,
        remembered,
        conditions,
        folder=run.exam,
        open_engine=open_engine,
        progress=progress,
    )
    report = summarise(
        questions,
        rows,
        hits={question.id: remembered.retrieve(question.question, top_k=DEPTH) for question in questions},
        passages=passages,
        abstain=conditions.abstain,
        resamples=resamples,
        seed=seed,
        not_drawn=not_drawn,
        seen_documents=seen_documents,
        about=about,
        sources=Sources.of(run),
        unsupported=unsupported,
    )
    if "reflection" in report and conditions.reflect.fit and run.reflection_fit.is_file():
        report["reflection"]["fit"] = json.loads(run.reflection_fit.read_text("utf-8"))
    write_text_atomic(run.bundle / REPORTS[0], json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text_atomic(run.bundle / REPORTS[1], render_report(report))
    note_files(run.bundle, REPORTS)
    for lost in report["left_out"]["gold_not_found"]:
        progress.say(f"question {lost['question']}: its gold quote stands nowhere: {lost['quote'][:80]!r}")
    if report["n_seen_documents"]:
        progress.say(
            f"{report['n_seen_documents']} of the exam's {report['n_documents']} documents have seed questions too: "
            "the exam does not show what happens on new documents"
        )
    for line in report.get("reflection", {}).get("warnings", []):
        progress.say(line)
    progress.say(report["verdict"])
    return _stage_report(report)


def arms_of(models: dict[str, Path]) -> list[Arm]:
    """The five arms, those of one model file together."""
    return [
        Arm("base", models["base"], with_passages=False),
        Arm("base_rag", models["base"], with_passages=True),
        Arm("tuned", models["tuned"], with_passages=False, reflects=True),
        Arm("tuned_rag", models["tuned"], with_passages=True, reflects=True),
        Arm("exported_rag", models["exported"], with_passages=True, reflects=True),
    ]


def _stage_report(report: dict[str, Any]) -> Report:
    asked, not_drawn = report["n_questions"], report["left_out"]["not_drawn"]
    too_long: dict[str, int] = report["left_out"]["too_long"]
    return Report(
        counts={
            "exam_questions": asked + not_drawn,
            "asked": asked,
            "not_drawn": not_drawn,
            **{f"answered.{arm}": asked - count for arm, count in too_long.items()},
            **{f"too_long.{arm}": count for arm, count in too_long.items()},
        },
        facts={
            "verdict_code": report["verdict_code"],
            "score": {arm: metrics["score"]["mean"] for arm, metrics in report["arms"].items()},
            "answering_s": round(
                sum(
                    metrics.get("seconds_per_question", {}).get("mean", 0.0) * (asked - too_long[arm])
                    for arm, metrics in report["arms"].items()
                ),
                1,
            ),
        },
    )


def exam_questions(domain: Domain) -> tuple[list[Question], set[str]]:
    """The questions of the exam split, in the file's order; and the documents that seed questions are about.

    Raises:
        StageError: the domain has none.
        DataError: two questions share an id.
    """
    questions = domain.read_questions()
    exam = [question for question in questions if question.split == "exam"]
    if not exam:
        raise StageError(
            f"0 of {len(questions)} questions of domain {domain.name!r} are for the exam",
            expected='questions with "split": "exam", about documents that no seed question is about',
            next_step=f"add some to {domain.questions}",
        )
    return exam, {question.about for question in questions if question.split == "seed"}


def draw_questions(pool: Sequence[Question], *, count: int, seed: int) -> list[Question]:
    """``count`` of the questions (0: all), every kind in proportion, in their own order.

    Places left over by rounding go to the largest remainders (Hamilton's method). Within a kind the smallest
    hashes of seed and id are taken, so a larger exam contains nearly all of a smaller one.
    """
    if count == 0 or count >= len(pool):
        return list(pool)
    sizes = Counter(question.kind for question in pool)
    share = {kind: count * size / len(pool) for kind, size in sizes.items()}
    places = {kind: int(value) for kind, value in share.items()}
    by_remainder = sorted(share, key=lambda kind: (places[kind] - share[kind], kind))
    for kind in by_remainder[: count - sum(places.values())]:
        places[kind] += 1
    drawn: set[str] = set()
    for kind, number in places.items():
        ids = [question.id for question in pool if question.kind == kind]
        drawn |= set(sorted(ids, key=lambda name: _draw_order(name, seed))[:number])
    return [question for question in pool if question.id in drawn]


def _draw_order(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
