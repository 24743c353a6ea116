"""The student in the formats that laptops run, and an honest account of what llama.cpp really wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from domains.config import GgufType
from serve.gguf_check import check_gguf
from serve.quantizer import requantize

# What llama.cpp mixes into a format on purpose (src/llama-quant.cpp): wider types for the output matrix and
# some projections. Anything else is a fallback for rows that the format's block does not divide.
_FAMILY: dict[GgufType, frozenset[str]] = {
    "F16": frozenset({"F16", "F32"}),
    "Q8_0": frozenset({"Q8_0", "F32"}),
    "Q4_0": frozenset({"Q4_0", "Q4_1", "Q6_K", "F32"}),
    "Q4_1": frozenset({"Q4_1", "Q6_K", "F32"}),
    "Q4_K_M": frozenset({"Q4_K", "Q5_K", "Q6_K", "F32"}),
}
_OUTER = ("token_embd.weight", "output.weight")
# Mean over all tensors of Llama models of 0.1 to 3 billion weights, the fallbacks of odd widths included:
# for the estimate of disk space.
BITS_PER_WEIGHT: dict[GgufType, float] = {"F16": 16.0, "Q8_0": 8.6, "Q4_0": 5.6, "Q4_1": 6.0, "Q4_K_M": 6.5}


@dataclass(frozen=True)
class QuantizeReport:
    """What was written. ``kinds`` counts tensors by GGML type; ``fallbacks`` names the unexpected ones."""

    asked: GgufType
    size_bytes: int
    bits_per_weight: float
    kinds: dict[str, int]
    fallbacks: tuple[str, ...]

    def describe(self) -> str:
        """One line for a person: size, true width, and where the name of the format promises too much."""
        line = f"{self.asked}: {self.size_bytes / 1e6:.0f} MB, {self.bits_per_weight:.2f} bits per weight"
        if not self.fallbacks:
            return line
        total = sum(self.kinds.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items() if kind != "F32")
        return (
            f"{line}; {len(self.fallbacks)} of {total} tensors have rows that its blocks do not divide and "
            f"are wider ({kinds})"
        )


def quantize(
    source: Path,
    target: Path,
    *,
    kind: GgufType,
    imatrix: Mapping[str, NDArray[np.float32]] | None = None,
) -> QuantizeReport:
    """Write a GGUF file in another format, by llama.cpp's quantizer.

    Args:
        source: the student in F16.
        target: appears whole or not at all.
        kind: the format asked for.
        imatrix: see `pipeline.imatrix`; None rounds without weights.

    Raises:
        ModelError: the source is damaged, or llama.cpp refuses.
    """
    requantize(source, target, kind, imatrix=imatrix)
    return describe_file(target, kind)


def describe_file(path: Path, kind: GgufType, *, outer: GgufType | None = None) -> QuantizeReport:
    """What a file in the format ``kind`` holds; ``outer`` is a type that embedding and output matrix may have on purpose."""
    facts = check_gguf(path)
    return QuantizeReport(
        asked=kind,
        size_bytes=facts.size_bytes,
        bits_per_weight=round(facts.bits_per_weight, 3),
        kinds=facts.kind_counts,
        fallbacks=tuple(
            tensor.name
            for tensor in facts.tensors
            if tensor.kind not in _FAMILY[kind] and not (tensor.name in _OUTER and tensor.kind == outer)
        ),
    )
