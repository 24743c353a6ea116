from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domains.domain import Domain, load_domain
from domains.errors import ParityError, StageError
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Example, Message, Question, Quote, Rationale
from pipeline import candidates, export, gguf_writer
from pipeline.candidates import CANDIDATES
from pipeline.development import ask_items
from pipeline.grids import Packed
from pipeline.parity import Parity
from pipeline.progress import Silent
from pipeline.qlora import attach_lora, quantize_nf4
from pipeline.roundings import LOSSES, ROTATING, ROUNDINGS, Rounded, round_student
from pipeline.run_folder import Run
from pipeline.student import load_base
from serve.gguf_check import check_gguf
from serve.manifest import read_manifest
from tests.small_serving import SYSTEM, TEXTS, write_index
from tests.tiny_llama import make_tiny_llama

QUOTE = "The adult dose of Brenzal is 40 mg once a day."
TOML = """
[domain]
name = "shelf"
title = "A small shelf"
licence = "CC0-1.0"
[corpus]
documents = "documents"
questions = "questions.jsonl"
[retrieve]
top_k = 2
[student]
base = "{base}"
context = 1024
[export]
formats = ["Q4_0"]
serve = "Q8_0"
imatrix_tokens = 300
[parity]
prompts = 3
max_kl = 0.02
min_top1 = 0.7
"""


