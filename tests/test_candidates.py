"""Every way from a student to a file, on a tiny network, and the choice between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import roundings, spin
from pipeline.candidates import CANDIDATES, ON_REQUEST, Materials, Measured, measure, possible, weigh
from pipeline.choose_format import choose
from pipeline.fidelity import Fidelity, Reference, Text
from pipeline.imatrix import collect_imatrix
from pipeline.packing import Row
from pipeline.progress import Silent
from pipeline.rotate import random_rotations
from pipeline.roundings import LOSSES, Learning, round_student
from pipeline.speed import Speed
from pipeline.student import load_base
from pipeline.student_files import write_f16
from pipeline.training_loop import Settings
from tests.small_models import small_llama
from tests.tiny_llama import make_tiny_llama

SETTINGS = Settings(
    rank=4, alpha=8, dropout=0, learning_rate=1e-3, warmup_share=0.1, epochs=1, pack_tokens=256, packs_per_step=1,
    max_grad_norm=1.0, seed=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Measured]]:
    folder = tmp_path_factory.mktemp("candidates")
    base = load_base(str(make_tiny_llama(folder / "tiny")), dtype=torch.float32)
    f16 = folder / "F16.gguf"
    write_f16(f16, base.model, base, title="tiny")
    generator = torch.Generator().manual_seed(0)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(10, 300, shape, generator=generator)

    batches = [ids(4, 64) for _ in range(4)]
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    materials = Materials(
        network=base.model, base=base, f16=f16, batches=batches,
        rows=[Row(id=f"r{number}", ids=tuple(ids(60).tolist()), n_prompt=30) for number in range(8)],
        imatrix=collect_imatrix(base.model, [row.tolist() for row in torch.cat(batches)], max_tokens=10**6),
        settings=SETTINGS, learning=Learning(steps=2, tuning_steps=2),
    )  # fmt: skip
    reference = Reference.of_file(f16, [Text(tuple(ids(80).tolist())) for _ in range(6)])
    found = measure([*CANDIDATES, *ON_REQUEST], materials, folder / "files", reference, Silent(), speed=False)
    yield {each.candidate.name: each for each in found}
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # every candidate starts from the same student
    assert len(possible(CANDIDATES, replace(materials, rows=[]))) == len(CANDIDATES) - 3


def test_every_candidate_becomes_a_file_that_llama_cpp_runs(measured: dict[str, Measured]) -> None:
    assert list(measured) == [each.name for each in (*CANDIDATES, *ON_REQUEST)]
    for name, each in measured.items():
        assert 0 < each.fidelity.kl.mean < 0.2, name
        assert weigh(each.path) == (each.bytes, each.block_bits_per_weight, each.untied_bytes)
    assert measured["gptq-q4_0"].block_bits_per_weight == 4.5
    assert measured["qalora-q4_1"].block_bits_per_weight == 5.0
    assert measured["qalora-q4_0"].block_bits_per_weight == 4.5  # its multiplicative form


def test_only_a_rotated_stream_unties(measured: dict[str, Measured]) -> None:
    untied = {name for name, each in measured.items() if each.untied_bytes}
    assert untied == {"r1r2-gptq-q4_0", *(f"{rounding}-q4_0" for rounding in LOSSES)}
    bigger = measured["r1r2-gptq-q4_0"].bytes - measured["gptq-q4_0"].bytes
    assert bigger == pytest.approx(measured["r1r2-gptq-q4_0"].untied_bytes, rel=0.05)


def test_a_learned_rotation_says_on_what_it_was_learned(measured: dict[str, Measured]) -> None:
    told = {name: loss for name, each in measured.items() if (loss := each.row()["rotation_loss"])}
    assert told == {
        "learned-gptq-q4_0": "error", "learned-kl-gptq-q4_0": "kl", "learned-ce-gptq-q4_0": "ce",
        "tuned-gptq-q4_0": "error",
    }  # fmt: skip
    files = [measured[name].path.read_bytes() for name in told]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("fast", [True, False])
def test_rotations_are_learned_on_the_loss_that_the_rounding_names(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, Any, Any]] = []

    def learn(network: Any, _batches: Any, **how: Any) -> Any:
        asked.append((how["loss"], how["bfloat16"], how["steps"]))
        return random_rotations(network, r1=True, r2=True, seed=0)

    monkeypatch.setattr(spin, "learn_rotations", learn)
    monkeypatch.setattr(
        roundings, "training_dtype", lambda *, bf16: torch.bfloat16 if fast and bf16 else torch.float32
    )
    batches = [torch.arange(64).reshape(2, 32)]
    for rounding in ("r1r2-gptq", "learned-gptq", "learned-kl-gptq", "learned-ce-gptq"):
        round_student(small_llama(), rounding, "Q4_0", batches, seed=0, learning=Learning(steps=5))
    assert asked == [("error", fast, 5), ("kl", fast, 5), ("ce", fast, 5)]
    slow = Learning(steps=5, bf16=False)
    round_student(small_llama(), "learned-gptq", "Q4_0", batches, seed=0, learning=slow)
    assert asked[-1] == ("error", False, 5)


def test_compensation_and_search_help(measured: dict[str, Measured]) -> None:
    kl = {name: each.fidelity.kl.mean for name, each in measured.items()}
    assert kl["llamacpp-q8_0"] < kl["gptq-q4_1"] < kl["gptq-q4_0"] < kl["mse-q4_0"] < kl["rtn-q4_0"]


def test_bounds_decide_who_is_near_enough(measured: dict[str, Measured]) -> None:
    strict = choose(list(measured.values()), max_kl=0.02, min_top1=0.5)
    assert strict.winner.candidate.name == "llamacpp-q8_0"
    assert len(strict.reasons) == len(measured) - 1
    none = choose([measured["rtn-q4_0"], measured["gptq-q4_0"]], max_kl=0.001, min_top1=0.9)
    assert none.winner.candidate.name == "gptq-q4_0"
    assert "nearest" in none.reasons[-1]
    loose = choose(list(measured.values()), max_kl=1.0, min_top1=0.1)
    assert loose.winner.bytes == min(each.bytes for each in measured.values())


def fake(
    name: str, *, kl: float, wobble: float = 0.0, speed: float = 100.0, exam: tuple[float, ...] = ()
) -> Measured:
    candidate = next(each for each in CANDIDATES if each.name == name)
    sums = tuple(kl + wobble * (-1) ** number for number in range(20))
    fidelity = Fidelity(sums, (1.0,) * 20, (1,) * 20, (1,) * 20)
    return Measured(candidate, Path(name), 0.0, 100, 4.5, 0, fidelity, exam, Speed(speed, speed))


def test_a_rotation_ships_only_beyond_noise() -> None:
    plain = fake("gptq-q4_0", kl=0.010)
    noisy = fake("r1r2-gptq-q4_0", kl=0.009, wobble=0.008, speed=500)
    certain = fake("r1r2-gptq-q4_0", kl=0.005, speed=500)
    assert choose([plain, noisy], max_kl=0.02, min_top1=0.9).winner is plain
    assert choose([plain, certain], max_kl=0.02, min_top1=0.9).winner is certain
    # Where nothing is near enough, too.
    assert choose([plain, noisy], max_kl=0.001, min_top1=0.9).winner is plain
    assert choose([plain, certain], max_kl=0.001, min_top1=0.9).winner is certain


def test_rotation_is_compared_with_gptq_alone_whatever_the_bounds() -> None:
    plain, other_grid = fake("gptq-q4_0", kl=0.30), fake("gptq-q4_1", kl=0.01)
    noisy = fake("r1r2-gptq-q4_0", kl=0.29, wobble=0.08)
    certain = fake("learned-kl-gptq-q4_0", kl=0.295)
    near = fake("llamacpp-q8_0", kl=0.001)
    for max_kl in (0.02, 1.0):
        said = choose([near, plain, noisy, other_grid], max_kl=max_kl, min_top1=0.9).rotation
        assert said.startswith("no rotation beats GPTQ alone beyond noise: the nearest, r1r2-gptq-q4_0")
        assert "0.2900 nats against 0.3000 of gptq-q4_0, difference -0.0100 [-0.0" in said
        assert said.endswith("paired over 20 texts")
        both = choose([near, plain, noisy, certain], max_kl=max_kl, min_top1=0.9).rotation
        assert both.startswith("rotation beats GPTQ alone beyond noise: learned-kl-gptq-q4_0 has 0.2950")
    alone = choose([near, certain], max_kl=0.02, min_top1=0.9).rotation
    assert alone == "rotations were not compared: GPTQ alone was not measured beside them"
    assert choose([near, plain], max_kl=0.02, min_top1=0.9).rotation == ""


def test_one_text_shows_no_noise_and_decides_nothing() -> None:
    plain, rotated = (
        replace(each, fidelity=each.fidelity.part(slice(0, 1)))
        for each in (fake("gptq-q4_0", kl=0.010), fake("r1r2-gptq-q4_0", kl=0.005, speed=500))
    )
    choice = choose([plain, rotated], max_kl=0.02, min_top1=0.9)
    assert choice.winner is plain
    assert choice.rotation.startswith("no rotation beats")


def test_a_file_that_fails_the_exam_is_not_chosen_for_its_speed() -> None:
    good = fake("llamacpp-q8_0", kl=0.001, exam=(1.0, 0.8) * 10)
    bad = fake("qat-q4_0", kl=0.01, speed=900, exam=(0.3, 0.1) * 10)
    choice = choose([good, bad], max_kl=0.02, min_top1=0.9)
    assert choice.winner is good
    assert "70 points worse" in choice.reasons[0]


def test_files_of_one_type_are_equally_fast_however_they_were_timed() -> None:
    """The nearer one is not passed over because its timing met a busy moment."""
    lucky, nearer = fake("mse-q4_0", kl=0.012, speed=190), fake("gptq-q4_0", kl=0.010, speed=100)
    choice = choose([lucky, nearer], max_kl=0.02, min_top1=0.9)
    assert choice.winner is nearer
    assert "larger" in choice.reasons[-1]


def test_speeds_within_the_noise_of_timing_do_not_choose() -> None:
    small, large = fake("gptq-q4_0", kl=0.01), fake("llamacpp-q8_0", kl=0.001, speed=125)
    large = replace(large, bytes=150)
    assert choose([small, large], max_kl=0.02, min_top1=0.9).winner is small
    certain = replace(large, speed=Speed(200, 200))
    assert choose([small, certain], max_kl=0.02, min_top1=0.9).winner is certain
