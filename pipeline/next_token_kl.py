"""KL divergence between the next-token distributions of two networks, one row of logits in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def next_token_kl(target_head: Any, target: torch.Tensor, head: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Mean KL per token, in nats, of ``head(hidden)`` from ``target_head(target)``.

    Gradients reach ``hidden`` and ``head``, not the target.

    Args:
        target_head: the output layer of the network that is imitated.
        target: its last hidden states [rows, length, width].
        head: the output layer of the other network.
        hidden: its last hidden states.
    """
    from torch.utils.checkpoint import checkpoint

    total = hidden.new_zeros((), dtype=hidden.dtype)
    for theirs, mine in zip(target, hidden, strict=True):  # logits are recomputed for the gradient
        total = total + checkpoint(_row, target_head, theirs, head, mine, use_reentrant=False)
    return total / hidden.shape[:-1].numel()


def _row(target_head: Any, theirs: torch.Tensor, head: Any, mine: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        target = target_head(theirs).float().log_softmax(-1)
    log_probabilities = head(mine).float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_probabilities, target, log_target=True, reduction="sum")
