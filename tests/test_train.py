"""The train stage on a tiny student: it learns, resumes exactly, fails loudly; and two steps on the real one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import make_tiny_llama

from domains.config import DomainConfig
from domains.domain import Domain
from domains.errors import ModelError, StageError
from domains.jsonl import write_jsonl
from domains.records import Example, Message
from pipeline import train
from pipeline.packing import encode_examples
from pipeline.progress import Silent
from pipeline.run_folder import Report, Run
from pipeline.student import load_trained
from pipeline.training_loop import Settings, schedule

SETTINGS: dict[str, Any] = {
    "rank": 4,
    "alpha": 8.0,
    "learning_rate": 1e-2,
    "epochs": 2,
    "pack_tokens": 256,
    "packs_per_step": 2,
    "checkpoint_steps": 3,
}
WORDS = [
    "the",
    "dose",
    "of",
    "one",
    "tablet",
    "in",
    "the",
    "morning",
    "and",
    "not",
    "more",
    "than",
    "two",
    "within",
    "a",
    "day",
]


pytestmark = pytest.mark.usefixtures("on_one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def example(number: int, *, words: int = 12) -> Example:
    shuffler = random.Random(number)
    return Example(
        id=f"row-{number}",
        question_id=f"q-{number // 2}",  # two rows a question
        messages=[Message(role="user", content=" ".join(shuffler.choices(WORDS, k=words)))],
        completion=f"yes the dose is {number % 3}",
        passages=[],
        origin="gold",
        request="r",
    )


def domain(base: Path | str, **changes: Any) -> Domain:
    config = {
        "domain": {"name": "tiny", "title": "Tiny"},
        "corpus": {"documents": "."},
        "student": {"base": str(base), "context": 512},
        "train": SETTINGS | changes,
    }
    return Domain(folder=Path(), config=DomainConfig.model_validate(config), prompts={})


def write_rows(folder: Path, count: int = 24, **kwargs: Any) -> Run:
    run = Run(folder)
    write_jsonl(run.examples, [example(number, **kwargs) for number in range(count)])
    return run


def adapter(run: Run) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(run.training / "adapter" / "adapter_model.safetensors")
    return weights


def losses(run: Run) -> list[dict[str, Any]]:
    lines = (run.training / "loss.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Report]:
    run = write_rows(tmp_path_factory.mktemp("runs") / "whole")
    return run, train.run(domain(tiny), run, Silent())


def test_training_learns_and_its_counts_add_up(trained: tuple[Run, Report]) -> None:
    run, report = trained
    counts, facts = report.counts, report.facts
    assert counts == {"rows_in": 24, "trained": 20, "validation": 4, "too_long": 0, "over_max_rows": 0}
    assert facts["validation_after"] < facts["validation_before"] - 0.5
    lines = losses(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, facts["steps"] + 1))
    assert sum(line["supervised"] for line in steps) == facts["supervised_tokens"] > 0
    assert sum(line["tokens"] for line in steps) == facts["tokens"]
    assert [line["step"] for line in lines if "validation_loss" in line] == [
        0,
        facts["steps"] // 2,
        facts["steps"],
    ]
    assert facts["loss_last"] < facts["loss_first"]


def test_the_adapter_is_pefts_and_names_no_place(trained: tuple[Run, Report], tiny: Path) -> None:
    run, _ = trained
    folder = run.training / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    network = json.loads((run.training / "network.json").read_text("utf-8"))
    assert (network["rank"], network["alpha"], network["base"]) == (4, 8.0, tiny.name)
    assert str(tiny.parent) not in (folder / "adapter_config.json").read_text("utf-8") + json.dumps(network)


def test_the_trained_network_comes_back(trained: tuple[Run, Report], tiny: Path) -> None:
    run, report = trained
    adapted, base = load_trained(run.training, base=str(tiny))
    assert not adapted.training
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}
    examples = [example(number) for number in range(24)]
    _, held_out = train.split_validation(examples, seed=0)
    rows, _ = encode_examples(held_out, base, max_tokens=512)
    total = 0.0
    with torch.no_grad():
        for row in rows:
            logits = adapted(input_ids=torch.tensor([row.ids])).logits[0]
            targets = torch.tensor(row.ids[row.n_prompt :])
            total += torch.nn.functional.cross_entropy(
                logits[row.n_prompt - 1 : -1], targets, reduction="sum"
            ).item()
    mean = total / sum(row.supervised for row in rows)
    # training's last validation computed in bfloat16 where the machine can
    assert mean == pytest.approx(report.facts["validation_after"], abs=0.05)


def test_another_base_than_the_one_trained_on_is_refused(trained: tuple[Run, Report], tmp_path: Path) -> None:
    run, _ = trained
    other = make_tiny_llama(tmp_path / "tiny", seed=1)
    with pytest.raises(ModelError, match="now is sha256:"):
        load_trained(run.training, base=str(other))


def test_a_base_with_biases_is_refused_before_the_first_step(tmp_path: Path) -> None:
    base, run = make_tiny_llama(tmp_path / "biased", biases=True), write_rows(tmp_path / "run")
    with pytest.raises(ModelError, match=r"'biased' have biases \(attention_bias") as caught:
        train.run(domain(base), run, Silent())
    assert "name another base in [student]" in caught.value.next_step
    assert not (run.training / "loss.jsonl").exists()


def test_the_same_rows_give_the_same_bytes(trained: tuple[Run, Report], tiny: Path, tmp_path: Path) -> None:
    run, _ = trained
    again = write_rows(tmp_path / "again")
    train.run(domain(tiny), again, Silent())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again.training / "adapter" / name).read_bytes() == (
            run.training / "adapter" / name
        ).read_bytes()
    assert losses(again) == losses(run)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from test_train import Silent, domain, train, Run

class Killer(Silent):
    steps = 0
    def advance(self, amount=1):
        self.steps += amount
        if self.steps == 4:  # one step after the checkpoint
            os.kill(os.getpid(), signal.SIGKILL)

train.run(domain(sys.argv[1], dropout=0.2), Run(Path(sys.argv[2])), Killer())
"""


