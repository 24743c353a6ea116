"""Token ids for calibration: rows run together and cut into equal pieces, so that nothing is padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from domains.errors import StageError

if TYPE_CHECKING:
    import torch


def calibration_batches(
    rows: Iterable[Sequence[int]], *, length: int = 512, pieces: int = 64, batch: int = 4
) -> list[torch.Tensor]:
    """Batches [up to ``batch``, ``length``] of token ids, at most ``pieces`` rows in all.

    Args:
        rows: token ids of documents or training rows, taken in order; what is left of the last piece is not used.
        length: tokens per piece. Text shorter than one piece becomes one shorter piece.
        pieces: how many are wanted; fewer where the text ends.
        batch: pieces per batch.

    Raises:
        StageError: there are no tokens.
    """
    import torch

    tokens: list[int] = []
    for row in rows:
        tokens.extend(row)
        if len(tokens) >= pieces * length:
            break
    if not tokens:
        raise StageError(
            "there is no text to calibrate the rounding on",
            expected="training rows or passages",
            next_step="preceptor curate DOMAIN",
        )
    length = min(length, len(tokens))
    count = min(pieces, len(tokens) // length)
    table = torch.tensor(tokens[: count * length]).view(count, length)
    return list(torch.split(table, batch))
