"""Training rows as tokens, and several rows in one forward pass.

A pack is a plain concatenation: no padding, positions that restart with every row, and attention that never
crosses from one row into another ("packing" without cross-contamination, arXiv 2107.02027). Attention runs
row by row; a mask over the whole pack would compute the pairs between rows only to throw them away. What all rows of
a pack begin with (the system prompt) is computed once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from domains.records import Example
from pipeline.layer_cache import LayerCache
from pipeline.layout import IGNORED, layout_of
from pipeline.levers import Levers
from pipeline.packed_forward import attend_packed, hidden_of, no_mask
from pipeline.student import Base, encode_completion, encode_prompt, render_prompt

ATTENTION = "preceptor_packed"
_LEVERS = Levers()


@dataclass(frozen=True)
class Row:
    """An example as token ids: the first ``n_prompt`` are given, the rest is supervised.

    ``given`` are further ranges [start, end) of tokens that are not: the passages inside a reflected answer.
    """

    id: str
    ids: tuple[int, ...]
    n_prompt: int
    given: tuple[tuple[int, int], ...] = ()

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss: the completion and the end of the turn, without what is given."""
        return len(self.ids) - self.n_prompt - sum(end - start for start, end in self.given)

    @property
    def labels(self) -> list[int]:
        """Each token's own id where it is supervised, `IGNORED` elsewhere."""
        labels = [IGNORED] * self.n_prompt + list(self.ids[self.n_prompt :])
        for start, end in self.given:
            labels[start:end] = [IGNORED] * (end - start)
        return labels


@dataclass(frozen=True)
class Pack:
    """Rows that share a forward pass."""

    rows: tuple[Row, ...]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Per row its first token and the one after its last."""
        return list(pairwise(accumulate((len(row.ids) for row in self.rows), initial=0)))

    @property
    def singles(self) -> list[Pack]:
        """Every row in a pack of its own."""
        return [Pack((row,)) for row in self.rows]

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss."""
        return sum(row.supervised for row in self.rows)

    @property
    def input_ids(self) -> torch.Tensor:
        """[tokens]."""
        return torch.tensor([token for row in self.rows for token in row.ids])

    @property
    def position_ids(self) -> torch.Tensor:
        """[tokens]; from 0 in every row."""
        return torch.cat([torch.arange(len(row.ids)) for row in self.rows])

    @property
    def labels(self) -> torch.Tensor:
        """[tokens]; each token's own id where it is supervised (not shifted), `IGNORED` where it is given."""
        return torch.tensor([label for row in self.rows for label in row.labels])

    @property
    def segment_ids(self) -> torch.Tensor:
        """[tokens]; the number of the row from 0."""
        return torch.repeat_interleave(
            torch.arange(len(self.rows)), torch.tensor([len(row.ids) for row in self.rows])
        )


def encode_examples(
    examples: Sequence[Example], base: Base, *, max_tokens: int
) -> tuple[list[Row], list[str]]:
    """Tokenize examples as serving will see them; what is too long is reported, never cut.

    Prompt and completion are tokenized apart, because serving continues after the prompt's own tokens.

    Returns:
        The rows, and the ids of the examples that have more than ``max_tokens`` tokens.
    """
    rows, too_long = [], []
    for example in examples:
        prompt = encode_prompt(base, render_prompt(base, example.messages))
        completion, given = _encode_pieces(base, example, first=len(prompt))
        ids = (*prompt, *completion, base.end_of_turn)
        if len(ids) > max_tokens:
            too_long.append(example.id)
        else:
            rows.append(Row(id=example.id, ids=ids, n_prompt=len(prompt), given=given))
    return rows, too_long


def _encode_pieces(
    base: Base, example: Example, *, first: int
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """A completion's tokens, and the ranges of its unsupervised pieces when it begins at token ``first``.

    Pieces are tokenized apart, so that no token lies on both sides of a boundary. (Self-RAG's release looks for
    the mark-up in the tokens and masks from the first passage to the end of the last, sentences included.)
    """
    ids: list[int] = []
    given: list[tuple[int, int]] = []
    done = 0
    for start, end in example.unsupervised:
        ids += encode_completion(base, example.completion[done:start])
        inside = encode_completion(base, example.completion[start:end])
        given.append((first + len(ids), first + len(ids) + len(inside)))
        ids += inside
        done = end
    return [*ids, *encode_completion(base, example.completion[done:])], tuple(given)


def pack(rows: Sequence[Row], pack_tokens: int, *, seed: int, epoch: int) -> list[Pack]:
    """Put rows into packs of at most ``pack_tokens`` tokens: first fit, longest first; then shuffle the packs.

    Rows of the same length are shuffled too, so that epochs differ. Every row is in exactly one pack.

    Raises:
        ValueError: a row has more than ``pack_tokens`` tokens.
    """
    shuffler = random.Random(f"{seed}:{epoch}")  # noqa: S311  # not for secrets
    order = sorted(rows, key=lambda row: row.id)
    shuffler.shuffle(order)
    order.sort(key=lambda row: -len(row.ids))
    shortest = len(order[-1].ids) if order else 0
    bins: list[list[Row]] = []
    open_bins: list[tuple[int, int]] = []  # bin, free tokens; only those that another row still fits into
    for row in order:
        size = len(row.ids)
        if size > pack_tokens:
            raise ValueError(f"row {row.id!r} has {size} tokens, more than a pack's {pack_tokens}")
        place = next((i for i, (_, free) in enumerate(open_bins) if free >= size), None)
        if place is None:
            bins.append([row])
            if pack_tokens - size >= shortest:
                open_bins.append((len(bins) - 1, pack_tokens - size))
            continue
        number, free = open_bins[place]
        bins[number].append(row)
        if free - size >= shortest:
            open_bins[place] = (number, free - size)
        else:
            del open_bins[place]
    shuffler.shuffle(bins)
    return [Pack(tuple(members)) for members in bins]


def use_packed_attention(model: Any) -> None:
    """Let a Llama model attend as a `pipeline.layout.Layout` (a keyword of its forward pass) says."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attend_packed)
    AttentionMaskInterface.register(ATTENTION, no_mask)
    model.set_attn_implementation(ATTENTION)


def pack_hidden(
    network: Any, packed: Pack, levers: Levers = _LEVERS, below: LayerCache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that predict supervised tokens, and these tokens.

    The head is not applied: with a prompt of passages most of its work would be thrown away.

    Args:
        network: a ``LlamaForCausalLM`` with `use_packed_attention`.
        packed: what to run.
        levers: how. Without ``supervised_head``, all tokens count, and `IGNORED` ones are among the targets.
        below: what frozen layers gave for these rows.

    Returns:
        [supervised, hidden], [supervised].
    """
    share = levers.shared_prefix and levers.matmul_attention and network.device.type == "cpu"
    layout = layout_of(
        packed,
        share=share and levers.packing,
        padded=not levers.packing,
        even=levers.even_lengths and levers.packing,
        everywhere=not levers.supervised_head,
    )
    return hidden_of(network, packed, layout, levers, below), layout.targets.to(network.device)
