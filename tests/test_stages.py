"""The order of the main job: what makes a stage run again, and what does not."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from domains.config import DomainConfig
from domains.domain import Domain, load_domain
from pipeline.new import new_domain
from pipeline.run_folder import Finished, Run
from pipeline.stages import (
    GPTQ,
    GRIDS,
    METHODS,
    NAMES,
    REFLECTION,
    STAGES,
    Stage,
    fingerprint,
    is_done,
    paths_of,
)

PACKAGES = ("pipeline", "rag", "serve", "domains")
ROOT = Path(__file__).parent.parent
BY_NAME = {stage.name: stage for stage in STAGES}

# Modules that stages import and whose text is no part of their version, each with the reason.
NO_VERSION = {
    "domains.config": "its values count, by section",
    "domains.steps": "its values count, by section",
    "domains.routes": "what it completes counts as values of config",
    "domains.domain": "finds files; their content counts",
    "domains.cores": "how many threads share the work",
    "domains.errors": "wording of errors",
    "domains.jsonl": "form of files; their content counts",
    "domains.records": "form of files; their content counts",
    "pipeline.progress": "what is shown meanwhile",
    "pipeline.run_folder": "where files lie",
    "pipeline.kl_teacher": "which files a teacher is; their content counts",
    "pipeline.quiet_libraries": "silences warnings",
    "serve.llama_log": "silences llama.cpp",
    "serve.manifest": "form of a file; its content counts",
    "serve.gguf_check": "refuses damaged files, changes none",
    "serve.adapter_check": "refuses adapters of other models, changes none",
    "serve.models": "where model files lie; they are checked by sha256",
}
# Only the index stage cuts and stores; the others see that by the content of index.json.
STORING = {"rag.manifest", "rag.passages", "rag.update"}
# Makes the base's file, which is cached with the model under a name of its own. Exporting makes the served file with it.
BASE_QUANTIZED = {"serve.quantizer"}
# Reached through pipeline.base_gguf only, whose file is cached by the state of the base's weights.
BASE_FILE = {
    *("pipeline.gguf_writer", "pipeline.gguf_vocabulary", *GRIDS),
    *("pipeline.merge", "pipeline.qlora", "pipeline.student", "pipeline.unpack"),
    *(*METHODS, *GPTQ, "pipeline.levers", *BASE_QUANTIZED),
}  # fmt: skip
# A search for the format asks development questions, so which candidate wins may hang on them. It takes an hour and is not
# made again for every change of serving; `preceptor export --search` makes it again when wanted.
ASKING = {
    *REFLECTION,
    *(
        "serve.assistant",
        "serve.checking",
        "serve.confidence",
        "serve.options",
        "serve.signals",
        "serve.streaming",
        "serve.vote",
        "serve.yes_no",
    ),
    *(
        "rag.sentences",
        "rag.options",
        "rag.polarity",
        "pipeline.right",
        "pipeline.selective",
        "pipeline.reflection_report",
    ),
}
NO_VERSION_IN = {
    "elicit": STORING | BASE_QUANTIZED,
    "curate": STORING | BASE_QUANTIZED,
    "rerank": STORING | BASE_QUANTIZED,
    "train": BASE_QUANTIZED,
    "export": STORING | ASKING,
    "calibrate": STORING
    | BASE_QUANTIZED
    | {"serve.streaming", "pipeline.reflection_report"},  # it streams and reports nothing
    "exam": STORING | BASE_FILE | {"serve.streaming"},  # the exam does not stream
}

# For each section a key, and a value that is not the default.
CHANGES: dict[str, tuple[str, object]] = {
    "domain": ("abstain", "No idea."),
    "corpus": ("questions", "./questions.jsonl"),  # the same file
    "index": ("overlap_chars", 17),
    "retrieve": ("top_k", 7),
    "teacher": ("temperature", 0.1),
    "elicit": ("samples", 5),
    "curate": ("min_words", 1),
    "rerank": ("tau2", 3.0),
    "reflect": ("backend", "text"),
    "student": ("context", 4096),
    "train": ("rank", 8),
    "export": ("imatrix_tokens", 1),
    "parity": ("prompts", 3),
    "calibrate": ("folds", 3),
    "exam": ("resamples", 10),
    "serve": ("port", 9999),
}


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("pump", "press", "saw"):
        text = f"# The {name}\n\n## Care\nThe {name} is cleaned every day with a dry cloth and some oil.\n"
        (docs / f"{name}.md").write_text(text)
    return load_domain(str(new_domain("machines", docs, into=tmp_path / "machines")))


@pytest.fixture
def run(tmp_path: Path, domain: Domain) -> Run:
    """A run in which every stage has left something."""
    run = Run(tmp_path / "runs" / "machines" / "quick")
    for stage in STAGES:
        for what in stage.writes:
            for path in paths_of(what, domain, run):
                file = path / "weights" if what == "adapter" else path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(f"{what}\n")
    return run


def changed(domain: Domain, section: str) -> Domain:
    key, value = CHANGES[section]
    old = getattr(domain.config, section)
    assert getattr(old, key) != value
    new = old.model_copy(update={key: value})
    return replace(domain, config=domain.config.model_copy(update={section: new}))


@pytest.mark.parametrize("name", NAMES)
def test_config_counts_by_section(domain: Domain, run: Run, name: str) -> None:
    before = fingerprint(BY_NAME[name], domain, run)
    assert before == fingerprint(BY_NAME[name], domain, run)
    assert CHANGES.keys() == DomainConfig.model_fields.keys()
    now = {section: fingerprint(BY_NAME[name], changed(domain, section), run) for section in CHANGES}
    assert {section for section, digest in now.items() if digest != before} == {
        section.partition(".")[0] for section in BY_NAME[name].sections
    }


@pytest.mark.parametrize("name", NAMES)
def test_prompts_count_where_they_are_used(domain: Domain, run: Run, name: str) -> None:
    before = fingerprint(BY_NAME[name], domain, run)
    for prompt in domain.prompts:
        other = replace(domain, prompts={**domain.prompts, prompt: "Say nothing."})
        assert (fingerprint(BY_NAME[name], other, run) != before) == (prompt in BY_NAME[name].prompts)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_count_by_content(domain: Domain, run: Run, name: str) -> None:
    stage = BY_NAME[name]
    reflect = domain.config.reflect.model_copy(update={"backend": "tokens", "instructions": "general.jsonl"})
    domain = replace(domain, config=domain.config.model_copy(update={"reflect": reflect}))
    (domain.folder / "general.jsonl").write_text(
        '{"id": "g", "instruction": "What is 1 + 1?", "answer": "2."}\n'
    )
    (teacher := domain.folder / "other" / "train" / "adapter").mkdir(parents=True)
    for file in (teacher / "adapter_model.safetensors", teacher.parent / "network.json"):
        file.write_text("{}")
    train = domain.config.train.model_copy(update={"objective": "ce+kl", "kl_teacher": str(teacher.parent)})
    domain = replace(domain, config=domain.config.model_copy(update={"train": train}))
    before = fingerprint(stage, domain, run)
    everything = [
        "documents",
        "questions",
        "checks",
        "instructions",
        "kl_teacher",
        *(what for each in STAGES for what in each.writes),
    ]
    moved = set()
    for what in everything:
        for path in paths_of(what, domain, run):
            file = next(item for item in path.iterdir() if item.is_file()) if path.is_dir() else path
            text = file.read_bytes()
            file.write_bytes(text + b"more\n")
            if fingerprint(stage, domain, run) != before:
                moved.add(what)
            file.write_bytes(text)  # written again unchanged, at another time
            assert fingerprint(stage, domain, run) == before
    assert moved == set(stage.reads)


def test_a_document_more_or_renamed_makes_the_index_stale(domain: Domain, run: Run) -> None:
    seen = {fingerprint(BY_NAME["index"], domain, run)}
    (domain.documents / "new.md").write_text("# New\n")
    seen.add(fingerprint(BY_NAME["index"], domain, run))
    (domain.documents / "new.md").rename(domain.documents / "newer.md")
    seen.add(fingerprint(BY_NAME["index"], domain, run))
    assert len(seen) == 3


@pytest.mark.parametrize("name", NAMES)
def test_code_counts(
    domain: Domain, run: Run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = BY_NAME[name]
    before = fingerprint(stage, domain, run)
    find = importlib.util.find_spec

    def edited(target: str) -> Callable[[str], ModuleSpec | None]:
        def find_spec(module: str) -> ModuleSpec | None:
            spec = find(module)
            if module == target and spec is not None and spec.origin is not None:
                copy = tmp_path / "edited.py"
                copy.write_text(
                    Path(spec.origin).read_text(encoding="utf-8") + "\n# edited\n", encoding="utf-8"
                )
                return ModuleSpec(module, None, origin=str(copy))
            return spec

        return find_spec

    for module in (*stage.code, "domains.errors", "serve.http", "pipeline.doctor"):
        monkeypatch.setattr(importlib.util, "find_spec", edited(module))
        assert (fingerprint(stage, domain, run) != before) == (module in stage.code), module
        monkeypatch.undo()


def test_a_key_that_decides_the_teacher_counts(
    domain: Domain, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = domain.config.teacher.model_copy(update={"kind": "auto", "api_key_env": "SOME_KEY"})
    auto = replace(domain, config=domain.config.model_copy(update={"teacher": teacher}))
    monkeypatch.delenv("SOME_KEY", raising=False)
    without = {name: fingerprint(stage, auto, run) for name, stage in BY_NAME.items()}
    monkeypatch.setenv("SOME_KEY", "one")
    with_key = {name: fingerprint(stage, auto, run) for name, stage in BY_NAME.items()}
    # the critic of curate asks the teacher, too
    assert [name for name in NAMES if with_key[name] != without[name]] == ["elicit", "curate"]
    monkeypatch.setenv("SOME_KEY", "another")  # a new key is no new teacher
    assert fingerprint(BY_NAME["elicit"], auto, run) == with_key["elicit"]


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_is_done_until_an_output_is_deleted(domain: Domain, run: Run, name: str) -> None:
    stage = BY_NAME[name]
    assert not is_done(stage, domain, run)
    run.finish(name, Finished(fingerprint(stage, domain, run), {}, {}, 1.0))
    assert is_done(stage, domain, run)
    for what in stage.writes:
        for path in paths_of(what, domain, run):
            path.rename(path.with_name("away"))
            assert not is_done(stage, domain, run), what
            path.with_name("away").rename(path)
    assert is_done(stage, domain, run)
    run.finish(name, Finished("another", {}, {}, 1.0))
    assert not is_done(stage, domain, run)


def test_every_input_is_the_domains_or_written_by_an_earlier_stage() -> None:
    there = {"documents", "questions", "checks", "instructions", "kl_teacher"}
    for stage in STAGES:
        assert set(stage.reads) <= there, stage.name
        there |= set(stage.writes)


def test_what_a_stage_needs_of_another_is_among_its_outputs(domain: Domain, run: Run) -> None:
    """Else the advice "run that stage" would be answered by "done before"."""
    needed = []
    for name in NAMES:
        text = (ROOT / "pipeline" / f"{name}.py").read_text(encoding="utf-8")
        for expression, writer in re.findall(r"\bneed\((run\.[^,]+), stage=\"(\w+)\"\)", text):
            attribute, _, file = expression.removeprefix("run.").partition(" / ")
            needed.append((getattr(run, attribute) / file.strip('"'), writer))
    assert len(needed) >= 8
    for path, writer in needed:
        written = [each for what in BY_NAME[writer].writes for each in paths_of(what, domain, run)]
        assert any(each == path or path in each.parents for each in written), path


# -- the table against the code ----------------------------------------------------------------------


@cache
def source(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Our own modules that a module imports anywhere, but for type checking."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(source(module))
    ours = {
        (name, ROOT / name.replace(".", "/"))
        for name in found
        if name.split(".")[0] in PACKAGES and "." in name
    }
    return frozenset(
        name for name, path in ours if path.with_suffix(".py").exists() or (path / "__init__.py").exists()
    )


def reached(module: str) -> set[str]:
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += imports(name)
    # A package only hands on what its modules hold: it is followed, and has no version of its own.
    return {name for name in seen if not (ROOT / name.replace(".", "/")).is_dir()}


@pytest.mark.parametrize("stage", STAGES, ids=NAMES)
def test_the_modules_that_a_stage_uses_are_its_version(stage: Stage) -> None:
    used = reached(f"pipeline.{stage.name}")
    assert len(stage.code) == len(set(stage.code))
    excused = NO_VERSION.keys() | NO_VERSION_IN.get(stage.name, set())
    assert used - set(stage.code) - excused == set(), "list it in pipeline/stages.py, or here with the reason"
    assert set(stage.code) <= used, "listed, but not used"
    assert not set(stage.code) & excused


def test_nothing_is_excused_that_no_stage_uses() -> None:
    used = {stage.name: reached(f"pipeline.{stage.name}") for stage in STAGES}
    assert NO_VERSION.keys() <= set.union(*used.values())
    assert {
        name: modules - used[name] for name, modules in NO_VERSION_IN.items() if modules - used[name]
    } == {}


@pytest.mark.parametrize("stage", STAGES, ids=NAMES)
def test_the_sections_and_prompts_that_a_stage_reads_are_listed(stage: Stage) -> None:
    nodes = [*ast.walk(source(f"pipeline.{stage.name}"))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_config(node.value)}
    sections = read & DomainConfig.model_fields.keys()
    whole = {name for name in stage.sections if "." not in name}
    single = set(stage.sections) - whole  # keys of sections of which the stage reads a part
    keys = {
        f"{node.value.attr}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and _is_config(node.value.value)
    }
    assert {key for key in keys if key.partition(".")[0] in sections - whole} == single
    assert sections <= whole | {key.partition(".")[0] for key in single}
    # [corpus] says where the documents lie; a search for the format retrains by [train].
    carried = {"index": {"corpus"}, "export": {"train"}}
    assert whole - sections == carried.get(stage.name, set())
    prompts = {
        node.slice.value
        for node in nodes
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "prompts"
        and isinstance(node.slice, ast.Constant)
    }
    assert prompts == set(stage.prompts)


def _is_config(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "config") or (
        isinstance(node, ast.Attribute) and node.attr == "config"
    )
