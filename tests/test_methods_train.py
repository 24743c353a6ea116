"""Training by every method on a tiny student: it learns, comes back as it was, and goes on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from domains.errors import ModelError, ParityError
from domains.jsonl import write_jsonl
from domains.records import Example
from pipeline import train
from pipeline.fused_layer import fusable
from pipeline.levers import Levers
from pipeline.methods.grid_base import read_back
from pipeline.methods.method import Adapter
from pipeline.methods.registry import method_of
from pipeline.objective import DistilledLoss, Divergence, load_teacher
from pipeline.packing import Pack, encode_examples, pack_hidden, use_packed_attention
from pipeline.progress import Silent
from pipeline.run_folder import Report, Run
from pipeline.stages import STAGES, fingerprint
from pipeline.student import load_base, load_student
from tests.test_train import domain, example, losses
from tests.tiny_llama import make_tiny_llama

METHODS = (
    ("qalora", "Q4_1"),
    ("qalora", "Q4_0"),
    ("qat", "Q4_0"),
    ("qat", "Q4_1"),
    ("grid-lora", "Q4_0"),
    ("grid-lora", "Q8_0"),
)
NAMES = [f"{method}-{grid}" for method, grid in METHODS]


pytestmark = pytest.mark.usefixtures("on_one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another network than the tiny one, with its tokenizer."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "wide", seed=5, width=96)


def rows() -> list[Example]:
    return [example(number) for number in range(24)]


def train_on(tiny: Path, folder: Path, **settings: Any) -> tuple[Run, Report]:
    run = Run(folder)
    write_jsonl(run.examples, rows())
    rate = 3e-2 if settings["method"] == "qalora" else 1e-2
    return run, train.run(domain(tiny, **{"learning_rate": rate} | settings), run, Silent())


@pytest.fixture(scope="module", params=METHODS, ids=NAMES)
def trained(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Run, Report]:
    method, grid = request.param
    run, report = train_on(tiny, tmp_path_factory.mktemp("run") / "one", method=method, grid=grid)
    return method, grid, run, report


def test_every_method_learns(trained: tuple[str, str, Run, Report]) -> None:
    _, _, run, report = trained
    assert report.facts["validation_after"] < report.facts["validation_before"] - 0.3
    assert report.facts["loss_last"] < report.facts["loss_first"]
    assert report.counts["trained"] == 20
    assert (run.training / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("where", ["a block layer", "the embedding"])
@pytest.mark.parametrize(("method", "grid"), METHODS, ids=NAMES)
def test_nothing_is_kept_that_training_did_not_multiply_with(
    tiny: Path, tmp_path: Path, method: str, grid: str, where: str
) -> None:
    base = load_base(str(tiny), dtype=torch.float32)
    how = method_of(method, grid)
    adapted = how.prepare(base, Adapter(rank=4, alpha=8.0, dropout=0.0, seed=0, dtype=torch.bfloat16), str)
    for folder in ("whole", "spoilt"):
        (tmp_path / folder).mkdir()
    how.save(adapted, tmp_path / "whole", base_name="tiny")
    network = adapted.get_base_model()
    if where == "the embedding":
        network.get_input_embeddings().weight.data.mul_(1.01)
    elif method == "grid-lora":
        network.model.layers[0].mlp.up_proj.base_layer.weight.data.mul_(1.01)
    else:
        layer = network.model.layers[0].mlp.up_proj
        layer.a.data.fill_(1.0)  # behind the back of the numbers that the forward pass keeps
        layer.b.data.fill_(1.0)
    with pytest.raises(ParityError, match="training multiplied with other numbers"):
        how.save(adapted, tmp_path / "spoilt", base_name="tiny")
    assert not [*(tmp_path / "spoilt").glob("*")]


def test_the_trained_network_comes_back_from_its_blocks(
    trained: tuple[str, str, Run, Report], tiny: Path
) -> None:
    method, grid, run, report = trained
    student = load_student(run.training, base=str(tiny))
    assert not student.network.training
    assert {p.dtype for p in student.network.parameters()} == {torch.float32}
    assert student.grid == grid
    assert bool(student.low_rank) == (method == "grid-lora")
    _check_weights(student.network, student.packed)
    _, held_out = train.split_validation(rows(), seed=0)
    total = supervised = 0.0
    with torch.no_grad():
        for row in encode_examples(held_out, student.base, max_tokens=512)[0]:
            logits = student.network(input_ids=torch.tensor([row.ids])).logits[0]
            targets = torch.tensor(row.ids[row.n_prompt :])
            total += torch.nn.functional.cross_entropy(
                logits[row.n_prompt - 1 : -1], targets, reduction="sum"
            ).item()
            supervised += row.supervised
    # training's last validation computed in bfloat16 where the machine can
    assert total / supervised == pytest.approx(report.facts["validation_after"], abs=0.05)


def _check_weights(network: Any, packed: Any) -> None:
    """All matrices, embedding and tied head included, are numbers that the served file holds."""
    plain = network.get_base_model() if hasattr(network, "get_base_model") else network
    weights = {name.replace(".base_layer", ""): value for name, value in plain.state_dict().items()}
    assert len(packed) == 2 * 7 + 1
    assert packed["model.embed_tokens.weight"].kind == "Q8_0"
    for name, matrix in packed.items():
        assert torch.equal(weights[name], read_back(matrix, weights[name].shape[1])), name
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_what_was_trained_is_named(trained: tuple[str, str, Run, Report], tiny: Path) -> None:
    method, grid, run, _ = trained
    network = json.loads((run.training / "network.json").read_text("utf-8"))
    assert (network["method"], network["grid"], network["quantization"]) == (method, grid, grid)
    written = (run.training / "adapter" / "adapter_config.json").read_text("utf-8") + json.dumps(network)
    assert str(tiny.parent) not in written


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from pipeline import train
from pipeline.progress import Silent
from pipeline.run_folder import Run
from tests.test_train import domain

class Killer(Silent):
    steps = 0
    def advance(self, amount=1):
        self.steps += amount
        if self.steps == 4:  # one step after the checkpoint
            os.kill(os.getpid(), signal.SIGKILL)

base, folder, method, grid, rate = sys.argv[1:]
train.run(domain(base, method=method, grid=grid, learning_rate=float(rate)), Run(Path(folder)), Killer())
"""


