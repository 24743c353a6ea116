"""Checks a GGUF LoRA against the model it is meant for, before llama.cpp maps the file.

The layout is llama.cpp's (its convert_lora_to_gguf): for each adapted matrix of the model, ``NAME.lora_a``
[rank, in] and ``NAME.lora_b`` [out, rank]; what is added is (alpha / rank) B A.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import NoReturn

from domains.errors import ModelError
from serve.gguf_check import GgufFacts, check_gguf

_KINDS = {"F32", "F16", "BF16", "Q8_0"}
_FACTORS = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class AdapterFacts:
    """A checked adapter: the matrices it changes, by their names in the model, and its scale's numerator."""

    path: Path
    size_bytes: int
    alpha: float
    targets: tuple[str, ...]


def check_adapter(path: Path, model: GgufFacts) -> AdapterFacts:
    """The facts of an adapter, after its header was checked against the file and against its model's.

    Raises:
        ModelError: missing or damaged, no LoRA, or for a model of other shapes (names the first matrix).
    """
    facts = check_gguf(path)
    kind, method = facts.metadata.get("general.type"), facts.metadata.get("adapter.type")
    if (kind, method) != ("adapter", "lora"):
        _refuse(
            path, model, f"general.type is {kind!r} and adapter.type {method!r}, not 'adapter' and 'lora'"
        )
    alpha = facts.metadata.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not isfinite(alpha) or alpha <= 0:  # 0 would mean "don't scale"
        _refuse(path, model, f"adapter.lora.alpha is {alpha!r}, not a positive number")
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    factors = {tensor.name: tensor.shape for tensor in facts.tensors}
    for tensor in facts.tensors:
        if not tensor.name.endswith(_FACTORS) or tensor.kind not in _KINDS:
            _refuse(path, model, f"it holds {tensor.name!r} of type {tensor.kind}")
    targets = sorted({name.rpartition(".")[0] for name in factors})
    for target in targets:
        a, b, shape = factors.get(f"{target}.lora_a"), factors.get(f"{target}.lora_b"), shapes.get(target)
        if shape is None or len(shape) != 2 or target == "token_embd.weight":
            _refuse(path, model, f"it changes {target!r}, which is no linear layer of the model")
        if a is None or b is None or len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != shape:
            _refuse(path, model, f"{target!r} has factors {a} and {b} for a matrix {shape}")
    return AdapterFacts(path, facts.size_bytes, alpha, tuple(targets))


def _refuse(path: Path, model: GgufFacts, why: str) -> NoReturn:
    raise ModelError(
        f"{path} is not a usable adapter: {why}",
        expected=f"a GGUF LoRA for {model.path.name}: pairs [rank, in] and [out, rank] of its matrices",
        next_step="copy the bundle again, or preceptor export DOMAIN",
    )
