"""The train stage: an adapter on the student by one of `pipeline.methods`, loss on completions only.

A plain PyTorch loop rather than TRL's trainer: on a CPU, TRL (padded batches, logits for every token) trained
at about a quarter of the speed of packed rows with the head applied to supervised tokens only, and its
checkpoints hold pickles. The loop is deterministic: same rows, settings and machine, same adapter.

``train/`` holds ``adapter/`` (see the method), ``network.json`` (what it was trained on), ``loss.jsonl`` (one
line a step; lines with ``validation_loss`` before training and after each epoch) and
``checkpoint.safetensors``, from which a killed run goes on; until the adapter is saved, a base that GPTQ rounded
beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from domains.domain import Domain
from domains.errors import StageError
from domains.jsonl import read_jsonl, write_text_atomic
from domains.records import Example
from pipeline.calibration_text import calibration_batches
from pipeline.checkpoint import State
from pipeline.kl_teacher import check_teacher, teacher_files
from pipeline.levers import Levers
from pipeline.methods.grid_base import Calibration
from pipeline.methods.method import Adapter, Method
from pipeline.methods.registry import method_of
from pipeline.objective import DistilledLoss, Divergence, load_teacher
from pipeline.packing import Pack, Row, encode_examples, pack_hidden, use_packed_attention
from pipeline.progress import Progress
from pipeline.qlora import training_dtype
from pipeline.recipe import QLORA, Recipe, recipe_of, settings_of
from pipeline.run_folder import Report, Run, check_space, need
from pipeline.student import Base, load_base
from pipeline.token_rows import add_reflection_tokens
from pipeline.train_split import choose_rows, split_validation
from pipeline.training_loop import Objective, Settings, Trainer
from serve.models import sha256_file

_CALIBRATION = 48  # windows of 512 tokens for GPTQ
_FORMAT = 2  # of the checkpoint; a change makes older ones unusable
_BYTES_PER_WEIGHT = 32  # adapter, checkpoint with two moments, and its successor while it is written


def run(domain: Domain, run: Run, progress: Progress) -> Report:
    """Train the adapter on the run's examples, or go on where a killed run stopped.

    ``counts``: rows_in = trained + validation + too_long + over_max_rows.

    Raises:
        StageError: no rows, all too long, nothing supervised, the loss is no number, or the trained adapter
            changes nothing.
        ModelError: the base model can't be loaded.
    """
    config = domain.config
    examples = read_jsonl(need(run.examples, stage="curate"), Example)
    if not examples:
        raise StageError(
            f"{run.examples} holds no rows",
            expected="at least one training row",
            next_step=f"preceptor curate {domain.name} --force, and read why rows were rejected",
        )
    return train_student(
        examples,
        run.training,
        progress,
        base=config.student.base,
        context=config.student.context,
        max_rows=config.train.max_rows,
        checkpoint_steps=config.train.checkpoint_steps,
        settings=settings_of(domain),
        reflection_tokens=config.reflect.backend == "tokens",
        recipe=recipe_of(domain),
    )


def train_student(
    examples: Sequence[Example],
    folder: Path,
    progress: Progress,
    *,
    base: str,
    context: int,
    max_rows: int,
    checkpoint_steps: int,
    settings: Settings,
    reflection_tokens: bool = False,
    recipe: Recipe = QLORA,
) -> Report:
    """Train on ``examples`` and write ``folder``; see `run`.

    Args:
        examples: at least one.
        folder: the train stage's.
        progress: told of every step.
        base: of the student, as in ``[student] base``.
        context: rows with more tokens are reported as too long; so are those longer than a pack.
        max_rows: a random choice of so many examples; 0 = all.
        checkpoint_steps: steps from one checkpoint to the next.
        settings: see there.
        reflection_tokens: add Self-RAG's tokens to the vocabulary and train their rows.
        recipe: see there.
    """
    if recipe.divergence is not None:
        check_teacher(recipe.divergence.teacher, folder)
    chosen = choose_rows(examples, max_rows, seed=settings.seed)
    train_examples, held_out = split_validation(chosen, seed=settings.seed)
    dtype, how = training_dtype(bf16=settings.levers.bf16), method_of(recipe.method, recipe.grid)
    loaded = load_base(base, dtype=how.base_dtype(dtype))
    token_rows = add_reflection_tokens(loaded) if reflection_tokens else []
    limit = min(context, settings.pack_tokens)
    rows, too_long = encode_examples(train_examples, loaded, max_tokens=limit)
    validation, also_too_long = encode_examples(held_out, loaded, max_tokens=limit)
    too_long += also_too_long
    _check_rows(rows, validation, too_long, limit, progress)
    objective = _objective(loaded, recipe.divergence, dtype, settings.levers, base)
    kept = folder / "base_blocks.safetensors"
    if recipe.base_rounding == "gptq":
        how = method_of(recipe.method, recipe.grid, _calibration(rows, loaded, recipe, kept, progress))
    adapted = how.prepare(loaded, _adapter(settings, token_rows, dtype), progress.say)
    use_packed_attention(loaded.model)
    fingerprint = _fingerprint(rows, validation, settings, loaded, recipe, kept)
    trainer = Trainer(adapted, loaded.model, rows, validation, settings, folder, fingerprint, objective)
    check_space(folder, _BYTES_PER_WEIGHT * sum(weight.numel() for weight in trainer.weights.values()))
    state = trainer.fit(progress, checkpoint_steps=checkpoint_steps)
    _check_adapter_acts(adapted, loaded.model, rows[0])
    _save(folder, adapted, how, _about(loaded, dtype, settings, token_rows, recipe))
    kept.unlink(missing_ok=True)
    counts = {
        "rows_in": len(examples),
        "trained": len(rows),
        "validation": len(validation),
        "too_long": len(too_long),
        "over_max_rows": len(examples) - len(chosen),
    }
    return Report(counts=counts, facts=_facts(state, trainer, dtype, too_long))


def _objective(
    loaded: Base, divergence: Divergence | None, dtype: torch.dtype, levers: Levers, base: str
) -> Objective | None:
    """None for cross-entropy; the teacher is loaded before the student's weights are rounded."""
    if divergence is None:
        return None
    teacher = load_teacher(loaded, divergence, dtype=dtype, base=base)
    return DistilledLoss(loaded.model, teacher, divergence, levers)


