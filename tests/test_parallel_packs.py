"""A step's packs side by side: the same rows, the same loss and gradients, the same bits each time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_levers import matrices, network, rows, weights_made

from domains.errors import StageError
from pipeline import fused_layer, layer_cache
from pipeline.completion_loss import completion_loss
from pipeline.layer_cache import LayerCache
from pipeline.levers import Levers
from pipeline.packing import Pack, Row, pack_hidden
from pipeline.parallel_packs import add_gradients, cores_for_packs, prepare, shares
from pipeline.progress import Silent
from pipeline.training_loop import Settings, Trainer

LEVERS = Levers()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "the workers' setting is their own"
    torch.set_num_threads(threads)


def row(name: str, length: int) -> Row:
    return Row(name, tuple(range(5, 5 + length)), length // 2)


def test_shares_hold_every_row_once_in_as_many_packs_as_cores_can_share() -> None:
    lengths = (90, 80, 70, 60, 50, 40, 30)
    packs = [
        Pack(tuple(row(f"{i}", n) for i, n in enumerate(lengths[:4]))),
        Pack((row("5", 50), row("6", 40), row("7", 30))),
    ]
    found = shares(packs, 2, tokens=210)
    assert sorted(r.id for p in found for r in p.rows) == sorted(r.id for p in packs for r in p.rows)
    assert len(found) == 4  # 420 tokens are two packs of 210, each halved
    sums = [sum(len(r.ids) for r in p.rows) for p in found]
    assert sums == sorted(sums, reverse=True)
    assert sums[0] - sums[-1] <= 30  # no more than the shortest row


def test_fewer_rows_than_cores_are_a_pack_each() -> None:
    assert [len(p.rows) for p in shares([Pack((row("a", 9),))], 4, tokens=100)] == [1]


def gradients(
    model: Any, adapted: Any, packs: list[Pack], cores: int, below: Any = None
) -> tuple[float, list[torch.Tensor]]:
    adapted.train()
    adapted.zero_grad()
    weights = [p for p in adapted.parameters() if p.requires_grad]

    def loss_of(packed: Pack) -> torch.Tensor:
        hidden, targets = pack_hidden(model, packed, LEVERS, below)
        return completion_loss(model.lm_head, hidden, targets) / 100

    with cores_for_packs(cores) as pool:
        if pool is not None:
            prepare(model)
        loss = add_gradients(packs, loss_of, weights, pool)
    return loss, [p.grad.clone() for p in weights if p.grad is not None]


def same(one: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert len(one[1]) == len(other[1]) > 0
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("given", [{}, {"token_rows": (7, 9)}, {"keep": True}], ids=str)
def test_loss_and_gradients_are_those_of_one_pack_after_the_other(given: dict[str, Any]) -> None:
    model, adapted = network(**given)
    whole = Pack(tuple(rows()))
    expected = gradients(model, adapted, [whole], 1)
    packs = shares([whole], 2, tokens=100)
    assert len(packs) > 2
    same(gradients(model, adapted, packs, 2), expected)


def test_the_same_bits_each_time() -> None:
    model, adapted = network()
    packs = shares([Pack(tuple(rows()))], 2, tokens=100)
    first = gradients(model, adapted, packs, 2)
    for _ in range(5):
        again = gradients(model, adapted, packs, 2)
        assert again[0] == first[0]
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_changed_weights_are_seen() -> None:
    """What layers keep of weights from one pack to the next must go when an optimizer step has changed them."""
    model, adapted = network()
    packs = shares([Pack(tuple(rows()))], 2, tokens=100)
    before = gradients(model, adapted, packs, 2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    after = gradients(model, adapted, packs, 2)
    assert after[0] != pytest.approx(before[0], rel=1e-4)
    with adapted.disable_adapter():
        hidden, targets = pack_hidden(model, packs[0], LEVERS)
        off = completion_loss(model.lm_head, hidden, targets).item()
    hidden, targets = pack_hidden(model, packs[0], LEVERS)
    assert completion_loss(model.lm_head, hidden, targets).item() != pytest.approx(off, rel=1e-4)


def test_frozen_layers_are_cached_from_several_threads(tmp_path: Path) -> None:
    model, adapted = network(layers=1)
    whole = Pack(tuple(rows()))
    frozen = model.config.num_hidden_layers - 1
    expected = gradients(model, adapted, [whole], 1)
    cache = LayerCache(frozen, rows(), width=model.config.hidden_size, dtype=torch.float32, folder=tmp_path)
    packs = shares([whole], 2, tokens=100)
    same(gradients(model, adapted, packs, 2, cache), expected)
    same(gradients(model, adapted, packs, 2, cache), expected)


def trained(tmp_path: Path, levers: Levers, dropout: float = 0.0) -> tuple[Trainer, list[float]]:
    model, adapted = network()
    settings = Settings(
        rank=4, alpha=8.0, dropout=dropout, learning_rate=1e-3, warmup_share=0.0, epochs=3, pack_tokens=300,
        packs_per_step=2, max_grad_norm=1.0, seed=0, levers=levers,
    )  # fmt: skip
    trainer = Trainer(adapted, model, rows(), (), settings, tmp_path, "")
    state = trainer.fit(Silent(), checkpoint_steps=100)
    return trainer, [line["loss"] for line in state.history]


def test_training_follows_the_same_curve(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    parallel, losses = trained(tmp_path / "a", Levers())
    alone, expected = trained(tmp_path / "b", replace(Levers(), parallel_packs=False))
    assert (parallel.cores, alone.cores) == (2, 1)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]


def test_with_dropout_the_order_of_chance_is_kept(tmp_path: Path) -> None:
    assert trained(tmp_path, Levers(), dropout=0.1)[0].cores == 1


def test_weights_read_back_from_nf4_do_not_stay_in_memory() -> None:
    model, adapted = network(keep=True)
    before = matrices()
    gradients(model, adapted, shares([Pack(tuple(rows()))], 2, tokens=100), 2)
    assert all(layer in fused_layer._made for layer in model.model.layers), "packs share the layers' groups"
    assert weights_made(model, before) == 0


def test_the_file_of_cached_layers_goes_after_an_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_cache, "free_memory", lambda: 0)
    model, adapted = network(layers=1)
    settings = Settings(
        rank=4, alpha=8.0, dropout=0.0, learning_rate=float("inf"), warmup_share=0.0, epochs=2, pack_tokens=300,
        packs_per_step=2, max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    trainer = Trainer(adapted, model, rows(), (), settings, tmp_path, "")
    assert [*tmp_path.glob("frozen_layers.bin")]
    with pytest.raises(StageError, match="the loss is nan"):
        trainer.fit(Silent(), checkpoint_steps=100)
    assert not [*tmp_path.glob("frozen_layers.bin")]
