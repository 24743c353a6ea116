"""Layers whose adapter lies inside the blocks: their numbers, and their gradients against plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import linear

from domains.errors import ModelError, ParityError
from pipeline.grids.blocks import BLOCK, Blocks
from pipeline.grids.rounding import decode, encode
from pipeline.grids.straight_through import fake_quantize
from pipeline.methods.block_linear import BlockLinear
from pipeline.methods.grid_base import check_trained, pack_blocks
from pipeline.methods.rules import Minima, Rounded, Rule, Scales

OUT, WIDTH, RANK, SCALING = 24, 96, 4, 2.0


def weight() -> torch.Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(3)) * 0.1


def straight(values: torch.Tensor) -> torch.Tensor:
    """float16 in the forward pass, the identity in the backward pass."""
    return values + (values.half().float() - values).detach()


def spread(per_block: torch.Tensor) -> torch.Tensor:
    return per_block.repeat_interleave(BLOCK, dim=1)


def naive_minima(delta: torch.Tensor) -> torch.Tensor:
    blocks = encode(weight(), "Q4_1")
    assert blocks.m is not None
    return spread(blocks.d.float()) * blocks.codes + spread(straight(blocks.m.float() + delta / BLOCK))


def naive_scales(delta: torch.Tensor) -> torch.Tensor:
    blocks = encode(weight(), "Q4_0")
    return spread(straight(blocks.d.float() * (1 + delta))) * (blocks.codes.float() - 8)


def naive_rounded(delta: torch.Tensor) -> torch.Tensor:
    return fake_quantize(weight() + delta, "Q4_0")


CASES: dict[str, tuple[Callable[[], Rule], Callable[[torch.Tensor], torch.Tensor]]] = {
    "minima": (lambda: Minima(encode(weight(), "Q4_1")), naive_minima),
    "scales": (lambda: Scales(encode(weight(), "Q4_0")), naive_scales),
    "rounded": (lambda: Rounded(weight(), "Q4_0"), naive_rounded),
}


def test_blocks_stay_on_the_cpu_wherever_the_adapter_lies() -> None:
    """No GPU is here: fake tensors know their device and refuse to be mixed, as real ones do."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    asked = []

    class Watched(Minima):
        def blocks(self, delta: torch.Tensor) -> Blocks:
            asked.append(delta.device.type)
            return self.base

    rule = Watched(encode(weight(), "Q4_1"))
    layer = BlockLinear(rule, rank=RANK, scaling=SCALING, dtype=torch.float32, device=torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in ("a", "b"):
            setattr(layer, name, torch.nn.Parameter(torch.empty(getattr(layer, name).shape, device="cuda")))
        layer.blocks()
    assert asked == ["cpu"]


def layer_of(rule: Rule, dtype: torch.dtype = torch.float32) -> BlockLinear:
    torch.manual_seed(5)
    layer = BlockLinear(rule, rank=RANK, scaling=SCALING, dtype=dtype, device=torch.device("cpu"))
    with torch.no_grad():
        layer.b.normal_(0, 0.1)
    return layer


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_are_those_of_a_naive_layer(name: str) -> None:
    rule, naive = CASES[name]
    layer = layer_of(rule())
    x = torch.randn(2, 7, WIDTH, requires_grad=True)
    target = torch.randn(2, 7, OUT)
    (layer(x) * target).sum().backward()
    a, b = (p.detach().clone().requires_grad_() for p in (layer.a, layer.b))
    same = x.detach().clone().requires_grad_()
    y = linear(same, naive(SCALING * b @ a))
    (y * target).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(layer(x), y, atol=1e-5)
    for ours, theirs in ((layer.a.grad, a.grad), (layer.b.grad, b.grad), (x.grad, same.grad)):
        assert ours is not None
        assert theirs is not None
        assert theirs.abs().max() > 1e-3
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_the_layer_multiplies_with_what_its_blocks_decode_to(name: str) -> None:
    layer = layer_of(CASES[name][0]())
    assert torch.equal(layer.weight, decode(layer.blocks()))
    x = torch.randn(5, WIDTH)
    assert torch.equal(layer(x), x @ decode(layer.blocks()).T)


@pytest.mark.parametrize("name", CASES)
def test_what_training_did_not_multiply_with_is_not_kept(name: str) -> None:
    layer = layer_of(CASES[name][0](), torch.bfloat16)
    packed = pack_blocks({"w.weight": layer.blocks()})
    check_trained(packed, lambda _: layer.weight)
    stale = layer.weight.clone()
    with torch.no_grad():
        layer.b.mul_(1.5)
    packed = pack_blocks({"w.weight": layer.blocks()})
    check_trained(packed, lambda _: layer.weight)
    with pytest.raises(ParityError, match="training multiplied with other numbers"):
        check_trained(packed, lambda _: stale)


def test_pooling_beside_the_base_is_the_same_layer() -> None:
    """QA-LoRA as the paper writes it: base plus adapter on the means of 32 inputs."""
    rule = Minima(encode(weight(), "Q4_1"))
    layer = layer_of(rule)
    x = torch.randn(5, WIDTH)
    pooled = x.view(5, -1, BLOCK).mean(-1)
    beside = x @ decode(rule.base).T + SCALING * pooled @ layer.a.T @ layer.b.T
    assert torch.allclose(layer(x), beside, atol=2e-3)  # float16 rounding of the minima
    assert (layer(x) - x @ decode(rule.base).T).abs().max() > 0.01


@pytest.mark.parametrize(("name", "changed"), [("minima", {"m"}), ("scales", {"d"})])
def test_merging_changes_one_number_per_block(name: str, changed: set[str]) -> None:
    rule = CASES[name][0]()
    assert isinstance(rule, Minima | Scales)
    base, ours = rule.base, layer_of(rule).blocks()
    assert {field for field in ("codes", "d", "m") if not _equal(base, ours, field)} == changed


def _equal(one: Blocks, other: Blocks, field: str) -> bool:
    first, second = getattr(one, field), getattr(other, field)
    return first is second or torch.equal(first, second)


def test_the_weight_is_made_anew_when_the_adapter_changes_and_only_then() -> None:
    layer = layer_of(Rounded(weight(), "Q4_0"))
    first = layer.weight
    assert layer.weight is first
    optimizer = torch.optim.AdamW([layer.a, layer.b], lr=0.1)
    layer(torch.randn(3, WIDTH)).square().sum().backward()
    assert layer.weight is first  # the gradients are there, the step is not
    optimizer.step()
    assert not torch.equal(layer.weight, first)
    with torch.no_grad():
        layer.b.copy_(torch.zeros_like(layer.b))  # as restoring a checkpoint does
    assert torch.equal(layer.weight, decode(encode(weight(), "Q4_0")))


def test_without_its_adapter_a_layer_is_the_base() -> None:
    layer = layer_of(Rounded(weight(), "Q4_0"))
    on = layer.weight
    layer.enabled = False
    assert torch.equal(layer.weight, decode(encode(weight(), "Q4_0")))
    layer.enabled = True
    assert torch.equal(layer.weight, on)


def test_arithmetic_in_bfloat16_leaves_blocks_and_adapter_alone() -> None:
    wide, narrow = (layer_of(Rounded(weight(), "Q4_0"), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(wide.blocks().codes, narrow.blocks().codes)
    assert torch.equal(wide.blocks().d, narrow.blocks().d)
    y = narrow(torch.randn(3, WIDTH, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert narrow.a.grad is not None
    assert narrow.a.grad.dtype == torch.float32


def test_pooled_inputs_are_all_that_is_kept() -> None:
    x = torch.randn(5, WIDTH)
    assert Minima(encode(weight(), "Q4_1")).keep(x).shape == (5, WIDTH // BLOCK)


@pytest.mark.parametrize("case", ["minima", "scales", "rounded"])
def test_what_float16_can_not_hold_is_refused(case: str) -> None:
    """Else the file would hold an infinity, and the network answer NaN."""
    rule = CASES[case][0]()
    delta = torch.zeros(rule.rows, rule.width)
    delta[0, 0] = 1e9
    with pytest.raises(ModelError, match="beyond float16's 65504"):
        rule.blocks(delta)
