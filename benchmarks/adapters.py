"""Two domains on one base with an adapter each, against two whole students: memory, and what an adapter costs in speed.

    python benchmarks/adapters.py --quick              the default model in Q8_0, random adapters of rank 16
    python benchmarks/adapters.py --gguf base.gguf     another base
    python benchmarks/adapters.py --json               the last line is one JSON object

Every setup is measured in a process of its own after each domain has answered once; ``resident`` is what the process
holds in memory (files it has mapped included), ``two processes`` twice that of a process with one student.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# The project's packages are found beside this folder, installed or not.
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from domains.config import KvCache
from serve.engine import Engine
from serve.gguf_check import check_gguf
from serve.models import SMOLLM2, inference_gguf

SMALL_CACHE = ", q8_0 cache"
SETUPS = ("one student", "two students", "one base, two adapters", f"one base, two adapters{SMALL_CACHE}")
CONTEXT, PARALLEL = 2048, 4  # what a served domain has by default
PROMPT, DECODED = 512, 64
RANK = 16


def main() -> None:
    """Measure all setups, print a table, and one JSON object where asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", default=SMOLLM2, help="a GGUF file, or the default model")
    parser.add_argument("--rank", type=int, default=RANK, help="of the random adapters")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing, of which medians are taken")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--setup", nargs="+", metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.setup:
        name, *files = arguments.setup
        print(json.dumps(resident(name, [Path(file) for file in files])))
        return
    repeats = 3 if arguments.quick else arguments.repeats
    result = measure(inference_gguf(arguments.gguf), rank=arguments.rank, repeats=repeats)
    for name, value in result.items():
        print(f"{name:28} {value}")
    if arguments.json:
        print(json.dumps(result))


def measure(gguf: Path, *, rank: int, repeats: int) -> dict[str, Any]:
    """Megabytes per setup, and tokens per second with and without an adapter.

    Args:
        gguf: the base.
        rank: of the random adapters on all linear layers of its blocks.
        repeats: rounds of timing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = [write_random_adapter(folder / f"{n}.gguf", gguf, rank=rank, seed=n) for n in range(2)]
        other = Path(shutil.copyfile(gguf, folder / "other-student.gguf"))
        whole = {"one student": [gguf], "two students": [gguf, other]}
        memory = {setup: in_own_process(setup, whole.get(setup, [gguf, *adapters])) for setup in SETUPS}
        result: dict[str, Any] = {
            "model": gguf.name,
            "model_mb": megabytes(gguf.stat().st_size),
            "adapter_mb": megabytes(adapters[0].stat().st_size),
            "resident_mb": {**memory, "two processes": round(2 * memory["one student"], 1)},
        }
        return {**result, **speeds(gguf, adapters, repeats)}


def megabytes(count: float) -> float:
    """Of 10^6 bytes."""
    return round(count / 1e6, 1)


def write_random_adapter(path: Path, gguf: Path, *, rank: int, seed: int) -> Path:
    """A GGUF LoRA on all linear layers of a model's blocks; what it says does not matter here, how big it is does."""
    from gguf import GGUFWriter

    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for tensor in check_gguf(gguf).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            rows, width = tensor.shape
            for suffix, shape in ((".lora_a", (rank, width)), (".lora_b", (rows, rank))):
                factor = rng.normal(0, 0.01, shape).astype(np.float32)
                writer.add_tensor(tensor.name + suffix, factor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_own_process(setup: str, files: Sequence[Path]) -> float:
    """`resident` of a setup in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--setup", setup, *map(str, files)], stdout=subprocess.PIPE, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def resident(setup: str, files: Sequence[Path]) -> float:
    """Megabytes that this process holds more after its students were loaded and have answered than before."""
    import llama_cpp  # noqa: F401  its own size is no student's

    before = resident_bytes()
    with ExitStack() as stack:
        for engine in open_setup(setup, files, stack):
            engine.generate([prompt_of(engine)], max_tokens=8)
        return megabytes(resident_bytes() - before)


def open_setup(setup: str, files: Sequence[Path], stack: ExitStack) -> list[Engine]:
    """The engines of a setup: ``files`` are its models, or a base and its adapters."""
    if "adapters" not in setup:
        return [stack.enter_context(Engine(file, context=CONTEXT, parallel=PARALLEL)) for file in files]
    kv_cache: KvCache = "q8_0" if setup.endswith(SMALL_CACHE) else "f16"
    base, *adapters = files
    engines: list[Engine] = []
    for adapter in adapters:
        model = engines[0].model if engines else base
        engine = Engine(model, context=CONTEXT, parallel=PARALLEL, adapter=adapter, kv_cache=kv_cache)
        engines.append(stack.enter_context(engine))
    return engines


def resident_bytes() -> int:
    """What this process holds in memory now (Linux)."""
    rows = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(row.split()[1]) for row in rows if row.startswith("Rss:"))


def prompt_of(engine: Engine, start: int = 1000) -> list[int]:
    """Tokens; what they say does not matter."""
    return [(7 * place + start) % engine.vocab_size for place in range(PROMPT)]


def speeds(gguf: Path, adapters: Sequence[Path], repeats: int) -> dict[str, dict[str, float]]:
    """Tokens per second without and with an adapter, and of two domains that write at the same time."""
    found: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        plain = stack.enter_context(Engine(gguf, context=CONTEXT, parallel=PARALLEL))
        one, two = (
            stack.enter_context(Engine(plain.model, context=CONTEXT, parallel=PARALLEL, adapter=adapter))
            for adapter in adapters
        )
        for round_ in range(repeats + 1):
            took = {"base": time_alone(plain, round_), "base + adapter": time_alone(one, round_)}
            took["two at once"] = {"decode_4_tokens_per_s": time_both([one, two], round_)}
            if round_:
                for name, values in took.items():
                    for kind, value in values.items():
                        found.setdefault(name, {}).setdefault(kind, []).append(value)
    return {
        name: {kind: round(statistics.median(values), 1) for kind, values in kinds.items()}
        for name, kinds in found.items()
    }


def time_alone(engine: Engine, seed: int) -> dict[str, float]:
    """Of reading a prompt, of writing one reply behind it, and four at a time."""
    engine.forget()
    prompts = [prompt_of(engine, 1000 + number) for number in range(PARALLEL)]
    began = time.perf_counter()
    engine.generate(prompts[:1], max_tokens=1)
    took = {"prompt_tokens_per_s": PROMPT / (time.perf_counter() - began)}
    engine.generate(prompts, max_tokens=1)
    for count in (1, PARALLEL):
        began = time.perf_counter()
        written = write(engine, prompts[:count], seed)
        took[f"decode_{count}_tokens_per_s"] = written / (time.perf_counter() - began)
    return took


def time_both(engines: Sequence[Engine], seed: int) -> float:
    """Tokens per second of two engines together, each with two replies, on threads of their own."""
    prompts = [prompt_of(engines[0], 1000 + number) for number in range(PARALLEL // 2)]
    for engine in engines:
        engine.generate(prompts, max_tokens=1)
    written: list[int] = []
    threads = [
        threading.Thread(target=lambda engine=engine: written.append(write(engine, prompts, seed)))
        for engine in engines
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(written) / (time.perf_counter() - began)


def write(engine: Engine, prompts: Sequence[Sequence[int]], seed: int) -> int:
    """Tokens written behind prompts whose caches are there."""
    replies = engine.generate(prompts, max_tokens=DECODED, temperature=1.0, seed=seed)
    return sum(len(reply.tokens) for reply in replies)


if __name__ == "__main__":
    main()
