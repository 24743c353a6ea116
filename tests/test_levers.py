"""Every lever of training gives the loss and the gradients of the plain padded step with all logits."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import LLAMA3_ROPE, small_llama
from tiny_llama import make_tiny_llama
from torch import nn

from domains.records import Example, Message
from pipeline import train
from pipeline.completion_loss import completion_loss
from pipeline.fused_layer import fusable
from pipeline.layer_cache import LayerCache
from pipeline.layout import IGNORED, layout_of
from pipeline.levers import Levers, activation_bytes, checkpoints
from pipeline.packing import Pack, Row, encode_examples, pack_hidden, use_packed_attention
from pipeline.progress import Silent
from pipeline.qlora import attach_lora, base_weight, quantize_nf4, to_training
from pipeline.student import load_base
from pipeline.training_loop import Settings

PLAIN = Levers(
    parallel_packs=False,
    packing=False,
    even_lengths=False,
    supervised_head=False,
    chunked_loss=False,
    shared_prefix=False,
    last_layer=False,
    fused_layers=False,
    matmul_attention=False,
    cached_layers=False,
    bf16=False,
    checkpointing="off",
)
# Those that act inside one pack's pass; the others have tests of their own.
SWITCHES = [
    f.name
    for f in fields(Levers)
    if f.name not in {"checkpointing", "bf16", "cached_layers", "parallel_packs"}
]


pytestmark = pytest.mark.usefixtures("on_one_thread")


def rows() -> list[Row]:
    """Ragged rows with a common beginning, one of them over several blocks, one with tokens that are given inside."""
    shuffler = random.Random(3)
    common = tuple(shuffler.choices(range(5, 400), k=20))
    made = []
    for name, prompt, completion in (("a", 30, 9), ("b", 200, 70), ("c", 21, 1), ("d", 60, 30)):
        own = shuffler.choices(range(5, 400), k=prompt - 20 + completion)
        given = ((prompt + 3, prompt + 8),) if name == "d" else ()
        made.append(Row(name, (*common, *own), prompt, given))
    return made


def network(
    *, layers: int = 0, tied: bool = True, keep: bool = False, token_rows: tuple[int, ...] = ()
) -> tuple[Any, Any]:
    model = small_llama(tied=tied, rope=LLAMA3_ROPE)
    quantize_nf4(model, keep_quantized=keep)
    use_packed_attention(model)
    adapted = attach_lora(model, rank=4, alpha=8.0, dropout=0.0, seed=0, token_rows=token_rows, layers=layers)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, adapted


def step(
    model: Any, adapted: Any, levers: Levers, packed: Pack, below: LayerCache | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    adapted.train()
    adapted.zero_grad()
    hidden, targets = pack_hidden(model, packed, levers, below)
    loss = completion_loss(model.lm_head, hidden, targets, chunked=levers.chunked_loss) / packed.supervised
    loss.backward()
    found = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    return loss.item(), found


def transformers_own(model: Any, adapted: Any, packed: Pack) -> tuple[float, dict[str, torch.Tensor]]:
    """The step as everybody writes it: a padded batch, transformers' attention, PEFT's layers, all logits."""
    adapted.train()
    adapted.zero_grad()
    longest = max(len(row.ids) for row in packed.rows)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in packed.rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in packed.rows])
    labels = torch.tensor([[*row.labels, *[IGNORED] * (longest - len(row.ids))] for row in packed.rows])
    model.set_attn_implementation("sdpa")
    loss = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    use_packed_attention(model)
    return loss.item(), {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}


def assert_equal(
    one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert grad.abs().max() > 0, name
        assert (grad - other[1][name]).abs().max() <= 2e-5 * other[1][name].abs().max(), name


VARIANTS: list[Levers] = [
    PLAIN,
    *(replace(PLAIN, **{name: True}) for name in SWITCHES),
    replace(PLAIN, matmul_attention=True, fused_layers=True),
    replace(PLAIN, packing=True, matmul_attention=True, shared_prefix=True),
    replace(PLAIN, supervised_head=True, matmul_attention=True, fused_layers=True, last_layer=True),
    replace(PLAIN, packing=True, even_lengths=True),
    replace(PLAIN, checkpointing="on"),
    replace(Levers(), checkpointing="on"),
    Levers(),
]


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any, tuple[float, dict[str, torch.Tensor]]]:
    model, adapted = network()
    return model, adapted, transformers_own(model, adapted, Pack(tuple(rows())))


@pytest.mark.parametrize("levers", VARIANTS, ids=lambda levers: ",".join(
    f.name for f in fields(levers) if getattr(levers, f.name) != getattr(PLAIN, f.name)
) or "none")  # fmt: skip
def test_loss_and_gradients_are_those_of_the_plain_step(reference: Any, levers: Levers) -> None:
    model, adapted, expected = reference
    assert_equal(step(model, adapted, levers, Pack(tuple(rows()))), expected)


@pytest.mark.parametrize("keep", [False, True])
def test_untied_and_quantized_weights_give_the_same(keep: bool) -> None:
    model, adapted = network(tied=False, keep=keep)
    packed = Pack(tuple(rows()))
    assert_equal(step(model, adapted, Levers(), packed), transformers_own(model, adapted, packed))


@pytest.mark.parametrize("tied", [True, False])
def test_trained_token_rows_get_their_gradients_from_both_ends(tied: bool) -> None:
    model, adapted = network(tied=tied, token_rows=(401, 402))
    given = rows()
    packed = Pack((*given[:3], replace(given[3], ids=(*given[3].ids[:-3], 401, 402, 401))))
    plain = step(model, adapted, PLAIN, packed)
    assert any("trainable_tokens" in name for name in plain[1])
    assert_equal(step(model, adapted, Levers(), packed), plain)


def test_the_fused_layer_is_really_taken_and_weights_are_not_doubled() -> None:
    model, adapted = network()
    assert all(fusable(layer) for layer in model.model.layers)
    before = {name: p.clone() for name, p in model.named_parameters()}
    step(model, adapted, Levers(), Pack(tuple(rows())))
    gate, up = model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj
    assert gate.get_base_layer().weight.untyped_storage().data_ptr() == (
        up.get_base_layer().weight.untyped_storage().data_ptr()
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def matrices() -> list[torch.Tensor]:
    """All that live."""
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return [each for each in found if each.dtype == torch.float32 and each.dim() == 2]


def weights_made(model: Any, before: list[torch.Tensor]) -> int:
    """How many of the blocks' weights have come into memory as numbers, alone or as the first rows of a joined matrix."""
    known = {id(each) for each in before}
    new = [each for each in matrices() if id(each) not in known]
    projections = ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")  # v and up come behind k and gate
    modules = [module for path, module in model.model.layers.named_modules() if path.endswith(projections)]

    def lies_in(each: torch.Tensor, weight: torch.Tensor) -> bool:
        return each.shape[1] == weight.shape[1] and torch.equal(each[: len(weight)], weight)

    weights = [base_weight(module.get_base_layer(), torch.float32) for module in modules]
    return sum(any(lies_in(each, weight) for each in new) for weight in weights)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_weights_read_back_from_nf4_do_not_wait_for_the_backward_pass(checkpointing: Any) -> None:
    """Else memory holds the whole network as if it were not quantized, once per pack that runs."""
    levers = replace(Levers(), checkpointing=checkpointing)
    nothing: list[torch.Tensor] = []
    assert weights_made(network()[0], nothing) == 2 * 5, "the count sees weights"
    model, adapted = network(keep=True)
    assert all(fusable(layer) for layer in model.model.layers)
    packs = [Pack(tuple(rows()[:2])), Pack(tuple(rows()[2:]))]
    adapted.train()
    before = matrices()
    hidden = [pack_hidden(model, packed, levers)[0] for packed in packs]
    assert weights_made(model, before) == 0
    torch.cat(hidden).sum().backward()
    assert weights_made(model, before) == 0
    for packed in packs:
        expected = step(model, adapted, replace(levers, fused_layers=False), packed)
        assert_equal(step(model, adapted, levers, packed), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.mlp.up_proj.get_base_layer().register_forward_hook(lambda *_: None),
        lambda layer: layer.input_layernorm.register_forward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer.self_attn, "forward", lambda **_: None),
        lambda layer: setattr(layer.mlp, "up_proj", type("Other", (nn.Linear,), {})(64, 128)),
        lambda layer: setattr(layer.mlp.up_proj, "forward", lambda x: x),
        lambda layer: layer.mlp.up_proj.lora_dropout.update({"default": nn.Dropout(0.5)}),
        lambda layer: setattr(layer.mlp.down_proj.get_base_layer(), "bias", nn.Parameter(torch.ones(64))),
    ],
    ids=["hook", "hook before a norm", "another attention", "another class", "another forward pass", "dropout", "bias"],
)  # fmt: skip
def test_a_layer_in_which_something_else_happens_is_not_fused(change: Callable[[Any], Any]) -> None:
    model, adapted = network()
    adapted.train()
    change(model.model.layers[0])
    assert [fusable(layer) for layer in model.model.layers] == [False, True]


