"""QLoRA (arXiv 2305.14314): an adapter beside NF4 weights, merged and rounded once more for serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.merge import check_biases
from pipeline.methods.method import Adapter, Trained
from pipeline.methods.peft_files import save_peft
from pipeline.qlora import attach_lora, load_adapter, quantize_nf4
from pipeline.student import Base


@dataclass(frozen=True)
class Qlora:
    """No grid: the file that is served is not what was trained, and the parity gate says how far it is off."""

    def base_dtype(self, arithmetic: torch.dtype) -> torch.dtype:
        """The arithmetic's: what it rounds is rounded before NF4."""
        return arithmetic

    def prepare(self, base: Base, adapter: Adapter, say: Callable[[str], None]) -> Any:
        """See `Method.prepare`; NF4 by bitsandbytes, double quantization."""
        check_biases(base.name, base.model.config.to_dict())
        kept = quantize_nf4(base.model)
        dtype = str(base.model.dtype).removeprefix("torch.")
        how = "read back at every use" if kept else f"read back once, kept as {dtype} (memory allows)"
        say(f"NF4 weights are {how}")
        return attach_lora(
            base.model,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            seed=adapter.seed,
            token_rows=adapter.token_rows,
            layers=adapter.layers,
        )

    def save(self, adapted: Any, folder: Path, *, base_name: str) -> dict[str, Any]:
        """See `Method.save`; PEFT's format."""
        save_peft(adapted, folder, base_name=base_name)
        return {"quantization": "nf4, double"}

    def load(self, folder: Path, base: Base) -> Trained:
        """See `Method.load`.

        The base's weights are rounded to NF4 and kept in the type that training computed with, as training did, then
        widened: the weights are those of training, free of bfloat16's rounding of intermediate results.
        """
        quantize_nf4(base.model, keep_quantized=False)
        return Trained(load_adapter(base.model, folder).float().eval(), base)
