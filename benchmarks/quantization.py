"""Measures the routes from a trained student to the file that is served: exactness, and quality at equal bits.

    python benchmarks/quantization.py              everything, well over an hour on 2 cores
    python benchmarks/quantization.py --quick      small samples, 11 minutes on 2 idle cores
    python benchmarks/quantization.py --json       the last line is one JSON object
    python benchmarks/quantization.py --parts candidates --networks default --only gptq-q4_0 llamacpp-q4_0-imatrix

exactness   each [train] method trains a few rows; the file's blocks are compared with the training tensors bit for
            bit, and the file's answers with those of the training network (KL, teacher-forced, llama.cpp). Beside
            them the usual way: a QLoRA adapter merged into the unquantized base, then Q4_K_M.
candidates  files of one student, compared with it in full precision: `default` is the default model, fine-tuned
            (untouched, its weights lie on the Q4_1 grid); `k-capable` the default model cut to widths that K-quants
            divide (SliceGPT's way), then trained here with all of its weights. Both have the same table; --quick
            has llama.cpp's own Q4_0 and Q4_K_M, and R1 + R2 with GPTQ. Rotations learned on the cross-entropy:
            --only learned-ce-gptq-q4_0.

Texts: wikitext articles where ``--data`` has them (folder ``wikitext2_test``) and documents of the exam split, none of
them used in training or calibration. The exam: questions of the exam split with their gold passages.
Speeds are of this machine as it is: close what else runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# The packages are found beside this folder, installed or not.
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from domains.domain import Domain, load_domain
from domains.records import Example, Passage, Question
from domains.routes import LEARNING_RATES, Grid
from pipeline.bootstrap import Interval
from pipeline.candidates import CANDIDATES, ON_REQUEST, Materials, Measured, mean_score, measure, possible
from pipeline.choose_format import compare_rotations
from pipeline.exact_files import find_strangers, write_adapter, write_exact
from pipeline.fidelity import Fidelity, Reference, Text
from pipeline.gguf_tensors import read_packed
from pipeline.imatrix import collect_imatrix
from pipeline.merge import merge_adapter
from pipeline.narrow import narrow
from pipeline.packing import Row, encode_examples
from pipeline.progress import Lines, Progress
from pipeline.quantization_bench import (
    articles,
    heal,
    held_out_texts,
    merge_into_unquantized,
    score_file,
    taught_examples,
    windows,
)
from pipeline.recipe import Recipe, settings_of
from pipeline.roundings import Learning
from pipeline.speed import compare_prompts
from pipeline.student import Base, load_base, load_student
from pipeline.student_files import write_f16
from pipeline.train import train_student
from pipeline.training_loop import Settings
from rag.load import load_documents
from rag.passages import split_document
from serve.engine import Engine
from serve.models import packaged_gguf
from serve.quantizer import requantize

ROOT = Path(__file__).parent.parent
PARTS = ("exactness", "candidates")
NETWORKS = ("default", "k-capable")
ROUTES: tuple[tuple[str, Grid | None], ...] = (
    ("qlora", None), ("qalora", "Q4_1"), ("qalora", "Q4_0"), ("qat", "Q4_0"), ("grid-lora", "Q4_0"),
)  # fmt: skip
# What --quick makes of each network, to bound its time; the full run has them all.
QUICK_CANDIDATES = {"llamacpp-q4_0-imatrix", "llamacpp-q4_k_m-imatrix", "r1r2-gptq-q4_0"}
MOST_BITS = 4.6  # of the blocks, for the comparison with llama.cpp's own Q4_0


@dataclass(frozen=True)
class Sizes:
    """How much of everything. ``texts`` of ``length`` tokens each; ``articles`` is how many of them are wikitext's."""

    rows: int
    epochs: int
    exact_rows: int
    length: int
    calibration: int
    texts: int
    exam: int
    learning_steps: int
    heal_steps: int
    heal_batch: int
    prompt_rounds: int


QUICK = Sizes(
    rows=12, epochs=2, exact_rows=6, length=512, calibration=24, texts=4, exam=2, learning_steps=16, heal_steps=20,
    heal_batch=2, prompt_rounds=3,
)  # fmt: skip
FULL = Sizes(
    rows=48, epochs=2, exact_rows=24, length=512, calibration=24, texts=12, exam=12, learning_steps=16, heal_steps=120, heal_batch=4,
    prompt_rounds=9,
)  # fmt: skip