def questions() -> list[Question]:
    dose = Question(
        id="dose", kind="open", question="What is the adult dose of Brenzal?", answer="40 mg once a day",
        about="brenzal", gold=[Quote(doc_id="brenzal", quote=QUOTE)], split="exam",
    )  # fmt: skip
    milk = Question(
        id="milk", kind="yes_no", question="May Moltrex be taken with milk?", answer="no", about="moltrex",
        gold=[Quote(doc_id="moltrex", quote="Moltrex must not be taken with milk, because milk binds it.")],
        split="exam",
    )  # fmt: skip
    price = Question(
        id="price",
        kind="unanswerable",
        question="What does Sanivar cost?",
        answer=None,
        about="",
        split="exam",
    )
    seed = dose.model_copy(update={"id": "seed", "split": "seed"})
    fresh = milk.model_copy(update={"id": "fresh", "split": "seed"})
    return [dose, milk, price, seed, fresh]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A domain's folder and a run's, as after training."""
    root = tmp_path_factory.mktemp("world")
    tiny, domain, run = make_tiny_llama(root / "tiny"), root / "domain", Run(root / "runs" / "shelf" / "one")
    (domain / "prompts").mkdir(parents=True)
    (domain / "domain.toml").write_text(TOML.replace("{base}", str(tiny)), encoding="utf-8")
    for name in ("system", "teacher"):
        (domain / "prompts" / f"{name}.md").write_text(SYSTEM, encoding="utf-8")
    write_jsonl(domain / "questions.jsonl", questions())
    write_index(run.index)
    messages = [Message(role="system", content=SYSTEM), Message(role="user", content=TEXTS["Brenzal"])]
    rows = [
        Example(
            id=str(n), question_id="seed", messages=messages, completion=f'"{QUOTE}" [1]\nAnswer: 40 mg',
            passages=[], origin="gold", request="r",
        )
        for n in range(4)
    ]  # fmt: skip
    write_jsonl(run.examples, rows)
    write_jsonl(
        run.rationales,
        [
            Rationale(
                question_id="seed", sample=0, text="x", answer="y", passages=[], teacher="big", request="r"
            )
        ],
    )
    write_adapter(run.training, tiny)
    return domain, run.folder


def write_adapter(training: Path, tiny: Path) -> None:
    base = load_base(str(tiny), dtype=torch.bfloat16)
    quantize_nf4(base.model, keep_quantized=False)
    adapted = attach_lora(base.model, rank=4, alpha=8.0, dropout=0.0, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    adapted.save_pretrained(str(training / "adapter"))
    facts = {"base": base.name, "base_version": base.version, "dtype": "bfloat16"}
    (training / "network.json").write_text(json.dumps(facts), encoding="utf-8")


def load(world: tuple[Path, Path], **changes: dict[str, Any]) -> tuple[Domain, Run]:
    domain = load_domain(str(world[0]))
    sections = {
        name: getattr(domain.config, name).model_copy(update=change) for name, change in changes.items()
    }
    config = domain.config.model_copy(update=sections)
    return Domain(domain.folder, config, domain.prompts), Run(world[1])


def digests(run: Run) -> dict[str, str]:
    paths = [*run.bundle.glob("*.*"), *run.export.iterdir()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_export_writes_a_ready_bundle_and_again_the_same_bytes(world: tuple[Path, Path]) -> None:
    domain, run = load(world)
    progress = Silent()
    report = export.run(domain, run, progress)
    assert {path.name for path in run.bundle.iterdir()} == {
        "student.gguf", "student-Q4_0.gguf", "index", "domain.toml", "prompts", "NOTICE", "parity.json",
        "manifest.json",
    }  # fmt: skip
    assert {path.name for path in run.export.iterdir()} == {"student-F16.gguf", "imatrix.npz"}
    manifest = read_manifest(run.bundle)
    assert manifest.ready
    assert manifest.teachers == ["big"]
    assert manifest.base.licence == "apache-2.0"
    assert "Q8_0" in check_gguf(run.bundle / "student.gguf").kind_counts
    assert check_gguf(run.bundle / "student.gguf").metadata["general.name"] == "A small shelf"
    parity = Parity.model_validate_json((run.bundle / "parity.json").read_bytes())
    assert parity.prompts == report.counts["prompts"] == 3
    assert parity.kl is not None
    assert parity.kl < 0.02
    assert parity.steps["merge"].kl < 1e-6
    assert report.counts == {"formats": 2, "prompts": 3, "positions": parity.positions}
    assert report.facts["files"]["Q8_0"]["size_bytes"] == (run.bundle / "student.gguf").stat().st_size
    assert any(line.startswith("parity:") for line in progress.lines)
    before = digests(run)
    export.run(domain, run, Silent())
    assert digests(run) == before


def test_another_serving_format_leaves_no_file_behind(world: tuple[Path, Path]) -> None:
    domain, run = load(world, export={"formats": ["Q8_0"], "imatrix_tokens": 0})
    export.run(domain, run, Silent())
    assert [path.name for path in run.bundle.glob("*.gguf")] == ["student.gguf"]


def rounded(
    world: tuple[Path, Path],
    rounding: str,
    kind: str,
    *,
    max_kl: float,
    min_top1: float,
    said: Silent | None = None,
) -> tuple[Run, dict[str, Any]]:
    """The run and the export's facts, after its gate."""
    how = {"rounding": rounding, "serve": kind, "formats": ["Q8_0"], "imatrix_tokens": 0}
    domain, run = load(world, export=how, parity={"max_kl": max_kl, "min_top1": min_top1})
    return run, export.run(domain, run, said or Silent()).facts


@pytest.mark.parametrize(("rounding", "bigger"), [("rtn", False), ("r1r2-gptq", True)])
def test_the_bytes_of_an_untied_output_are_said(
    world: tuple[Path, Path], rounding: str, bigger: bool
) -> None:
    said = Silent()
    rounded(world, rounding, "Q8_0", max_kl=1.0, min_top1=0.1, said=said)
    (line,) = (line for line in said.lines if line.startswith(f"{rounding}-q8_0: "))
    assert ("MB of them for an output matrix of its own" in line) is bigger


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_rounding_passes_a_strict_gate_in_eight_bits(world: tuple[Path, Path], rounding: str) -> None:
    """Here rounding costs next to nothing: what a rotation or a wrong merge breaks is far beyond these bounds."""
    run, facts = rounded(world, rounding, "Q8_0", max_kl=0.005, min_top1=0.9)
    assert read_manifest(run.bundle).ready
    assert facts["parity"]["steps"].keys() == {"merge", "GGUF", "quantize"}
    served = check_gguf(run.bundle / "student.gguf")
    untied = rounding in {"r1r2-gptq", *LOSSES}
    assert ("output.weight" in {tensor.name for tensor in served.tensors}) is untied
    assert served.kind_counts["Q8_0"] == 15 + untied  # seven matrices in two layers, the embedding, the head
    assert facts["files"]["Q8_0"]["file"] == "student.gguf"
    assert not [*(run.export / "candidates").glob("*.gguf")]


