"""The student that was trained is the student that is served: bit for bit, through the whole export."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domains.config import DomainConfig
from domains.domain import Domain
from domains.errors import ParityError
from domains.jsonl import write_jsonl
from pipeline import exact_files, export, train
from pipeline.bundle import adapter_of
from pipeline.exact_files import find_strangers, share_base
from pipeline.gguf_tensors import read_packed
from pipeline.grids.layout import unpack
from pipeline.methods.method import Adapter
from pipeline.methods.registry import method_of
from pipeline.parity import Parity, measure_gap, torch_network
from pipeline.progress import Silent
from pipeline.run_folder import Run
from pipeline.student import load_base, load_student
from serve.bundle import open_bundle
from serve.engine import Engine
from serve.gguf_check import check_gguf
from serve.manifest import read_manifest
from serve.models import packaged_gguf
from serve.shared_models import SharedModels
from tests.exam_example import ActorEngine, make_run, take_exam
from tests.small_serving import write_index
from tests.test_train import SETTINGS, example
from tests.tiny_llama import make_tiny_llama

METHODS = (
    ("qalora", "Q4_1"),
    ("qalora", "Q4_0"),
    ("qat", "Q4_0"),
    ("qat", "Q4_1"),
    ("grid-lora", "Q4_0"),
    ("grid-lora", "Q4_1"),
    ("grid-lora", "Q8_0"),
)


pytestmark = pytest.mark.usefixtures("on_one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def domain(
    base: Path, *, name: str = "tiny", export: dict[str, Any] | None = None, **settings: Any
) -> Domain:
    config = {
        "domain": {"name": name, "title": f"Title of {name}", "licence": "CC0-1.0"},
        "corpus": {"documents": "."},
        "student": {"base": str(base), "context": 512},
        "train": SETTINGS | {"epochs": 1, "learning_rate": 1e-2} | settings,
        "parity": {"prompts": 3, "max_kl": 0.02, "min_top1": 0.8},
        "export": {"imatrix_tokens": 0} | (export or {}),
    }
    return Domain(Path(), DomainConfig.model_validate(config), {"system": "Answer.", "teacher": "x"})


def trained_run(folder: Path, domain: Domain) -> Run:
    run = Run(folder)
    write_jsonl(run.examples, [example(number) for number in range(24)])
    train.run(domain, run, Silent())
    return run


@pytest.fixture(scope="module", params=METHODS, ids=[f"{method}-{grid}" for method, grid in METHODS])
def exported(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Domain, Run, dict[str, Any]]:
    method, grid = request.param
    there = domain(tiny, method=method, grid=grid)
    run = trained_run(tmp_path_factory.mktemp("runs") / "tiny" / "one", there)
    return there, run, export.run(there, run, Silent()).facts


def test_every_block_of_the_served_file_is_the_trained_one(
    exported: tuple[Domain, Run, dict[str, Any]], tiny: Path
) -> None:
    there, run, facts = exported
    assert facts["exact"] == {"matrices": 15, "bits_equal": True}
    parity = Parity.model_validate_json((run.bundle / "parity.json").read_bytes())
    assert parity.bits_equal is True
    assert list(parity.steps) == ["GGUF"]
    assert parity.kl is not None
    assert parity.kl < 0.02
    manifest = read_manifest(run.bundle)
    assert manifest.ready
    assert check_gguf(run.bundle / "student.gguf").metadata["general.file_type"] == {
        "Q4_0": 2, "Q4_1": 3, "Q8_0": 7,
    }[str(there.config.train.grid)]  # fmt: skip
    student = load_student(run.training, base=str(tiny))
    served = read_packed(run.bundle / "student.gguf", student.base.model.config)
    for name, matrix in student.packed.items():
        assert served[name].kind == matrix.kind
        assert np.array_equal(served[name].rows, matrix.rows), name
    norms = {name: value for name, value in served.items() if "norm" in name}
    plain = load_base(str(tiny), dtype=torch.float32).model.state_dict()
    assert len(norms) == 5
    assert all(np.array_equal(v.rows.view(np.float32).ravel(), plain[k].numpy()) for k, v in norms.items())
    assert served.keys() == student.packed.keys() | norms.keys()


def test_only_the_served_files_are_in_the_bundle(exported: tuple[Domain, Run, dict[str, Any]]) -> None:
    there, run, facts = exported
    beside = there.config.train.method == "grid-lora"
    assert {path.name for path in run.bundle.glob("*.gguf")} == {"student.gguf"} | (
        {"adapter.gguf"} if beside else set()
    )
    assert read_manifest(run.bundle).adapter == ("adapter.gguf" if beside else "")
    assert bool(adapter_of(run.bundle / "student.gguf")) is beside
    assert {path.name for path in run.export.iterdir()} == {"student-F16.gguf"}
    assert facts["files"].keys() == {there.config.train.grid}


def test_the_full_precision_arm_is_the_trained_network(
    exported: tuple[Domain, Run, dict[str, Any]], tiny: Path
) -> None:
    _, run, _ = exported
    student = load_student(run.training, base=str(tiny))
    tokens = list(range(3, 60))
    wanted = torch_network(student.network)(tokens, first=0)
    with Engine(run.export / "student-F16.gguf", context=512, parallel=1) as engine:
        found = engine.logits(tokens, first=0)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_again_the_same_bytes(exported: tuple[Domain, Run, dict[str, Any]]) -> None:
    there, run, _ = exported

    def digests() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in [*run.bundle.glob("*.gguf"), *run.export.iterdir()]}

    before = digests()
    export.run(there, run, Silent())
    assert digests() == before


def test_qalora_moves_one_number_per_block(exported: tuple[Domain, Run, dict[str, Any]], tiny: Path) -> None:
    there, run, _ = exported
    if there.config.train.method != "qalora":
        pytest.skip("for qalora")
    grid = there.config.train.grid
    assert grid is not None
    from pipeline.methods.grid_base import base_blocks

    base = load_base(str(tiny), dtype=torch.float32)
    served = read_packed(run.bundle / "student.gguf", base.model.config)
    moved = 0
    for name, blocks in base_blocks(base, grid).items():
        ours = unpack(served[name].rows, grid)
        assert torch.equal(ours.codes, blocks.codes)
        if grid == "Q4_1":
            assert blocks.m is not None
            assert ours.m is not None
            assert torch.equal(ours.d, blocks.d)
            moved += int((ours.m != blocks.m).sum())
        else:
            moved += int((ours.d != blocks.d).sum())
    assert moved > 1000


def test_other_formats_are_made_of_the_trained_blocks_and_said_to_be_rounded(
    tiny: Path, tmp_path: Path
) -> None:
    there = domain(tiny, method="qat", grid="Q4_0", export={"formats": ["Q8_0"], "imatrix_tokens": 200})
    run = trained_run(tmp_path / "runs" / "tiny" / "one", there)
    progress = Silent()
    export.run(there, run, progress)
    assert {path.name for path in run.bundle.glob("*.gguf")} == {"student.gguf", "student-Q8_0.gguf"}
    (line,) = [line for line in progress.lines if line.startswith("Q8_0:")]
    assert "no longer exactly" in line


def test_one_byte_off_keeps_the_bundle_from_being_ready(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = domain(tiny, method="qat", grid="Q4_0")
    run = trained_run(tmp_path / "runs" / "tiny" / "one", there)
    whole = exact_files.write_exact

    def write(path: Path, network: Any, trained: Any, **kwargs: Any) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        rows = trained.packed[name].rows.copy()
        rows[3, 5] ^= 1
        changed = replace(trained, packed={**trained.packed, name: replace(trained.packed[name], rows=rows)})
        whole(path, network, changed, **kwargs)

    monkeypatch.setattr("pipeline.student_files.write_exact", write)
    with pytest.raises(ParityError, match=r"first 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        export.run(there, run, Silent())
    assert not read_manifest(run.bundle).ready
    parity = json.loads((run.bundle / "parity.json").read_text("utf-8"))
    assert (parity["bits_equal"], parity["broken"]) == (False, "blocks")


def test_domains_on_one_base_share_its_file(tiny: Path, tmp_path: Path) -> None:
    students = []
    for number, name in enumerate(("one", "two")):
        there = domain(tiny, name=name, method="grid-lora", grid="Q8_0", seed=number)
        run = trained_run(tmp_path / "runs" / name / "main", there)
        export.run(there, run, Silent())
        students.append(run.bundle)
    one, two = (folder / "student.gguf" for folder in students)
    assert one.samefile(two)
    assert (students[0] / "adapter.gguf").read_bytes() != (students[1] / "adapter.gguf").read_bytes()
    assert len(list((tmp_path / "runs" / ".bases").iterdir())) == 1


@pytest.mark.parametrize("grid", ["Q4_0", "Q8_0"])
def test_each_request_is_answered_by_its_own_domains_network(grid: str, tiny: Path, tmp_path: Path) -> None:
    """Llama 3.2's features: grouped queries, tied embeddings, llama3 rope. One base in memory, two adapters."""
    runs = {}
    for number, name in enumerate(("one", "two")):
        there = domain(tiny, name=name, method="grid-lora", grid=grid, seed=number)
        runs[name] = trained_run(tmp_path / "runs" / name / "main", there)
        write_index(runs[name].index)
        export.run(there, runs[name], Silent())
    facts = check_gguf(runs["one"].bundle / "student.gguf")
    names = {tensor.name for tensor in facts.tensors}
    assert "rope_freqs.weight" in names
    assert "output.weight" not in names
    assert facts.metadata["llama.attention.head_count_kv"] < facts.metadata["llama.attention.head_count"]
    networks = {
        name: torch_network(load_student(run.training, base=str(tiny)).network) for name, run in runs.items()
    }
    with SharedModels() as shared, ExitStack() as stack:
        opened = {
            name: stack.enter_context(open_bundle(run.bundle, shared=shared)) for name, run in runs.items()
        }
        assert len(shared) == 1
        assert opened["one"].engine.model is opened["two"].engine.model
        prompt = opened["one"].engine.tokenize(12 * "The dose of Brenzal is 40 mg in the morning. ")
        assert len(prompt) > 256  # longer than the context before rope was scaled
        wanted = {name: network(prompt, first=0) for name, network in networks.items()}
        for name, other in (("one", "two"), ("two", "one")) * 2:
            engine = opened[name].engine
            served = engine.logits(prompt, first=0)
            own, foreign = measure_gap([wanted[name]], [served]), measure_gap([wanted[other]], [served])
            assert own.kl < 0.02
            assert foreign.kl > 10 * own.kl
            (reply,) = engine.generate([prompt], max_tokens=8, temperature=0.0)
            after = networks[name]([*prompt, *reply.tokens][:-1], first=len(prompt) - 1)
            picked = after[np.arange(len(reply.tokens)), reply.tokens]
            assert (after.max(axis=1) - picked).max() < 0.1 * after.std()  # the likeliest, or nearly