@dataclass(frozen=True)
class Ground:
    """What both parts stand on."""

    domain: Domain
    passages: list[Passage]
    examples: list[Example]
    exam: list[Question]
    sizes: Sizes
    settings: Settings
    learned: list[str]  # texts that calibration and healing may see
    unseen: list[str]
    unseen_articles: list[str]


def main() -> None:
    """Measure the chosen parts and report."""
    options = parse_options()
    progress = Lines()
    ground = prepare(options)
    result: dict[str, Any] = {"quick": options.quick, "domain": options.domain}
    with tempfile.TemporaryDirectory() as name:
        work = Path(options.work or name)
        work.mkdir(parents=True, exist_ok=True)
        for part in options.parts:
            began = time.monotonic()
            progress.say(f"== {part}")
            result |= MEASURES[part](options, ground, work, progress)
            result.setdefault("seconds", {})[part] = round(time.monotonic() - began)
    show(result)
    if options.json:
        print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small samples")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="of the candidates")
    names = [each.name for each in CANDIDATES]
    known = [*names, *(each.name for each in ON_REQUEST)]
    more = ", ".join(known[len(names) :])
    parser.add_argument(
        "--only", nargs="+", choices=known, help=f"candidates (default: all but {more}; fewer with --quick)"
    )
    parser.add_argument("--domain", default="medical", help="name or folder (default: medical)")
    beside = ROOT.parent / "shared" / "data"
    parser.add_argument(
        "--data", type=Path, default=beside if beside.is_dir() else None, help="folder with public sets"
    )
    parser.add_argument(
        "--split", default="dev", choices=("dev", "hidden"), help="which half of the articles"
    )
    parser.add_argument(
        "--retrain-rate", type=float, default=LEARNING_RATES["qlora"],
        help="learning rate of qat's adapter; qalora's is three times as high (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the rotations")
    parser.add_argument("--work", help="keep the files here")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> Ground:
    """Documents, rows and texts; by document split, as the exam's questions are."""
    domain = load_domain(options.domain)
    config, sizes = domain.config, QUICK if options.quick else FULL
    loaded = load_documents(domain.documents).documents
    passages = [
        passage
        for document in loaded
        for passage in split_document(
            document, max_chars=config.index.passage_chars, overlap_chars=config.index.overlap_chars
        )
    ]
    questions = domain.read_questions()
    examples = taught_examples(
        questions, passages, system=domain.prompts["system"], abstain=config.domain.abstain,
        shown=config.retrieve.top_k, count=sizes.rows,
    )  # fmt: skip
    held = {question.about for question in questions if question.split == "exam"}
    exam = [question for question in questions if question.split == "exam" and question.gold]
    known, unknown = [], []
    path = options.data / "wikitext2_test" / f"{options.split}.jsonl" if options.data else None
    if path is not None and path.is_file():
        texts = articles(path)
        known, unknown = texts[1::2], texts[::2]
    return Ground(
        domain=domain,
        passages=passages,
        examples=examples,
        exam=exam[: sizes.exam],
        sizes=sizes,
        settings=replace(settings_of(domain), epochs=sizes.epochs, learning_rate=LEARNING_RATES["qlora"]),
        learned=[*known, *(each.text for each in loaded if each.doc_id not in held)],
        unseen=[each.text for each in loaded if each.doc_id in held],
        unseen_articles=unknown,
    )


# -- exactness ---------------------------------------------------------------------------------------


