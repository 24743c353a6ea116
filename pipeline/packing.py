"""Training rows as tokens, and several rows in one forward pass.

A pack is a plain concatenation: no padding, positions that restart with every row, and attention that never
crosses from one row into another ("packing" without cross-contamination, arXiv 2107.02027). Attention runs
row by row through PyTorch's fused kernel; a mask over the whole pack would compute the pairs between rows
only to throw them away.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from domains.records import Example
from pipeline.student import Base, encode_completion, encode_prompt, render_prompt

IGNORED = -100  # torch's label for "no loss here"
ATTENTION = "preceptor_packed"


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
    """Let a Llama model attend within ``bounds`` (a keyword of its forward pass) only."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
    model.set_attn_implementation(ATTENTION)


def pack_hidden(network: Any, packed: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that predict supervised tokens, and these tokens.

    The head is not applied: with a prompt of passages most of its work would be thrown away.

    Args:
        network: a ``LlamaForCausalLM`` with `use_packed_attention`.
        packed: what to run.

    Returns:
        [supervised, hidden], [supervised].
    """
    device = network.device
    labels = packed.labels
    (places,) = torch.nonzero(labels != IGNORED, as_tuple=True)
    hidden = network.model(
        input_ids=packed.input_ids[None].to(device),
        position_ids=packed.position_ids[None].to(device),
        use_cache=False,
        bounds=packed.bounds,
    ).last_hidden_state[0]
    return hidden[(places - 1).to(device)], labels[places].to(device)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: None,
    *,
    scaling: float,
    dropout: float = 0.0,
    bounds: Sequence[tuple[int, int]],
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row. query [1, heads, tokens, width]; key, value with fewer heads."""
    groups = module.num_key_value_groups
    parts = []
    for start, end in bounds:
        rows = slice(start, end)
        part = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, rows],
            key[:, :, rows].repeat_interleave(groups, dim=1),
            value[:, :, rows].repeat_interleave(groups, dim=1),
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Rows are told apart by ``bounds``."""
