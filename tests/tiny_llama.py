"""A tiny, randomly initialised Llama in an ordinary Hugging Face folder: Llama 3.2's features, 0.6 MB.

Grouped-query attention, tied embeddings, ``llama3`` rope scaling, a byte-level BPE tokenizer that splits
text as Llama 3 does, Llama 3's control tokens and chat template, and a BOS that the model wants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
# Llama 3's split pattern ("llama-bpe" in llama.cpp).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim"
    " + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
# Each pair merges two symbols that stand earlier in the vocabulary ("Ġ" is a leading blank).
_MERGES = (
    "Ġ t,h e,i n,Ġ a,o n,r e,Ġt he,e r,a t,e n,Ġ o,Ġ s,Ġ w,i s,n d,o r,Ġ c,i t,e s,o u,Ġ f,Ġ p,e d,Ġ b,Ġo f,"
    "in g,Ġ m,Ġa nd,Ġt o,a l,a r,Ġ d,Ġ in,Ġ h,en t,a s,i on,y es,n o,Ġ is,s t,a n,l l,Ġ 1,Ġ 2"
)


def make_tiny_llama(folder: Path, *, seed: int = 0, width: int = 64, biases: bool = False) -> Path:
    """Write the model and its tokenizer into ``folder``; same seed and width of the stream, same weights.

    With ``biases``, its attention has some, as no Llama of Meta's.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        tie_word_embeddings=True,
        attention_bias=biases,
        initializer_range=0.15,  # large enough that logits differ visibly between tokens
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # gains of one would hide a norm that is left out or folded twice
                    parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny Llama\n", encoding="utf-8")
    return folder


def write_reflecting_gguf(folder: Path) -> Path:
    """The model in GGUF, with the 15 reflection tokens as export writes them; returns the file."""
    import torch

    from pipeline.gguf_writer import write_llama_gguf
    from pipeline.student import load_base
    from pipeline.token_rows import add_reflection_tokens

    base = load_base(str(make_tiny_llama(folder / "hf")), dtype=torch.float32)
    ids = add_reflection_tokens(base)
    with torch.no_grad():  # apart from each other and likely enough to be taken
        torch.manual_seed(1)
        weight = base.model.get_input_embeddings().weight
        weight[ids] = 1.5 * weight[:256].std() * torch.randn(len(ids), weight.shape[1])
    path = folder / "tiny.gguf"
    write_llama_gguf(
        path,
        state=base.model.state_dict(),
        config=base.model.config,
        tokenizer=base.tokenizer,
        template=base.template,
        name="tiny",
        licence="apache-2.0",
        end_of_turn=base.end_of_turn,
    )
    return path


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in _MERGES.split(","))]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    bos = CONTROL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos} $B",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            ),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<|eot_id|>")
    fast.chat_template = _TEMPLATE
    return fast
