"""The parity gate: does the file that is served behave like the network that was trained?

Held-out prompts are replayed, teacher-forced, through every step of the export. Where training network and
served file differ too much, the step with the fault is named and the bundle does not become ready.

    prompt rendering   the chat template in the file renders the bytes that training rendered
    token ids          llama.cpp's tokenizer gives the ids that training saw, with exactly one BOS or none
    merge              training network (NF4 + LoRA)    -> merged network
    GGUF               merged network                   -> F16 file in llama.cpp
    quantize           F16 file                         -> served file

Where the blocks themselves were trained, nothing is merged or rounded, and two steps take the place of these three:

    blocks             training network                 -> the served file's bytes, all of them equal
    GGUF               training network                 -> served file in llama.cpp
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from domains.config import GgufType, KvCache
from domains.errors import ParityError
from domains.records import Message, Record
from serve.engine import Engine

Logits = NDArray[np.float32]
StepName = Literal["prompt rendering", "token ids", "merge", "blocks", "GGUF", "quantize"]

_WORST = 1000.0  # nats; also stands for logits that are no numbers
_NEXT: dict[StepName, str] = {
    "prompt rendering": "give the base the chat template it is trained with, then preceptor export DOMAIN",
    "token ids": "use a base whose tokenizer llama.cpp knows ([student] base), then preceptor run DOMAIN",
    "merge": "preceptor train DOMAIN, then preceptor export DOMAIN",
    "blocks": "preceptor export DOMAIN --force; if it stays, report it as a bug",
    "GGUF": "preceptor export DOMAIN --force; if it stays, report the base model's name as a bug",
    "quantize": "serve a wider format ([export] serve = \"Q8_0\", and no rounding), or allow more with [parity] max_kl and min_top1",
}  # fmt: skip


class Replay(Record):
    """One exam prompt with a completion, as the training side renders and tokenizes them.

    ``end_tokens`` are supervised after the completion (the turn's end) but are no part of its text.
    """

    messages: list[Message]
    prompt: str
    prompt_tokens: list[int]
    completion: str
    completion_tokens: list[int]
    end_tokens: list[int] = []


class Gap(Record):
    """How far a network is from another: KL in nats per position, share of positions with the same top token."""

    kl: float
    top1_agreement: float


class Parity(Record):
    """What the gate found; ``parity.json``. ``kl`` is KL(training network || served file).

    ``bits_equal``: the served file's blocks are those of the training network, bit for bit; None where these are merged
    and rounded, and no such thing is promised.
    """

    ready: bool
    served: GgufType
    kl: float | None
    top1_agreement: float | None
    positions: int
    prompts: int
    max_kl: float
    min_top1: float
    steps: dict[StepName, Gap]
    broken: StepName | None
    problem: str
    bits_equal: bool | None = None


class Network(Protocol):
    """Anything that gives teacher-forced logits: `Engine.logits`, or a torch model's."""

    def __call__(self, tokens: Sequence[int], *, first: int) -> Logits:
        """float32 [len(tokens) - first, vocab]; row i predicts the token after ``tokens[first + i]``."""


def replay_logits(
    network: Network, replays: Sequence[Replay], on_done: Callable[[], None] | None = None
) -> list[Logits]:
    """Per replay the logits that predict its completion's tokens, [completion tokens, vocab]."""
    found = []
    for replay in replays:
        tokens = replay.prompt_tokens + replay.completion_tokens + replay.end_tokens
        found.append(network(tokens[:-1], first=len(replay.prompt_tokens) - 1))
        if on_done:
            on_done()
    return found


def torch_network(model: object) -> Network:
    """A torch causal language model as a `Network`; the head is applied to the rows asked for only."""
    import torch

    def logits(tokens: Sequence[int], *, first: int) -> Logits:
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=model.device)  # type: ignore[attr-defined]
            out = model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens) - first)  # type: ignore[operator]
        rows: Logits = out.logits[0].float().cpu().numpy()
        return rows

    return logits


