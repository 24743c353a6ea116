"""What makes training fast, each part with its own switch; none changes the result beyond rounding.

The table in docs/results.md says what each is worth (``python benchmarks/training.py``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ACTIVATION_SHARE = (
    1 / 2
)  # of the free memory that activations may take before they are computed twice instead


@dataclass(frozen=True)
class Levers:
    """``[train.levers]``.

    Attributes:
        parallel_packs: a step's rows run side by side, a core each, instead of every product on all cores. Not on
            GPUs, with dropout, or with ``objective = "ce+kl"``.
        packing: rows follow each other without padding; off: every row is as long as the pack's longest.
        even_lengths: every row's length is a multiple of 32 (chunks of the loss always are). For each shape that it meets, PyTorch's library of matrix products
            compiles code and keeps it: ragged rows are ever new shapes, which costs time and up to a gigabyte.
        supervised_head: logits of supervised tokens only.
        chunked_loss: logits of a hundred tokens or so at a time; their gradient is taken in the forward pass. It costs the
            135M model some speed for nothing. It is on for the larger students: over Llama 3.2's 128,256 tokens the
            logits of 1,000 supervised tokens are 0.5 GB in float32, and their gradient as much again.
        shared_prefix: tokens with which all rows of a pack begin are computed once. Not on GPUs.
        last_layer: the last layer computes keys and values of all tokens, the rest only where a loss is.
        fused_layers: a decoder layer's own forward and backward pass instead of autograd's. Not on GPUs.
        matmul_attention: attention as matrix products in blocks instead of PyTorch's kernel. Not on GPUs.
        cached_layers: what layers below the lowest adapter give is kept per row (acts with ``lora_layers``).
        bf16: arithmetic in bfloat16 where the hardware multiplies it.
        checkpointing: ``on`` keeps a layer's input only and computes the rest again in the backward pass
            (arXiv 1604.06174); ``auto`` does so when activations would take more than half of free memory.
    """

    parallel_packs: bool = True
    packing: bool = True
    even_lengths: bool = True
    supervised_head: bool = True
    chunked_loss: bool = True
    shared_prefix: bool = True
    last_layer: bool = True
    fused_layers: bool = True
    matmul_attention: bool = True
    cached_layers: bool = True
    bf16: bool = True
    checkpointing: Literal["auto", "on", "off"] = "auto"


def checkpoints(levers: Levers, config: Any, lengths: Sequence[Sequence[int]], *, item_bytes: int) -> bool:
    """Whether layers are computed twice, as ``levers`` say or as memory demands.

    Args:
        levers: see there.
        config: of the network.
        lengths: tokens of every row of every pack.
        item_bytes: of a number in training's arithmetic.
    """
    if levers.checkpointing != "auto":
        return levers.checkpointing == "on"
    most = max((activation_bytes(config, pack, item_bytes=item_bytes) for pack in lengths), default=0)
    return most > ACTIVATION_SHARE * free_memory()


def activation_bytes(config: Any, lengths: Sequence[int], *, item_bytes: int) -> int:
    """An upper estimate of what a pack's forward pass keeps for the backward pass."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    per_token = 2 * config.hidden_size + heads * width + 2 * config.intermediate_size
    scores = config.num_attention_heads * sum(length * (length + 128) / 2 for length in lengths)
    return int(config.num_hidden_layers * item_bytes * (per_token * sum(lengths) + scores))


def free_memory() -> int:
    """Bytes that a process may still take without swapping; of the GPU where training runs there."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
