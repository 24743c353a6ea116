"""What frozen layers gave for each row, so that they run once and not once an epoch.

Rows attend within themselves only, so their hidden states are the same in every pack. They are kept in the arithmetic's
type in memory while they take less than a quarter of what is free, else in a file that goes away with the cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.levers import free_memory
from pipeline.run_folder import check_space

if TYPE_CHECKING:
    from pipeline.layout import Layout
    from pipeline.packing import Pack, Row

_SHARE = 1 / 4  # of the free memory


class LayerCache:
    """Hidden states after the first ``layers`` layers, per row.

    Args:
        layers: how many are frozen, from below.
        rows: all rows that will be asked for.
        width: of the hidden states.
        dtype: of the arithmetic.
        folder: for the file.
    """

    def __init__(
        self, layers: int, rows: Sequence[Row], *, width: int, dtype: torch.dtype, folder: Path
    ) -> None:
        self.layers = layers
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}
        total = 0
        for row in rows:
            if row.ids not in self._places:
                self._places[row.ids] = (total, total + len(row.ids))
                total += len(row.ids)
        self.size_bytes = total * width * dtype.itemsize
        self._path = None
        if self.size_bytes <= _SHARE * free_memory():
            self._states = torch.empty(total, width, dtype=dtype)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / "frozen_layers.bin"
            self._path.unlink(missing_ok=True)
            check_space(folder, self.size_bytes)
            flat = torch.from_file(str(self._path), shared=True, size=total * width, dtype=dtype)
            self._states = flat.view(total, width)
        self._known: set[tuple[int, ...]] = set()

    @property
    def in_file(self) -> bool:
        """Whether memory was too small."""
        return self._path is not None

    def knows(self, row: Row) -> bool:
        """Whether `put` had it."""
        return row.ids in self._known

    def find(self, packed: Pack, layout: Layout) -> torch.Tensor:
        """Hidden states as ``layout`` wants them, of rows that are all known: [tokens, width]."""
        parts = [self._of(packed.rows[0])[: layout.prefix]]
        for row, (start, end) in zip(packed.rows, layout.bounds, strict=True):
            part = self._of(row)[layout.prefix :]
            padding = part.new_zeros(end - start - len(part), part.shape[1])
            parts += [part, padding]
        return torch.cat(parts)

    def put(self, row: Row, states: torch.Tensor) -> None:
        """Remember a row's hidden states [tokens, width]."""
        self._of(row).copy_(states)
        self._known.add(row.ids)

    def close(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _of(self, row: Row) -> torch.Tensor:
        start, end = self._places[row.ids]
        return self._states[start:end]


def frozen_layers(weights: Iterable[str], count: int) -> int:
    """How many layers, from below, no trained weight acts in.

    Args:
        weights: the trained weights' names.
        count: all layers; what is trained outside of them (rows of the embedding) lies below.
    """
    lowest = count
    for name in weights:
        found = re.search(r"\.layers\.(\d+)\.", name)
        lowest = min(lowest, int(found[1]) if found else 0)
    return lowest