def measure_gap(before: Sequence[Logits], after: Sequence[Logits]) -> Gap:
    """Mean KL(before || after) and top-1 agreement over all positions of all replays."""
    kls: list[float] = []
    same = 0
    for one, other in zip(before, after, strict=True):
        log_p, log_q = _log_softmax(one), _log_softmax(other)
        kls += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).tolist()
        same += int((one.argmax(axis=1) == other.argmax(axis=1)).sum())
    kl = float(np.nan_to_num(np.mean(kls), nan=_WORST, posinf=_WORST))
    return Gap(kl=min(max(0.0, kl), _WORST), top1_agreement=same / len(kls))


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def check_parity(
    replays: Sequence[Replay],
    *,
    training: Sequence[Logits],
    merged: Sequence[Logits] | None,
    f16: Path | None,
    served: Path,
    served_kind: GgufType,
    context: int,
    max_kl: float,
    min_top1: float,
    on_done: Callable[[], None] | None = None,
    adapter: Path | None = None,
    kv_cache: KvCache = "f16",
    strangers: Sequence[str] | None = None,
) -> Parity:
    """Compare the training network with the served file, step by step.

    Args:
        replays: the prompts, at least one.
        training: `replay_logits` of the network as it was trained.
        merged: `replay_logits` of the merged network; None where nothing is merged.
        f16: the merged network as a GGUF file; None where nothing is merged.
        served: the file that users get.
        served_kind: its format.
        context: tokens that the longest replay may have.
        max_kl: most nats per position between training network and served file.
        min_top1: least share of positions with the same most likely token.
        on_done: called after each replay of each file.
        adapter: of the served file, where the student is two files.
        kv_cache: how keys and values are kept where the file is served.
        strangers: the matrices whose bytes in the served file are not those that were trained; None where none are
            promised.
    """
    networks: list[tuple[StepName, Sequence[Logits]]] = [("merge", merged)] if merged is not None else []
    broken = _compare_blocks(strangers or ())
    files: list[tuple[StepName, Path]] = [("GGUF", f16), ("quantize", served)] if f16 else [("GGUF", served)]
    for step, path in files:
        kept: KvCache = kv_cache if path == served else "f16"
        with Engine(path, context=context, parallel=1, adapter=adapter, kv_cache=kept) as engine:
            broken = broken or _compare_prompts(engine, replays)
            if broken is None:
                networks.append((step, replay_logits(engine.logits, replays, on_done)))
    steps: dict[StepName, Gap] = {}
    before = training
    for step, logits in networks:
        steps[step] = measure_gap(before, logits)
        before = logits
    whole = measure_gap(training, before) if broken is None else None
    broken = broken or _blame(whole, steps, max_kl=max_kl, min_top1=min_top1)
    return Parity(
        ready=broken is None,
        served=served_kind,
        kl=whole.kl if whole else None,
        top1_agreement=whole.top1_agreement if whole else None,
        positions=sum(map(len, training)),
        prompts=len(replays),
        max_kl=max_kl,
        min_top1=min_top1,
        steps=steps,
        broken=broken[0] if broken else None,
        problem=broken[1] if broken else "",
        bits_equal=None if strangers is None else not strangers,
    )


def _compare_blocks(strangers: Sequence[str]) -> tuple[StepName, str] | None:
    if not strangers:
        return None
    return (
        "blocks",
        f"{len(strangers)} matrices of the served file are not the trained ones, first {strangers[0]!r}",
    )


def _blame(
    whole: Gap | None, steps: dict[StepName, Gap], *, max_kl: float, min_top1: float
) -> tuple[StepName, str] | None:
    """The step that is farthest from the one before it, where the whole way is too far; else None."""
    if whole is None or (whole.kl <= max_kl and whole.top1_agreement >= min_top1):
        return None
    step = max(steps, key=lambda name: steps[name].kl)
    gap = steps[step]
    return step, (
        f"training network and served file differ by {whole.kl:.4g} nats per token (at most {max_kl}) and agree "
        f"on {whole.top1_agreement:.1%} of top tokens (at least {min_top1:.0%}); the step {step!r} alone: "
        f"{gap.kl:.4g} nats, {gap.top1_agreement:.1%}"
    )


def _compare_prompts(engine: Engine, replays: Sequence[Replay]) -> tuple[StepName, str] | None:
    begin = engine.tokenize("")
    for number, replay in enumerate(replays, 1):
        text = engine.render(replay.messages)
        if text != replay.prompt:
            at = _first_difference(text, replay.prompt)
            near = slice(max(0, at - 20), at + 20)
            return "prompt rendering", (
                f"prompt {number} differs from character {at} on: training …{replay.prompt[near]!r}, "
                f"served …{text[near]!r}"
            )
        tokens = engine.tokenize(text)
        completion = engine.tokenize(replay.completion)[len(begin) :]
        for what, ours, theirs in (
            ("prompt", tokens, replay.prompt_tokens),
            ("completion", completion, replay.completion_tokens),
        ):
            if ours != theirs:
                at = _first_difference(ours, theirs)
                return "token ids", (
                    f"{what} {number} differs from token {at} on: training {theirs[at : at + 6]}, "
                    f"served {ours[at : at + 6]}"
                )
        if begin and (tokens[:1] != begin or tokens.count(begin[0]) != 1):
            return "token ids", (
                f"prompt {number} has {tokens.count(begin[0])} begin-of-sequence tokens, expected exactly one"
            )
    return None


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def require(parity: Parity) -> None:
    """Stop here unless the gate passed.

    Raises:
        ParityError: names the step that broke the student, the numbers, and what to do.
    """
    if parity.broken is not None:
        raise ParityError(
            f"the served file does not behave like the trained student: {parity.problem}",
            expected=f"the step {parity.broken!r} keeps what was trained; the bundle is not ready",
            next_step=_NEXT[parity.broken],
        )
