"""A finished student trained once more on its grid: every call by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.packing import Row
from pipeline.progress import Silent
from pipeline.retrain import RetrainMethod, retrain
from pipeline.student import Base, load_base
from pipeline.training_loop import Settings
from serve.models import packaged_gguf
from tests.tiny_llama import make_tiny_llama

SETTINGS = Settings(
    rank=4, alpha=8, dropout=0, learning_rate=1e-2, warmup_share=0.1, epochs=1, pack_tokens=256, packs_per_step=1,
    max_grad_norm=1.0, seed=0,
)  # fmt: skip


def rows(seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    some = torch.randint(10, 300, (6, 60), generator=generator).tolist()
    return [Row(id=f"r{place}", ids=tuple(ids), n_prompt=30) for place, ids in enumerate(some)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny")), dtype=torch.float32)


@pytest.mark.parametrize("method", ["qat", "qalora"])
def test_what_an_earlier_call_left_in_the_folder_changes_nothing(
    base: Base, tmp_path: Path, method: RetrainMethod
) -> None:
    def matrices(folder: str, seed: int, rate: float) -> dict[str, bytes]:
        packed = retrain(
            base.model, base, rows(seed), tmp_path / folder, Silent(),
            method=method, grid="Q4_0", settings=replace(SETTINGS, learning_rate=rate), kl_weight=1.0,
            batches=[torch.tensor([row.ids for row in rows(seed)])],
        )  # fmt: skip
        return {name: matrix.rows.tobytes() for name, matrix in packed.items()}

    first = matrices("one", 0, 1e-2)
    again = matrices("one", 1, 3e-2)
    assert again == matrices("fresh", 1, 3e-2)
    assert again != first
    assert not [*tmp_path.rglob("*.safetensors")]


@pytest.mark.parametrize("method", ["qat", "qalora"])
def test_a_student_of_the_packaged_model_does_not_begin_from_that_models_file(
    base: Base, tmp_path: Path, method: RetrainMethod
) -> None:
    made = [
        retrain(
            base.model, replace(base, gguf=gguf), rows(0), tmp_path / str(gguf is None), Silent(),
            method=method, grid="Q4_1", settings=SETTINGS, kl_weight=1.0,
            batches=[torch.tensor([row.ids for row in rows(0)])],
        )
        for gguf in (None, packaged_gguf())
    ]  # fmt: skip
    own, packaged = ({name: matrix.rows.tobytes() for name, matrix in each.items()} for each in made)
    assert own == packaged
