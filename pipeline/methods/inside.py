"""What `qalora` and `qat` share: the adapter lies inside the blocks, and the blocks are the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from domains.routes import Grid
from pipeline.grids.blocks import Packed
from pipeline.methods.adapter_files import load_blocks, save_adapter, save_blocks
from pipeline.methods.block_linear import BlockLinear, BlockNetwork
from pipeline.methods.grid_base import check_trained, outer_packed, pack_blocks, set_linears, set_outer
from pipeline.methods.method import Adapter, Trained
from pipeline.methods.rules import Rule
from pipeline.qlora import to_training, training_device
from pipeline.student import Base


@dataclass(frozen=True)
class Inside:
    """A method whose adapter moves blocks. ``rules_of`` gives the rule of every matrix by parameter name."""

    name: str
    grid: Grid
    rules_of: Callable[[Base], Mapping[str, Rule]]

    def base_dtype(self, arithmetic: torch.dtype) -> torch.dtype:  # noqa: ARG002
        """float32: norms go into the file as they are, and rounding begins with unrounded weights."""
        return torch.float32

    def prepare(self, base: Base, adapter: Adapter, say: Callable[[str], None]) -> BlockNetwork:
        """See `Method.prepare`."""
        say(f"{self.name}: the student's blocks lie on the {self.grid} grid, as they will in its file")
        model, device = base.model, training_device()
        rules = self.rules_of(base)
        frozen = _frozen(rules, model.config.num_hidden_layers, adapter.layers)
        fixed = outer_packed(base) | pack_blocks(
            {name: rules[name].blocks(torch.zeros(rules[name].rows, rules[name].width)) for name in frozen}
        )
        set_outer(model, fixed)
        set_linears(model, fixed)
        model.requires_grad_(False)
        to_training(model, adapter.dtype)  # before the adapters, which stay float32
        with torch.random.fork_rng():
            torch.manual_seed(adapter.seed)
            for name in [name for name in rules if name not in frozen]:
                layer = BlockLinear(
                    rules[name],
                    rank=adapter.rank,
                    scaling=adapter.scaling,
                    dtype=adapter.dtype,
                    device=device,
                )
                parent, _, last = name.removesuffix(".weight").rpartition(".")
                setattr(model.get_submodule(parent), last, layer)
        return BlockNetwork(model, fixed)

    def save(self, adapted: BlockNetwork, folder: Path, *, base_name: str) -> dict[str, Any]:
        """See `Method.save`."""
        packed, layers = packed_of(adapted), dict(adapted.linears())
        check_trained(
            packed,
            lambda name: layers[name].weight if name in layers else adapted.network.get_parameter(name),
        )
        weights = {}
        for name, layer in layers.items():
            weights[f"{name}.lora_A"], weights[f"{name}.lora_B"] = layer.a, layer.b
        save_adapter(folder, weights, {"method": self.name, "grid": self.grid, "base": base_name})
        save_blocks(folder, packed)
        return {"quantization": self.grid}

    def load(self, folder: Path, base: Base) -> Trained:
        """See `Method.load`: an ordinary network with the numbers that the blocks decode to."""
        packed = load_blocks(folder)
        set_outer(base.model, packed)
        set_linears(base.model, packed)
        return Trained(base.model.float().eval(), base, packed, grid=self.grid)


def packed_of(adapted: BlockNetwork) -> dict[str, Packed]:
    """All matrices of the training network as they are now, as bytes."""
    blocks = {name: layer.blocks() for name, layer in adapted.linears()}
    return {**adapted.fixed, **pack_blocks(blocks)}


def _frozen(rules: Mapping[str, Rule], count: int, layers: int) -> set[str]:
    """The matrices below the topmost ``layers`` of ``count`` layers; none for 0."""
    if not layers:
        return set()
    return {name for name in rules if int(name.split(".")[2]) < count - layers}
