"""What a training method is: it puts an adapter on a base, saves it, and brings the trained network back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from domains.routes import Grid
from pipeline.grids.blocks import Packed
from pipeline.student import Base


@dataclass(frozen=True)
class Adapter:
    """The adapter's shape, and how training computes.

    ``token_rows`` are rows of the vocabulary that are trained too; ``layers`` is how many of the topmost layers get an
    adapter (0: all).
    """

    rank: int
    alpha: float
    dropout: float
    seed: int
    dtype: torch.dtype
    token_rows: tuple[int, ...] = ()
    layers: int = 0

    @property
    def scaling(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Trained:
    """A trained student, as it comes back from its files: in eval mode, computing in float32.

    ``packed`` are the matrices that must stand in the served file byte for byte, by transformers' names; empty where
    nothing is promised, and what is served is merged and rounded. The blocks' are on ``grid``. ``low_rank`` is the adapter that is served beside
    them, (A [rank, in], B [out, rank]) per matrix; empty where it lies inside them.
    """

    network: Any
    base: Base
    packed: Mapping[str, Packed] = field(default_factory=dict)
    low_rank: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    alpha: float = 0.0
    grid: Grid | None = None


class Method(Protocol):
    """One way to train. The folder that it writes and reads is the train stage's ``adapter/``."""

    def base_dtype(self, arithmetic: torch.dtype) -> torch.dtype:
        """What the base's weights are loaded in where training computes with ``arithmetic``."""

    def prepare(self, base: Base, adapter: Adapter, say: Callable[[str], None]) -> Any:
        """Turn ``base.model`` into the training network, in place; it computes in ``adapter.dtype``.

        Returns:
            A module around it: its parameters that require gradients are the adapter, and its ``disable_adapter()``
            is a context without it.

        Raises:
            ModelError: the base has a matrix for which the method has no place.
        """

    def save(self, adapted: Any, folder: Path, *, base_name: str) -> dict[str, Any]:
        """Write the adapter into the empty ``folder``; returns facts for ``network.json``."""

    def load(self, folder: Path, base: Base) -> Trained:
        """The trained network again.

        Args:
            folder: what `save` wrote.
            base: the one trained on, loaded in `base_dtype`; its model is taken apart.

        Raises:
            ModelError: a file is missing or does not belong to this base.
        """
