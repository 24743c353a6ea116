"""The untrained student as a GGUF file: what the exam's base arms answer with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from domains.errors import ModelError
from serve.models import SMOLLM2, cache_folder, inference_gguf


def base_gguf(base: str) -> Path:
    """The base model's file.

    The default model's exists already; another base (a Hugging Face id or a folder) is written once, in F16,
    to the cache.

    Raises:
        ModelError: it can't be loaded, or llama.cpp has no place for it.
    """
    if base == SMOLLM2:
        return inference_gguf(base)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(base)
        target = cache_folder() / f"base-{Path(base).name}-{_version(base, config)}.F16.gguf"
        if not target.is_file():
            _write(base, config, target)
    except OSError as error:  # what transformers makes of an unknown id, a lacking file, or no network
        raise ModelError(
            f"can't load the base model {base!r}: {str(error).splitlines()[0]}",
            expected=f"{SMOLLM2!r}, a Hugging Face id that is in the local cache or reachable, or a folder",
            next_step="check [student] base in domain.toml",
        ) from error
    return inference_gguf(str(target))


def _version(base: str, config: Any) -> str:
    """Names a state of the weights: the revision of a Hugging Face id, or sizes and times of a folder's files."""
    folder = Path(base).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    state = json.dumps([base, stats, getattr(config, "_commit_hash", None)])
    return hashlib.sha256(state.encode()).hexdigest()[:12]


def _write(base: str, config: Any, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.gguf_writer import write_llama_gguf

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if not tokenizer.chat_template:
        raise ModelError(
            f"the base model {base!r} has no chat template",
            expected="an instruction-tuned model",
            next_step="name another [student] base in domain.toml",
        )
    write_llama_gguf(
        target,
        state=model.state_dict(),
        config=config,
        tokenizer=tokenizer,
        template=tokenizer.chat_template,
        name=base,
        licence="",
    )
