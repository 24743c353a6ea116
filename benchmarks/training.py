"""Measures training: this project's loop against plain peft + bitsandbytes + TRL, and each lever by itself.

    python benchmarks/training.py              12 steps of 8 rows for everybody
    python benchmarks/training.py --quick      fewer steps and rounds, meant for 15 minutes on 2 cores
    python benchmarks/training.py --json       the last line is one JSON object

Everybody trains the same rows in the same order, 8 a step, from the same first adapter on the same NF4 base (double
quantization), with the same schedule, completions only. Every arm is a process of its own: its peak is what the process
took at most, imports and loading included. Tokens are real ones, padding is not counted; the first step warms up and
is not timed. Our loop runs before and after TRL's, and the mean counts. The levers' speeds are taken in one process, step by
step in turns, so that what else the machine does falls on all alike; their memory in processes of their own.
``bound`` is what matrix products of the blocks alone would allow, at the rate at which this machine multiplies now. TRL has its defaults but for the batch size, the rate and the order of rows; it keeps adapters in bfloat16,
which is what its loss curve differs by. Every figure is of this machine as it is: close what else runs.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# The packages are found beside this folder, installed or not.
sys.path.insert(0, str(Path(__file__).parent.parent))

from serve.models import SMOLLM2, packaged_gguf

DOMAINS = ("medical", "product_requirements")
ROWS_PER_STEP = 8


@dataclass(frozen=True)
class Sizes:
    """Steps of the two main arms, of TRL's default and of the levers' memory; rounds of their speeds, the first not counted."""

    main: int
    default: int
    memory: int
    rounds: int


STEPS = 12  # of a whole run: everybody follows its schedule, however early it stops
FULL, QUICK = Sizes(STEPS, STEPS, 2, 6), Sizes(6, 2, 1, 3)
PACK_TOKENS = 1024
NO_LIMIT = 10**6  # no row is left out or cut, here or there
RANK, ALPHA, RATE, SEED = 16, 32.0, 1e-3, 0
TOP_LAYERS = 15  # of 30, for the cache of frozen layers

# Lever -> what it is measured beside, and the switches that turn it off.
LEVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parallel_packs": ({}, {"parallel_packs": False}),
    # packs are what is shared among cores: without them, neither side has parallel_packs
    "packing": ({"parallel_packs": False}, {"parallel_packs": False, "packing": False}),
    "even_lengths": ({}, {"even_lengths": False}),
    "supervised_head": ({}, {"supervised_head": False}),
    "chunked_loss": ({}, {"chunked_loss": False}),
    "shared_prefix": ({}, {"shared_prefix": False}),
    "last_layer": ({}, {"last_layer": False}),
    "fused_layers": ({}, {"fused_layers": False}),
    # the kernel takes neither shared beginnings nor fused layers
    "matmul_attention": (
        {"fused_layers": False, "shared_prefix": False},
        {"fused_layers": False, "shared_prefix": False, "matmul_attention": False},
    ),
    "bf16": ({}, {"bf16": False}),
    "checkpointing_off": ({"checkpointing": "off"}, {"checkpointing": "on"}),
    "cached_layers": ({}, {"cached_layers": False}),
}


@dataclass(frozen=True)
class Arm:
    """What one process measures."""

    name: str
    steps: int
    trl: bool = False
    trl_checkpointing: bool = True
    switches: tuple[tuple[str, Any], ...] = ()
    lora_layers: int = 0
    epochs: int = 1
    base: str = SMOLLM2

    @classmethod
    def parse(cls, text: str) -> Arm:
        """From JSON."""
        values = json.loads(text)
        return cls(**{**values, "switches": tuple((key, value) for key, value in values["switches"])})


@dataclass(frozen=True)
class Measured:
    """An arm's result. ``losses`` are the steps' means per supervised token, in nats."""

    tokens_per_s: float
    peak_mb: float
    losses: list[float]
    tokens: int
    same_tokens: bool = True


def main() -> None:
    """Measure all arms and report."""
    options = parse_options()
    if options.arm:
        print(json.dumps(asdict(run_arm(Arm.parse(options.arm)))))
        return
    if options.turns is not None:
        print(json.dumps(take_turns([Arm.parse(arm) for arm in options.turns], options.rounds)))
        return
    result = measure(quick=options.quick, levers=options.levers, trl=not options.no_trl)
    show(result)
    if options.json:
        print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps of the slow parts")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--levers", nargs="*", choices=list(LEVERS), default=list(LEVERS), help="which")
    parser.add_argument("--no-trl", action="store_true", help="this project's loop only")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--turns", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(*, quick: bool, levers: Sequence[str], trl: bool) -> dict[str, Any]:
    """All arms, one process after the other."""
    sizes = QUICK if quick else FULL
    arms = {"ours": Arm("ours", sizes.main)}
    if trl:
        arms["trl"] = Arm("trl", sizes.main, trl=True, trl_checkpointing=False)
        arms["trl_default"] = Arm("trl_default", sizes.default, trl=True)
        arms["ours_again"] = Arm("ours", sizes.main)
    found = {name: start(arm) for name, arm in arms.items()}
    result: dict[str, Any] = {"quick": quick, "arms": {name: asdict(value) for name, value in found.items()}}
    if trl:
        result |= compared(found)
    return result | measure_levers(levers, sizes)


def compared(found: dict[str, Measured]) -> dict[str, Any]:
    """The headline: our loop against both of TRL's."""
    first, again, plain, default = (found[name] for name in ("ours", "ours_again", "trl", "trl_default"))
    speed = (first.tokens_per_s + again.tokens_per_s) / 2
    ours = replace(first, tokens_per_s=speed, peak_mb=max(first.peak_mb, again.peak_mb))
    differences = [abs(a - b) for a, b in zip(ours.losses, plain.losses, strict=True)]
    return {
        "speedup": round(ours.tokens_per_s / plain.tokens_per_s, 3),
        "memory_ratio": round(ours.peak_mb / plain.peak_mb, 3),
        "speedup_default": round(ours.tokens_per_s / default.tokens_per_s, 3),
        "memory_ratio_default": round(ours.peak_mb / default.peak_mb, 3),
        "max_loss_difference": round(max(differences), 4),
    }