@pytest.fixture(scope="module")
def nearest_codes(world: tuple[Path, Path]) -> dict[str, Any]:
    """The gate's numbers of plain rounding to 4 bits: what everything else must be better than."""
    parity: dict[str, Any] = rounded(world, "rtn", "Q4_0", max_kl=1.0, min_top1=0.1)[1]["parity"]
    assert 0.02 < parity["kl"] < 0.3
    return parity


@pytest.mark.parametrize("rounding", [each for each in ROUNDINGS if each.endswith("gptq")])
def test_compensated_roundings_pass_a_gate_that_plain_rounding_fails_in_four_bits(
    world: tuple[Path, Path], nearest_codes: dict[str, Any], rounding: str
) -> None:
    bounds = {"max_kl": 0.7 * nearest_codes["kl"], "min_top1": nearest_codes["top1_agreement"]}
    run, facts = rounded(world, rounding, "Q4_0", **bounds)
    assert read_manifest(run.bundle).ready
    assert check_gguf(run.bundle / "student.gguf").kind_counts["Q4_0"] == 14
    assert facts["files"]["Q4_0"]["file"] == "student.gguf"
    assert check_gguf(run.bundle / "student-Q8_0.gguf").kind_counts.keys() == {"F32", "Q8_0"}


def test_plain_rounding_fails_that_gate(world: tuple[Path, Path], nearest_codes: dict[str, Any]) -> None:
    with pytest.raises(ParityError, match="the step 'quantize' alone"):
        rounded(world, "rtn", "Q4_0", max_kl=0.7 * nearest_codes["kl"], min_top1=0.1)


def shift_rows(packed: dict[str, Packed]) -> None:
    """One matrix of 14 has every output in its neighbour's place."""
    name = "model.layers.1.self_attn.v_proj.weight"
    packed[name] = replace(packed[name], rows=np.roll(packed[name].rows, 1, axis=0))


def tie_again(packed: dict[str, Packed]) -> None:
    """The rotated embedding serves as the output matrix, without the final norm's gains."""
    packed["lm_head.weight"] = packed["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("rounding", "kind", "damage"),
    [
        ("gptq", "Q8_0", shift_rows), ("gptq", "Q4_0", shift_rows), ("r1r2-gptq", "Q8_0", shift_rows),
        ("r1r2-gptq", "Q4_0", shift_rows), ("r1r2-gptq", "Q8_0", tie_again), ("r1r2-gptq", "Q4_0", tie_again),
    ],
)  # fmt: skip
def test_a_damaged_rounding_fails_the_same_gates(
    world: tuple[Path, Path], nearest_codes: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    rounding: str, kind: str, damage: Callable[[dict[str, Packed]], None],
) -> None:  # fmt: skip
    def damaged(*args: Any, **kwargs: Any) -> Rounded:
        found = round_student(*args, **kwargs)
        damage(found.packed)
        return found

    monkeypatch.setattr(candidates, "round_student", damaged)
    four_bits = {"max_kl": 0.7 * nearest_codes["kl"], "min_top1": nearest_codes["top1_agreement"]}
    bounds = four_bits if kind == "Q4_0" else {"max_kl": 0.005, "min_top1": 0.9}
    with pytest.raises(ParityError, match="the step 'quantize' alone"):
        rounded(world, rounding, kind, **bounds)
    assert not read_manifest(Run(world[1]).bundle).ready


