"""KL and perplexity of files against a reference, through llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import speed as timing
from pipeline.fidelity import Fidelity, Reference, Text, compare
from pipeline.speed import compare_prompts, measure_speed
from pipeline.student import load_base
from pipeline.student_files import write_f16
from serve.engine import Completion
from serve.quantizer import requantize
from tests.tiny_llama import make_tiny_llama


def test_kl_and_likelihood_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 300, 7)).astype(np.float32)
    targets = rng.integers(0, 7, 300).tolist()
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (before.astype(float), after.astype(float)))
    kl, nll, same, positions = compare(before, after, targets)
    assert kl == pytest.approx((p * np.log(p / q)).sum())
    assert nll == pytest.approx(-np.log(q[np.arange(300), targets]).sum())
    assert (same, positions) == ((p.argmax(1) == q.argmax(1)).sum(), 300)
    assert compare(before, before, targets)[0] == 0


def test_a_difference_is_paired_by_text() -> None:
    near = Fidelity((1.0, 10.0, 100.0), (1.0, 1.0, 1.0), (1, 1, 1), (10, 10, 10))
    far = Fidelity((1.5, 10.5, 100.5), (1.0, 1.0, 1.0), (1, 1, 1), (10, 10, 10))
    gap = near.minus(far)
    assert gap.mean == pytest.approx(-0.05)
    assert gap.low == pytest.approx(-0.05)  # the texts differ much, the pairs do not
    assert gap.high == pytest.approx(-0.05)
    assert near.perplexity == pytest.approx(math.exp(0.1))
    assert near.perplexity_interval.low == near.perplexity_interval.high == near.perplexity


def test_perplexity_has_its_interval_over_texts() -> None:
    wide = Fidelity((0.0,) * 4, (10.0, 20.0, 30.0, 40.0), (1,) * 4, (10,) * 4)
    found = wide.perplexity_interval
    assert found.mean == wide.perplexity == pytest.approx(math.exp(2.5))
    assert math.exp(1.0) < found.low < math.exp(2.0)
    assert math.exp(3.0) < found.high < math.exp(4.0)


def write_tiny(folder: Path) -> Path:
    base = load_base(str(make_tiny_llama(folder / "tiny")), dtype=torch.float32)
    write_f16(folder / "f16.gguf", base.model, base, title="tiny")
    return folder / "f16.gguf"


def test_a_file_is_itself_and_a_coarser_one_is_farther(tmp_path: Path) -> None:
    f16 = write_tiny(tmp_path)
    texts = [Text(tuple(range(20 + shift, 60 + shift)), first=3 * shift) for shift in range(3)]
    reference = Reference.of_file(f16, texts)
    same = reference.measure(f16)
    assert reference.itself() == same
    assert same.positions == (39, 36, 33)
    assert same.kl.mean < 1e-9
    assert same.top1_agreement == 1
    found = {}
    for kind in ("Q8_0", "Q4_0"):
        requantize(f16, tmp_path / f"{kind}.gguf", kind, outer="F16")  # type: ignore[arg-type]
        found[kind] = reference.measure(tmp_path / f"{kind}.gguf").kl.mean
    assert 0 < found["Q8_0"] < found["Q4_0"]


def test_speed_is_measured_in_tokens_per_second(tmp_path: Path) -> None:
    speed = measure_speed(write_tiny(tmp_path), prompt_tokens=32, decode_tokens=4, repeats=1)
    assert speed.prompt_tokens_per_s > 0
    assert speed.decode_tokens_per_s > 0


def test_prompts_of_two_files_are_timed_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower and slower favours neither: here every read takes 1 % longer than the one before."""
    cost = [1.0]

    def read(engine: Any, _prompt: list[int]) -> float:
        cost[0] *= 1.01
        return cost[0] * (2.0 if engine.path.name == "slow.gguf" else 1.0)

    monkeypatch.setattr("pipeline.speed._read", read)
    fast, slow = (write_tiny(tmp_path / name).rename(tmp_path / f"{name}.gguf") for name in ("fast", "slow"))
    ratio = compare_prompts(fast, slow, prompt_tokens=32, rounds=8)
    assert (ratio.rounds, ratio.median) == (8, pytest.approx(2.0, rel=0.011))
    assert ratio.low < ratio.median < ratio.high


class _Scripted:
    """Writes replies of given lengths, a hundredth of a second a token; the prompt takes a whole second."""

    def __init__(self, lengths: list[int], clock: list[float]) -> None:
        self.lengths, self.clock = lengths, clock

    def stream(self, _prompt: list[int], *, max_tokens: int, **_: Any) -> Iterator[str]:
        length = min(max_tokens, self.lengths.pop(0) if len(self.lengths) > 1 else self.lengths[0])
        self.clock[0] += 1.0
        yield from self._tokens(length)
        return Completion("", list(range(length)), 8, "stop")

    def _tokens(self, length: int) -> Iterator[str]:
        for number in range(length):
            self.clock[0] += 0.01 if number else 0.0
            yield "a"


@pytest.mark.parametrize("lengths", [[49], [3, 1, 20, 2, 30], [2]])
def test_writing_is_timed_behind_the_prompt_however_soon_a_reply_ends(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    rate = timing._write(_Scripted(lengths, clock), [1] * 8, tokens=48, seed=0)  # type: ignore[arg-type]
    assert rate == pytest.approx(100)


def test_a_model_that_writes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing._write(_Scripted([0], clock), [1] * 8, tokens=48, seed=0) == pytest.approx(1.0)  # type: ignore[arg-type]
