"""The order of the main job, as data: what each stage reads, writes, and what makes it run again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domains.domain import PROMPTS, Domain
from pipeline.bundle import adapter_of
from pipeline.kl_teacher import teacher_files
from pipeline.run_folder import Run
from serve.manifest import CALIBRATION


@dataclass(frozen=True)
class Stage:
    """One row of the order.

    ``reads`` and ``writes`` name what `paths_of` knows; ``sections`` are the tables of ``domain.toml``
    (or ``table.key``) whose change makes the stage run again; ``prompts`` likewise; ``code`` are the modules whose text
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
    "rag.rerank", "rag.token_vectors",
)  # fmt: skip
# How a student judges evidence while answering; which back-end does is config.
REFLECTION = (
    "serve.reflection", "serve.reflection_scores", "serve.reflection_run", "serve.reflection_tokens",
    "serve.reflection_beam", "serve.reflection_long", "serve.reflection_text", "serve.reflection_grader", "serve.judges",
)  # fmt: skip
# How rows are elicited; which of them run is config.
STRATEGIES = (
    *("pipeline.strategies.row", "pipeline.strategies.context", "pipeline.strategies.templates"),
    *("pipeline.strategies.strategy", "pipeline.strategies.registry", "pipeline.strategies.desk"),
    *(
        "pipeline.strategies.drive",
        "pipeline.strategies.flow",
        "pipeline.strategies.plan",
        "pipeline.strategies.parse",
    ),
    *("pipeline.strategies.outcome", "pipeline.strategies.refusal", "pipeline.strategies.grading"),
    *("pipeline.strategies.critic_loop", "pipeline.strategies.label", "pipeline.strategies.orca"),
    *("pipeline.strategies.explain_options", "pipeline.strategies.generate_questions"),
    *("pipeline.strategies.critique_revise", "pipeline.strategies.rate"),
)
# llama.cpp's grids, and a GGUF file's own blocks on them.
GRIDS = (
    "pipeline.grids.blocks", "pipeline.grids.layout", "pipeline.grids.library", "pipeline.grids.rounding",
    "pipeline.grids.search", "pipeline.one_thread", "pipeline.gguf_tensors", "pipeline.gguf_names",
)  # fmt: skip

# What makes a training step fast.
LEVERS = (
    *(
        "pipeline.levers",
        "pipeline.layout",
        "pipeline.packed_forward",
        "pipeline.parallel_packs",
        "pipeline.row_attention",
    ),
    *("pipeline.fused_layer", "pipeline.linear_group", "pipeline.layer_cache", "pipeline.completion_loss"),
)
# How a student is trained and brought back; which method does is config.
METHODS = (
    *(
        "pipeline.methods.registry",
        "pipeline.methods.method",
        "pipeline.methods.qlora",
        "pipeline.methods.qalora",
    ),
    *(
        "pipeline.methods.qat",
        "pipeline.methods.grid_lora",
        "pipeline.methods.inside",
        "pipeline.methods.rules",
    ),
    *("pipeline.methods.block_linear", "pipeline.methods.grid_base", "pipeline.methods.adapter_files"),
    *("pipeline.methods.peft_files",),
)

# How GPTQ gets a network onto a grid: a student for serving, or the base before training.
GPTQ = (
    "pipeline.gptq", "pipeline.aim", "pipeline.compensate", "pipeline.layer_inputs",
    "pipeline.grids.straight_through",
)  # fmt: skip

