"""What a quantized key-value cache costs and saves: KL against f16, bytes per token, tokens per second.

    python benchmarks/kv_cache.py --quick                 the default model, a few long texts (2 minutes)
    python benchmarks/kv_cache.py --gguf student.gguf     another file
    python benchmarks/kv_cache.py --json                  the last line is one JSON object

llama.cpp turns keys and values by a Hadamard matrix before it rounds them (SpinQuant's R3, arXiv 2405.16406). The
rows "… rotation off" are measured in a process of their own without it. KL is teacher-forced, in nats per position,
over the positions behind the first ``FIRST`` tokens, where each attends to a long cache; its interval is over texts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# The project's packages are found beside this folder, installed or not.
sys.path.insert(0, str(Path(__file__).parent.parent))

from domains.config import KvCache
from pipeline.fidelity import Fidelity, compare
from serve.engine import Engine
from serve.gguf_check import GgufFacts
from serve.models import SMOLLM2, inference_gguf

ROOT = Path(__file__).parent.parent
KINDS: tuple[KvCache, ...] = ("f16", "q8_0", "q4_0")
BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # per number; a quantized block of 32 has an f16 scale
TOKENS, FIRST = 1024, 512  # of a text; positions behind FIRST count
DECODED = 64
PARALLEL = 4
NO_ROTATION = "LLAMA_ATTN_ROT_DISABLE"  # llama.cpp reads it when a context is made


def main() -> None:
    """Measure, print a table, and one JSON object where asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", default=SMOLLM2, help="a GGUF file, or the default model")
    parser.add_argument("--text", type=Path, default=ROOT / "corpora" / "medical" / "documents")
    parser.add_argument("--texts", type=int, default=16, help="how many texts of 1024 tokens")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing, of which medians are taken")
    parser.add_argument("--quick", action="store_true", help="4 texts and 3 rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)  # the process without rotation
    arguments = parser.parse_args()
    texts, repeats = (4, 3) if arguments.quick else (arguments.texts, arguments.repeats)
    gguf = inference_gguf(arguments.gguf)
    if arguments.rows:
        print(json.dumps(measure(gguf, read_text(arguments.text), texts=texts, repeats=0)))
        return
    result = measure_both(gguf, arguments.text, texts=texts, repeats=repeats)
    for name, row in result["caches"].items():
        print(f"{name:20} " + "  ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.json:
        print(json.dumps(result))


def measure_both(gguf: Path, text: Path, *, texts: int, repeats: int) -> dict[str, Any]:
    """All rows: with llama.cpp's rotation and, for the quantized kinds' KL, without.

    Args:
        gguf: the model.
        text: a file, or a folder of Markdown files.
        texts: how many are cut from it.
        repeats: rounds of timing.
    """
    caches = measure(gguf, read_text(text), texts=texts, repeats=repeats)
    command = [sys.executable, __file__, "--rows", "--gguf", str(gguf), "--text", str(text)]
    done = subprocess.run(
        [*command, "--texts", str(texts)],
        env={**os.environ, NO_ROTATION: "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    for name, row in json.loads(done.stdout.splitlines()[-1]).items():
        if name != "f16":
            caches[f"{name} rotation off"] = row
    return {"model": gguf.name, "texts": texts, "tokens": TOKENS, "caches": caches}


def read_text(path: Path) -> str:
    """A file's text, or that of all Markdown files of a folder, by name."""
    files = sorted(path.glob("*.md")) if path.is_dir() else [path]
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def measure(gguf: Path, text: str, *, texts: int, repeats: int) -> dict[str, dict[str, Any]]:
    """One row per kind of cache: ``kl`` [mean, low, high] against f16, ``top1_agreement``, bytes and speeds.

    Contexts of all kinds stand on one loaded model. ``repeats`` 0 leaves the speeds out.
    """
    with ExitStack() as stack:
        first = stack.enter_context(Engine(gguf, context=TOKENS + DECODED + 8, parallel=PARALLEL))
        engines: dict[KvCache, Engine] = {"f16": first}
        for kind in KINDS[1:]:
            engines[kind] = stack.enter_context(
                Engine(first.model, context=first.context, parallel=PARALLEL, kv_cache=kind)
            )
        pieces = list(cut(first.tokenize(text), texts))
        rows: dict[str, dict[str, Any]] = {
            kind: {"bytes_per_token": bytes_per_token(first.facts, kind)} for kind in engines
        }
        for kind, found in fidelities(engines, pieces).items():
            kl = found.kl
            rows[kind]["kl"] = [float(f"{value:.3g}") for value in (kl.mean, kl.low, kl.high)]
            rows[kind]["top1_agreement"] = round(found.top1_agreement, 4)
            rows[kind]["perplexity"] = round(found.perplexity, 4)
        for kind, speeds in time_all(engines, pieces, repeats).items():
            rows[kind] |= {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    return rows


def cut(tokens: Sequence[int], count: int) -> Iterator[list[int]]:
    """``count`` pieces of ``TOKENS``, spread over the whole."""
    if len(tokens) < TOKENS * count:
        raise SystemExit(f"the text has {len(tokens)} tokens; {TOKENS * count} are needed")
    step = len(tokens) // count
    for number in range(count):
        yield list(tokens[number * step : number * step + TOKENS])


def bytes_per_token(facts: GgufFacts, kind: KvCache) -> int:
    """What a token's keys and values take in all layers."""
    data = facts.metadata
    layers, heads = int(str(data["llama.block_count"])), int(str(data["llama.attention.head_count"]))
    kv_heads = int(str(data.get("llama.attention.head_count_kv", heads)))
    width = int(str(data["llama.embedding_length"])) // heads
    width = int(str(data.get("llama.attention.key_length", width)))
    return round(2 * layers * kv_heads * width * BYTES[kind])


def fidelities(engines: dict[KvCache, Engine], pieces: Sequence[list[int]]) -> dict[KvCache, Fidelity]:
    """How far each cache's predictions are from those of f16 on the same texts."""
    rows: dict[KvCache, list[tuple[float, float, int, int]]] = {kind: [] for kind in engines}
    for tokens in pieces:
        before = engines["f16"].logits(tokens[:-1], first=FIRST)
        for kind, engine in engines.items():
            after = before if kind == "f16" else engine.logits(tokens[:-1], first=FIRST)
            rows[kind].append(compare(before, after, tokens[FIRST + 1 :]))
    return {kind: Fidelity(*zip(*found, strict=True)) for kind, found in rows.items()}


def time_all(
    engines: dict[KvCache, Engine], pieces: Sequence[list[int]], repeats: int
) -> dict[KvCache, dict[str, list[float]]]:
    """Tokens per second, round by round and in turn, after one unmeasured round.

    ``prompt``: a text is read afresh. ``decode``: replies are written behind one text, and behind four at a time,
    which stand in the cache already.
    """
    found: dict[KvCache, dict[str, list[float]]] = {kind: {} for kind in engines}
    for round_ in range(repeats + 1 if repeats else 0):
        for kind, engine in engines.items():
            began = time.perf_counter()
            engine.logits(pieces[0], first=TOKENS - 1)  # in a sequence of its own, which is empty afterwards
            took = {"prompt_tokens_per_s": TOKENS / (time.perf_counter() - began)}
            for count in (1, PARALLEL):
                prompts = [pieces[number % len(pieces)] for number in range(count)]
                engine.generate(prompts, max_tokens=1)
                began = time.perf_counter()
                replies = engine.generate(prompts, max_tokens=DECODED, temperature=1.0, seed=round_)
                written = sum(len(reply.tokens) for reply in replies)
                took[f"decode_{count}_tokens_per_s"] = written / (time.perf_counter() - began)
            if round_:
                for name, value in took.items():
                    found[kind].setdefault(name, []).append(value)
    return found


if __name__ == "__main__":
    main()
