"""Trains KARD's reranker on the CPU: fresh draws each epoch, the best epoch by the loss on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from domains.records import Record
from pipeline.rerank_loss import late_interaction, rerank_loss
from pipeline.rerank_pools import Pool, draw, standard_scores
from pipeline.rerank_tower import PassageStates, QuestionTower

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
_WARMUP = 0.05  # share of the steps, as in the release
_EVALUATION = 8  # candidates of the release's evaluation


@dataclass(frozen=True)
class Recipe:
    """How the reranker is trained; the keys of ``[rerank]``."""

    loss: str
    tau1: float
    tau2: float
    draws: int
    epochs: int
    batch: int
    learning_rate: float
    rank: int
    alpha: float
    dropout: float
    dimensions: int
    seed: int


class Evaluation(Record):
    """Held-out rows. ``top1``, ``top3``, ``top5``: how often BM25(rationale)'s best passage is among the first of 8.

    ``hit1`` and ``ndcg10`` are over whole pools: that passage comes first; gains are BM25 with the rationale.
    """

    epoch: int
    loss: float
    top1: float
    top3: float
    top5: float
    hit1: float
    ndcg10: float


@dataclass(frozen=True)
class Trained:
    """The exported tower (see `QuestionTower.export`) and how it fared; ``history[0]`` is before training."""

    changed: dict[str, Floats]
    compressor: Floats
    best: Evaluation
    history: list[Evaluation]
    steps: int


def train_reranker(
    pools: Sequence[Pool],
    held_out: Sequence[Pool],
    states: PassageStates,
    recipe: Recipe,
    *,
    on_step: Callable[[int], None] = lambda _: None,
) -> Trained:
    """Train, evaluate after each epoch, and keep the epoch with the lowest held-out loss (before training counts too).

    Args:
        pools: to learn from.
        held_out: of other documents.
        states: of every passage in both.
        recipe: see `Recipe`; same recipe and pools, same result on one machine.
        on_step: called with the number of questions of each step.
    """
    import torch

    axes = states.principal_axes(recipe.dimensions, sample=1000, seed=recipe.seed)
    tower = QuestionTower(
        axes, rank=recipe.rank, alpha=recipe.alpha, dropout=recipe.dropout, seed=recipe.seed
    )
    steps = recipe.epochs * -(-len(pools) // recipe.batch)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _linear(steps))
    history = [evaluate(tower, held_out, states, recipe, epoch=0)]
    kept = tower.state()
    for epoch in range(1, recipe.epochs + 1):
        rng = np.random.default_rng((recipe.seed, epoch))
        for loss, count in _epoch(tower, pools, states, recipe, rng):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            on_step(count)
        history.append(evaluate(tower, held_out, states, recipe, epoch=epoch))
        if history[-1].loss < min(past.loss for past in history[:-1]):
            kept = tower.state()
    tower.load(kept)
    changed, compressor = tower.export()
    best = min(history, key=lambda entry: entry.loss)
    return Trained(changed=changed, compressor=compressor, best=best, history=history, steps=steps)


def _epoch(
    tower: QuestionTower,
    pools: Sequence[Pool],
    states: PassageStates,
    recipe: Recipe,
    rng: np.random.Generator,
) -> Iterator[tuple[Tensor, int]]:
    """The loss of each batch with its number of questions, every pool once, candidates drawn afresh."""
    order = rng.permutation(len(pools)).tolist()
    tower.set_training(True)
    for begin in range(0, len(order), recipe.batch):
        batch = [pools[i] for i in order[begin : begin + recipe.batch]]
        drawn = [draw(pool, count=recipe.draws, rng=rng) for pool in batch]
        yield _loss(tower, states, batch, drawn, recipe), len(batch)


def evaluate(
    tower: QuestionTower, pools: Sequence[Pool], states: PassageStates, recipe: Recipe, *, epoch: int
) -> Evaluation:
    """The measures of `Evaluation`; the same 8 candidates each time."""
    import torch

    rng = np.random.default_rng((recipe.seed, 0))
    tower.set_training(False)
    losses, places, firsts, gains = [], [], [], []
    with torch.no_grad():
        for pool in pools:
            drawn = draw(pool, count=recipe.draws, rng=rng)
            others = (rng.permutation(len(pool.cands) - 1)[: _EVALUATION - 1] + 1).tolist()
            scores = score_pool(tower, states, pool)
            targets = torch.from_numpy(standard_scores(pool))
            chosen = torch.tensor(drawn)
            losses.append(
                float(
                    rerank_loss(
                        scores[None, chosen], targets[None, chosen], torch.ones(1, len(drawn), dtype=torch.bool),
                        kind=recipe.loss, tau1=recipe.tau1, tau2=recipe.tau2,
                    )
                )
            )  # fmt: skip
            values = scores.numpy()
            places.append(int((values[others] >= values[0]).sum()))
            firsts.append(bool(values.argmax() == 0))
            gains.append(_ndcg([cand.s_r for cand in pool.cands], values))
    top = [float(np.mean([place < k for place in places])) for k in (1, 3, 5)]
    return Evaluation(
        epoch=epoch, loss=float(np.mean(losses)), top1=top[0], top3=top[1], top5=top[2],
        hit1=float(np.mean(firsts)), ndcg10=float(np.mean(gains)),
    )  # fmt: skip


def score_pool(tower: QuestionTower, states: PassageStates, pool: Pool) -> Tensor:
    """The reranker's score of every candidate, [cands]."""
    query, query_mask = tower.questions([pool.question])
    packed, places, _ = states.gather([[cand.pid for cand in pool.cands]])
    return late_interaction(query, query_mask, tower.passages(packed, places), places)[0]


def _loss(
    tower: QuestionTower,
    states: PassageStates,
    pools: Sequence[Pool],
    drawn: Sequence[Sequence[int]],
    recipe: Recipe,
) -> Tensor:
    import torch

    query, query_mask = tower.questions([pool.question for pool in pools])
    packed, places, there = states.gather(
        [[pool.cands[i].pid for i in chosen] for pool, chosen in zip(pools, drawn, strict=True)]
    )
    targets = torch.zeros(there.shape)
    for i, (pool, chosen) in enumerate(zip(pools, drawn, strict=True)):
        targets[i, : len(chosen)] = torch.from_numpy(standard_scores(pool)[list(chosen)])
    scores = late_interaction(query, query_mask, tower.passages(packed, places), places)
    return rerank_loss(scores, targets, there, kind=recipe.loss, tau1=recipe.tau1, tau2=recipe.tau2)


def _linear(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(_WARMUP * steps))
    return lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


def _ndcg(gains: Sequence[float], scores: Floats, k: int = 10) -> float:
    discounts = 1 / np.log2(np.arange(2, k + 2))
    values = np.maximum(np.asarray(gains), 0)
    found = values[np.argsort(-scores, kind="stable")[:k]]
    ideal = np.sort(values)[::-1][:k]
    best = float(ideal @ discounts[: len(ideal)])
    return float(found @ discounts[: len(found)]) / best if best > 0 else 1.0
