"""What would stop the main job late is looked at before it starts: nothing has been paid or waited for then."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from domains.config import KvCache
from domains.domain import Domain
from domains.errors import ConfigError, TeacherError
from domains.jsonl import write_text_atomic
from pipeline.gguf_vocabulary import check_byte_level
from pipeline.gguf_writer import check_rope
from pipeline.merge import check_biases
from pipeline.progress import Progress
from pipeline.run_folder import Run
from pipeline.student import check_architecture
from serve.llama import check_head_width
from serve.models import SMOLLM2, check_base

FEW_SEEDS = 20  # answerable seed questions; with fewer a student learns next to nothing
_OWNER = "domain.txt"


def check_main_job(domain: Domain, run: Run, progress: Progress) -> None:
    """Pass if the run can be expected to reach its end; says what will make it a poor one.

    Raises:
        ConfigError: no questions, or the run folder belongs to another domain of the same name.
        DataError: the file of questions or of general instructions is missing or wrong.
        ModelError: the student's base is neither known, nor a folder, nor a hub id; or what is here of it says that it could
            be trained, but not exported.
        TeacherError: the teacher's key is missing while there is something to ask.
    """
    check_owner(domain, run)
    check_base(domain.config.student.base)
    config = domain.config
    _check_exportable(
        config.student.base,
        on_grid=config.train.grid is not None or config.export.rounding != "llama.cpp",
        kv_cache=config.serve.kv_cache,
    )
    questions = domain.read_questions()
    domain.read_instructions()
    teacher = domain.config.teacher
    key = teacher.api_key_env
    if teacher.kind == "endpoint" and key and not os.environ.get(key) and not run.rationales.exists():
        raise TeacherError(
            f"the environment variable {key} is not set",
            expected=f"the key of {teacher.base_url}",
            next_step=f'export {key}=…, or set [teacher] kind = "local"',
        )
    seeds = sum(question.split == "seed" and question.kind != "unanswerable" for question in questions)
    if seeds < FEW_SEEDS:
        progress.say(
            f"Only {seeds} seed questions: the student will learn next to nothing from them. "
            f"Write more into {domain.questions}, or let a strong teacher write them (docs/configuration.md)."
        )


def _check_exportable(base: str, *, on_grid: bool, kv_cache: KvCache) -> None:
    config, tokenizer = _json_of(base, "config.json"), _json_of(base, "tokenizer.json")
    check_biases(base, config)
    if "model_type" in config:
        check_architecture(base, config["model_type"])
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(rope, dict):
        check_rope(rope)
    widths = [
        config[name] for name in ("hidden_size", "intermediate_size") if isinstance(config.get(name), int)
    ]
    heads, hidden, head_dim = (
        config.get(name) for name in ("num_attention_heads", "hidden_size", "head_dim")
    )
    if isinstance(heads, int) and isinstance(head_dim, int):
        widths.append(heads * head_dim)  # the rows of o_proj
    elif isinstance(heads, int) and isinstance(hidden, int):
        head_dim = hidden // max(heads, 1)
    if isinstance(head_dim, int):
        check_head_width(head_dim, kv_cache, f"the base model {base!r}")
    if on_grid and widths:
        from pipeline.grids.blocks import BLOCK  # with torch
        from pipeline.methods.grid_base import no_place

        if odd := [width for width in widths if width % BLOCK]:
            raise no_place(f"the base model {base!r}", f"rows of {odd[0]} weights")
    if isinstance(tokenizer.get("model"), dict):
        check_byte_level(tokenizer["model"])


def _json_of(base: str, name: str) -> dict[str, Any]:
    """What can be read of a base's file without fetching anything; nothing of a base that is not here yet."""
    if base == SMOLLM2:
        return {}
    folder = Path(base).expanduser()
    if folder.is_dir():
        path: object = folder / name
    else:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(base, name)
    try:
        found = json.loads(Path(path).read_text("utf-8")) if isinstance(path, str | Path) else {}
    except (OSError, ValueError):
        found = {}  # loading it will say what is wrong
    return found if isinstance(found, dict) else {}


def check_owner(domain: Domain, run: Run) -> None:
    """Pass unless the runs of this name belong to another domain folder: a copied domain must get its own name.

    Raises:
        ConfigError: they do, and that folder is still there.
    """
    note = run.folder.parent / _OWNER
    own = str(domain.folder.resolve())
    owner = note.read_text(encoding="utf-8").strip() if note.is_file() else own
    if owner != own and (Path(owner) / "domain.toml").is_file():
        raise ConfigError(
            f"{run.folder.parent} holds the runs of the domain in {owner}, and {own} has the same name {domain.name!r}",
            expected="a name of its own for each domain: runs, ledger and bundles are kept under it",
            next_step=f"change [domain] name in {domain.folder / 'domain.toml'}, or give --runs DIR",
        )


def note_owner(domain: Domain, run: Run) -> None:
    """Write down which domain folder the runs of this name belong to."""
    text = f"{domain.folder.resolve()}\n"
    note = run.folder.parent / _OWNER
    if not note.is_file() or note.read_text(encoding="utf-8") != text:
        write_text_atomic(note, text)