def test_without_its_adapter_the_fused_network_is_the_base() -> None:
    model, adapted = network()
    packed = Pack(tuple(rows()))
    with torch.no_grad(), adapted.disable_adapter():
        fused, _ = pack_hidden(model, packed, Levers())
        plain, _ = pack_hidden(model, packed, replace(PLAIN, supervised_head=True))
    with torch.no_grad():
        adapted_hidden, _ = pack_hidden(model, packed, Levers())
    assert (fused - plain).abs().max() < 1e-4
    assert (adapted_hidden - plain).abs().max() > 1e-2


@pytest.mark.parametrize("share", [True, False], ids=["in memory", "in a file"])
def test_frozen_layers_run_once_per_row_and_change_nothing(
    share: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not share:
        monkeypatch.setattr("pipeline.layer_cache.free_memory", lambda: 0)
    model, adapted = network(layers=1)
    given = rows()
    cache = LayerCache(1, given, width=64, dtype=torch.float32, folder=tmp_path)
    assert cache.in_file is not share
    assert cache.size_bytes == sum(len(row.ids) for row in given) * 64 * 4
    for packed in (
        Pack(tuple(given)),
        Pack(tuple(given[:2])),
        Pack(tuple(given[2:])),
        Pack(tuple(given[::-1])),
    ):
        assert_equal(step(model, adapted, Levers(), packed, cache), step(model, adapted, PLAIN, packed))
    calls = []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    step(model, adapted, Levers(), Pack(tuple(given[1:])), cache)
    assert not calls  # everything below is known
    cache.close()
    assert list(tmp_path.iterdir()) == []


def example(number: int) -> Example:
    text = f"What is the dose of number {number}, and when is it due? " * (1 + number % 3)
    return Example(
        id=f"row-{number}",
        question_id=f"q-{number}",
        messages=[Message(role="system", content="Answer."), Message(role="user", content=text)],
        completion=f"yes, {number % 4}",
        passages=[],
        origin="gold",
        request="r",
    )


def history(base: Path, folder: Path, progress: Silent, **changes: Any) -> list[float]:
    """The losses of a training on a base's folder."""
    settings = Settings(
        rank=4, alpha=8.0, dropout=0.0, learning_rate=1e-2, warmup_share=0.1, epochs=2, pack_tokens=400,
        packs_per_step=1, max_grad_norm=1.0, seed=0, **changes,
    )  # fmt: skip
    train.train_student(
        [example(number) for number in range(20)],
        folder,
        progress,
        base=str(base),
        context=512,
        max_rows=0,
        checkpoint_steps=100,
        settings=settings,
    )
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text("utf-8").splitlines()]
    return [line.get("loss", line.get("validation_loss")) for line in lines]


