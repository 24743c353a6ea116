"""Cross-entropy of a large vocabulary without all its logits at once.

Logits exist for a chunk of tokens at a time. With a frozen head the gradient of the hidden states is taken in the
forward pass, so that no chunk is computed twice (the idea of Liger Kernel, arXiv 2410.10989); a head with trained rows
is computed twice instead (arXiv 1604.06174).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.layout import EVEN, IGNORED

_CHUNK = 128  # tokens; at a vocabulary of 49,152 about 60 MB


def completion_loss(
    head: Any, hidden: torch.Tensor, targets: torch.Tensor, *, chunked: bool = True
) -> torch.Tensor:
    """Cross-entropy summed over the targets that are not ignored, in nats.

    Args:
        head: the network's output layer.
        hidden: [tokens, width].
        targets: [tokens].
        chunked: a hundred tokens or so at a time.
    """
    if not chunked:
        return _whole(head, hidden, targets)
    if _frozen(head):
        result: torch.Tensor = _ChunkedLoss.apply(hidden, head.weight, targets)  # type: ignore[no-untyped-call]
        return result
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, ids in zip(torch.split(hidden, _CHUNK), torch.split(targets, _CHUNK), strict=True):
        total = total + checkpoint(_whole, head, rows, ids, use_reentrant=False)
    return total


def _whole(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden).float()
    return nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)


def _even(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With ignored rows to a multiple of `EVEN`: few shapes, see `pipeline.levers.Levers`."""
    missing = -len(hidden) % EVEN
    if not missing:
        return hidden, targets
    return nn.functional.pad(hidden, (0, 0, 0, missing)), nn.functional.pad(
        targets, (0, missing), value=IGNORED
    )


def _frozen(head: Any) -> bool:
    return type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        d_hidden = torch.empty_like(hidden) if wanted else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), _CHUNK):
            rows = slice(start, start + _CHUNK)
            part, ids = _even(hidden[rows], targets[rows])
            logs = torch.log_softmax((part @ weight.T).float(), dim=-1)
            total += nn.functional.nll_loss(logs, ids, reduction="sum", ignore_index=IGNORED)
            if d_hidden is None:
                continue
            counted = (ids != IGNORED)[:, None]
            d_logits = logs.exp_()
            d_logits.scatter_add_(1, ids.clamp_min(0)[:, None], -counted.to(d_logits.dtype))
            d_logits.mul_(counted)
            d_hidden[rows] = torch.mm(d_logits.to(hidden.dtype), weight)[: len(hidden[rows])]
        ctx.d_hidden = d_hidden
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, ctx.d_hidden = ctx.d_hidden, None
        return d_hidden.mul_(grads[0]), None, None