def measure_levers(names: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Each lever with it over without it: speed, memory, and how far loss and gradient are from each other."""
    pairs: dict[str, list[Arm]] = {}
    for name in names:
        layers = TOP_LAYERS if name == "cached_layers" else 0
        epochs = 2 if layers else 1  # the second finds everything in the cache
        pairs[name] = [
            Arm("lever", sizes.memory, switches=tuple(switches.items()), lora_layers=layers, epochs=epochs)
            for switches in LEVERS[name]
        ]
    arms = list({arm: None for pair in pairs.values() for arm in pair})
    if not arms:
        return {"levers": {}}
    peaks = {arm: start(arm).peak_mb for arm in arms}
    turns = start_turns(arms, sizes.rounds)
    place = {arm: number for number, arm in enumerate(arms)}
    levers = {}
    for name, (with_it, without) in pairs.items():
        one, other = (turns["arms"][place[arm]] for arm in (with_it, without))
        ratios = [slow / fast for fast, slow in zip(one["seconds"], other["seconds"], strict=True)]
        levers[name] = {
            "speedup": round(statistics.median(ratios), 3),
            "speedups": [round(min(ratios), 3), round(max(ratios), 3)],
            "memory_ratio": round(peaks[with_it] / peaks[without], 3),
            "loss_difference": round(abs(one["loss"] - other["loss"]), 6),
            "gradient_norm_ratio": round(one["norm"] / other["norm"], 4),
        }
    return {"levers": levers, "bound": turns["bound"]}


def start_turns(arms: Sequence[Arm], rounds: int) -> dict[str, Any]:
    """`take_turns` in a process of its own."""
    say(f"{len(arms)} arms in turns ({rounds} rounds)")
    command = [
        sys.executable,
        str(Path(__file__)),
        "--rounds",
        str(rounds),
        "--turns",
        *(json.dumps(asdict(arm)) for arm in arms),
    ]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def take_turns(arms: Sequence[Arm], rounds: int) -> dict[str, Any]:
    """One step's forward and backward pass per arm and round, always of the same rows and weights."""
    import torch

    benches: dict[tuple[bool, int], Bench] = {}
    found: list[dict[str, Any]] = [{"seconds": []} for _ in arms]
    for round_ in range(rounds):
        for arm, result in zip(arms, found, strict=True):
            switches = dict(arm.switches)
            key = switches.get("bf16", True), arm.lora_layers
            if key not in benches:
                benches[key] = Bench(arm.base, bf16=key[0], layers=key[1])
            seconds, loss, norm = benches[key].step(switches)
            if round_:
                result["seconds"].append(seconds)
            result |= {"loss": loss, "norm": norm}
    for bench in benches.values():
        bench.close()
    rate = gemm_rate(torch.bfloat16)
    weights = benches[min(benches)].block_weights
    per_token = 2 * 2 * weights  # forward, and backward to the inputs: the weights themselves are frozen
    return {
        "arms": found,
        "bound": {"gemm_gflops": round(rate / 1e9), "tokens_per_s": round(rate / per_token)},
    }


def gemm_rate(dtype: Any) -> float:
    """Operations per second of the widest matrix product of the default model, the median of 30."""
    import torch

    x, w = torch.randn(1000, 576, dtype=dtype), torch.randn(3072, 576, dtype=dtype)
    seconds = []
    for _ in range(33):
        begin = time.perf_counter()
        x @ w.T
        seconds.append(time.perf_counter() - begin)
    return 2 * x.numel() * len(w) / statistics.median(seconds[3:])


class Bench:
    """A network with adapters whose every weight counts, and the packs of one step."""

    def __init__(self, name: str, *, bf16: bool, layers: int) -> None:
        import torch

        from pipeline.packing import encode_examples, use_packed_attention
        from pipeline.qlora import attach_lora, quantize_nf4, training_dtype
        from pipeline.student import load_base

        base = load_base(name, dtype=training_dtype(bf16=bf16))
        config = base.model.config
        self.block_weights = sum(
            weight.numel() for weight in base.model.model.layers.parameters() if weight.ndim == 2
        )
        self.rows, _ = encode_examples(examples()[:ROWS_PER_STEP], base, max_tokens=NO_LIMIT)
        self.room = max(PACK_TOKENS, *(len(row.ids) for row in self.rows))
        quantize_nf4(base.model)
        use_packed_attention(base.model)
        self.network = base.model
        self.adapted = attach_lora(base.model, rank=RANK, alpha=ALPHA, dropout=0.0, seed=SEED, layers=layers)
        self.weights = {n: p for n, p in self.adapted.named_parameters() if p.requires_grad}
        torch.manual_seed(SEED)
        for weight in self.weights.values():
            if not weight.any():  # B begins at zero, where A has no gradient
                torch.nn.init.normal_(weight, std=0.01)
        self._folder = tempfile.TemporaryDirectory()
        self._below = self._cache(config) if layers else None

    def _cache(self, config: Any) -> Any:
        from pipeline.layer_cache import LayerCache, frozen_layers

        frozen = frozen_layers(self.weights, config.num_hidden_layers)
        folder = Path(self._folder.name)
        return LayerCache(
            frozen, self.rows, width=config.hidden_size, dtype=self.network.dtype, folder=folder
        )

    def close(self) -> None:
        """Remove what lies on disk."""
        if self._below is not None:
            self._below.close()
        self._folder.cleanup()

    def step(self, switches: dict[str, Any]) -> tuple[float, float, float]:
        """Seconds, loss per supervised token, norm of the gradient."""
        import torch

        from pipeline.completion_loss import completion_loss
        from pipeline.levers import Levers
        from pipeline.packing import pack_hidden
        from pipeline.parallel_packs import add_gradients, cores_for_packs, prepare, shares

        levers = replace(Levers(checkpointing="off"), **switches)
        cores = torch.get_num_threads() if levers.parallel_packs and levers.packing else 1
        packs = packs_of(self.rows, self.room, packing=levers.packing)
        if cores > 1:
            packs = shares(packs, cores, tokens=self.room)
        below = self._below if levers.cached_layers else None
        self.adapted.train()
        supervised = sum(packed.supervised for packed in packs)

        def loss_of(packed: Any) -> torch.Tensor:
            hidden, targets = pack_hidden(self.network, packed, levers, below)
            loss = completion_loss(self.network.lm_head, hidden, targets, chunked=levers.chunked_loss)
            return loss / supervised

        with cores_for_packs(cores) as pool:
            begin = time.perf_counter()
            if pool is not None:
                prepare(self.network)
            loss = add_gradients(packs, loss_of, list(self.weights.values()), pool)
            seconds = time.perf_counter() - begin
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0).item()
        for weight in self.weights.values():
            weight.grad = None
        return seconds, loss, norm


