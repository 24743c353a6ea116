"""The training benchmark: its rows, its sums, and both trainers on a tiny student."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import make_tiny_llama

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import training


def test_the_rows_are_ragged_and_the_same_every_time() -> None:
    rows = training.examples()
    assert len(rows) == training.STEPS * training.ROWS_PER_STEP
    assert [row.id for row in rows] == [row.id for row in training.examples()]
    sizes = [len(row.messages[1].content) for row in rows]
    assert statistics.stdev(sizes) > 0.25 * statistics.mean(sizes)
    assert {len(row.passages) for row in rows} == {0, 1, 2}


def test_an_arm_survives_its_way_to_another_process() -> None:
    arm = training.Arm("x", 3, switches=(("packing", False), ("checkpointing", "on")), lora_layers=2)
    assert training.Arm.parse(json.dumps(asdict(arm))) == arm


def measured(speed: float, peak: float, *losses: float) -> training.Measured:
    return training.Measured(speed, peak, list(losses), 100)


def test_ratios_are_ours_over_theirs() -> None:
    result = training.compared(
        {
            "ours": measured(900, 1900, 2.0, 1.5),
            "ours_again": measured(700, 2000, 2.0, 1.5),
            "trl": measured(100, 8000, 2.01, 1.46),
            "trl_default": measured(50, 5000, 2.0),
        }
    )
    assert result == {
        "speedup": 8.0,
        "memory_ratio": 0.25,
        "speedup_default": 16.0,
        "memory_ratio_default": 0.4,
        "max_loss_difference": 0.04,
    }


def test_every_lever_is_measured_against_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[training.Arm] = []

    def start(arm: training.Arm) -> training.Measured:
        seen.append(arm)
        off = dict(arm.switches).get("packing") is False
        return measured(100 if off else 300, 900 if off else 600, 2.0)

    def start_turns(arms: list[training.Arm], _rounds: int) -> dict[str, Any]:
        off = [dict(arm.switches).get("packing") is False for arm in arms]
        found = [{"seconds": [3.0, 9.0] if each else [1.0, 3.0], "loss": 2.0, "norm": 1.0} for each in off]
        return {"arms": found, "bound": {"tokens_per_s": 1000}}

    monkeypatch.setattr(training, "start", start)
    monkeypatch.setattr(training, "start_turns", start_turns)
    result = training.measure_levers(list(training.LEVERS), training.QUICK)
    levers = result["levers"]
    assert levers.keys() == training.LEVERS.keys()
    assert levers["packing"] == {
        "speedup": 3.0, "speedups": [3.0, 3.0], "memory_ratio": 0.667, "loss_difference": 0.0, "gradient_norm_ratio": 1.0,
    }  # fmt: skip
    assert levers["last_layer"]["speedup"] == 1.0
    assert result["bound"] == {"tokens_per_s": 1000}
    assert len(seen) == len(set(seen))  # no arm is measured twice
    from pipeline.levers import Levers

    for arm in seen:
        Levers(**dict(arm.switches))


def test_both_trainers_take_the_same_tokens_to_the_same_losses(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    base = str(make_tiny_llama(tmp_path / "tiny"))
    ours = training.start(training.Arm("ours", 2, base=base))
    theirs = training.start(training.Arm("trl", 2, trl=True, trl_checkpointing=False, base=base))
    assert theirs.same_tokens
    assert ours.tokens == theirs.tokens
    assert ours.losses == pytest.approx(theirs.losses, abs=0.05)
    assert ours.losses[1] != ours.losses[0]


def test_in_turns_every_lever_gives_the_same_loss_and_gradient(tmp_path: Path) -> None:
    base = str(make_tiny_llama(tmp_path / "tiny"))
    switches = [{}, {"fused_layers": False, "shared_prefix": False}, {"packing": False}, {"bf16": False}]
    arms = [training.Arm("lever", 1, switches=tuple(each.items()), base=base) for each in switches]
    arms.append(training.Arm("lever", 1, lora_layers=1, base=base))
    found = training.take_turns(arms, 2)
    assert [len(each["seconds"]) for each in found["arms"]] == [1] * len(arms)
    whole, *others, top = found["arms"]
    for each in others:
        assert each["loss"] == pytest.approx(whole["loss"], abs=0.02)
        assert each["norm"] == pytest.approx(whole["norm"], rel=0.05)
    assert 0 < top["norm"] < whole["norm"]
    assert found["bound"]["gemm_gflops"] > 0
