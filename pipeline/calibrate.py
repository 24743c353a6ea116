"""calibrate: how sure is the served student? Fitted to its answers to seed questions, never to the exam's.

reads    the domain's questions, train.jsonl, the index, bundle/student.gguf
writes   calibration.jsonl (every development answer with its signals), bundle/calibration.json;
         with reflection tokens also reflection.jsonl (what there was to choose from), reflection.json (what came of
         the fit) and, where it helps, bundle/reflection.json;
         with ``[serve] yes_no = "evidence"`` also yes_no.json (what came of the fit) and, where it helps,
         bundle/yes_no.json
counts   asked = answered + abstained + too_long; answered = right + wrong
         asked = answerable + gold_removed + unanswerable = unseen + trained_on

How the questions are made stands in `pipeline.development`, how the confidence is fitted in `pipeline.fit`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence, Set
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from domains.config import ReflectSection
from domains.domain import Domain
from domains.jsonl import read_jsonl, write_jsonl, write_text_atomic
from domains.records import Example, Question
from pipeline.bundle import adapter_of, drop_file, note_files
from pipeline.development import PARALLEL, Row, ask_items, draw_items, judge_items, seed_questions
from pipeline.fit import calibrate
from pipeline.fit_reflection import fit_student
from pipeline.fit_yes_no import fit_yes_no
from pipeline.progress import Progress
from pipeline.run_folder import Report, Run, need
from serve.assistant import Assistant, Retrieves
from serve.confidence import Calibration, describe_choice
from serve.engine import Engine
from serve.manifest import CALIBRATION, FITTED_REFLECTION, FITTED_YES_NO
from serve.models import sha256_file
from serve.reflection import open_reflector, retrieval_depth
from serve.reflection_fit import fitted
from serve.vote import Votes


def run(domain: Domain, run: Run, progress: Progress) -> Report:
    """Ask the development questions, fit, write the calibration into the bundle.

    Raises:
        StageError: the student or the index is missing.
    """
    from rag.retrieve import open_retriever

    config = domain.config
    student = need(run.bundle / "student.gguf", stage="export")
    index = need(run.index, stage="index")
    sources = {
        "student.gguf": sha256_file(student),
        "index.json": sha256_file(index / "index.json"),
        "questions": sha256_file(domain.questions) if domain.questions else "",
    }
    adapter = adapter_of(student)
    if adapter:
        sources[adapter.name] = sha256_file(adapter)
    if not config.calibrate.enabled:
        drop_file(run.bundle, FITTED_YES_NO)
        drop_file(run.bundle, FITTED_REFLECTION)
        _write(run.bundle, Calibration(reason="[calibrate] enabled is false", sources=sources))
        return Report(counts={"asked": 0})
    seen = {example.question_id for example in read_jsonl(need(run.examples, stage="curate"), Example)}
    questions = seed_questions(domain.read_questions())
    with open_retriever(index, config.retrieve, config.rerank) as retriever:
        items = draw_items(
            questions,
            seen,
            retriever,
            count=config.calibrate.questions,
            top_k=retrieval_depth(config.reflect, config.retrieve.top_k),
            seed=config.calibrate.seed,
        )
        yes_no = _fit_yes_no(domain, run, questions, retriever, progress)
    if (run.bundle / FITTED_YES_NO).is_file():
        sources[FITTED_YES_NO] = sha256_file(run.bundle / FITTED_YES_NO)
    with ExitStack() as stack:
        engine = stack.enter_context(
            Engine(
                student,
                context=config.student.context,
                parallel=PARALLEL,
                adapter=adapter,
                kv_cache=config.serve.kv_cache,
            )
        )
        reflect, reflection = _fit_reflection(domain, run, engine, seen, progress)
        if (run.bundle / FITTED_REFLECTION).is_file():
            sources[FITTED_REFLECTION] = sha256_file(run.bundle / FITTED_REFLECTION)
        reflector = open_reflector(reflect, engine)
        if reflector is not None:
            stack.callback(reflector.close)
        answers = ask_items(
            items,
            engine,
            system=domain.prompts["system"],
            abstain=config.domain.abstain,
            top_k=config.retrieve.top_k,
            max_tokens=config.serve.max_tokens,
            unsupported=config.serve.unsupported,
            reflector=reflector,
            votes=Votes(config.serve.votes, config.serve.vote_temperature),
            progress=progress,
        )
    rows = judge_items(items, answers, seen, folds=config.calibrate.folds, seed=config.calibrate.seed)
    calibration, rows = calibrate(rows, folds=config.calibrate.folds, sources=sources)
    write_jsonl(run.calibration, rows)
    _write(run.bundle, calibration)
    _tell(calibration, config.serve.max_wrong, progress)
    return Report(counts=_counts(rows), facts={**calibration.facts, **yes_no, **reflection})


def _fit_yes_no(
    domain: Domain, run: Run, questions: Sequence[Question], retriever: Retrieves, progress: Progress
) -> dict[str, Any]:
    """Fit and store what serving answers yes/no questions with, where ``[serve]`` wants it; the facts as ``yes_no``."""
    config = domain.config
    if config.serve.yes_no != "evidence":
        drop_file(run.bundle, FITTED_YES_NO)
        run.yes_no_fit.unlink(missing_ok=True)
        return {}
    found = fit_yes_no(
        questions,
        lambda query, count: retriever.retrieve(query, top_k=count),
        folds=config.calibrate.folds,
        seed=config.calibrate.seed,
        progress=progress,
    )
    write_text_atomic(run.yes_no_fit, json.dumps(found.facts, indent=1) + "\n")
    if found.model is not None and not found.reason:
        write_text_atomic(run.bundle / FITTED_YES_NO, found.model.model_dump_json(indent=1) + "\n")
        note_files(run.bundle, [FITTED_YES_NO])
    else:
        drop_file(run.bundle, FITTED_YES_NO)
    return {"yes_no": found.facts}


def _fit_reflection(
    domain: Domain, run: Run, engine: Engine, seen: Set[str], progress: Progress
) -> tuple[ReflectSection, dict[str, Any]]:
    """The settings that serving will reflect with; where the student has reflection tokens they are fitted here.

    What was fitted is used only where it is certainly better than what is configured. The numbers of the fit come as
    ``reflection``.
    """
    from rag.retrieve import open_retriever

    config = domain.config
    drop_file(run.bundle, FITTED_REFLECTION)
    if config.reflect.backend != "tokens" or not config.reflect.fit:
        return config.reflect, {}
    reflector = open_reflector(config.reflect, engine)
    assert reflector is not None
    with open_retriever(run.index, config.retrieve, config.rerank) as retriever, closing(reflector):
        assistant = Assistant(
            engine,
            retriever,
            system=domain.prompts["system"],
            abstain=config.domain.abstain,
            top_k=config.retrieve.top_k,
            max_tokens=config.serve.max_tokens,
            unsupported="keep",
            reflector=reflector,
        )
        found = fit_student(
            domain,
            assistant,
            count=config.calibrate.questions,
            trained_on=seen,
            progress=progress,
            keep=run.reflection_fit.with_suffix(".jsonl"),
        )
    write_text_atomic(run.reflection_fit, json.dumps(found.facts, indent=1) + "\n")
    if not found.reason:
        write_text_atomic(run.bundle / FITTED_REFLECTION, found.settings.model_dump_json(indent=1) + "\n")
        note_files(run.bundle, [FITTED_REFLECTION])
    return fitted(config.reflect, run.bundle), {"reflection": found.facts}


def _write(bundle: Path, calibration: Calibration) -> None:
    write_text_atomic(bundle / CALIBRATION, calibration.model_dump_json(indent=1) + "\n")
    note_files(bundle, [CALIBRATION])


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    parts = Counter(row.part for row in rows)
    trained_on = sum(row.trained_on for row in rows)
    return {
        "asked": len(rows),
        "answerable": parts["answerable"],
        "gold_removed": parts["gold_removed"],
        "unanswerable": parts["unanswerable"],
        "unseen": len(rows) - trained_on,
        "trained_on": trained_on,
        "answered": sum(row.given for row in rows),
        "abstained": sum(row.answer is not None and not row.given for row in rows),
        "too_long": sum(row.answer is None for row in rows),
        "right": sum(row.right for row in rows),
        "wrong": sum(row.given and not row.right for row in rows),
    }


def _tell(calibration: Calibration, max_wrong: float, progress: Progress) -> None:
    if calibration.reason:
        progress.say(f"no calibration: {calibration.reason}")
        return
    facts = calibration.facts
    progress.say(
        f"{calibration.right} of {calibration.answers} development answers are right and supported; AURC "
        f"{facts['aurc']:.3f}, by the model's own probability {facts['aurc_likelihood']:.3f}, uninformed "
        f"{facts['aurc_random']:.3f} (lower is better)"
    )
    if calibration.trained_on:
        progress.say(
            f"{calibration.trained_on} of these answers are to questions of the training: expect less of others"
        )
    choice = calibration.choose(max_wrong) if max_wrong else None
    if choice:
        progress.say(describe_choice(choice, max_wrong))