def start(arm: Arm) -> Measured:
    """Run an arm in a process of its own."""
    say(f"{arm.name} {dict(arm.switches) or ''} ({arm.steps * arm.epochs} steps)")
    command = [sys.executable, str(Path(__file__)), "--arm", json.dumps(asdict(arm))]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured = Measured(**json.loads(process.stdout.splitlines()[-1]))
    speed = f"{measured.tokens_per_s:.0f} tokens/s, " if measured.tokens_per_s else ""
    say(f"  {speed}{measured.peak_mb:.0f} MB")
    return measured


def say(message: str) -> None:
    """One line of progress."""
    print(message, file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    """Tables for people."""
    print(f"{'':18} tokens/s  peak MB  last loss")
    for name, arm in result["arms"].items():
        print(f"{name:18} {arm['tokens_per_s']:8.1f} {arm['peak_mb']:8.0f} {arm['losses'][-1]:10.3f}")
    if "speedup" in result:
        print(
            f"against TRL without checkpointing: {result['speedup']} x the speed, {result['memory_ratio']} x the memory"
        )
        print(
            f"against TRL's default: {result['speedup_default']} x the speed, {result['memory_ratio_default']} x the memory"
        )
        print(f"largest difference of the losses: {result['max_loss_difference']}")
    if "bound" in result:
        bound = result["bound"]
        print(f"bound: {bound['tokens_per_s']} tokens/s at {bound['gemm_gflops']} GFLOP/s of matrix products")
    for name, lever in result["levers"].items():
        print(f"{name:18} {lever['speedup']:8.2f} x the speed {lever['memory_ratio']:8.2f} x the memory")


def run_arm(arm: Arm) -> Measured:
    """In the arm's own process."""
    return run_trl(arm) if arm.trl else run_ours(arm)


def examples() -> list[Any]:
    """Question-answer rows of both domains' seed questions, with none to two passages each: ragged, and the same for all."""
    from domains.domain import load_domain
    from domains.jsonl import read_jsonl
    from domains.records import Example, Question
    from pipeline.rows import gold_quotes
    from rag.answers import format_reply, reference_answer
    from rag.load import load_documents
    from rag.passages import split_document
    from rag.prompt import render_question, student_messages

    chooser = random.Random(SEED)
    made = []
    for name in DOMAINS:
        domain = load_domain(name)
        assert domain.documents is not None
        assert domain.questions is not None
        sizes = domain.config.index
        passages = [
            passage
            for document in load_documents(domain.documents).documents
            for passage in split_document(
                document, max_chars=sizes.passage_chars, overlap_chars=sizes.overlap_chars
            )
        ]
        for question in read_jsonl(domain.questions, Question):
            if question.split != "seed" or not question.gold:
                continue
            home = [passage for passage in passages if passage.doc_id == question.about]
            chooser.shuffle(home)
            home.sort(key=lambda passage: not gold_quotes(question, [passage]))  # the gold one comes first
            shown = home[: chooser.choice((0, 1, 1, 2))]
            completion = format_reply(
                quotes=gold_quotes(question, shown), rationale="", answer=reference_answer(question)
            )
            made.append(
                Example(
                    id=question.id,
                    question_id=question.id,
                    messages=student_messages(domain.prompts["system"], render_question(question), shown),
                    completion=completion,
                    passages=[passage.passage_id for passage in shown],
                    origin="gold",
                    request="benchmark",
                )
            )
    chooser.shuffle(made)
    return made[: STEPS * ROWS_PER_STEP]


def run_ours(arm: Arm) -> Measured:
    """This project's loop, `pipeline.training_loop.Trainer`, with its steps' rows given."""
    from pipeline.levers import Levers
    from pipeline.packing import encode_examples, use_packed_attention
    from pipeline.progress import Silent
    from pipeline.qlora import attach_lora, quantize_nf4, training_dtype
    from pipeline.student import load_base
    from pipeline.training_loop import Settings, Trainer

    levers = replace(Levers(), **dict(arm.switches))
    base = load_base(arm.base, dtype=training_dtype(bf16=levers.bf16))
    rows, _ = encode_examples(examples()[: arm.steps * ROWS_PER_STEP], base, max_tokens=NO_LIMIT)
    room = max(PACK_TOKENS, *(len(row.ids) for row in rows))
    quantize_nf4(base.model)
    use_packed_attention(base.model)
    adapted = attach_lora(base.model, rank=RANK, alpha=ALPHA, dropout=0.0, seed=SEED, layers=arm.lora_layers)
    settings = Settings(
        rank=RANK,
        alpha=ALPHA,
        dropout=0.0,
        learning_rate=RATE,
        warmup_share=0.0,
        epochs=1,
        pack_tokens=room,
        packs_per_step=1,
        max_grad_norm=1.0,
        seed=SEED,
        lora_layers=arm.lora_layers,
        levers=levers,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(adapted, base.model, rows, (), settings, Path(folder), "")
        batches = [rows[i * ROWS_PER_STEP : (i + 1) * ROWS_PER_STEP] for i in range(arm.steps)]
        trainer.epochs = [[packs_of(batch, room, packing=levers.packing) for batch in batches]] * arm.epochs
        trainer.total = max(STEPS, arm.steps * arm.epochs)  # the schedule's
        state = trainer.fit(Silent(), checkpoint_steps=10**6)
    history = [line for line in state.history if "loss" in line]
    timed = history[max(1, arm.steps * (arm.epochs - 1)) :]  # the last epoch, never the first step
    seconds = sum(line["seconds"] for line in timed)
    tokens = sum(line["tokens"] for line in timed)
    return Measured(
        tokens / seconds if seconds else 0.0,  # one step alone is for its memory
        peak_mb(),
        [line["loss"] for line in history],
        sum(line["tokens"] for line in history),
    )


def packs_of(rows: Sequence[Any], room: int, *, packing: bool) -> list[Any]:
    """The packs of a step; without packing one padded batch."""
    from pipeline.packing import Pack, pack

    return list(pack(rows, room, seed=SEED, epoch=0)) if packing else [Pack(tuple(rows))]


def run_trl(arm: Arm) -> Measured:
    """Plain transformers + bitsandbytes + peft + TRL's SFTTrainer on the same texts."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from pipeline.packing import encode_examples
    from pipeline.qlora import BLOCK_LINEARS
    from pipeline.student import load_base, render_prompt
    from pipeline.unpack import unpacked_gguf

    base = load_base(arm.base, dtype=torch.bfloat16)
    chosen = examples()[: arm.steps * ROWS_PER_STEP]
    rows, _ = encode_examples(chosen, base, max_tokens=NO_LIMIT)
    end = base.tokenizer.decode([base.end_of_turn])
    texts = [{"prompt": render_prompt(base, e.messages), "completion": e.completion + end} for e in chosen]
    tokenizer = base.tokenizer
    del base
    model = AutoModelForCausalLM.from_pretrained(
        str(unpacked_gguf(packaged_gguf())) if arm.base == SMOLLM2 else arm.base,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(BLOCK_LINEARS), bias="none", task_type="CAUSAL_LM"
    )
    torch.manual_seed(SEED)
    model = get_peft_model(model, lora)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.monotonic()

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS_PER_STEP,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            max_length=None,
            gradient_checkpointing=arm.trl_checkpointing,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        stretch_schedule(trainer)
        trainer.train()
    same = [tuple(ids) for ids in trainer.train_dataset["input_ids"]] == [row.ids for row in rows]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    tokens = sum(len(row.ids) for row in rows)
    timed = tokens - sum(len(row.ids) for row in rows[:ROWS_PER_STEP])
    return Measured(timed / sum(seconds[1:]), peak_mb(), losses, tokens, same)


def stretch_schedule(trainer: Any) -> None:
    """A run that stops early follows the whole run's schedule."""
    create = trainer.create_scheduler

    def whole(num_training_steps: int, optimizer: Any = None) -> Any:
        return create(max(STEPS, num_training_steps), optimizer)

    trainer.create_scheduler = whole


def peak_mb() -> float:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    main()
