"""A finished student once more through training, now on the grid that it will be served on.

Quantization-aware training after the fact: the weights of the merged student are the masters (`qat`) or lie on the grid
from the beginning (`qalora`), and the student in full precision is the teacher (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from domains.routes import ON_BASE, Grid
from pipeline.grids import Packed
from pipeline.methods.grid_base import Calibration
from pipeline.methods.inside import packed_of
from pipeline.methods.method import Adapter
from pipeline.methods.registry import method_of
from pipeline.objective import SELF, DistilledLoss, Divergence, load_teacher
from pipeline.packing import Row, use_packed_attention
from pipeline.progress import Progress
from pipeline.qlora import training_dtype
from pipeline.student import Base
from pipeline.training_loop import Settings, Trainer

if TYPE_CHECKING:
    import torch

RetrainMethod = Literal["qat", "qalora"]


def retrain(
    network: Any,
    base: Base,
    rows: Sequence[Row],
    folder: Path,
    progress: Progress,
    *,
    method: RetrainMethod,
    grid: Grid,
    settings: Settings,
    kl_weight: float,
    batches: Sequence[torch.Tensor],
) -> dict[str, Packed]:
    """Train ``rows`` with cross-entropy and the divergence from the student itself.

    Args:
        network: the merged student in float32; stays as it is.
        base: whose tokenizer and licence it has.
        rows: what is trained on, tokenized.
        folder: for the loop's notes.
        progress: told of every step.
        method: how.
        grid: where to.
        settings: of the loop.
        kl_weight: how much the divergence counts beside the cross-entropy.
        batches: text that `qalora`'s base is rounded on, by GPTQ; token ids, each [rows, length].

    Returns:
        Every matrix of the student as the file's bytes.
    """
    dtype = training_dtype(bf16=settings.levers.bf16)
    how = method_of(method, grid, Calibration(batches, progress=progress) if method in ON_BASE else None)
    # Not the packaged model any more: that one's file must not be taken for this network's own.
    student = replace(base, gguf=None, model=copy.deepcopy(network))
    divergence = Divergence(weight=kl_weight, temperature=1.0, teacher=SELF)
    teacher = load_teacher(student, divergence, dtype=dtype, base=base.name)
    adapter = Adapter(rank=settings.rank, alpha=settings.alpha, dropout=0.0, seed=settings.seed, dtype=dtype)
    adapted = how.prepare(student, adapter, progress.say)
    use_packed_attention(student.model)
    objective = DistilledLoss(student.model, teacher, divergence, settings.levers)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(adapted, student.model, rows, (), settings, folder, "", objective=objective)
    trainer.fit(progress, checkpoint_steps=trainer.total + 1)
    return packed_of(adapted)