def test_another_method_leaves_no_adapter_behind(tiny: Path, tmp_path: Path) -> None:
    there = domain(tiny, method="grid-lora", grid="Q4_0")
    run = trained_run(tmp_path / "runs" / "tiny" / "one", there)
    export.run(there, run, Silent())
    assert read_manifest(run.bundle).adapter
    other = domain(tiny, method="qat", grid="Q4_0")
    train.run(other, run, Silent())
    export.run(other, run, Silent())
    assert [path.name for path in run.bundle.glob("*.gguf")] == ["student.gguf"]
    assert read_manifest(run.bundle).adapter == ""


def test_shared_files_that_nobody_holds_go(tmp_path: Path) -> None:
    runs, target = tmp_path / "runs", tmp_path / "runs" / "x" / "student.gguf"
    target.parent.mkdir(parents=True)
    for content in (b"first", b"second", b"second"):
        source = tmp_path / "new.gguf"
        source.write_bytes(content)
        share_base(source, target, runs=runs)
        assert target.read_bytes() == content
        assert not source.exists()
        assert [path.read_bytes() for path in (runs / ".bases").iterdir()] == [content]
        assert [path.name for path in target.parent.iterdir()] == ["student.gguf"]


def test_a_file_system_without_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    source, target = tmp_path / "new.gguf", tmp_path / "student.gguf"
    source.write_bytes(b"base")
    share_base(source, target, runs=tmp_path / "runs")
    assert target.read_bytes() == b"base"
    assert not list((tmp_path / "runs" / ".bases").iterdir())


