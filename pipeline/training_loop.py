"""The training loop: AdamW on the adapter, cosine schedule, gradient clipping, checkpoints, validation."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from domains.errors import StageError
from domains.jsonl import write_text_atomic
from pipeline.checkpoint import State, read_state, restore, save_checkpoint
from pipeline.completion_loss import completion_loss
from pipeline.layer_cache import LayerCache, frozen_layers
from pipeline.levers import Levers, checkpoints
from pipeline.packing import Pack, Row, pack, pack_hidden
from pipeline.parallel_packs import add_gradients, cores_for_packs, prepare, shares
from pipeline.progress import Progress


@dataclass(frozen=True)
class Settings:
    """How to train; everything that changes the result."""

    rank: int
    alpha: float
    dropout: float
    learning_rate: float
    warmup_share: float
    epochs: int
    pack_tokens: int
    packs_per_step: int
    max_grad_norm: float
    seed: int
    lora_layers: int = 0
    levers: Levers = field(default_factory=Levers)


# The loss of a pack, its hidden states and their targets: summed over the supervised tokens, in nats.
Objective = Callable[[Pack, torch.Tensor, torch.Tensor], torch.Tensor]


class Trainer:
    """The loop. ``weights`` are the adapter's parameters by name.

    ``fingerprint`` says what is trained, so that a checkpoint of something else is not taken up; empty, none is kept.
    ``objective`` gives another loss than cross-entropy; validation is always by cross-entropy.
    """

    def __init__(
        self,
        adapted: Any,
        network: Any,
        rows: Sequence[Row],
        validation: Sequence[Row],
        settings: Settings,
        folder: Path,
        fingerprint: str,
        objective: Objective | None = None,
    ) -> None:
        self.adapted, self.network, self.settings, self.folder = adapted, network, settings, folder
        self.weights = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=settings.learning_rate, weight_decay=0.0)
        self.validation = pack(validation, settings.pack_tokens, seed=settings.seed, epoch=-1)
        self.epochs = [
            steps_of(
                pack(rows, settings.pack_tokens, seed=settings.seed, epoch=epoch), settings.packs_per_step
            )
            for epoch in range(settings.epochs)
        ]
        self.fingerprint, self.objective = fingerprint, objective
        self.total = sum(len(steps) for steps in self.epochs)
        self.cores = self._cores()
        self.levers = self._levers()
        self.below = self._below([*rows, *validation])

    def _cores(self) -> int:
        """How many packs run at once; one where dropout would depend on their order, and with a loss of another's making."""
        settings = self.settings
        levers = settings.levers
        alone = self.objective is not None or settings.dropout or self.network.device.type != "cpu"
        if alone or not (levers.parallel_packs and levers.packing):
            return 1
        return torch.get_num_threads()

    def _shared(self, packs: Sequence[Pack]) -> list[Pack]:
        """A step's packs as they will run."""
        if self.cores == 1:
            return list(packs)
        return shares(packs, self.cores, tokens=self.settings.pack_tokens)

    def _levers(self) -> Levers:
        """The switches with what depends on the rows and the memory decided."""
        levers = self.settings.levers
        lengths = []
        for steps in self.epochs:
            for step in steps:
                packs = [[len(row.ids) for row in packed.rows] for packed in self._shared(step)]
                at_once = range(0, len(packs), self.cores)
                lengths += [
                    [length for pack in packs[first : first + self.cores] for length in pack]
                    for first in at_once
                ]
        if not levers.packing:
            lengths = [[max(pack)] * len(pack) for pack in lengths]
        item_bytes = self.network.dtype.itemsize
        twice = checkpoints(levers, self.network.config, lengths, item_bytes=item_bytes)
        share = levers.shared_prefix and not self.settings.dropout  # each row draws its own dropout
        return replace(levers, checkpointing="on" if twice else "off", shared_prefix=share)

    def _below(self, rows: Sequence[Row]) -> LayerCache | None:
        frozen = frozen_layers(self.weights, self.network.config.num_hidden_layers)
        if not frozen or not self.levers.cached_layers:
            return None
        width, dtype = self.network.config.hidden_size, self.network.dtype
        return LayerCache(frozen, rows, width=width, dtype=dtype, folder=self.folder)

    def fit(self, progress: Progress, *, checkpoint_steps: int) -> State:
        """Train to the end, from the checkpoint if there is one of these very rows and settings."""
        try:
            return self._fit(progress, checkpoint_steps=checkpoint_steps)
        finally:
            if self.below:
                self.below.close()
                self.below = None

    def _fit(self, progress: Progress, *, checkpoint_steps: int) -> State:
        if left_out := _leave_out_attention_dropout(self.network):
            progress.say(f"the base's attention_dropout of {left_out:g} is left out")
        path = self.folder / "checkpoint.safetensors"
        state = self._begin(path, progress)
        progress.start("train", self.total)
        progress.advance(state.step)
        if state.step == 0 and self.validation:
            self._note(state, {"step": 0, "validation_loss": self._validate()})
        plan = [(steps, place) for steps in self.epochs for place in range(len(steps))]
        with cores_for_packs(self.cores) as pool:
            for steps, place in plan[state.step :]:
                self._step(state, steps[place], pool)
                if place == len(steps) - 1 and self.validation:
                    self._note(state, {"step": state.step, "validation_loss": self._validate()})
                due = state.step % checkpoint_steps == 0 or state.step == self.total
                if due and self.fingerprint:
                    save_checkpoint(path, state, self.weights, self.optimizer)
                progress.advance()
        self.adapted.eval()
        return state

    def _begin(self, path: Path, progress: Progress) -> State:
        found = read_state(path)
        torch.manual_seed(self.settings.seed)
        if found is not None and self.fingerprint and found.fingerprint == self.fingerprint:
            restore(path, found, self.weights, self.optimizer)
            progress.say(f"going on after step {found.step} of {self.total}")
            state = found
        else:
            if path.exists():
                progress.say(
                    f"{path.name} belongs to other rows or settings, or is damaged: training starts afresh"
                )
                path.unlink()
            state = State(self.fingerprint)
        shutil.rmtree(
            self.folder / "adapter", ignore_errors=True
        )  # an older one must not pass for this run's
        lines = "".join(json.dumps(line) + "\n" for line in state.history)
        write_text_atomic(self.folder / "loss.jsonl", lines)
        return state

    def _step(self, state: State, packs: Sequence[Pack], pool: ThreadPoolExecutor | None) -> None:
        start = time.monotonic()
        self.adapted.train()
        rate = self.settings.learning_rate * schedule(state.step, self.total, self.settings.warmup_share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        supervised = sum(packed.supervised for packed in packs)
        if pool is not None:
            prepare(self.network)
        loss = add_gradients(
            self._shared(packs),
            lambda packed: self._loss(packed, self.objective) / supervised,
            list(self.weights.values()),
            pool,
        )
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.settings.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm.item()):
            raise StageError(
                f"step {state.step + 1}: the loss is {loss}, the gradient's norm {norm.item()}",
                expected="finite numbers",
                next_step="lower [train] learning_rate, then run the command again",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens, seconds = sum(len(row.ids) for p in packs for row in p.rows), time.monotonic() - start
        state.step += 1
        state.tokens += tokens
        state.seconds += seconds
        line = {"step": state.step, "loss": loss, "lr": rate, "tokens": tokens, "supervised": supervised}
        self._note(state, line | {"seconds": round(seconds, 3)})

    def _loss(self, packed: Pack, objective: Objective | None = None) -> torch.Tensor:
        """Summed over the pack's supervised tokens, in nats."""
        hidden, targets = pack_hidden(self.network, packed, self.levers, self.below)
        if objective is not None:
            return objective(packed, hidden, targets)
        return completion_loss(self.network.lm_head, hidden, targets, chunked=self.levers.chunked_loss)

    def _validate(self) -> float:
        self.adapted.eval()
        with torch.no_grad():
            total = sum(self._loss(packed).item() for packed in self.validation)
        return total / sum(packed.supervised for packed in self.validation)

    def _note(self, state: State, line: dict[str, Any]) -> None:
        state.history.append(line)
        with (self.folder / "loss.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _leave_out_attention_dropout(network: Any) -> float:
    """Train without the dropout of attention weights that a base's config.json may ask for; returns its rate.

    ``[train] dropout`` is what chance a training has. Dropped weights would differ between the rows that share a
    beginning, between packs that run side by side in whatever order, and between the passes that the cache of frozen
    layers saves: three levers would change the result, or have to go.
    """
    rate = 0.0
    for layer in network.model.layers:
        rate = max(rate, layer.self_attn.attention_dropout or 0.0)
        layer.self_attn.attention_dropout = 0.0
    return rate


def schedule(step: int, total: int, warmup_share: float) -> float:
    """The share of the learning rate at ``step`` (from 0): a linear warm-up, then half a cosine to zero."""
    warmup = round(warmup_share * total)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def steps_of(packs: Sequence[Pack], packs_per_step: int) -> list[Sequence[Pack]]:
    """The packs of each optimizer step; the last may have fewer."""
    return [packs[start : start + packs_per_step] for start in range(0, len(packs), packs_per_step)]
