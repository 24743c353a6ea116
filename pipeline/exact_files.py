"""Writes a student whose very blocks were trained: nothing is merged, rounded or encoded on the way.

A base that several domains' adapters share is the same file for all of them: it is kept once, under its hash, in
``<runs>/.bases``, and bundles hold hard links to it (copies where the file system knows no links).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from domains.routes import Grid
from pipeline.gguf_lora import write_lora_gguf
from pipeline.gguf_tensors import read_packed
from pipeline.gguf_writer import write_llama_gguf
from pipeline.grids.blocks import Packed
from pipeline.methods.method import Trained
from serve.models import sha256_file

_BASES = ".bases"


def write_exact(path: Path, network: Any, trained: Trained, *, grid: Grid, name: str) -> None:
    """Write the trained blocks as they are; what is no block (norms) comes from ``network``.

    Args:
        path: the GGUF file.
        network: a plain ``LlamaForCausalLM``.
        trained: holds the packed matrices.
        grid: of most of them; the file says so.
        name: ``general.name``.
    """
    base = trained.base
    write_llama_gguf(
        path,
        state=network.state_dict(),
        config=network.config,
        tokenizer=base.tokenizer,
        template=base.template,
        name=name,
        licence=base.licence,
        end_of_turn=base.end_of_turn,
        copy_tokenizer_from=base.gguf,
        packed=trained.packed,
        file_kind=grid,
    )


def write_adapter(path: Path, network: Any, trained: Trained, *, name: str) -> None:
    """Write the adapter that is served beside the blocks, float32: the very numbers that were trained."""
    write_lora_gguf(
        path,
        {matrix: (a.float().cpu(), b.float().cpu()) for matrix, (a, b) in sorted(trained.low_rank.items())},
        alpha=trained.alpha,
        config=network.config,
        name=name,
        base_name=trained.base.name,
    )


def find_strangers(path: Path, packed: Mapping[str, Packed], config: Any) -> list[str]:
    """The matrices of a file, read back, that are not byte for byte those in ``packed``."""
    found = read_packed(path, config)
    return [name for name, matrix in sorted(packed.items()) if not _same(found.get(name), matrix)]


def _same(one: Packed | None, other: Packed) -> bool:
    return one is not None and one.kind == other.kind and bool(np.array_equal(one.rows, other.rows))


def share_base(source: Path, target: Path, *, runs: Path) -> None:
    """Move a base file to ``target``, and let bundles with the same base hold one file between them.

    Files that no bundle holds any more are removed.

    Args:
        source: is gone afterwards.
        target: replaced when it exists.
        runs: the folder with all runs.
    """
    kept = runs / _BASES / f"{sha256_file(source)}.gguf"
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if not kept.is_file():
            os.link(source, kept)
        os.link(kept, temporary)
        temporary.replace(target)
        source.unlink()
    except OSError:  # no hard links here
        source.replace(target)
    finally:
        temporary.unlink(missing_ok=True)  # still there where target already was a link to the same file
    for path in kept.parent.glob("*.gguf"):
        if path.stat().st_nlink == 1:
            path.unlink()
