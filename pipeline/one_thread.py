"""A while without PyTorch's threads, for work made of many small elementwise steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: after every small elementwise step PyTorch's threads meet at a barrier.

    That costs several times the work itself as soon as anything else runs on the machine.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
