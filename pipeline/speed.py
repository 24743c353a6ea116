"""How fast llama.cpp reads and writes with a file, on this machine as it is now: medians of repeats."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from serve.engine import Engine

_MOST_REPLIES = 40


@dataclass(frozen=True)
class Speed:
    """Tokens per second of reading a prompt, and of writing one reply."""

    prompt_tokens_per_s: float
    decode_tokens_per_s: float


def measure_speed(
    gguf: Path,
    *,
    prompt_tokens: int = 512,
    decode_tokens: int = 48,
    repeats: int = 3,
    adapter: Path | None = None,
) -> Speed:
    """Time a file, after one unmeasured round.

    Args:
        gguf: the model.
        prompt_tokens: length of the prompt that is read.
        decode_tokens: written after a short prompt, by several replies where the model ends one.
        repeats: of which the medians are taken.
        adapter: a GGUF LoRA beside it.
    """
    reading, writing = [], []
    with Engine(gguf, context=prompt_tokens + decode_tokens + 8, parallel=1, adapter=adapter) as engine:
        prompt = _prompt(engine, prompt_tokens)
        for round_ in range(repeats + 1):
            seconds = _read(engine, prompt)
            rate = _write(engine, prompt[:8], tokens=decode_tokens, seed=1000 * round_)
            if round_:
                reading.append(prompt_tokens / seconds)
                writing.append(rate)
    return Speed(round(statistics.median(reading), 1), round(statistics.median(writing), 1))


@dataclass(frozen=True)
class PromptRatio:
    """How many times as fast one file reads a prompt as another: the median of rounds, their quartiles, their number."""

    median: float
    low: float
    high: float
    rounds: int


def compare_prompts(one: Path, other: Path, *, prompt_tokens: int = 512, rounds: int = 9) -> PromptRatio:
    """Time two files in turns, so that what slows the machine down slows both; after one unmeasured round.

    Args:
        one: a model; a ratio above 1 says that it is the faster one.
        other: the model that it is held against, of the same vocabulary.
        prompt_tokens: length of the prompt that both read.
        rounds: at least 2.
    """
    ratios = []
    with (
        Engine(one, context=prompt_tokens + 8, parallel=1) as first,
        Engine(other, context=prompt_tokens + 8, parallel=1) as second,
    ):
        prompt = _prompt(first, prompt_tokens)
        for round_ in range(rounds + 1):
            turn = (
                (first, second) if round_ % 2 else (second, first)
            )  # neither is always the one that comes first
            seconds = {id(engine): _read(engine, prompt) for engine in turn}
            if round_:
                ratios.append(seconds[id(second)] / seconds[id(first)])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return PromptRatio(round(median, 3), round(low, 3), round(high, 3), rounds)


def _write(engine: Engine, prompt: list[int], *, tokens: int, seed: int) -> float:
    """Tokens per second behind the first one of a reply, over as many replies as make ``tokens`` of them.

    The first token is the prompt's: it comes with the pass that reads it, and a reply of one token would be no
    writing at all. A model that ends every reply at once is given up after some tries, and what it took is told.
    """
    written, seconds, whole = 0, 0.0, 0.0
    for number in range(_MOST_REPLIES):
        begin = time.perf_counter()
        first = None
        pieces = engine.stream(prompt, max_tokens=tokens - written + 1, temperature=1.0, seed=seed + number)
        try:
            while True:
                if next(pieces) and first is None:
                    first = time.perf_counter()
        except StopIteration as end:
            count = len(end.value.tokens)
        now = time.perf_counter()
        whole += now - begin
        if first is not None and count > 1:
            written += count - 1
            seconds += now - first
        if written >= tokens:
            break
    return written / seconds if seconds else _MOST_REPLIES / whole


def _prompt(engine: Engine, tokens: int) -> list[int]:
    return [(7 * place + 1000) % engine.vocab_size for place in range(tokens)]  # what it says does not matter


def _read(engine: Engine, prompt: list[int]) -> float:
    """Seconds to read a prompt of which nothing is cached."""
    engine.forget()
    begin = time.perf_counter()
    engine.logits(prompt, first=len(prompt) - 1)
    return time.perf_counter() - begin
