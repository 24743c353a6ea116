"""Causal attention within rows as plain matrix products, forward and backward.

PyTorch's fused kernel reaches 35 GFLOP/s a core in bfloat16 on a CPU whose matrix products reach 215 (docs/log.md), so
here scores are products of whole blocks: some queries of a row against every key up to the block's end. The upper
triangle is skipped block by block and masked inside the last one. All query heads that share a key are rows of one
product, which also sums their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_BLOCK = 128  # queries at a time
_KEEP = 1024  # rows up to so many tokens keep their attention weights for the backward pass


@dataclass(frozen=True)
class Span:
    """A row's place: keys are those of the shared prefix [0, ``prefix``) and of [``start``, ``end``).

    Queries are of the tokens [``first``, ``last``); the first of them is row ``at`` of the query tensor.
    """

    prefix: int
    start: int
    first: int
    last: int
    at: int

    def blocks(self) -> Iterator[tuple[slice, int, int]]:
        """Rows of the query tensor, how many they are, and how many keys they may see at most."""
        for begin in range(self.first, self.last, _BLOCK):
            end = min(begin + _BLOCK, self.last)
            at = self.at + begin - self.first
            yield slice(at, at + end - begin), end - begin, self.prefix + end - self.start


Weights = list[torch.Tensor | None]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Sequence[Span], scaling: float
) -> tuple[torch.Tensor, Weights]:
    """Attention of every row.

    Args:
        query: [key heads, query heads per key head, queries, width].
        key: [key heads, tokens, width].
        value: likewise.
        spans: the rows; they cover all queries.
        scaling: of the scores.

    Returns:
        [queries, key heads, query heads per key head, width], and per block the attention weights (None: to be
        computed again).
    """
    heads, group, queries, width = query.shape
    out = query.new_empty(queries, heads, group, width)
    kept: Weights = []
    for span in spans:
        keys, values = _of_row(key, span), _of_row(value, span)
        for rows, count, seen in span.blocks():
            weights = _weights(_stack(query[:, :, rows]), keys[:, :seen], count, scaling)
            part = torch.bmm(weights, values[:, :seen]).view(heads, group, count, width)
            out[rows] = part.permute(2, 0, 1, 3)
            kept.append(weights if span.last - span.start <= _KEEP else None)
    return out, kept


def attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    scaling: float,
    kept: Weights,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, shaped as these (keys' and values' in float32), of ``grad``, shaped as the result."""
    heads, group, _, width = query.shape
    d_query = torch.empty_like(query)
    d_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    d_value = torch.zeros_like(d_key)
    pending = iter(kept)
    for span in spans:
        keys, values = _of_row(key, span), _of_row(value, span)
        for rows, count, seen in span.blocks():
            asked = _stack(query[:, :, rows])
            weights = next(pending)
            if weights is None:
                weights = _weights(asked, keys[:, :seen], count, scaling)
            d_part = grad[rows].permute(1, 2, 0, 3).reshape(heads, group * count, width)
            d_weights = torch.bmm(d_part, values[:, :seen].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if scaling != 1.0:
                d_scores.mul_(scaling)
            d_asked = torch.bmm(d_scores, keys[:, :seen])
            d_query[:, :, rows] = d_asked.view(heads, group, count, width)
            _add(d_key, torch.bmm(d_scores.transpose(1, 2), asked), span, seen)
            _add(d_value, torch.bmm(weights.transpose(1, 2), d_part), span, seen)
    return d_query, d_key, d_value


def _weights(asked: torch.Tensor, keys: torch.Tensor, count: int, scaling: float) -> torch.Tensor:
    scores = torch.bmm(asked, keys.transpose(1, 2))  # [key heads, group * count, seen]
    if scaling != 1.0:
        scores.mul_(scaling)
    by_head = scores.view(scores.shape[0], -1, count, scores.shape[-1])
    by_head[..., -count:].masked_fill_(_later(scores.device)[:count, :count], float("-inf"))
    return torch.softmax(scores, dim=-1)


@cache
def _later(device: torch.device) -> torch.Tensor:
    """Whether a key [column] comes after a query [row]."""
    return torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=device).triu_(1)


def _stack(query: torch.Tensor) -> torch.Tensor:
    heads, group, count, width = query.shape
    return query.reshape(heads, group * count, width)


def _of_row(tensor: torch.Tensor, span: Span) -> torch.Tensor:
    row = tensor[:, span.start : span.last]
    return torch.cat([tensor[:, : span.prefix], row], dim=1) if span.prefix else row


def _add(total: torch.Tensor, part: torch.Tensor, span: Span, seen: int) -> None:
    """Add a block's gradient to the prefix's and to the row's own tokens."""
    if span.prefix:
        total[:, : span.prefix] += part[:, : span.prefix]
    total[:, span.start : span.start + seen - span.prefix] += part[:, span.prefix :]


class RowAttention(torch.autograd.Function):
    """`attend` for autograd: query [heads, tokens, width], key and value with fewer heads -> [tokens, heads, width]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Sequence[Span],
        scaling: float,
    ) -> torch.Tensor:
        """See the class."""
        heads, tokens, width = query.shape
        grouped = query.reshape(key.shape[0], -1, tokens, width)
        out, kept = attend(grouped, key, value, spans, scaling)
        ctx.save_for_backward(grouped, key, value)
        ctx.spans, ctx.scaling, ctx.kept = spans, scaling, kept
        return out.view(tokens, heads, width)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """See the class."""
        query, key, value = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        heads, group, tokens, width = query.shape
        grad = grads[0].view(tokens, heads, group, width)
        d_query, d_key, d_value = attend_backward(grad, query, key, value, ctx.spans, ctx.scaling, kept)
        return (
            d_query.view(heads * group, tokens, width),
            d_key.to(key.dtype),
            d_value.to(value.dtype),
            None,
            None,
        )
