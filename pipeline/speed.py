"""How fast llama.cpp reads and writes with a file, on this machine as it is now: medians of repeats."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from serve.engine import Engine


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
        decode_tokens: written after a short prompt; fewer where the model ends its reply.
        repeats: of which the medians are taken.
        adapter: a GGUF LoRA beside it.
    """
    reading, writing = [], []
    with Engine(gguf, context=prompt_tokens + decode_tokens + 8, parallel=1, adapter=adapter) as engine:
        size = engine.vocab_size
        prompt = [(7 * place + 1000) % size for place in range(prompt_tokens)]  # what it says does not matter
        for round_ in range(repeats + 1):
            engine.forget()
            begin = time.perf_counter()
            engine.logits(prompt, first=len(prompt) - 1)
            read = time.perf_counter()
            (reply,) = engine.generate([prompt[:8]], max_tokens=decode_tokens, temperature=1.0, seed=round_)
            end = time.perf_counter()
            if round_:
                reading.append(prompt_tokens / (read - begin))
                writing.append(max(1, len(reply.tokens)) / (end - read))
    return Speed(round(statistics.median(reading), 1), round(statistics.median(writing), 1))