# How `[export] rounding` gets a student onto a grid, and how a search measures what came of it.
ROUNDING = (
    *(
        "pipeline.search",
        "pipeline.calibration_text",
        "pipeline.candidates",
        "pipeline.choose_format",
        "pipeline.roundings",
        "pipeline.retrain",
    ),
    *(
        "pipeline.hadamard",
        "pipeline.rotate",
        "pipeline.cayley",
        "pipeline.spin",
    ),
    *(
        "pipeline.spin_error",
        "pipeline.spin_forward",
        "pipeline.tune_scales",
        "pipeline.next_token_kl",
    ),
    *(
        "pipeline.fidelity",
        "pipeline.speed",
        "pipeline.bootstrap",
        "pipeline.metrics",
        "pipeline.development",
    ),
    *(
        "pipeline.recipe",
        "pipeline.objective",
        "pipeline.training_loop",
        "pipeline.checkpoint",
        "pipeline.packing",
    ),
    "pipeline.methods.block_group",
)

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
        writes=("rationales", "generated"),
        sections=("teacher", "elicit", "retrieve"),
        prompts=("teacher",),
        code=(
            "pipeline.elicit", "pipeline.asking", "pipeline.ledger", "pipeline.teacher", "pipeline.teacher_endpoint",
            "pipeline.teacher_local", "pipeline.teacher_passages", "pipeline.teacher_prompt", "serve.engine", "serve.llama", "serve.llama_model",
            *STRATEGIES, "pipeline.verify", "pipeline.decontaminate", "pipeline.near_duplicates", "pipeline.wording", "pipeline.negation",
            "domains.words", "domains.checks", "rag.citations", "rag.prompt", "rag.untrusted", "rag.answers", *RETRIEVAL,
        ),
    ),
    Stage(
        name="curate",
        summary="verified rationales -> training rows",
        reads=("questions", "generated", "index", "rationales", "checks", "instructions"),
        writes=("examples", "kept", "rejections"),
        sections=(
            "domain", "curate", "retrieve", "teacher", "reflect.backend", "reflect.drafts", "reflect.critic", "reflect.critic_sample",
            "reflect.max_unparsed", "reflect.passages", "reflect.no_retrieval_share", "reflect.partial_share",
            "reflect.unsupported_share", "reflect.seed",
        ),
        prompts=("system",),
        code=(
            "pipeline.curate", "pipeline.questions", "pipeline.judge", "pipeline.verify", "pipeline.verify_model", "serve.engine", "serve.llama", "serve.llama_model", "pipeline.rows", "pipeline.decontaminate",
            "pipeline.reflect_ground", "pipeline.reflect_rows", "pipeline.verdict_rows", "pipeline.augment", "pipeline.critic", "pipeline.critics", "pipeline.critic_rules",
            "pipeline.critic_prompts", "pipeline.critic_teacher", "pipeline.critic_trained", "pipeline.logistic", "pipeline.asking",
            "pipeline.ledger", "pipeline.teacher", "pipeline.teacher_endpoint", "pipeline.teacher_local",
            "rag.reflection", "rag.verdicts",
            "pipeline.near_duplicates", "pipeline.wording", "pipeline.negation", "domains.words", "domains.checks", "rag.citations",
            "rag.prompt", "rag.untrusted", "rag.answers", *RETRIEVAL,
        ),
    ),
    Stage(
        name="rerank",
        summary="a reranker learns from rationales",
        reads=("questions", "generated", "index", "rationales", "examples"),
        writes=("reranker",),
        sections=("rerank", "retrieve"),
        prompts=(),
        code=(
            "pipeline.rerank", "pipeline.questions", "pipeline.ranking", "pipeline.bootstrap", "pipeline.rerank_pools", "pipeline.rerank_loss",
            "pipeline.rerank_tower", "pipeline.rerank_train", "pipeline.rows", "pipeline.verify", "pipeline.wording", "pipeline.negation",
            "domains.words", "domains.checks", "rag.answers", "rag.citations", "rag.prompt", "rag.untrusted", *RETRIEVAL,
        ),
    ),
    Stage(
        name="train",
        summary="the student learns, by [train] method",
        reads=("examples", "kl_teacher"),
        writes=("adapter",),
        sections=("student", "train", "reflect.backend"),
        prompts=(),
        code=(
            *METHODS, "pipeline.methods.block_group", "pipeline.objective", "pipeline.merge", "pipeline.recipe", "pipeline.train", "pipeline.train_split", "pipeline.training_loop", "pipeline.checkpoint", "pipeline.packing", "pipeline.qlora",
            *LEVERS, *GPTQ, "pipeline.calibration_text",
            "pipeline.student", "pipeline.unpack", "pipeline.token_rows", "rag.prompt", "rag.untrusted",
            "rag.reflection", *GRIDS,
        ),
    ),
    Stage(
        name="export",
        summary="merge -> GGUF -> quantize -> parity gate",
        reads=("adapter", "examples", "index", "questions", "reranker"),
        writes=("merged", "served", "manifest"),
        sections=("domain", "student", "train", "retrieve", "export", "parity", "serve", "rerank", "reflect"),
        prompts=("system",),
        code=(
            *METHODS, "pipeline.exact_files", "pipeline.export", "pipeline.student_files", "pipeline.replays", "pipeline.merge", "pipeline.qlora", *LEVERS, *GPTQ, *ROUNDING,
            "pipeline.student", "pipeline.gguf_writer", "pipeline.gguf_lora", "pipeline.gguf_vocabulary", "pipeline.imatrix", *GRIDS,
            "pipeline.quantize", "serve.quantizer", "pipeline.bundle", "pipeline.parity", "pipeline.rows", "pipeline.verify",
            "pipeline.wording", "pipeline.negation", "pipeline.unpack", "pipeline.token_rows", "rag.reflection", "rag.verdicts",
            "serve.engine", "serve.llama", "serve.llama_model", "domains.words", "domains.checks",
            "rag.citations", "rag.prompt", "rag.untrusted", "rag.answers", *RETRIEVAL,
        ),
    ),
    Stage(
        name="calibrate",
        summary="how sure the served student is, fitted to seed questions",
        reads=("questions", "index", "examples", "served", "reranker", "instructions"),
        writes=("calibration",),
        sections=("domain", "student", "retrieve", "rerank", "reflect", "calibrate", "serve"),
        prompts=("system",),
        code=(
            "pipeline.calibrate", "pipeline.fit_reflection", "pipeline.fit_yes_no", "pipeline.logistic", "pipeline.reflection_cases", "pipeline.metrics", "pipeline.development", "pipeline.fit", "pipeline.right", "pipeline.selective",
            "pipeline.bootstrap", "pipeline.bundle", "pipeline.wording", "pipeline.negation", "serve.assistant", "serve.checking",
            "serve.confidence", "serve.signals", "serve.options", "rag.options", "serve.yes_no", "rag.polarity",
            "serve.vote", "rag.sentences",
            *REFLECTION, "serve.reflection_fit", "rag.reflection", "rag.verdicts",
            "serve.engine", "serve.llama", "serve.llama_model", "domains.words", "rag.citations", "rag.prompt", "rag.untrusted", "rag.answers", *RETRIEVAL,
        ),
    ),
    Stage(
        name="exam",
        summary="five arms on the held-out documents",
        reads=("questions", "index", "served", "reranker", "calibration"),
        writes=("report",),
        sections=("domain", "student", "retrieve", "exam", "rerank", "reflect", "serve"),
        prompts=("system",),
        code=(
            "pipeline.exam", "pipeline.arms", "pipeline.metrics", "pipeline.bootstrap", "pipeline.summary",
            "pipeline.verdict", "pipeline.report", "pipeline.plots", "pipeline.base_gguf", "pipeline.token_rows", "pipeline.reflection_report",
            "pipeline.bundle", "pipeline.right", "pipeline.selective", "pipeline.selective_report", "pipeline.wording", "pipeline.negation",
            "serve.assistant", "serve.checking", "serve.confidence", "serve.signals", "serve.options", "rag.options", "serve.yes_no", "rag.polarity", "serve.vote", "rag.sentences", *REFLECTION, "serve.reflection_fit", "rag.reflection", "rag.verdicts",
            "serve.engine", "serve.llama", "serve.llama_model", "domains.words", "rag.citations", "rag.prompt", "rag.untrusted", "rag.answers", *RETRIEVAL,
        ),
    ),
)  # fmt: skip