def test_a_killed_run_goes_on_to_the_same_adapter_and_blocks(
    trained: tuple[str, str, Run, Report], tiny: Path, tmp_path: Path
) -> None:
    method, grid, whole, _ = trained
    if (method, grid) not in {("qalora", "Q4_1"), ("qat", "Q4_0"), ("grid-lora", "Q4_0")}:
        pytest.skip("the same code as on the other grid")
    run = Run(tmp_path / "killed")
    write_jsonl(run.examples, rows())
    rate = "3e-2" if method == "qalora" else "1e-2"
    root = Path(__file__).parent.parent
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny), str(run.folder), method, grid, rate],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    progress = Silent()
    train.run(domain(tiny, method=method, grid=grid, learning_rate=float(rate)), run, progress)
    assert any(line.startswith("going on after step 3") for line in progress.lines)
    assert losses(run) == losses(whole)
    for path in sorted((whole.training / "adapter").iterdir()):
        assert (run.training / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_grid_or_objective_starts_afresh(tiny: Path, tmp_path: Path) -> None:
    train_on(tiny, tmp_path, method="qalora", grid="Q4_1", epochs=1)
    for change in ({"grid": "Q4_0"}, {"method": "qat", "grid": "Q4_0"}, {"objective": "ce+kl"}):
        settings: dict[str, Any] = {"method": "qalora", "grid": "Q4_1", "learning_rate": 3e-2, "epochs": 1}
        progress = Silent()
        train.run(domain(tiny, **settings | change), Run(tmp_path), progress)
        assert any("starts afresh" in line for line in progress.lines), change


def test_a_damaged_file_of_blocks_is_named(tiny: Path, tmp_path: Path) -> None:
    run, _ = train_on(tiny, tmp_path, method="qat", grid="Q4_0", epochs=1)
    path = run.training / "adapter" / "blocks.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"can't read .*blocks\.safetensors"):
        load_student(run.training, base=str(tiny))


def test_adapters_are_float32_pairs(trained: tuple[str, str, Run, Report]) -> None:
    method, _, run, report = trained
    weights = load_file(run.training / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert sum(value.numel() for value in weights.values()) == report.facts["trainable_weights"]
    widths = {value.shape[1] for name, value in weights.items() if "lora_A" in name}
    assert widths == ({2, 8} if method == "qalora" else {64, 256})


@pytest.mark.parametrize(("method", "grid"), [("qalora", "Q4_1"), ("qat", "Q4_0"), ("grid-lora", "Q4_0")])
def test_layers_without_an_adapter_lie_on_the_grid_too(
    method: str, grid: str, tiny: Path, tmp_path: Path
) -> None:
    run, report = train_on(tiny, tmp_path, method=method, grid=grid, lora_layers=1)
    weights = load_file(run.training / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 7
    assert not any("layers.0." in name for name in weights)
    student = load_student(run.training, base=str(tiny))
    _check_weights(student.network, student.packed)
    assert {value.kind for name, value in student.packed.items() if "layers" in name} == {grid}
    assert report.facts["validation_after"] < report.facts["validation_before"]


@pytest.mark.parametrize(("method", "grid"), METHODS[:3])
def test_a_fused_layer_gives_the_same_loss_and_gradients(method: str, grid: Any, tiny: Path) -> None:
    found = {}
    for fused in (False, True):
        base = load_base(str(tiny), dtype=torch.float32)
        adapter = Adapter(rank=4, alpha=8.0, dropout=0.0, seed=0, dtype=torch.float32)
        adapted = method_of(method, grid).prepare(base, adapter, lambda _: None)
        torch.manual_seed(1)
        with torch.no_grad():
            for _, layer in adapted.linears():
                layer.b.normal_(0, 0.05)
        use_packed_attention(base.model)
        packed = Pack(tuple(encode_examples(rows()[:3], base, max_tokens=512)[0]))
        hidden, targets = pack_hidden(base.model, packed, Levers(fused_layers=fused, last_layer=False))
        loss = torch.nn.functional.cross_entropy(base.model.lm_head(hidden), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        weights = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert len(weights) == 2 * 2 * 7
        assert fusable(base.model.model.layers[0])
        found[fused] = loss.item(), {name: weight.grad for name, weight in weights.items()}
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for name, grad in found[False][1].items():
        assert grad is not None
        assert grad.abs().max() > 1e-6
        assert torch.allclose(found[True][1][name], grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize(("method", "grid"), [("qlora", None), *METHODS])
def test_bfloat16_is_for_weights_not_for_rotary_frequencies(method: str, grid: Any, tiny: Path) -> None:
    how = method_of(method, grid)
    base = load_base(str(tiny), dtype=how.base_dtype(torch.bfloat16))
    adapter = Adapter(rank=4, alpha=8.0, dropout=0.0, seed=0, dtype=torch.bfloat16)
    adapted = how.prepare(base, adapter, lambda _: None)
    _check_arithmetic(base.model, tiny)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def _check_arithmetic(network: Any, tiny: Path) -> None:
    """Frozen weights in bfloat16; rotary frequencies as the base has them."""
    exact = load_base(str(tiny), dtype=torch.float32).model.model.rotary_emb
    assert {p.dtype for p in network.parameters() if not p.requires_grad} == {torch.bfloat16}
    for name in ("inv_freq", "original_inv_freq"):
        found, expected = getattr(network.model.rotary_emb, name), getattr(exact, name)
        assert found.dtype == torch.float32, name
        assert torch.equal(found, expected), name


# -- the teacher's distribution --------------------------------------------------------------------


def test_a_divergence_holds_the_student_near_its_base(tiny: Path, tmp_path: Path) -> None:
    """With all weight on the teacher, the student stays where it was; without, it does not."""
    facts = {}
    for name, settings in {
        "ce": {"objective": "ce"},
        "kl": {"objective": "ce+kl", "kl_weight": 100.0},
        "other": {"objective": "ce+kl", "kl_weight": 100.0, "kl_teacher": str(tiny)},
    }.items():
        run, _ = train_on(tiny, tmp_path / name, method="qat", grid="Q4_0", epochs=4, **settings)
        facts[name] = _distance(run, tiny)
    assert facts["kl"] < 0.3 * facts["ce"]
    assert facts["other"] == pytest.approx(facts["kl"], rel=0.2)  # the same weights by another way


def test_a_larger_teacher_with_the_same_tokenizer_is_approached(
    tiny: Path, wide: Path, tmp_path: Path
) -> None:
    """White-box distillation: the teacher has other weights of other shapes; only its vocabulary is the student's."""
    far = {}
    for name, settings in {
        "ce": {"objective": "ce"},
        "kl": {"objective": "ce+kl", "kl_weight": 100.0, "kl_teacher": str(wide)},
    }.items():
        run, _ = train_on(tiny, tmp_path / name, method="qat", grid="Q4_0", epochs=4, **settings)
        far[name] = _distance(run, tiny, teacher=wide)
    assert far["kl"] < 0.7 * far["ce"]


def test_a_finished_student_is_the_teacher_of_the_network_that_is_rounded(tiny: Path, tmp_path: Path) -> None:
    """Distil first, then train the rounded network towards that student: it is approached, the base left."""
    finished, _ = train_on(tiny, tmp_path / "first", method="qlora", epochs=4)
    run, _ = train_on(
        tiny, tmp_path / "second", method="qat", grid="Q4_0", epochs=4, objective="ce+kl", kl_weight=100.0,
        kl_teacher=str(finished.training),
    )  # fmt: skip
    stage = next(each for each in STAGES if each.name == "train")
    own = domain(tiny, method="qat", grid="Q4_0", objective="ce+kl", kl_teacher=str(finished.training))
    before = fingerprint(stage, own, run)
    note = finished.training / "network.json"
    text = note.read_text("utf-8")
    note.write_text(text.replace("{", "{ ", 1), "utf-8")
    assert fingerprint(stage, own, run) != before, "a teacher counts by content, not by its name"
    note.write_text(text, "utf-8")
    with pytest.raises(ModelError, match="is the folder that this training writes"):
        train.run(own, finished, Silent())
    aim = load_student(finished.training, base=str(tiny)).network  # nothing of it was taken away
    assert _distance(run, tiny, teacher=aim) < 0.3 * _distance(run, tiny)


def _distance(run: Run, tiny: Path, *, teacher: Any = None) -> float:
    """KL(teacher || trained) on a row, in nats per token; the base is its own teacher, a folder or a network."""
    student = load_student(run.training, base=str(tiny))
    row = encode_examples(rows()[:1], student.base, max_tokens=512)[0][0]
    with torch.no_grad():
        ids = torch.tensor([row.ids])
        folder = teacher is None or isinstance(teacher, Path)
        base = load_base(str(teacher or tiny), dtype=torch.float32).model if folder else teacher
        wanted = torch.log_softmax(base(input_ids=ids).logits[0, row.n_prompt - 1 :], dim=-1)
        given = torch.log_softmax(student.network(input_ids=ids).logits[0, row.n_prompt - 1 :], dim=-1)
    return float(torch.nn.functional.kl_div(given, wanted, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("kind", ["base", "folder", "finished qlora", "finished qat"])
def test_a_teacher_in_bfloat16_keeps_its_rotary_frequencies(kind: str, tiny: Path, tmp_path: Path) -> None:
    teacher = {"base": "base", "folder": str(tiny)}.get(kind)
    if teacher is None:
        method = kind.removeprefix("finished ")
        grid = {} if method == "qlora" else {"grid": "Q4_0"}
        run, _ = train_on(tiny, tmp_path, method=method, epochs=1, **grid)
        teacher = str(run.training)
    student = load_base(str(tiny), dtype=torch.float32)
    divergence = Divergence(weight=1.0, temperature=1.0, teacher=teacher)
    network = load_teacher(student, divergence, dtype=torch.bfloat16, base=str(tiny))
    _check_arithmetic(network, tiny)
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}, "the student is another network"


@pytest.mark.parametrize("levers", [Levers(), Levers(packing=False, supervised_head=False)])
@pytest.mark.parametrize("white_box", [False, True], ids=["itself", "wide"])
def test_the_loss_is_cross_entropy_plus_the_divergence(
    tiny: Path, wide: Path, levers: Levers, white_box: bool
) -> None:
    base, other = (load_base(str(tiny), dtype=torch.float32) for _ in range(2))
    divergence = Divergence(weight=0.7, temperature=2.0, teacher=str(wide) if white_box else "base")
    teacher = load_teacher(other, divergence, dtype=torch.float32, base=str(tiny))
    assert teacher.config.hidden_size == (96 if white_box else 64)
    with torch.no_grad():
        for layer in base.model.model.layers:
            layer.mlp.up_proj.weight.mul_(1.3)
    use_packed_attention(base.model)
    packed = Pack(tuple(encode_examples(rows()[:3], base, max_tokens=512)[0]))
    given = [each.detach() for each in pack_hidden(base.model, packed, levers)]
    loss = DistilledLoss(base.model, teacher, divergence, levers)(packed, *(each.clone() for each in given))
    hidden, targets = (each.detach() for each in pack_hidden(base.model, packed))
    hidden.requires_grad_()
    DistilledLoss(base.model, teacher, divergence, Levers())(packed, hidden, targets).backward()  # type: ignore[no-untyped-call]
    ours = hidden.detach().clone().requires_grad_()
    p, q = teacher.lm_head(pack_hidden(teacher, packed)[0]).softmax(-1), base.model.lm_head(ours)
    soft = (teacher.lm_head(pack_hidden(teacher, packed)[0]) / 2).softmax(-1)
    kl = (soft * (soft.log() - (q / 2).log_softmax(-1))).sum()
    wanted = torch.nn.functional.cross_entropy(q, targets, reduction="sum") + 0.7 * 4 * kl
    wanted.backward()
    assert (p - soft).abs().max() > 1e-3  # the temperature matters
    assert kl > 0.01
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert hidden.grad is not None
    assert ours.grad is not None
    assert torch.allclose(hidden.grad, ours.grad, atol=1e-5)


def test_a_teacher_with_another_vocabulary_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has another vocabulary"):
        train_on(
            tiny, tmp_path, method="qat", grid="Q4_0", objective="ce+kl", kl_teacher="smollm2-135m", epochs=1
        )
