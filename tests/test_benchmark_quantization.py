"""The quantization benchmark: what its comparisons and its look at the base file say, and both parts on a tiny student."""

from __future__ import annotations

import copy
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domains.jsonl import write_jsonl
from domains.records import Question, Quote
from pipeline.candidates import CANDIDATES, Measured
from pipeline.fidelity import Fidelity
from pipeline.grids import Packed
from pipeline.progress import Silent
from pipeline.rotate import fold_norms
from pipeline.speed import PromptRatio, Speed
from tests.tiny_llama import make_tiny_llama

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import quantization


def measured(name: str, *, kl: float, bits: float = 4.5, speed: float = 100.0) -> Measured:
    candidate = next(each for each in CANDIDATES if each.name == name)
    fidelity = Fidelity((kl,) * 8, (1.0,) * 8, (1,) * 8, (1,) * 8)
    return Measured(candidate, Path(name), 0.0, 100, bits, 0, fidelity, (), Speed(speed, speed))


def test_the_best_of_few_bits_is_compared_with_llama_cpps_own(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[str, str]] = []

    def in_turns(one: Path, other: Path, *, rounds: int) -> PromptRatio:
        timed.append((one.name, other.name))
        return PromptRatio(1.5, 1.4, 1.6, rounds)

    monkeypatch.setattr(quantization, "compare_prompts", in_turns)
    found = quantization.comparisons([
        measured("gptq-q4_0", kl=0.03), measured("r1r2-gptq-q4_0", kl=0.02, speed=150),
        measured("gptq-q4_1", kl=0.01, bits=5.0),  # nearer, but of more bits
        measured("llamacpp-q4_0-imatrix", kl=0.04), measured("llamacpp-q4_k_m-imatrix", kl=0.01, bits=4.8),
    ], prompt_rounds=9)  # fmt: skip
    assert found["best"] == "r1r2-gptq-q4_0"
    assert found["llamacpp-q4_0-imatrix"] == {
        "kl_ratio": 0.5, "kl_minus": [-0.02, -0.02, -0.02], "block_bits": [4.5, 4.5], "prompt_speed_ratio": 1.5,
        "prompt_speed_quartiles": [1.4, 1.6],
    }  # fmt: skip
    assert timed[0] == ("r1r2-gptq-q4_0", "llamacpp-q4_0-imatrix")
    assert found["llamacpp-q4_k_m-imatrix"]["kl_ratio"] == 2.0
    assert quantization.comparisons([measured("llamacpp-q4_0-imatrix", kl=0.04)], prompt_rounds=9) == {}


def test_every_byte_that_differs_from_the_base_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {
        "a": Packed("Q4_1", np.zeros((3, 40), np.uint8)),
        "b": Packed("Q8_0", np.zeros((2, 34), np.uint8)),
    }
    rows = {name: matrix.rows.copy() for name, matrix in theirs.items()}
    rows["a"][0, 2] = rows["a"][0, 3] = 7  # one minimum, both of its bytes
    rows["a"][2, 22] = 7  # another
    ours = {name: Packed(theirs[name].kind, array) for name, array in rows.items()}
    monkeypatch.setattr(quantization, "packaged_gguf", lambda: Path("base"))
    monkeypatch.setattr(
        quantization, "read_packed", lambda path, _config: theirs if path == Path("base") else ours
    )
    found = quantization.compare_with_base(Path("ours"), None)
    assert found == {"minima_changed": 2, "other_bytes_changed": 0}
    rows["a"][1, 4] = 1  # a code
    rows["a"][1, 20] = 1  # a scale
    rows["b"][1, 0] = 1
    assert quantization.compare_with_base(Path("ours"), None)["other_bytes_changed"] == 3


def test_quick_names_real_candidates() -> None:
    names = {each.name for each in CANDIDATES}
    assert names > quantization.QUICK_CANDIDATES


# -- both parts for real, on a tiny student --------------------------------------------------------

TOML = """
[domain]
name = "shelf"
title = "A small shelf"
licence = "CC0-1.0"
[corpus]
documents = "documents"
questions = "questions.jsonl"
[retrieve]
top_k = 1
[student]
base = "{base}"
context = 1024
[train]
rank = 4
alpha = 8
learning_rate = 0.002
pack_tokens = 1024
packs_per_step = 2
"""
SIZES = replace(
    quantization.QUICK, rows=12, epochs=1, exact_rows=8, length=64, calibration=8, texts=4, exam=3, learning_steps=2,
    heal_steps=2,
)  # fmt: skip
REQUIRED = {
    "name", "network", "bytes", "block_bits_per_weight", "kl", "kl_interval", "top1_agreement", "perplexity",
    "perplexity_interval", "wikitext_perplexity", "wikitext_perplexity_interval", "exam", "exam_interval",
    "prompt_tokens_per_s", "decode_tokens_per_s", "rotation_loss",
}  # fmt: skip
ONLY = [
    "llamacpp-q4_0-imatrix", "llamacpp-q4_k_m-imatrix", "gptq-q4_0", "r1r2-gptq-q4_0", "learned-kl-gptq-q4_0",
    "qat-q4_0", "qalora-q4_1", "qalora-q4_0",
]  # fmt: skip


