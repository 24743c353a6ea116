"""Self-RAG's 15 tokens as rows of the student's vocabulary (arXiv 2310.11511 §3.2; spec: [reflect] backend).

They are added as *non-special* tokens: GGUF then types them USER_DEFINED, which llama.cpp always reads as one
token and always prints. (Special ones become CONTROL, printed as nothing; the released trainer, besides, adds them
for Llama 1 and 2 tokenizers only.) A new row begins as the mean of the sub-word pieces of its words, not at
random, and is trained through PEFT's ``trainable_token_indices``; with a tied head input and output row are one.
"""

from __future__ import annotations

import re
from typing import Any

from domains.errors import ModelError
from pipeline.quiet_libraries import quiet_transformers
from pipeline.student import Base
from rag.reflection import TOKENS

_ROWS_MULTIPLE = 8  # llama.cpp's repacked kernels want the output matrix's rows in blocks of 8


def add_reflection_tokens(base: Base) -> list[int]:
    """Add the tokens to ``base``'s tokenizer and network, in place; their ids in the order of `TOKENS`.

    Rows that only fill up to a multiple of 8 are the mean of all rows: by Jensen's inequality such a token never
    gets more than the average probability, 1 / vocabulary.

    Raises:
        ModelError: the tokenizer already has one of them as a control token.
    """
    import torch

    tokenizer, model = base.tokenizer, base.model
    if taken := sorted(set(TOKENS) & set(tokenizer.all_special_tokens)):
        raise ModelError(
            f"the base {base.name!r} has {taken[0]!r} as a control token",
            expected="a vocabulary where the reflection tokens are ordinary or absent",
            next_step='choose [reflect] backend = "text"',
        )
    pieces = {token: tokenizer(_phrase(token), add_special_tokens=False)["input_ids"] for token in TOKENS}
    old_rows = model.get_input_embeddings().weight.shape[0]
    known = set(tokenizer.get_vocab())
    tokenizer.add_tokens(list(TOKENS), special_tokens=False)
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(TOKENS))
    rows = max(old_rows, -(-len(tokenizer) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
    with quiet_transformers():
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for weight in _matrices(model):
            weight[old_rows:] = weight[:old_rows].float().mean(dim=0).to(weight.dtype)
            for token, row in zip(TOKENS, ids, strict=True):
                if token not in known:
                    weight[row] = weight[pieces[token]].float().mean(dim=0).to(weight.dtype)
    return ids


def _matrices(model: Any) -> list[Any]:
    """The input matrix, and the head's where it is another."""
    first, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return [first] if head is first else [first, head]


def _phrase(token: str) -> str:
    """What a token says, as words: `` Utility 5``, `` end of paragraph``."""
    words = re.sub(r"[\[\]<>:/]", " ", token.replace("</", "end of ")).split()
    return " " + " ".join(words)
