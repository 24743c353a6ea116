"""`[train] base_rounding`: the frozen base of `qalora` and `grid-lora` rounded by GPTQ on the training rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from domains.jsonl import write_jsonl
from pipeline import train
from pipeline.calibration_text import calibration_batches
from pipeline.gptq import collect_and_round
from pipeline.grids.blocks import Packed
from pipeline.grids.layout import unpack
from pipeline.methods import grid_base
from pipeline.methods.adapter_files import keep_blocks, load_blocks
from pipeline.methods.grid_base import Calibration, base_blocks, pack_blocks, set_linears
from pipeline.packing import encode_examples
from pipeline.progress import Silent
from pipeline.run_folder import Report, Run
from pipeline.student import load_base
from serve.models import SMOLLM2
from tests.test_train import domain, example
from tests.tiny_llama import make_tiny_llama

KEPT = "base_blocks.safetensors"


pytestmark = pytest.mark.usefixtures("on_one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


class Stopped(Exception):
    pass


class Stopping(Silent):
    """Ends the training after its fourth step, one after a checkpoint."""

    steps = 0

    def start(self, what: str, total: int) -> None:
        self.steps = 0

    def advance(self, amount: int = 1) -> None:
        self.steps += amount
        if self.steps == 4:
            raise Stopped


def train_on(tiny: Path, run: Run, progress: Silent | None = None, **settings: Any) -> Report:
    write_jsonl(run.examples, [example(number) for number in range(24)])
    found = {"method": "qalora", "grid": "Q4_0", "base_rounding": "gptq", "learning_rate": 3e-2} | settings
    return train.run(domain(tiny, **found), run, progress or Silent())


def texts(base: Any) -> list[torch.Tensor]:
    rows, _ = encode_examples([example(number) for number in range(24)], base, max_tokens=512)
    return calibration_batches((row.ids for row in rows), length=128)


def error(tiny: Path, grid: Any, *, by_gptq: bool) -> float:
    """Of the network's outputs on text that the rounding has not seen, relative."""
    base = load_base(str(tiny), dtype=torch.float32)
    calibration, unseen = texts(base)[:-1], texts(base)[-1]
    with torch.no_grad():
        wanted = base.model(unseen).logits
        blocks = base_blocks(base, grid, Calibration(calibration) if by_gptq else None)
        set_linears(base.model, pack_blocks(blocks))
        return float((base.model(unseen).logits - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("grid", ["Q4_0", "Q4_1"])
def test_gptq_leaves_the_base_nearer_to_itself(grid: str, tiny: Path) -> None:
    assert error(tiny, grid, by_gptq=True) < 0.9 * error(tiny, grid, by_gptq=False)


@pytest.mark.parametrize("method", ["qalora", "grid-lora"])
def test_training_keeps_the_codes_that_gptq_chose(method: str, tiny: Path, tmp_path: Path) -> None:
    run = Run(tmp_path)
    report = train_on(tiny, run, method=method, learning_rate=3e-2 if method == "qalora" else 1e-2)
    assert report.facts["validation_after"] < report.facts["validation_before"]
    assert not (run.training / KEPT).exists()
    trained = load_blocks(run.training / "adapter")
    base = load_base(str(tiny), dtype=torch.float32)
    train_rows, _ = train.split_validation([example(number) for number in range(24)], seed=0)
    rows, _ = encode_examples(train_rows, base, max_tokens=512)
    calibration = Calibration(calibration_batches(row.ids for row in rows))
    fitted = base_blocks(base, "Q4_0")
    for name, blocks in base_blocks(base, "Q4_0", calibration).items():
        codes = unpack(trained[name].rows, "Q4_0").codes
        assert torch.equal(codes, blocks.codes), name
        assert not torch.equal(codes, fitted[name].codes), name


def test_a_training_that_goes_on_does_not_round_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = Run(tmp_path / "whole"), Run(tmp_path / "stopped")
    train_on(tiny, whole)
    with pytest.raises(Stopped):
        train_on(tiny, stopped, Stopping())
    assert (stopped.training / KEPT).is_file()
    monkeypatch.setattr(grid_base, "collect_and_round", None)
    progress = Silent()
    train_on(tiny, stopped, progress)
    assert any(line.startswith("going on after step 3") for line in progress.lines)
    assert not (stopped.training / KEPT).exists()
    for path in sorted((whole.training / "adapter").iterdir()):
        assert (stopped.training / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name


def test_blocks_are_kept_for_what_they_were_made_for(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Packed]:
        made.append(1)
        blocks = grid_base.encode(torch.full((2, 32), float(len(made))), "Q4_0")
        return pack_blocks({"w": blocks})

    path = tmp_path / KEPT
    first = keep_blocks(path, "a", make)["w"].rows
    assert (keep_blocks(path, "a", make)["w"].rows == first).all()
    assert len(made) == 1
    keep_blocks(path, "b", make)
    assert len(made) == 2
    path.write_bytes(path.read_bytes()[:40])
    keep_blocks(path, "b", make)
    assert len(made) == 3
    assert [each.name for each in tmp_path.iterdir()] == [KEPT]


def test_an_adapter_does_not_go_on_beside_another_base(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    with pytest.raises(Stopped):
        train_on(tiny, run, Stopping())
    (run.training / KEPT).unlink()
    monkeypatch.setattr(grid_base, "collect_and_round", partial(collect_and_round, sweeps=0))
    progress = Silent()
    train_on(tiny, run, progress)
    assert any("starts afresh" in line for line in progress.lines)


def test_a_base_whose_own_file_lies_on_the_grid_is_not_rounded() -> None:
    base = load_base(SMOLLM2, dtype=torch.float32)
    progress = Silent()
    found = base_blocks(base, "Q4_1", Calibration([], progress=progress))  # no text: GPTQ would refuse
    assert progress.lines == ["the base's own file lies on the Q4_1 grid: GPTQ has nothing to round"]
    assert set(found) == {f"{path}.weight" for path, _ in grid_base.block_linears(base.model)}
