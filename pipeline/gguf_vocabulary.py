"""A byte-level BPE vocabulary as GGUF metadata: tokens, their types, merges, special ids, pre-tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domains.errors import ModelError
from serve.gguf_check import Array, check_gguf

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
# Arrays with one entry a token, and which part of an appended token they take.
_PER_TOKEN = {"tokenizer.ggml.tokens": 0, "tokenizer.ggml.token_type": 1, "tokenizer.ggml.scores": 2}
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What splits text before the merges, in tokenizer.json's words -> llama.cpp's name for it. llama-bpe looks
# whole words up before it merges (ignore_merges), the others do not.
_PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "smollm": (
        [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ],
        False,
    ),
    "llama-bpe": (
        [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
        True,
    ),
    "gpt-2": ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], False),
}


def write_vocabulary(
    writer: GGUFWriter, tokenizer: Any, *, template: str, size: int, end_of_turn: int | None = None
) -> None:
    """Write a fast tokenizer's vocabulary, padded to ``size`` tokens.

    ``end_of_turn`` is the token that ends a reply; by default the first of the usual ones that is there.

    Raises:
        ModelError: no byte-level BPE, a pre-tokenizer that llama.cpp has no name for, or too many tokens.
    """
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_name(data)
    tokens, kinds = _tokens(data, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([_merge(pair) for pair in data["model"]["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    ends = [tokens.index(text) for text in _TURN_ENDS if text in tokens]
    if end_of_turn is not None or ends:
        writer.add_eot_token_id(ends[0] if end_of_turn is None else end_of_turn)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_space_prefix(False)
    writer.add_chat_template(template)


def copy_vocabulary(
    writer: GGUFWriter, source: Path, *, template: str, size: int, tokenizer: Any = None
) -> None:
    """Take over every ``tokenizer.*`` key of another GGUF file, but for the chat template.

    Args:
        writer: of the new file.
        source: the other file.
        template: the chat template.
        size: rows of the new file's embedding.
        tokenizer: where it has tokens that ``source`` lacks, they are appended, and rows up to ``size``.

    Raises:
        ModelError: the file is damaged, or its vocabulary has another size.
    """
    from gguf import GGUFValueType

    facts = check_gguf(source, arrays=True)
    tokens = facts.metadata.get("tokenizer.ggml.tokens")
    count = tokens.count if isinstance(tokens, Array) else 0
    more = _appended(tokenizer, count, size)
    if count + len(more) != size:
        raise ModelError(
            f"{source} has {count} tokens, the model {size}",
            expected="the GGUF file that the model was loaded from",
            next_step="check [student] base in domain.toml",
        )
    for key, value in facts.metadata.items():
        if not key.startswith("tokenizer.") or key == "tokenizer.chat_template":
            continue
        kind = GGUFValueType(facts.kinds[key])
        if isinstance(value, Array):
            extra = [row[_PER_TOKEN[key]] for row in more] if key in _PER_TOKEN else []
            writer.add_key_value(key, [*value.values, *extra], kind, GGUFValueType(value.kind))
        else:
            writer.add_key_value(key, value, kind)
    writer.add_chat_template(template)


def _appended(tokenizer: Any, count: int, size: int) -> list[tuple[str, int, float]]:
    """(text, type, score) of the tokens from ``count`` on; none where nothing was added to the tokenizer."""
    if tokenizer is None or len(tokenizer) <= count:
        return []
    texts, kinds = _tokens(json.loads(tokenizer.backend_tokenizer.to_str()), size)
    return [(text, kind, 0.0) for text, kind in zip(texts[count:], kinds[count:], strict=True)]


def check_byte_level(model: Mapping[str, Any]) -> None:
    """Pass if the ``model`` of a ``tokenizer.json`` is a byte-level BPE.

    Raises:
        ModelError: it is not.
    """
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _unknown(
            f"a {model.get('type')} model" + (" with byte fallback" if model.get("byte_fallback") else "")
        )


def pre_tokenizer_name(data: dict[str, Any]) -> str:
    """llama.cpp's name for how a ``tokenizer.json`` splits text before merging.

    llama.cpp falls back to another splitting with a warning where it does not know the name; tokens then
    differ from those of training, so an unknown splitting is refused here.

    Raises:
        ModelError: it is none that both sides know.
    """
    model = data["model"]
    check_byte_level(model)
    if data.get("normalizer"):
        raise _unknown(f"the normalizer {data['normalizer'].get('type')!r}")
    steps = _flat(data.get("pre_tokenizer"))
    for name, (known, ignore_merges) in _PRE_TOKENIZERS.items():
        if steps == known and bool(model.get("ignore_merges")) == ignore_merges:
            return name
    raise _unknown(f"the pre-tokenizer {json.dumps(steps)[:300]}")


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [flat for part in step["pretokenizers"] for flat in _flat(part)]
    # trim_offsets only moves the reported character offsets
    return [{key: value for key, value in step.items() if key != "trim_offsets"}]


def _tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    by_id = {number: (text, _NORMAL) for text, number in data["model"]["vocab"].items()}
    for added in data.get("added_tokens", []):
        kind = _CONTROL if added["special"] else _USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    if max(by_id, default=0) >= size:
        raise ModelError(
            f"the tokenizer has token {max(by_id)}, the model only {size} rows of embeddings",
            expected="a tokenizer that belongs to the model",
            next_step="check [student] base in domain.toml",
        )
    rows = [by_id.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _unknown(what: str) -> ModelError:
    return ModelError(
        f"the tokenizer uses {what}, which llama.cpp would read differently",
        expected=f"byte-level BPE, split as one of: {', '.join(_PRE_TOKENIZERS)}",
        next_step="use a Llama 3.x or SmolLM2 base in [student]",
    )
