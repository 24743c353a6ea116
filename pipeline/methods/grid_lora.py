"""LoRA (arXiv 2106.09685) beside a base on a GGUF grid: QLoRA with the served file's own numbers instead of NF4.

The adapter is never merged. llama.cpp adds it to the base in every forward pass, so one base in memory serves any
number of domains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from domains.routes import Grid
from pipeline.grids.blocks import Packed
from pipeline.methods.adapter_files import load_blocks, save_blocks
from pipeline.methods.grid_base import (
    Calibration,
    base_blocks,
    check_trained,
    outer_packed,
    pack_blocks,
    set_linears,
    set_outer,
)
from pipeline.methods.method import Adapter, Trained
from pipeline.methods.peft_files import save_peft
from pipeline.qlora import attach_lora, load_adapter, to_training
from pipeline.student import Base

_PACKED = "grid_blocks"  # where the training network carries its blocks


@dataclass(frozen=True)
class GridLora:
    """The frozen base lies on ``grid``; rounded by GPTQ where there is a ``calibration``."""

    grid: Grid
    calibration: Calibration | None = None

    def base_dtype(self, arithmetic: torch.dtype) -> torch.dtype:  # noqa: ARG002
        """float32: norms go into the file as they are, and rounding begins with unrounded weights."""
        return torch.float32

    def prepare(self, base: Base, adapter: Adapter, say: Callable[[str], None]) -> Any:
        """See `Method.prepare`."""
        say(f"grid-lora: the base lies on the {self.grid} grid, the adapter beside it")
        if self.calibration is not None:
            say(
                "rounded on this domain's rows, the base is this domain's own: no other domain's adapter runs on it"
            )
        packed = outer_packed(base) | pack_blocks(base_blocks(base, self.grid, self.calibration))
        _round(base, packed)
        to_training(base.model, adapter.dtype)
        adapted = attach_lora(
            base.model,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            seed=adapter.seed,
            layers=adapter.layers,
        )
        setattr(adapted, _PACKED, packed)
        return adapted

    def save(self, adapted: Any, folder: Path, *, base_name: str) -> dict[str, Any]:
        """See `Method.save`; PEFT's format, and the base's blocks."""
        network, packed = adapted.get_base_model(), getattr(adapted, _PACKED)
        check_trained(packed, lambda name: _base_weight(network.get_submodule(name.removesuffix(".weight"))))
        save_peft(adapted, folder, base_name=base_name)
        save_blocks(folder, packed)
        return {"quantization": self.grid}

    def load(self, folder: Path, base: Base) -> Trained:
        """See `Method.load`."""
        from peft.tuners.lora import LoraLayer

        packed = load_blocks(folder)
        _round(base, packed)
        adapted = load_adapter(base.model.float(), folder).eval()
        low_rank, alpha = {}, 0.0
        for path, layer in adapted.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                (name,) = layer.active_adapters
                pair = (layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach())
                low_rank[f"{path}.weight"], alpha = pair, float(layer.lora_alpha[name])
        return Trained(adapted, base, packed, low_rank, alpha, self.grid)


def _base_weight(module: Any) -> torch.Tensor:
    from peft.tuners.lora import LoraLayer

    weight: torch.Tensor = (module.get_base_layer() if isinstance(module, LoraLayer) else module).weight
    return weight


def _round(base: Base, packed: dict[str, Packed]) -> None:
    set_outer(base.model, packed)
    set_linears(base.model, packed)
