"""export: the trained student as GGUF files that laptops run, and the gate that they must pass.

reads    the adapter, train.jsonl (for the importance matrix), the domain's questions, the index
writes   export/student-F16.gguf, export/imatrix.npz (where something is rounded),
         bundle/: student*.gguf, adapter.gguf (grid-lora), domain.toml, prompts/, NOTICE, parity.json, manifest.json (last)
counts   formats = files written; prompts = replayed by the gate; positions = tokens compared there
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from shutil import rmtree
from typing import Any

from domains.config import GgufType
from domains.domain import Domain
from domains.errors import StageError
from domains.jsonl import read_jsonl
from domains.records import Example, Question, Rationale
from pipeline.bundle import close_bundle
from pipeline.development import PARALLEL, ask_items, draw_items, seed_questions
from pipeline.merge import plain_network
from pipeline.progress import Progress, Silent
from pipeline.recipe import settings_of
from pipeline.replays import Turn, exam_turns
from pipeline.run_folder import Report, Run, disk_errors, need
from pipeline.search import HeldOut, Work, round_one, scores, search, unseen_passages
from pipeline.student import load_student
from pipeline.student_files import Clock, Student, pass_gate, write_formats, write_student
from serve.engine import Engine
from serve.manifest import BaseModelFacts
from serve.reflection import open_reflector, retrieval_depth

_ASKED = 48  # prompts drawn for a search; those without the passages that answer are left out of it


def run(domain: Domain, run: Run, progress: Progress) -> Report:
    """Merge, write, quantize, bundle; then compare the served file with the trained network.

    Raises:
        StageError: an input is missing.
        ModelError: the student can't be written as GGUF.
        ParityError: the served file does not behave like the trained student; the bundle stays "not ready".
    """
    config = domain.config
    need(run.training / "adapter", stage="train")
    examples = read_jsonl(need(run.examples, stage="curate"), Example)
    questions = _exam_questions(domain)
    turns = _exam_turns(domain, run, questions) or _training_turns(examples, count=config.parity.prompts)
    kinds: list[GgufType] = list(dict.fromkeys([*config.export.formats, config.export.serve]))
    clock = Clock(progress)
    student = write_student(
        run,
        clock,
        base=config.student.base,
        title=config.domain.title,
        turns=turns,
        examples=examples,
        imatrix_tokens=config.export.imatrix_tokens,
        room_for=kinds,
    )
    served, made, search = _make_served(domain, run, clock, examples)
    kinds = list(dict.fromkeys([*kinds, served]))
    with disk_errors(run.bundle):
        files = write_formats(run, clock, student, kinds=kinds, served=served, made=made)
        _write_rest(domain, run, student)
        parity = pass_gate(
            run,
            clock,
            student,
            served=served,
            context=config.student.context,
            max_kl=config.parity.max_kl,
            min_top1=config.parity.min_top1,
            kv_cache=config.serve.kv_cache,
        )
    facts = {"weights": student.weights, "files": files, "parity": parity.model_dump(mode="json")}
    if student.exact is not None:
        facts["exact"] = {"matrices": student.exact.matrices, "bits_equal": parity.bits_equal}
    if search is not None:
        facts["search"] = search
    counts = {"formats": len(kinds), "prompts": parity.prompts, "positions": parity.positions}
    return Report(counts=counts, facts={**facts, "seconds": clock.seconds})


def _make_served(
    domain: Domain, run: Run, clock: Clock, examples: Sequence[Example]
) -> tuple[GgufType, Path | None, dict[str, Any] | None]:
    """Type and file of what is served where ``[export] rounding`` makes it, and what a search found.

    Without a file llama.cpp's quantizer makes it.
    """
    config = domain.config
    how, serve = config.export.rounding, config.export.serve
    candidates = run.export / "candidates"
    rmtree(candidates, ignore_errors=True)  # what an interrupted search left
    if how == "llama.cpp":
        return serve, None, None
    trained = load_student(run.training, base=config.student.base)
    work = Work(
        network=plain_network(trained).cpu(),  # where calibration text lies, too
        base=trained.base,
        f16=run.export / "student-F16.gguf",
        folder=candidates,
        examples=examples,
        context=config.student.context,
        settings=settings_of(domain),
    )
    with disk_errors(run.export), clock("rounding", "rounding the student"):
        if how != "search":
            return serve, round_one(work, how, serve, clock.progress), None
        held_out = _held_out(domain, run, examples)
        choice, found = search(work, held_out, clock.progress)
    facts = {
        "winner": choice.winner.candidate.name,
        "reasons": list(choice.reasons),
        "rotation": choice.rotation,
        "caveat": held_out.caveat,
        "asked": held_out.asked,
        "candidates": [each.row() for each in found],
    }
    return choice.winner.candidate.kind, choice.winner.path, facts


def _held_out(domain: Domain, run: Run, examples: Sequence[Example]) -> HeldOut:
    """Text and questions that training has not seen and the exam does not ask."""
    from rag.retrieve import open_retriever

    config = domain.config
    questions = domain.read_questions()
    seen = {example.question_id for example in examples}
    with open_retriever(need(run.index, stage="index"), config.retrieve, config.rerank) as retriever:
        passages = list(retriever.index.passages)
        fresh = [question for question in seed_questions(questions) if question.id not in seen]
        depth = retrieval_depth(config.reflect, config.retrieve.top_k)
        drawn = draw_items(fresh, seen, retriever, count=_ASKED, top_k=depth, seed=0)
    items = [item for item in drawn if item.part == "answerable"]
    # No more of them than of the others: a file that never answers would win.
    items += [item for item in drawn if item.part == "unanswerable"][: len(items)]

    def score(gguf: Path) -> list[float]:
        with ExitStack() as stack:
            engine = stack.enter_context(Engine(gguf, context=config.student.context, parallel=PARALLEL))
            # A grader would be asked, and paid, for each file again; its students answer in the plain form.
            reflector = open_reflector(config.reflect, engine) if config.reflect.backend != "grader" else None
            if reflector is not None:
                stack.callback(reflector.close)
            answers = ask_items(
                items, engine, system=domain.prompts["system"], abstain=config.domain.abstain,
                top_k=config.retrieve.top_k, max_tokens=config.serve.max_tokens, unsupported="keep",
                reflector=reflector, progress=Silent(),
            )  # fmt: skip
        return scores([item.question for item in items], answers, abstain=config.domain.abstain)

    unseen, caveat = unseen_passages(passages, questions, examples)
    if not items:
        caveat = "; ".join(
            filter(
                None,
                [
                    caveat,
                    "no exam: training has seen every seed question that has an answer, or there is none",
                ],
            )
        )
    return HeldOut(
        passages=unseen,
        caveat=caveat,
        asked=len(items),
        score=score if items else None,
        max_kl=config.parity.max_kl,
        min_top1=config.parity.min_top1,
    )


def _write_rest(domain: Domain, run: Run, student: Student) -> None:
    rationales = read_jsonl(run.rationales, Rationale) if run.rationales.exists() else []
    base = student.base
    close_bundle(
        run.bundle,
        config=domain.config,
        prompts={"system": domain.prompts["system"]},
        base=BaseModelFacts(name=base.name, licence=base.licence, version=base.version),
        teachers=[rationale.teacher for rationale in rationales],
        template=base.template,
    )


def _exam_questions(domain: Domain) -> list[Question]:
    path = domain.questions
    rows = read_jsonl(path, Question) if path is not None and path.exists() else []
    return [question for question in rows if question.split == "exam"]


def _exam_turns(domain: Domain, run: Run, questions: Sequence[Question]) -> list[Turn]:
    if not questions:
        return []
    from rag.retrieve import open_retriever

    config = domain.config
    with open_retriever(need(run.index, stage="index"), config.retrieve, config.rerank) as retriever:
        return exam_turns(
            questions,
            lambda query: retriever.find(query, config.retrieve.top_k),
            system=domain.prompts["system"],
            abstain=config.domain.abstain,
            count=config.parity.prompts,
            backend=config.reflect.backend,
        )


def _training_turns(examples: Sequence[Example], *, count: int) -> list[Turn]:
    """For a domain without an exam: the first training rows."""
    turns = [(list(row.messages), row.completion) for row in islice(examples, count)]
    if not turns:
        raise StageError(
            "there is nothing to replay in the parity gate",
            expected="exam questions or training rows",
            next_step="preceptor curate DOMAIN",
        )
    return turns
