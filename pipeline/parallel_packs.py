"""A step's packs on several cores, one thread each, instead of every product on all cores.

The products of a small network are too small to share: with two threads inside each, a step of the default model takes
about three quarters of the time that one thread takes (docs/log.md). Rows are independent, so a step's rows are cut
into packs that run side by side. Gradients are added in the order of the packs: the same rows give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.fused_layer import prepare_layers
from pipeline.packing import Pack, Row

LossOf = Callable[[Pack], torch.Tensor]


def shares(packs: Sequence[Pack], cores: int, *, tokens: int) -> list[Pack]:
    """The rows of ``packs`` in packs of about the same length, a multiple of ``cores`` of them where there are as many rows.

    So short that ``cores`` of them have at most about ``tokens`` tokens together, which is what one pack would have: running side by
    side takes no more memory. Longest rows first, each to the shortest pack (Graham 1969); packs go longest first.

    Args:
        packs: of a step.
        cores: packs that will run at once.
        tokens: of a pack that runs alone.
    """
    rows = sorted((row for packed in packs for row in packed.rows), key=lambda row: -len(row.ids))
    total = sum(len(row.ids) for row in rows)
    count = min(len(rows), cores * math.ceil(total / tokens))
    bins: list[list[Row]] = [[] for _ in range(count)]
    lengths = [0] * count
    for row in rows:
        place = lengths.index(min(lengths))
        bins[place].append(row)
        lengths[place] += len(row.ids)
    order = sorted(range(count), key=lambda place: -lengths[place])
    return [Pack(tuple(bins[place])) for place in order]


def prepare(network: Any) -> None:
    """Before threads share the network: what layers make of changed weights at first use is made now."""
    prepare_layers(network.model.layers, network.dtype)


@contextmanager
def cores_for_packs(cores: int) -> Iterator[ThreadPoolExecutor | None]:
    """Threads that compute on one core each; None for one core, where packs run one after the other."""
    if cores < 2:
        yield None
        return
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def add_gradients(
    packs: Sequence[Pack],
    loss_of: LossOf,
    weights: Sequence[torch.nn.Parameter],
    pool: ThreadPoolExecutor | None = None,
) -> float:
    """The sum of the packs' losses; their gradients are added to ``weights``.

    Args:
        packs: of a step.
        loss_of: a pack's loss, already divided by what the step's is divided by.
        weights: all that is trained.
        pool: see `cores_for_packs`. Whatever ``loss_of`` reads must not change meanwhile.
    """
    if pool is None:
        total = 0.0
        for packed in packs:
            loss = loss_of(packed)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def one(packed: Pack) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        loss = loss_of(packed)
        return loss.item(), torch.autograd.grad(loss, list(weights), allow_unused=True)

    total = 0.0
    for value, gradients in pool.map(one, packs):
        total += value
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                continue
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    return total