def measure_exactness(
    _options: argparse.Namespace, ground: Ground, work: Path, progress: Progress
) -> dict[str, Any]:
    """Per route: bits equal, and the KL of the served file from the training network."""
    found: dict[str, Any] = {}
    for method, grid in ROUTES:
        name = method.replace("-", "_") + ("_q4_0" if (method, grid) == ("qalora", "Q4_0") else "")
        folder = work / "exact" / name
        settings = replace(ground.settings, epochs=1, learning_rate=LEARNING_RATES[method])
        report = train_student(
            ground.examples[: ground.sizes.exact_rows], folder / "train", progress, base=ground.domain.config.student.base,
            context=ground.domain.config.student.context, max_rows=0, checkpoint_steps=1000, settings=settings,
            recipe=Recipe(method, grid),
        )  # fmt: skip
        trained = load_student(folder / "train", base=ground.domain.config.student.base)
        texts = row_texts(ground, trained.base)
        reference = Reference.of_network(trained.network, texts)
        facts = {key: report.facts[key] for key in ("validation_before", "validation_after", "tokens_per_s")}
        if method == "qlora":
            found |= measure_merges(ground, trained, reference, folder)
            found["qlora"] = facts
            continue
        adapter = folder / "adapter.gguf" if trained.low_rank else None
        network = merge_adapter(trained.network) if trained.low_rank else trained.network
        path = folder / "student.gguf"
        assert grid is not None
        write_exact(path, network, trained, grid=grid, name=name)
        if adapter is not None:
            write_adapter(adapter, network, trained, name=name)
        strangers = find_strangers(path, trained.packed, network.config)
        kl = reference.measure(path, adapter=adapter).kl
        found[name] = {
            "bits_equal": not strangers,
            "matrices": len(trained.packed),
            "kl": round(kl.mean, 6),
            "kl_interval": [round(kl.low, 6), round(kl.high, 6)],
            **facts,
        }
        if method == "qalora" and grid == "Q4_1" and trained.base.gguf is not None:
            found[name] |= compare_with_base(path, network.config)
    return found


def row_texts(ground: Ground, base: Base) -> list[Text]:
    """Completions of rows that no route trains on."""
    config = ground.domain.config
    rows, _ = encode_examples(
        ground.examples[ground.sizes.exact_rows :][: ground.sizes.texts], base, max_tokens=config.student.context
    )  # fmt: skip
    return [Text(row.ids, first=row.n_prompt - 1) for row in rows]


def measure_merges(ground: Ground, trained: Any, reference: Reference, folder: Path) -> dict[str, Any]:
    """KL of what QLoRA is served as: our merge in Q8_0 and Q4_K_M, and the usual one in Q4_K_M."""
    unquantized = load_base(ground.domain.config.student.base, dtype=torch.float32)
    usual = merge_into_unquantized(unquantized.model, trained.network)
    write_f16(folder / "usual.gguf", usual, trained.base, title="usual merge")
    write_f16(folder / "ours.gguf", merge_adapter(trained.network), trained.base, title="our merge")
    found = {}
    for key, source, kind in (
        ("qlora_q8_0", "ours", "Q8_0"), ("qlora_merged_q4_k_m", "ours", "Q4_K_M"), ("qlora_q4_k_m", "usual", "Q4_K_M"),
    ):  # fmt: skip
        path = folder / f"{source}-{kind}.gguf"
        requantize(folder / f"{source}.gguf", path, kind)  # type: ignore[arg-type]
        kl = reference.measure(path).kl
        found[key] = {
            "kl": round(kl.mean, 6),
            "kl_interval": [round(kl.low, 6), round(kl.high, 6)],
            "bytes": path.stat().st_size,
        }
    return found


def compare_with_base(path: Path, config: Any) -> dict[str, Any]:
    """What differs between a QA-LoRA student's file and the base's own: nothing but block minima should."""
    ours, theirs = read_packed(path, config), read_packed(packaged_gguf(), config)
    changed = elsewhere = 0
    for name, matrix in theirs.items():
        different = matrix.rows != ours[name].rows
        if matrix.kind == "Q4_1":
            blocks = different.reshape(len(different), -1, 20)  # float16 d, float16 m, 16 bytes of codes
            changed += int(blocks[:, :, 2:4].any(axis=2).sum())
            elsewhere += int(blocks[:, :, :2].sum() + blocks[:, :, 4:].sum())
        else:
            elsewhere += int(different.sum())
    return {"minima_changed": changed, "other_bytes_changed": elsewhere}


# -- candidates --------------------------------------------------------------------------------------


