"""The order of the main job, as data: what each stage reads, writes, and what makes it run again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from domains.domain import Domain
from pipeline.run_folder import Run


@dataclass(frozen=True)
class Stage:
    """One row of the order.

    ``reads`` and ``writes`` name what `paths_of` knows; ``sections`` are the tables of ``domain.toml``
    whose change makes the stage run again; ``prompts`` likewise; ``code`` are the modules whose text
    counts as the stage's version.
    """

    name: str
    summary: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    sections: tuple[str, ...]
    prompts: tuple[str, ...]
    code: tuple[str, ...]


# What finding passages consists of. How they are cut and stored counts in the index stage; others see that by
# the content of index.json.
RETRIEVAL = (
    "rag.retrieve", "rag.fuse", "rag.index", "rag.lexical", "rag.embed", "rag.bert", "rag.blas", "rag.words",
)  # fmt: skip

STAGES = (
    Stage(
        name="index",
        summary="documents -> passages -> dense and lexical index",
        reads=("documents",),
        writes=("index",),
        sections=("corpus", "index"),
        prompts=(),
        code=(
            *("pipeline.index", "rag.load", "rag.formats", "rag.html", "rag.jats", "rag.passages", "rag.words"),
            *("rag.embed", "rag.bert", "rag.blas", "rag.lexical", "rag.index", "rag.update", "rag.manifest"),
        ),
    ),
    Stage(
        name="elicit",
        summary="the teacher explains the answers of the seed questions",
        reads=("questions", "index"),
        writes=("rationales",),
        sections=("teacher", "elicit", "retrieve"),
        prompts=("teacher",),
        code=(
            "pipeline.elicit", "pipeline.asking", "pipeline.ledger", "pipeline.teacher", "pipeline.teacher_endpoint",
            "pipeline.teacher_local", "pipeline.teacher_passages", "pipeline.teacher_prompt", "serve.engine",
            "domains.words", "rag.prompt", "rag.answers", *RETRIEVAL,
        ),
    ),
    Stage(
        name="curate",
        summary="verified rationales -> training rows",
        reads=("questions", "index", "rationales", "checks"),
        writes=("examples", "rejections"),
        sections=("domain", "curate", "retrieve"),
        prompts=("system",),
        code=(
            "pipeline.curate", "pipeline.judge", "pipeline.verify", "pipeline.rows", "pipeline.decontaminate",
            "pipeline.near_duplicates", "pipeline.wording", "domains.words", "domains.checks", "rag.citations",
            "rag.prompt", "rag.answers", *RETRIEVAL,
        ),
    ),
    Stage(
        name="train",
        summary="QLoRA on the student",
        reads=("examples",),
        writes=("adapter",),
        sections=("student", "train"),
        prompts=(),
        code=(
            "pipeline.train", "pipeline.training_loop", "pipeline.checkpoint", "pipeline.packing", "pipeline.qlora",
            "pipeline.student", "pipeline.unpack", "rag.prompt",
        ),
    ),
    Stage(
        name="export",
        summary="merge -> GGUF -> quantize -> parity gate",
        reads=("adapter", "examples", "index", "questions"),
        writes=("merged", "served", "manifest"),
        sections=("domain", "student", "retrieve", "export", "parity", "serve"),
        prompts=("system",),
        code=(
            "pipeline.export", "pipeline.student_files", "pipeline.replays", "pipeline.merge", "pipeline.qlora",
            "pipeline.student", "pipeline.gguf_writer", "pipeline.gguf_vocabulary", "pipeline.imatrix",
            "pipeline.quantize", "pipeline.bundle", "pipeline.parity", "pipeline.rows", "pipeline.verify",
            "pipeline.wording", "pipeline.unpack", "serve.engine", "domains.words", "domains.checks",
            "rag.citations", "rag.prompt", "rag.answers", *RETRIEVAL,
        ),
    ),
    Stage(
        name="exam",
        summary="five arms on the held-out documents",
        reads=("questions", "index", "served"),
        writes=("report",),
        sections=("domain", "student", "retrieve", "exam"),
        prompts=("system",),
        code=(
            "pipeline.exam", "pipeline.arms", "pipeline.metrics", "pipeline.bootstrap", "pipeline.summary",
            "pipeline.verdict", "pipeline.report", "pipeline.plots", "pipeline.base_gguf", "serve.assistant",
            "serve.engine", "domains.words", "rag.citations", "rag.prompt", "rag.answers", *RETRIEVAL,
        ),
    ),
)  # fmt: skip

NAMES = tuple(stage.name for stage in STAGES)


def paths_of(what: str, domain: Domain, run: Run) -> list[Path]:
    """The files behind a name used in `STAGES`: those whose content identifies it."""
    named: dict[str, list[Path | None]] = {
        "documents": [domain.documents],
        "questions": [domain.questions],
        "checks": [domain.folder / "checks.py"],
        "index": [run.index / "index.json"],
        "rationales": [run.rationales],
        "examples": [run.examples],
        "rejections": [run.rejections],
        "adapter": [run.training / "adapter"],
        "merged": [run.export / "student-F16.gguf"],
        "served": [run.bundle / "student.gguf"],
        "manifest": [run.bundle / "manifest.json"],
        "report": [run.bundle / "report.json", run.bundle / "report.html"],
    }
    return [path for path in named[what] if path is not None]


def fingerprint(stage: Stage, domain: Domain, run: Run) -> str:
    """A digest of everything the stage's result depends on: inputs, prompts, config, code.

    Inputs count by content, so a stage whose input was written again unchanged is still skipped.
    """
    config = domain.config.model_dump(mode="json")
    digest = hashlib.sha256()
    parts: dict[str, object] = {
        "stage": stage.name,
        "config": {section: config[section] for section in stage.sections},
        "prompts": {name: domain.prompts[name] for name in stage.prompts},
        "code": {name: _module_digest(name) for name in stage.code},
        "inputs": {
            name: [_path_digest(path) for path in paths_of(name, domain, run)] for name in stage.reads
        },
    }
    if "teacher" in stage.sections and domain.config.teacher.kind == "auto":
        parts["key"] = "set" if os.environ.get(domain.config.teacher.api_key_env) else "missing"
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def is_done(stage: Stage, domain: Domain, run: Run) -> bool:
    """Whether the stage finished with the present inputs and its output is still there."""
    entry = run.finished().get(stage.name)
    if entry is None or not all(p.exists() for name in stage.writes for p in paths_of(name, domain, run)):
        return False
    return entry.fingerprint == fingerprint(stage, domain, run)


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(item for item in path.rglob("*") if item.is_file())
    elif path.exists():
        yield path


def _path_digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _module_digest(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
