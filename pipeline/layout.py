"""Where every token of a pack lies in the tensors of a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.row_attention import Span

if TYPE_CHECKING:
    from pipeline.packing import Pack

IGNORED = -100  # torch's label for "no loss here"
EVEN = 32  # tokens: see `Levers.even_lengths`


@dataclass(frozen=True)
class Layout:
    """First the tokens that all rows begin with, once; then what is left of every row.

    Attributes:
        input_ids: [tokens].
        position_ids: [tokens]; each token's place in its row.
        prefix: how many tokens are shared.
        bounds: per row its first own token and the one after its last.
        places: [predictions]; tokens after which something is predicted.
        targets: [predictions]; what, or `IGNORED`.
        wanted: per row a range of tokens that holds its places; None where all tokens are places.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    prefix: int
    bounds: tuple[tuple[int, int], ...]
    places: torch.Tensor
    targets: torch.Tensor
    wanted: tuple[tuple[int, int], ...] | None

    @property
    def spans(self) -> list[Span]:
        """All tokens attend."""
        shared = [Span(0, 0, 0, self.prefix, 0)] if self.prefix else []
        return shared + [Span(self.prefix, start, start, end, start) for start, end in self.bounds]

    def last_spans(self) -> tuple[list[Span], torch.Tensor, torch.Tensor]:
        """Only wanted tokens attend: the spans, these tokens [queries], and `places` among them."""
        assert self.wanted is not None
        spans, at = [], 0
        for (start, _), (first, last) in zip(self.bounds, self.wanted, strict=True):
            spans.append(Span(self.prefix, start, first, last, at))
            at += last - first
        tokens = torch.cat([torch.arange(first, last) for first, last in self.wanted])
        return spans, tokens, torch.searchsorted(tokens, self.places)


def layout_of(
    packed: Pack, *, share: bool = False, padded: bool = False, even: bool = False, everywhere: bool = False
) -> Layout:
    """The layout of a pack.

    Args:
        packed: its rows.
        share: compute the common beginning of its rows once.
        padded: make every row as long as the longest, with token 0.
        even: make every length a multiple of `EVEN`, with token 0 behind a row, where no other token sees it.
        everywhere: predict after every token, with `IGNORED` where nothing is supervised.
    """
    rows = packed.rows
    step = EVEN if even else 1
    prefix = _common(packed) // step * step if share else 0
    longest = max(len(row.ids) for row in rows)
    ids, positions = list(rows[0].ids[:prefix]), list(range(prefix))
    bounds, wanted, places, targets = [], [], [], []
    for row in rows:
        offset = len(ids) - prefix  # from a token's place in its row to its place here
        end = longest if padded else -(-len(row.ids) // step) * step
        bounds.append((len(ids), offset + end))
        ids += [*row.ids[prefix:], *[0] * (end - len(row.ids))]
        positions += range(prefix, end)
        labels = row.labels
        chosen = [
            place for place in range(max(prefix, 1), len(labels)) if everywhere or labels[place] != IGNORED
        ]
        places += [offset + place - 1 for place in chosen]
        targets += [labels[place] for place in chosen]
        first = chosen[0] - 1 if chosen else prefix
        last = chosen[-1] if chosen else first
        wanted.append((offset + first // step * step, offset + -(-last // step) * step))
    return Layout(
        torch.tensor(ids),
        torch.tensor(positions),
        prefix,
        tuple(bounds),
        torch.tensor(places, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        None if everywhere else tuple(wanted),
    )


def _common(packed: Pack) -> int:
    """How many tokens all rows begin with, short of the first that predicts a supervised one."""
    rows = packed.rows
    if len(rows) < 2:
        return 0
    room = min(row.n_prompt for row in rows) - 1
    first = rows[0].ids
    count = 0
    while count < room and all(row.ids[count] == first[count] for row in rows):
        count += 1
    return count