def measure_candidates(
    options: argparse.Namespace, ground: Ground, work: Path, progress: Progress
) -> dict[str, Any]:
    """The table of each network, and how the best at few bits compares with llama.cpp's own."""
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for name in options.networks:
        progress.say(f"-- network {name}")
        own, facts[name] = measure_network(name, options, ground, work / name, progress)
        rows += own
    return {"candidates": rows, "networks": facts}


def measure_network(
    name: str, options: argparse.Namespace, ground: Ground, folder: Path, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One network's table, and what it says of the network itself."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "default":
        base, trained_rows, about = fine_tuned(ground, folder, progress)
        batches = calibration(ground, base, trained_rows)
    else:
        base, trained_rows, about = k_capable(ground, progress)
        batches = calibration(ground, base, ())  # it was healed on text and has seen no rows
    texts, split = unseen_texts(ground, base)
    f16 = folder / "F16.gguf"
    write_f16(f16, base.model, base, title=name)
    steps = ground.sizes.learning_steps
    materials = Materials(
        network=base.model, base=base, f16=f16, batches=batches, rows=trained_rows,
        imatrix=collect_imatrix(base.model, [ids for batch in batches for ids in batch.tolist()], max_tokens=10**9),
        settings=replace(ground.settings, epochs=1, learning_rate=options.retrain_rate), learning=Learning(steps=steps, tuning_steps=steps),
        seed=options.seed,
    )  # fmt: skip
    reference = Reference.of_file(f16, texts)
    wanted = options.only or [
        each.name for each in CANDIDATES if not options.quick or each.name in QUICK_CANDIDATES
    ]
    chosen = [each for each in possible([*CANDIDATES, *ON_REQUEST], materials) if each.name in wanted]
    found = list(measure(chosen, materials, folder, reference, progress, exam=lambda path: ask(ground, path)))
    itself, exam = reference.itself(), mean_score(ask(ground, f16))
    rows = [{**each.row(), "network": name, **wikitext(each.fidelity, split)} for each in found]
    return rows, {
        **about,
        "perplexity": round(itself.perplexity, 3),
        "perplexity_interval": limits(itself.perplexity_interval),
        **wikitext(itself, split),
        "positions": sum(itself.positions),
        "calibration_tokens": sum(batch.numel() for batch in batches),
        "exam": round(exam.mean, 4) if exam else None,
        "exam_interval": limits(exam) if exam else None,
        "comparisons": comparisons(found, prompt_rounds=ground.sizes.prompt_rounds),
        "rotation": compare_rotations(found),
    }


def limits(interval: Interval) -> list[float]:
    """The ends of an interval."""
    return [round(interval.low, 4), round(interval.high, 4)]


def fine_tuned(ground: Ground, folder: Path, progress: Progress) -> tuple[Base, list[Row], dict[str, Any]]:
    """The default model after QLoRA on the domain's rows, merged: a student as users have it."""
    config = ground.domain.config
    report = train_student(
        ground.examples, folder / "train", progress, base=config.student.base, context=config.student.context,
        max_rows=0, checkpoint_steps=1000, settings=ground.settings,
    )  # fmt: skip
    trained = load_student(folder / "train", base=config.student.base)
    rows, _ = encode_examples(ground.examples, trained.base, max_tokens=ground.settings.pack_tokens)
    facts = {key: report.facts[key] for key in ("validation_before", "validation_after")}
    base = replace(trained.base, model=merge_adapter(trained.network))
    return base, rows, {"rows": len(rows), **facts}


def k_capable(ground: Ground, progress: Progress) -> tuple[Base, list[Row], dict[str, Any]]:
    """The default model cut to widths that K-quants divide, and healed on texts that may be learnt from.

    The rows are what its candidates are retrained on; it has not seen them.
    """
    base = load_base(ground.domain.config.student.base, dtype=torch.float32)
    pieces = windows(base, ground.learned, length=256, count=4096)
    network = narrow(base.model, [torch.tensor(pieces[begin : begin + 4]) for begin in range(0, 64, 4)])
    progress.start("healing the narrowed network", ground.sizes.heal_steps)
    losses = heal(network, pieces, steps=ground.sizes.heal_steps, batch=ground.sizes.heal_batch)
    facts = {
        "tokens": 256 * len(pieces),
        "weights": sum(p.numel() for p in network.parameters()),
        "width": network.config.hidden_size,
        "heads": network.config.num_attention_heads,
        "loss_first": round(losses[0], 3),
        "loss_last": round(sum(losses[-10:]) / len(losses[-10:]), 3),
    }
    rows, _ = encode_examples(ground.examples, base, max_tokens=ground.settings.pack_tokens)
    return replace(base, model=network), rows, facts


def unseen_texts(ground: Ground, base: Base) -> tuple[list[Text], int]:
    """Held-out texts, and how many of them (the first) are articles."""
    sizes = ground.sizes
    half = sizes.texts // 2 if ground.unseen_articles else 0
    some = held_out_texts(base, ground.unseen_articles, length=sizes.length, count=half)
    more = held_out_texts(base, ground.unseen, length=sizes.length, count=sizes.texts - len(some))
    return [*some, *more], len(some)


def calibration(ground: Ground, base: Base, rows: Sequence[Row]) -> list[torch.Tensor]:
    """Half of it training rows where there are any, half of it text, in windows of one length."""
    sizes = ground.sizes
    ids = [token for row in rows for token in row.ids]
    own = [ids[begin : begin + sizes.length] for begin in range(0, len(ids) - sizes.length + 1, sizes.length)]
    own = own[: sizes.calibration // 2]
    pieces = [*own, *windows(base, ground.learned, length=sizes.length, count=sizes.calibration - len(own))]
    return [torch.tensor(pieces[begin : begin + 4]) for begin in range(0, len(pieces), 4)]


def wikitext(fidelity: Fidelity, articles_count: int) -> dict[str, Any]:
    """The perplexity of the articles alone, where there are any."""
    if not articles_count:
        return {}
    found = fidelity.part(slice(0, articles_count)).perplexity_interval
    return {"wikitext_perplexity": round(found.mean, 3), "wikitext_perplexity_interval": limits(found)}


def ask(ground: Ground, path: Path) -> list[float]:
    """The scores of a file in the exam."""
    config = ground.domain.config
    with Engine(path, context=config.student.context, parallel=8) as engine:
        return score_file(
            engine, ground.exam, ground.passages, system=ground.domain.prompts["system"],
            abstain=config.domain.abstain, shown=config.retrieve.top_k, max_tokens=80,
        )  # fmt: skip


def comparisons(found: Sequence[Measured], *, prompt_rounds: int) -> dict[str, Any]:
    """The best candidate of few bits against llama.cpp's own files: KL paired over texts, prompts timed in turns."""
    by_name = {each.candidate.name: each for each in found}
    ours = [
        each for each in found if each.candidate.how != "llamacpp" and each.block_bits_per_weight <= MOST_BITS
    ]
    if not ours:
        return {}
    best = min(ours, key=lambda each: each.fidelity.kl.mean)
    result: dict[str, Any] = {"best": best.candidate.name}
    for theirs in ("llamacpp-q4_0-imatrix", "llamacpp-q4_k_m-imatrix"):
        if theirs not in by_name:
            continue
        other = by_name[theirs]
        gap = best.fidelity.minus(other.fidelity)
        result[theirs] = {
            "kl_ratio": round(best.fidelity.kl.mean / other.fidelity.kl.mean, 4),
            "kl_minus": [round(value, 5) for value in (gap.mean, gap.low, gap.high)],
            "block_bits": [round(best.block_bits_per_weight, 3), round(other.block_bits_per_weight, 3)],
        }
        ratio = compare_prompts(best.path, other.path, rounds=prompt_rounds)
        result[theirs] |= {
            "prompt_speed_ratio": ratio.median, "prompt_speed_quartiles": [ratio.low, ratio.high],
        }  # fmt: skip
    return result


def show(result: dict[str, Any]) -> None:
    """Tables for a person."""
    for key, value in result.items():
        if key == "candidates":
            for row in value:
                print("  ".join(f"{name} {row[name]}" for name in row))
        elif isinstance(value, dict):
            print(key)
            for name, each in value.items():
                print(f"    {name:24} {each}")
        else:
            print(f"{key:28} {value}")


MEASURES = {"exactness": measure_exactness, "candidates": measure_candidates}

if __name__ == "__main__":
    main()
