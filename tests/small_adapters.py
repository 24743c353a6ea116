"""A tiny base and tiny GGUF LoRA adapters of it, for tests of serving several domains on one base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from pipeline.gguf_names import gguf_name, permute_rows
from pipeline.gguf_writer import write_llama_gguf
from tests.small_models import TEMPLATE, small_llama, small_tokenizer

RANK, ALPHA = 4, 8.0
Factors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def write_base(path: Path, state: dict[str, Any] | None = None) -> Path:
    """The same random Llama every time (or with other weights), as F32."""
    model = small_llama()
    write_llama_gguf(
        path,
        state=state or model.state_dict(),
        config=model.config,
        tokenizer=small_tokenizer(),
        template=TEMPLATE,
        name="small",
        licence="CC0-1.0",
        file_type="F32",
    )
    return path


def random_factors(seed: int, *, size: float = 0.5) -> Factors:
    """Factors (A [rank, in], B [out, rank]) for every linear layer of the small Llama's blocks."""
    rng = np.random.default_rng(seed)
    found: Factors = {}
    for name, weight in small_llama().state_dict().items():
        if name.endswith("_proj.weight"):
            rows, width = weight.shape
            a = rng.normal(0, width**-0.5, (RANK, width)).astype(np.float32)
            found[name] = a, rng.normal(0, size * RANK**-0.5, (rows, RANK)).astype(np.float32)
    return found


def merged_state(factors: Factors) -> dict[str, Any]:
    """The small Llama's weights with W + (alpha / rank) B A."""
    import torch

    state = small_llama().state_dict()
    return {
        name: value + ALPHA / RANK * torch.from_numpy(factors[name][1] @ factors[name][0])
        if name in factors
        else value
        for name, value in state.items()
    }


def write_adapter(path: Path, factors: Factors, **changes: Any) -> Path:
    """A GGUF LoRA, written by hand; ``changes`` replace its facts (type, method, alpha) or tensors' names."""
    heads = {"attn_q": 4, "attn_k": 2}
    writer = GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_type(changes.get("type", "adapter"))
    writer.add_string("adapter.type", changes.get("method", "lora"))
    if (alpha := changes.get("alpha", ALPHA)) is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in factors.items():
        target = gguf_name(name) or name
        kind = target.split(".")[-2]
        rows = permute_rows(b, heads[kind]) if kind in heads else b
        writer.add_tensor(f"{target}.lora_a", a)
        writer.add_tensor(f"{target}{changes.get('second', '.lora_b')}", np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TOML = """
[domain]
name = "{name}"
title = "The domain {name}"

[corpus]
documents = "documents"

[retrieve]
top_k = 1

[student]
context = 512

[serve]
max_tokens = 24
parallel = 2
unsupported = "keep"
"""


def write_bundle(folder: Path, base: Path, adapter: Path | None, *, name: str, documents: list[str]) -> Path:
    """A ready bundle: a student (linked), its adapter if any, an index over some of the shelf's documents."""
    from domains.config import parse_config
    from domains.records import Document
    from pipeline.bundle import ADAPTER, close_bundle, mark_ready
    from rag.embed import MiniLMEmbedder
    from rag.index import update_index
    from serve.manifest import BaseModelFacts
    from tests.small_serving import TEXTS

    folder.mkdir()
    shutil.copyfile(base, folder / "student.gguf")
    if adapter:
        shutil.copyfile(adapter, folder / ADAPTER)
    found = [Document(doc_id=item.lower(), title=item, text=TEXTS[item], source=item) for item in documents]
    update_index(folder / "index", found, embedder=MiniLMEmbedder(), max_chars=400, overlap_chars=0)
    close_bundle(
        folder,
        config=parse_config(TOML.format(name=name), origin=name),
        prompts={"system": f"You answer for {name}.", "teacher": "Explain."},
        base=BaseModelFacts(name="small", licence="CC0-1.0", version=""),
        teachers=["local"],
        template=TEMPLATE,
    )
    (folder / "parity.json").write_text("{}", encoding="utf-8")
    mark_ready(folder, ready=True)
    return folder