def write_shelf(folder: Path) -> Path:
    """A domain of 16 documents, three of them the exam's, with a question about each."""
    (folder / "prompts").mkdir(parents=True)
    (folder / "documents").mkdir()
    tiny = make_tiny_llama(folder / "tiny")
    (folder / "domain.toml").write_text(TOML.replace("{base}", str(tiny)), encoding="utf-8")
    for name in ("system", "teacher"):
        (folder / "prompts" / f"{name}.md").write_text("Answer from the passages.", encoding="utf-8")
    questions = []
    for number in range(16):
        quote = f"The dose of drug {number} is {3 * number + 2} mg a day."
        other = " ".join(
            f"Note {line} on drug {number}: keep it dry in box {line * number}." for line in range(12)
        )
        (folder / "documents" / f"drug{number}.md").write_text(
            f"# Drug {number}\n{quote} {other}\n", encoding="utf-8"
        )
        questions.append(
            Question(
                id=f"q{number}", kind="open", question=f"What is the dose of drug {number}?",
                answer=f"{3 * number + 2} mg", about=f"drug{number}",
                gold=[Quote(doc_id=f"drug{number}", quote=quote)], split="exam" if number < 3 else "seed",
            )
        )  # fmt: skip
    write_jsonl(folder / "questions.jsonl", questions)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Namespace, quantization.Ground, Path]]:
    root = tmp_path_factory.mktemp("quantization")
    (root / "data" / "wikitext2_test").mkdir(parents=True)
    lines = [
        json.dumps({"text": f"Article {number}. " + f"In {number} it was so. " * 40}) for number in range(6)
    ]
    (root / "data" / "wikitext2_test" / "dev.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = Namespace(
        quick=False, domain=str(write_shelf(root / "shelf")), data=root / "data", split="dev", seed=0,
        networks=list(quantization.NETWORKS), only=ONLY, retrain_rate=1e-3,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "FULL", SIZES)
        yield options, quantization.prepare(options), root
    torch.set_num_threads(threads)


def test_exactness_is_measured_on_every_route(shelf: tuple[Namespace, quantization.Ground, Path]) -> None:
    options, ground, root = shelf
    found = quantization.measure_exactness(options, ground, root / "work", Silent())
    exact = ("qalora", "qalora_q4_0", "qat", "grid_lora")
    for route in exact:
        assert found[route]["bits_equal"] is True, route
        assert found[route]["matrices"] == 15  # seven in two layers, and the embedding
        assert found[route]["kl"] < 0.02, route
    merges = {key: found[key]["kl"] for key in ("qlora_q8_0", "qlora_merged_q4_k_m", "qlora_q4_k_m")}
    assert max(found[route]["kl"] for route in exact) < merges["qlora_q4_k_m"]
    assert merges["qlora_q8_0"] < min(merges["qlora_merged_q4_k_m"], merges["qlora_q4_k_m"])


def test_a_file_of_other_bits_is_not_called_equal(
    shelf: tuple[Namespace, quantization.Ground, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, ground, root = shelf
    whole = quantization.write_exact

    def write(path: Path, network: Any, trained: Any, **kwargs: Any) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        rows = trained.packed[name].rows.copy()
        rows[2, 5] ^= 1
        changed = {**trained.packed, name: replace(trained.packed[name], rows=rows)}
        whole(path, network, replace(trained, packed=changed), **kwargs)

    monkeypatch.setattr(quantization, "write_exact", write)
    monkeypatch.setattr(quantization, "ROUTES", (("qat", "Q4_0"),))
    found = quantization.measure_exactness(options, ground, root / "other", Silent())
    assert found["qat"]["bits_equal"] is False


def test_both_networks_have_the_same_table(
    shelf: tuple[Namespace, quantization.Ground, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, ground, root = shelf

    def untied(network: Any, _batches: Any) -> Any:  # the tiny student is too narrow to be narrowed
        network = copy.deepcopy(network)
        fold_norms(network)
        return network

    monkeypatch.setattr(quantization, "narrow", untied)
    found = quantization.measure_candidates(options, ground, root / "work", Silent())
    rows = found["candidates"]
    assert [(row["network"], row["name"]) for row in rows] == [
        (network, name) for network in ("default", "k-capable") for name in ONLY
    ]
    for row in rows:
        assert row.keys() >= REQUIRED, row["name"]
        assert row["kl_interval"][0] <= row["kl"] <= row["kl_interval"][1]
        assert row["perplexity_interval"][0] < row["perplexity"] < row["perplexity_interval"][1]
        assert row["exam_interval"][0] <= row["exam"] <= row["exam_interval"][1]
        assert 0 < row["top1_agreement"] <= 1
        assert min(row["bytes"], row["prompt_tokens_per_s"], row["decode_tokens_per_s"]) > 0
    for name in quantization.NETWORKS:
        facts = found["networks"][name]
        mine = {row["name"]: row for row in rows if row["network"] == name}
        said = facts["rotation"].replace(", has", " has")
        told = next(row for each, row in mine.items() if f" {each} has" in said)
        plain = mine["gptq-q4_0"]
        assert f"has {told['kl']:.4f} nats against {plain['kl']:.4f} of gptq-q4_0" in said
        assert told["kl"] < plain["kl"] or said.startswith("no rotation beats")
        assert facts["comparisons"].keys() == {"best", "llamacpp-q4_0-imatrix", "llamacpp-q4_k_m-imatrix"}
        assert facts["exam_interval"][0] <= facts["exam"] <= facts["exam_interval"][1]
        assert facts["perplexity_interval"][0] < facts["perplexity"] < facts["perplexity_interval"][1]


def test_scores_have_an_interval_over_questions() -> None:
    scored = replace(measured("gptq-q4_0", kl=0.03), exam=(1.0, 0.0) * 10).row()
    assert scored["exam"] == 0.5
    assert 0.2 < scored["exam_interval"][0] < 0.4
    assert 0.6 < scored["exam_interval"][1] < 0.8
    unasked = measured("gptq-q4_0", kl=0.03).row()
    assert (unasked["exam"], unasked["exam_interval"]) == (None, None)
