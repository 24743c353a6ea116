"""``[train]``: which network is trained, to which end, and how."""

from __future__ import annotations

from dataclasses import dataclass

from domains.domain import Domain
from domains.routes import Grid
from pipeline.levers import Levers
from pipeline.objective import Divergence
from pipeline.training_loop import Settings


@dataclass(frozen=True)
class Recipe:
    """What is trained, beside the loop's settings.

    Attributes:
        method: as in ``[train] method``.
        grid: as in ``[train] grid``; None for a method without.
        divergence: a teacher's distribution counts in the loss, too.
        base_rounding: as in ``[train] base_rounding``.
    """

    method: str = "qlora"
    grid: Grid | None = None
    divergence: Divergence | None = None
    base_rounding: str = "search"


QLORA = Recipe()


def recipe_of(domain: Domain) -> Recipe:
    """The method and the objective of ``[train]``."""
    config = domain.config
    divergence = Divergence(
        weight=config.train.kl_weight,
        temperature=config.train.kl_temperature,
        teacher=config.train.kl_teacher,
    )
    return Recipe(
        method=config.train.method,
        grid=config.train.grid,
        divergence=None if config.train.objective == "ce" else divergence,
        base_rounding=config.train.base_rounding,
    )


def settings_of(domain: Domain) -> Settings:
    """``[train]`` as the loop wants it."""
    config = domain.config
    return Settings(
        rank=config.train.rank,
        alpha=config.train.alpha,
        dropout=config.train.dropout,
        learning_rate=config.train.learning_rate,
        warmup_share=config.train.warmup_share,
        epochs=config.train.epochs,
        pack_tokens=config.train.pack_tokens,
        packs_per_step=config.train.packs_per_step,
        max_grad_norm=config.train.max_grad_norm,
        seed=config.train.seed,
        lora_layers=config.train.lora_layers,
        levers=Levers(**config.train.levers.model_dump()),
    )