def _calibration(
    rows: Sequence[Row], base: Base, recipe: Recipe, kept: Path, progress: Progress
) -> Calibration:
    batches = calibration_batches((row.ids for row in rows), pieces=_CALIBRATION)
    parts = [recipe.grid, base.version, [batch.tolist() for batch in batches]]
    return Calibration(batches, kept, hashlib.sha256(json.dumps(parts).encode()).hexdigest(), progress)


def _adapter(settings: Settings, token_rows: Sequence[int], dtype: torch.dtype) -> Adapter:
    return Adapter(
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        seed=settings.seed,
        dtype=dtype,
        token_rows=tuple(token_rows),
        layers=settings.lora_layers,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_rows(
    rows: Sequence[Row], validation: Sequence[Row], too_long: Sequence[str], limit: int, progress: Progress
) -> None:
    if not rows:
        raise StageError(
            f"all {len(too_long)} rows have more than {limit} tokens (first: {too_long[0]!r})",
            expected="rows that fit into [train] pack_tokens and [student] context",
            next_step="raise [train] pack_tokens, or shorten prompts with [retrieve] top_k or [index] passage_chars",
        )
    if not sum(row.supervised for row in rows):
        raise StageError(
            f"none of the tokens in {len(rows)} rows is supervised",
            expected="completions to learn from",
            next_step="preceptor curate DOMAIN --force",
        )
    if too_long:
        progress.say(f"{len(too_long)} rows have more than {limit} tokens and are left out")
    if not validation:
        progress.say("too few questions to hold any out: there is no validation loss")


def _fingerprint(
    rows: Sequence[Row],
    validation: Sequence[Row],
    settings: Settings,
    base: Base,
    recipe: Recipe,
    kept: Path,
) -> str:
    parts: list[Any] = [_FORMAT, [asdict(r) for r in rows], [asdict(r) for r in validation]]
    parts += [asdict(settings), asdict(recipe)]
    if recipe.divergence is not None:
        parts.append([sha256_file(path) for path in teacher_files(recipe.divergence.teacher)])
    parts += [base.version, str(base.model.dtype)]
    if kept.is_file():  # an adapter must not go on beside other codes than those it began with
        parts.append(sha256_file(kept))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _check_adapter_acts(adapted: Any, network: Any, row: Row) -> None:
    """A dead adapter (wrong names, zero loss mask) must not look like a finished training."""

    def logits() -> torch.Tensor:
        result: torch.Tensor = network.lm_head(pack_hidden(network, Pack((row,)))[0])
        return result

    with torch.no_grad():
        on = logits()
        with adapted.disable_adapter():
            off = logits()
    if torch.equal(on, off):
        raise StageError(
            "the trained adapter changes no logit",
            expected="a student that differs from its base",
            next_step="raise [train] learning_rate or epochs",
        )


def _about(
    base: Base, dtype: torch.dtype, settings: Settings, token_rows: Sequence[int], recipe: Recipe
) -> dict[str, Any]:
    return {
        "base": base.name,
        "base_version": base.version,
        "source": base.source,
        "licence": base.licence,
        **asdict(recipe),
        "dtype": _name(dtype),
        "rank": settings.rank,
        "alpha": settings.alpha,
        "reflection_tokens": list(token_rows),
    }


def _save(folder: Path, adapted: Any, how: Method, network: dict[str, Any]) -> None:
    temporary = folder / f".adapter.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        network |= how.save(adapted, temporary, base_name=network["base"])
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        temporary.rename(folder / "adapter")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_text_atomic(folder / "network.json", json.dumps(network, indent=1) + "\n")


def _facts(state: State, trainer: Trainer, dtype: torch.dtype, too_long: list[str]) -> dict[str, Any]:
    losses = [line["loss"] for line in state.history if "loss" in line]
    validation = [line["validation_loss"] for line in state.history if "validation_loss" in line]
    return {
        "dtype": _name(dtype),
        "steps": state.step,
        "tokens": state.tokens,
        "supervised_tokens": sum(line.get("supervised", 0) for line in state.history),
        "tokens_per_s": round(state.tokens / state.seconds, 1) if state.seconds else None,
        "trainable_weights": sum(weight.numel() for weight in trainer.weights.values()),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "validation_before": validation[0] if validation else None,
        "validation_after": validation[-1] if validation else None,
        "too_long": too_long,
        "peak_rss_mb": _peak_rss_mb(),
    }


def _peak_rss_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)
