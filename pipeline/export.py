"""export: the trained student as GGUF files that laptops run, and the gate that they must pass.

reads    the adapter, train.jsonl (for the importance matrix), the domain's questions, the index
writes   export/student-F16.gguf, export/imatrix.npz,
         bundle/: student*.gguf, domain.toml, prompts/, NOTICE, parity.json, manifest.json (last)
counts   formats = files written; prompts = replayed by the gate; positions = tokens compared there
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from domains.config import GgufType
from domains.domain import Domain
from domains.errors import StageError
from domains.jsonl import read_jsonl
from domains.records import Example, Question, Rationale
from pipeline.bundle import close_bundle
from pipeline.progress import Progress
from pipeline.replays import Turn, exam_turns
from pipeline.run_folder import Report, Run, disk_errors, need
from pipeline.student_files import Clock, Student, pass_gate, write_formats, write_student
from serve.manifest import BaseModelFacts


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
    with disk_errors(run.bundle):
        files = write_formats(run, clock, student, kinds=kinds, served=config.export.serve)
        _write_rest(domain, run, student)
        parity = pass_gate(
            run,
            clock,
            student,
            served=config.export.serve,
            context=config.student.context,
            max_kl=config.parity.max_kl,
            min_top1=config.parity.min_top1,
        )
    facts = {"weights": student.weights, "files": files, "parity": parity.model_dump(mode="json")}
    counts = {"formats": len(kinds), "prompts": parity.prompts, "positions": parity.positions}
    return Report(counts=counts, facts={**facts, "seconds": clock.seconds})


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
