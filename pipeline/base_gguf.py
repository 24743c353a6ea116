"""The untrained student as a GGUF file: what the exam's base arms answer with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from serve.models import SMOLLM2, cache_folder, inference_gguf


def base_gguf(base: str) -> Path:
    """The base model's file.

    The default model's exists already; another base (a Hugging Face id or a folder) is written once, in F16,
    to the cache.

    Raises:
        ModelError: it can't be loaded (see `pipeline.student.load_base`), or llama.cpp has no place for it.
    """
    if base == SMOLLM2:
        return inference_gguf(base)
    target = cache_folder() / f"base-{Path(base).name}-{_state(base)}.F16.gguf"
    if not target.is_file():
        _write(base, target)
    return inference_gguf(str(target))


def _state(base: str) -> str:
    """Names a state of the weights without reading them: a folder's sizes and times, or the hub's commit."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        stats = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
        state: object = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    else:
        from transformers import AutoConfig

        try:
            state = getattr(AutoConfig.from_pretrained(base, trust_remote_code=False), "_commit_hash", None)
        except (OSError, ValueError):
            state = None  # loading it will say what is wrong
    return hashlib.sha256(json.dumps([base, state]).encode()).hexdigest()[:12]


def _write(base: str, target: Path) -> None:
    import torch

    from pipeline.gguf_writer import write_llama_gguf
    from pipeline.student import load_base

    loaded = load_base(base, dtype=torch.float16)
    write_llama_gguf(
        target,
        state=loaded.model.state_dict(),
        config=loaded.model.config,
        tokenizer=loaded.tokenizer,
        template=loaded.template,
        name=loaded.name,
        licence=loaded.licence,
        end_of_turn=loaded.end_of_turn,
    )