@pytest.mark.parametrize("lora_layers", [0, 1])
def test_a_bases_attention_dropout_is_left_out_and_said(lora_layers: int, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "tiny")
    loaded = load_base(str(base), dtype=torch.float32)
    two, _ = encode_examples([example(1), example(2)], loaded, max_tokens=512)
    assert layout_of(Pack(tuple(two)), share=True, even=True).prefix, "the rows share a beginning"
    given = {"lora_layers": lora_layers, "levers": Levers(bf16=False)}
    expected = history(base, tmp_path / "without", Silent(), **given)
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"attention_dropout": 0.5}), "utf-8")
    progress = Silent()
    assert history(base, tmp_path / "with", progress, **given) == expected
    assert any("attention_dropout of 0.5 is left out" in line for line in progress.lines)


def test_training_with_frozen_layers_learns_the_same_with_and_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.layer_cache.free_memory", lambda: 0)  # in a file
    base = make_tiny_llama(tmp_path / "tiny")
    histories = []
    for cached in (True, False):
        folder = tmp_path / f"run-{cached}"
        levers = Levers(cached_layers=cached, bf16=False)
        histories.append(history(base, folder, Silent(), lora_layers=1, levers=levers))
        assert not list(folder.glob("*.bin"))
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert all(".layers.1." in name for name in saved)
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)
    assert histories[0][-1] < histories[0][0]


