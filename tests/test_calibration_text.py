from __future__ import annotations

import pytest
import torch

from domains.errors import StageError
from pipeline.calibration_text import calibration_batches


def test_rows_run_together_in_order() -> None:
    batches = calibration_batches([[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]], length=4, pieces=9, batch=2)
    assert [batch.tolist() for batch in batches] == [[[0, 1, 2, 3], [4, 5, 6, 7]]]


def test_no_more_pieces_than_wanted() -> None:
    rows = (range(10 * start, 10 * start + 10) for start in range(100))
    batches = calibration_batches(rows, length=8, pieces=5, batch=2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 8), (2, 8), (1, 8)]
    assert torch.equal(torch.cat(batches).flatten(), torch.arange(40))
    assert next(rows)[0] == 40  # the rest was not even read


def test_short_text_is_one_short_piece() -> None:
    assert [batch.tolist() for batch in calibration_batches([[5, 6], [7]])] == [[[5, 6, 7]]]


def test_no_text_is_named() -> None:
    with pytest.raises(StageError, match="no text"):
        calibration_batches([[], []])
