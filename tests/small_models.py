"""Small random Llama models with a trained byte-level BPE vocabulary, for export tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = [
    "Take one tablet in the morning with a glass of water, and never two within 12 hours.",
    "The clinic's booking page shows 2026 slots: ask the front desk if you can't find yours!",
    "Passages: [1] Dose\nÄrzte raten: höchstens 40 mg a day.\nQuestion: what is the dose?\nAnswer: 40 mg",
]
SPECIAL = ["<|begin|>", "<|start|>", "<|im_end|>", "<|pad|>"]


def small_tokenizer(*, adds_bos: bool = True, kind: str = "smollm", vocab_size: int = 400) -> Any:
    """A fast tokenizer: kind is a pre-tokenizer name of pipeline.gguf_vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from pipeline.gguf_vocabulary import _LLAMA3_SPLIT

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama-bpe")
    from tokenizers import Regex

    first: dict[str, list[Any]] = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")],
        "gpt-2": [],
        "other": [pre_tokenizers.Whitespace()],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first[kind], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )


def small_llama(
    *, tied: bool = True, rope: dict[str, Any] | None = None, vocab_size: int = 416, width: int = 64
) -> Any:
    """A random LlamaForCausalLM with grouped-query attention, float32, gains that are not all one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read_tensors(path: Path, count: int | None = None) -> dict[str, np.ndarray]:
    """The first ``count`` tensors as numbers. (gguf's own reader takes seconds for a large vocabulary.)"""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from serve.gguf_check import check_gguf

    found = {}
    data = np.memmap(path, mode="r")
    for tensor in check_gguf(path).tensors[:count]:
        raw = data[tensor.offset : tensor.offset + tensor.size_bytes]
        kind = GGMLQuantizationType[tensor.kind]
        if tensor.kind in {"F32", "F16"}:
            raw = raw.view(np.float32 if tensor.kind == "F32" else np.float16)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        found[tensor.name] = np.asarray(dequantize(rows, kind))
    return found