def test_lora_on_the_topmost_layers_leaves_the_others_alone() -> None:
    _, adapted = network(layers=1)
    assert {name.split(".layers.")[1][0] for name, p in adapted.named_parameters() if p.requires_grad} == {
        "1"
    }


def test_the_common_beginning_ends_before_the_first_prediction() -> None:
    one, other = Row("a", (7, 8, 9, 1), 3), Row("b", (7, 8, 9, 2, 3), 3)
    layout = layout_of(Pack((one, other)), share=True)
    assert layout.prefix == 2
    assert layout.input_ids.tolist() == [7, 8, 9, 1, 9, 2, 3]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert layout.bounds == ((2, 4), (4, 7))
    assert layout.places.tolist() == [2, 4, 5]
    assert layout.targets.tolist() == [1, 2, 3]
    assert layout.wanted == ((2, 3), (4, 6))
    assert layout_of(Pack((one,)), share=True).prefix == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_is_the_whole_loss(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 50, bias=False).to(dtype).requires_grad_(False)
    targets = torch.randint(0, 50, (600,))
    targets[::5] = IGNORED
    found = []
    for chunked in (True, False):
        hidden = torch.randn(600, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        loss = completion_loss(head, hidden, targets, chunked=chunked) / 480
        loss.backward()
        assert hidden.grad is not None
        found.append((loss.item(), hidden.grad.float()))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert found[0][0] == pytest.approx(found[1][0], rel=tolerance)
    assert (found[0][1] - found[1][1]).abs().max() <= tolerance * found[1][1].abs().max()
    assert (found[0][1][::5] == 0).all()


def test_bfloat16_stays_near_float32() -> None:
    model, adapted = network()
    packed = Pack(tuple(rows()))
    exact = step(model, adapted, PLAIN, packed)
    to_training(model, torch.bfloat16)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    apart = []
    for levers in (Levers(), PLAIN):
        loss, grads = step(model, adapted, levers, packed)
        assert loss == pytest.approx(exact[0], rel=0.02)
        one = torch.cat([grads[name].flatten() for name in exact[1]])
        other = torch.cat([grad.flatten() for grad in exact[1].values()])
        apart.append(((one - other).norm() / other.norm()).item())
    assert apart[0] < 1.3 * apart[1]  # no less exact than the plain step in the same arithmetic


def test_checkpointing_follows_the_switch_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_llama().config
    need = activation_bytes(config, [100, 50], item_bytes=2)
    assert activation_bytes(config, [150], item_bytes=2) > need > 0
    assert checkpoints(Levers(checkpointing="on"), config, [[1]], item_bytes=2)
    assert not checkpoints(Levers(checkpointing="off"), config, [[10**6]], item_bytes=2)
    for free, expected in ((2 * need + 2, False), (2 * need - 2, True)):
        monkeypatch.setattr("pipeline.levers.free_memory", lambda free=free: free)
        assert checkpoints(Levers(), config, [[10], [100, 50]], item_bytes=2) is expected