NAMES = tuple(stage.name for stage in STAGES)


def paths_of(what: str, domain: Domain, run: Run) -> list[Path]:
    """The files behind a name used in `STAGES`: those whose content identifies it."""
    train = domain.config.train
    named: dict[str, Sequence[Path | None]] = {
        "documents": [domain.documents],
        "questions": [domain.questions],
        "checks": [domain.folder / "checks.py"],
        "instructions": [domain.instructions],
        "index": [run.index / "index.json"],
        "rationales": [run.rationales],
        "generated": [run.generated],
        "examples": [run.examples],
        "kept": [run.kept],
        "rejections": [run.rejections],
        "reranker": [run.rerank / "result.json"],  # holds hashes of what lies in the bundle
        "kl_teacher": teacher_files(train.kl_teacher) if train.objective == "ce+kl" else [],
        "adapter": [run.training / "adapter"],
        "merged": [run.export / "student-F16.gguf"],
        "served": [run.bundle / "student.gguf", adapter_of(run.bundle / "student.gguf")],
        "manifest": [run.bundle / "manifest.json"],
        "calibration": [run.bundle / CALIBRATION],  # names the hashes of reflection.json and yes_no.json
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
        "config": {section: _setting(config, section) for section in stage.sections},
        "prompts": {name: domain.prompts[name] for name in stage.prompts} | _own_prompts(stage, domain),
        "code": {name: _module_digest(name) for name in stage.code},
        "inputs": {
            name: [_path_digest(path) for path in paths_of(name, domain, run)] for name in stage.reads
        },
    }
    if "teacher" in stage.sections and domain.config.teacher.kind == "auto":
        parts["key"] = "set" if os.environ.get(domain.config.teacher.api_key_env) else "missing"
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def _own_prompts(stage: Stage, domain: Domain) -> dict[str, str]:
    """The domain's own prompts for strategies: only the elicit stage has such."""
    if stage.name != "elicit":
        return {}
    return {name: text for name, text in domain.prompts.items() if name not in PROMPTS}


def _setting(config: dict[str, Any], section: str) -> object:
    """A table, or one key of it."""
    table, _, key = section.partition(".")
    return config[table][key] if key else config[table]


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
