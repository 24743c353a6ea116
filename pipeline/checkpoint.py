"""A training run's state in one safetensors file, written atomically: no pickle, and whole or absent.

Tensors: ``adapter.<name>``, and per adapter weight AdamW's ``exp_avg.<name>`` and ``exp_avg_sq.<name>``;
``rng``. The rest is JSON in the file's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """What a training run has done. ``history`` are the lines of ``loss.jsonl`` so far."""

    fingerprint: str
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(
    path: Path, state: State, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write the state, the adapter, the optimizer and the random number generator.

    Args:
        path: the file; replaced in one move.
        state: goes into the metadata.
        weights: the trainable parameters by name.
        optimizer: AdamW over exactly these.
    """
    from safetensors.torch import save_file

    tensors = {"rng": torch.get_rng_state()}
    for name, weight in weights.items():
        tensors[f"adapter.{name}"] = weight.detach().cpu().contiguous()
        for moment in _MOMENTS:
            if moment in optimizer.state[weight]:
                tensors[f"{moment}.{name}"] = optimizer.state[weight][moment].cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, str(temporary), metadata={"state": json.dumps(asdict(state))})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: Path) -> State | None:
    """The state in a checkpoint; None where there is none, or one that can't be read."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            return State(**json.loads(file.metadata()["state"]))
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None


def restore(
    path: Path, state: State, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put the checkpoint's tensors back, so that training goes on as if it had never stopped."""
    from safetensors.torch import load_file

    tensors = load_file(str(path))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"adapter.{name}"])
            if f"exp_avg.{name}" not in tensors:
                continue
            optimizer.state[weight] = {
                "step": torch.tensor(float(state.step)),
                **{moment: tensors[f"{moment}.{name}"].to(weight.device) for moment in _MOMENTS},
            }
    torch.set_rng_state(tensors["rng"])