def test_a_search_serves_what_is_near_enough_and_says_why(world: tuple[Path, Path]) -> None:
    domain, run = load(
        world,
        export={"rounding": "search", "formats": ["Q8_0"], "imatrix_tokens": 0},
        parity={"max_kl": 0.02, "min_top1": 0.5},
    )
    report = export.run(domain, run, Silent())
    found = report.facts["search"]
    names = [row["name"] for row in found["candidates"]]
    assert names == [each.name for each in CANDIDATES]
    assert found["winner"] in names
    winner = next(row for row in found["candidates"] if row["name"] == found["winner"])
    assert winner["kl"] <= 0.02
    assert (run.bundle / "student.gguf").stat().st_size == winner["bytes"]
    assert len(found["reasons"]) == len(names) - 1
    proven = found["rotation"].startswith("rotation beats GPTQ alone beyond noise")
    assert proven or found["rotation"].startswith("no rotation beats GPTQ alone beyond noise")
    rotated = {each.name for each in CANDIDATES if each.how in ROTATING}
    assert proven or found["winner"] not in rotated
    assert sum(f" {name}" in found["rotation"] for name in rotated) == 1
    assert [row["exam"] for row in found["candidates"]].count(None) == 0
    assert read_manifest(run.bundle).ready


@pytest.mark.parametrize(("backend", "opened"), [("none", None), ("text", "text"), ("grader", None)])
def test_files_are_scored_on_fresh_questions_in_the_form_that_was_trained(
    world: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, backend: str, opened: str | None
) -> None:
    plain, run = load(world, export={"formats": ["Q8_0"], "imatrix_tokens": 0})
    export.run(plain, run, Silent())
    asked: list[tuple[list[str], str | None]] = []

    def ask(items: Any, engine: Any, *, reflector: Any, **how: Any) -> Any:
        asked.append(([item.question.id for item in items], reflector and reflector.name))
        return ask_items(items, engine, reflector=reflector, **how)

    monkeypatch.setattr(export, "ask_items", ask)
    domain, _ = load(world, reflect={"backend": backend})
    held_out = export._held_out(domain, run, read_jsonl(run.examples, Example))
    assert held_out.score is not None
    assert len(held_out.score(run.bundle / "student.gguf")) == 1
    assert asked == [(["fresh"], opened)]
    assert held_out.asked == 1
    row = read_jsonl(run.examples, Example)[0]
    rows = [row.model_copy(update={"question_id": name}) for name in ("seed", "fresh")]
    none = export._held_out(domain, run, rows)
    assert (none.score, none.asked) == (None, 0)
    assert "no exam: training has seen every seed question" in none.caveat


def test_what_an_interrupted_search_left_goes(world: tuple[Path, Path]) -> None:
    domain, run = load(world, export={"formats": ["Q8_0"], "imatrix_tokens": 0})
    left = run.export / "candidates" / "gptq-q4_0.gguf"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half")
    export.run(domain, run, Silent())
    assert not left.parent.exists()


def test_a_bound_that_is_missed_keeps_the_bundle_from_being_ready(world: tuple[Path, Path]) -> None:
    domain, run = load(world, parity={"max_kl": 1e-7}, export={"formats": ["Q8_0"], "imatrix_tokens": 0})
    with pytest.raises(ParityError, match="the step 'quantize' alone"):
        export.run(domain, run, Silent())
    assert not read_manifest(run.bundle).ready
    assert json.loads((run.bundle / "parity.json").read_text("utf-8"))["broken"] == "quantize"


def test_a_broken_writer_is_caught(world: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    domain, run = load(world, export={"formats": ["Q8_0"], "imatrix_tokens": 0})
    monkeypatch.setattr(gguf_writer, "permute_rows", lambda weight, _heads: weight)
    with pytest.raises(ParityError, match="the step 'GGUF' alone"):
        export.run(domain, run, Silent())
    assert not read_manifest(run.bundle).ready


def test_without_questions_training_rows_are_replayed(world: tuple[Path, Path]) -> None:
    domain, run = load(world, corpus={"questions": ""}, export={"formats": ["Q8_0"], "imatrix_tokens": 0})
    assert export.run(domain, run, Silent()).counts["prompts"] == 3


def test_missing_training_names_the_stage(world: tuple[Path, Path], tmp_path: Path) -> None:
    domain, _ = load(world)
    with pytest.raises(StageError, match="adapter is missing"):
        export.run(domain, Run(tmp_path / "runs" / "new"), Silent())