def test_a_killed_run_goes_on_to_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    dropout = {"dropout": 0.2}  # so that the random numbers have to go on too
    whole = write_rows(tmp_path / "whole")
    train.run(domain(tiny, **dropout), whole, Silent())
    run = write_rows(tmp_path / "killed")
    root = Path(__file__).parent.parent
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny), str(run.folder)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (run.training / "adapter").exists()
    progress = Silent()
    train.run(domain(tiny, **dropout), run, progress)
    assert any(line.startswith("going on after step 3") for line in progress.lines)
    assert losses(run) == losses(whole)
    one, other = adapter(run), adapter(whole)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_other_settings_is_not_used(tiny: Path, tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run")
    train.run(domain(tiny), run, Silent())
    progress = Silent()
    report = train.run(domain(tiny, learning_rate=5e-3), run, progress)
    assert any("starts afresh" in line for line in progress.lines)
    fresh = write_rows(tmp_path / "fresh")
    train.run(domain(tiny, learning_rate=5e-3), fresh, Silent())
    assert report.facts["steps"] == len([line for line in losses(run) if "loss" in line])
    assert all(torch.equal(adapter(run)[name], weight) for name, weight in adapter(fresh).items())


def test_a_damaged_checkpoint_is_not_used(tiny: Path, tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run")
    run.training.mkdir()
    (run.training / "checkpoint.safetensors").write_bytes(b"\0" * 64)
    progress = Silent()
    assert train.run(domain(tiny, epochs=1), run, progress).facts["steps"] > 0
    assert any("is damaged" in line for line in progress.lines)


def test_long_rows_and_a_cap_are_counted(tiny: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    write_jsonl(run.examples, [example(n, words=200 if n % 4 == 0 else 12) for n in range(24)])
    report = train.run(domain(tiny, max_rows=16, epochs=1), run, Silent())
    counts = report.counts
    assert counts["over_max_rows"] == 8
    assert counts["too_long"] == len(report.facts["too_long"]) > 0
    assert counts["rows_in"] == sum(value for name, value in counts.items() if name != "rows_in")


def test_a_single_question_trains_without_validation(tiny: Path, tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", count=2)
    progress = Silent()
    report = train.run(domain(tiny), run, progress)
    assert report.counts["trained"] == 2
    assert report.facts["validation_after"] is None
    assert any("no validation loss" in line for line in progress.lines)


def test_held_out_rows_share_no_question_with_training() -> None:
    examples = [example(number) for number in range(200)]
    training, held_out = train.split_validation(examples, seed=3)
    assert len(training) + len(held_out) == 200
    assert len(held_out) == 10
    assert not {e.question_id for e in training} & {e.question_id for e in held_out}
    assert train.split_validation(examples, seed=4)[1] != held_out


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert schedule(0, 1, 0.0) == 1.0


def test_no_rows_is_an_error(tiny: Path, tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", count=0)
    with pytest.raises(StageError, match="holds no rows"):
        train.run(domain(tiny), run, Silent())
    with pytest.raises(StageError, match="is missing"):
        train.run(domain(tiny), Run(tmp_path / "other"), Silent())


def test_only_long_rows_is_an_error(tiny: Path, tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", count=6, words=300)
    with pytest.raises(StageError, match="all 6 rows have more than 256 tokens"):
        train.run(domain(tiny), run, Silent())


def test_a_loss_that_is_no_number_is_an_error(tiny: Path, tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run")
    with pytest.raises(StageError, match=r"the loss is (nan|inf)") as caught:
        train.run(domain(tiny, learning_rate=1e20), run, Silent())
    assert "learning_rate" in caught.value.next_step
    assert not (run.training / "adapter").exists()


def test_an_adapter_that_changes_nothing_is_an_error(tiny: Path, tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run")
    with pytest.raises(StageError, match="changes no logit"):
        train.run(domain(tiny, learning_rate=1e-30), run, Silent())
    assert not (run.training / "adapter").exists()


def test_two_steps_on_the_real_student_lower_the_loss(tmp_path: Path) -> None:
    rows = [example(number) for number in range(2)]
    settings = Settings(
        rank=8,
        alpha=16.0,
        dropout=0.0,
        learning_rate=2e-3,
        warmup_share=0.0,
        epochs=3,
        pack_tokens=512,
        packs_per_step=1,
        max_grad_norm=1.0,
        seed=0,
    )
    report = train.train_student(
        rows,
        tmp_path,
        Silent(),
        base="smollm2-135m",
        context=512,
        max_rows=0,
        checkpoint_steps=10,
        settings=settings,
    )
    assert report.facts["steps"] == 3  # the third step's loss is that after two
    assert report.facts["loss_last"] < report.facts["loss_first"] - 0.2
    adapted, base = load_trained(tmp_path, base="smollm2-135m")
    ids = torch.tensor([encode_examples(rows, base, max_tokens=512)[0][0].ids])
    with torch.no_grad():
        on = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            off = adapted(input_ids=ids).logits
    assert (on - off).abs().max() > 0.1