def test_strangers_are_missing_or_other_matrices(
    exported: tuple[Domain, Run, dict[str, Any]], tiny: Path
) -> None:
    _, run, _ = exported
    student = load_student(run.training, base=str(tiny))
    name, matrix = next(iter(student.packed.items()))
    rows = matrix.rows.copy()
    rows[0, 0] ^= 1
    packed = {**student.packed, name: replace(matrix, rows=rows), "lm_head.weight": matrix}
    config = student.base.model.config
    assert find_strangers(run.bundle / "student.gguf", student.packed, config) == []
    assert set(find_strangers(run.bundle / "student.gguf", packed, config)) == {name, "lm_head.weight"}


def test_the_packaged_student_differs_from_its_base_in_minima_alone(tmp_path: Path) -> None:
    """Every other byte of every tensor is the base file's; a random small adapter instead of training."""
    base = load_base("smollm2-135m", dtype=torch.float32)
    config = base.model.config
    how = method_of("qalora", "Q4_1")
    network = how.prepare(
        base, Adapter(rank=4, alpha=8.0, dropout=0.0, seed=0, dtype=torch.float32), lambda _: None
    )
    with torch.no_grad():
        for _, layer in network.linears():
            layer.b.normal_(0, 0.1)
    how.save(network, tmp_path, base_name=base.name)
    student = how.load(tmp_path, load_base("smollm2-135m", dtype=torch.float32))
    path = tmp_path / "student.gguf"
    exact_files.write_exact(path, student.network, student, grid="Q4_1", name="test")
    before, after = read_packed(packaged_gguf(), config), read_packed(path, config)
    assert before.keys() == after.keys()
    assert len(before) == 272
    changed = {name for name in before if not np.array_equal(before[name].rows, after[name].rows)}
    assert changed == {name for name, matrix in before.items() if matrix.kind == "Q4_1"}
    assert len(changed) == 210
    for name in changed:
        one, two = (found[name].rows.reshape(-1, 20) for found in (before, after))  # f16 d, f16 m, 32 codes
        assert np.array_equal(one[:, :2], two[:, :2])
        assert np.array_equal(one[:, 4:], two[:, 4:])
        assert (one[:, 2:4] != two[:, 2:4]).any(axis=1).mean() > 0.5


def test_another_adapter_is_another_student_to_the_exam(tmp_path: Path) -> None:
    run, models = make_run(tmp_path)
    ActorEngine.asked = 0  # other tests count on the same class
    take_exam(run, models)
    asked = ActorEngine.asked
    (run.bundle / "adapter.gguf").write_text("one", encoding="utf-8")
    take_exam(run, models)
    per_arm = ActorEngine.asked - asked
    assert per_arm == asked // 5  # of five arms, only the one that is served
    (run.bundle / "adapter.gguf").write_text("two", encoding="utf-8")
    take_exam(run, models)
    assert ActorEngine.asked == asked + 2 * per_arm
