"""The reranker's network for training: a question tower that learns, passages from the frozen encoder.

As in KARD's release, only the question's encoder and the compressor learn; passages pass the encoder as it
was published. Their hidden states are therefore computed once, in numpy, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.quiet_libraries import known_peft_warnings, quiet_bitsandbytes, quiet_transformers
from rag.embed import MiniLMEmbedder, minilm_weights
from rag.lexical import passage_text

if TYPE_CHECKING:
    from torch import Tensor

    from domains.records import Passage

Floats = NDArray[np.float32]
_CHUNK = 256  # passages encoded at a time


class PassageStates:
    """Hidden states of passages' tokens from the frozen encoder, float16 [tokens, hidden].

    Args:
        states: one array a passage, by its id.
    """

    def __init__(self, states: dict[str, NDArray[np.float16]]) -> None:
        self._states = states

    @classmethod
    def encode(
        cls, passages: Sequence[Passage], embedder: MiniLMEmbedder, *, advance: Any = None
    ) -> PassageStates:
        """All passages, ``advance(count)`` being called as they are done."""
        states = {}
        for begin in range(0, len(passages), _CHUNK):
            chunk = passages[begin : begin + _CHUNK]
            found = embedder.token_states([passage_text(passage) for passage in chunk])
            for passage, tokens in zip(chunk, found, strict=True):
                states[passage.passage_id] = tokens.astype(np.float16)
            if advance is not None:
                advance(len(chunk))
        return cls(states)

    def gather(self, pools: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor, Tensor]:
        """The states of a batch, packed, and where they go: [questions, candidates, tokens] as wide as the widest.

        A candidate that is not there, in a pool smaller than the largest, has one token, of zeros.

        Returns:
            float32 [all tokens, hidden], in the order of the places that are true in the next;
            bool [questions, candidates, tokens]; bool [questions, candidates], true where there is a candidate.
        """
        import torch

        width = max(len(pool) for pool in pools)
        nobody = np.zeros((1, next(iter(self._states.values())).shape[1]), dtype=np.float16)
        shelf = [[*(self._states[pid] for pid in pool), *[nobody] * (width - len(pool))] for pool in pools]
        lengths = np.array([[len(tokens) for tokens in row] for row in shelf])
        places = np.arange(lengths.max()) < lengths[..., None]
        there = np.arange(width) < np.array([len(pool) for pool in pools])[:, None]
        packed = np.concatenate([tokens for row in shelf for tokens in row]).astype(np.float32)
        return torch.from_numpy(packed), torch.from_numpy(places), torch.from_numpy(there)

    def principal_axes(self, count: int, *, sample: int, seed: int) -> Floats:
        """The ``count`` directions that keep most of the tokens' length, [count, hidden]: where training starts."""
        names = sorted(self._states)
        chosen = np.random.default_rng(seed).permutation(len(names))[:sample]
        tokens = np.concatenate([self._states[names[i]] for i in chosen]).astype(np.float64)
        _, axes = np.linalg.eigh(tokens.T @ tokens)
        largest = axes[:, ::-1][:, :count].T
        # eigh leaves the sign open
        signs = np.sign(largest[np.arange(len(largest)), np.abs(largest).argmax(axis=1)])
        return np.ascontiguousarray(largest * signs[:, None], dtype=np.float32)


class QuestionTower:
    """all-MiniLM-L6-v2 with LoRA on queries and values, or whole, and the compressor that both sides share.

    Args:
        axes: where the compressor starts, [dimensions, hidden].
        rank: of LoRA (arXiv 2106.09685); 0 trains the whole encoder.
        alpha: LoRA's scale times the rank.
        dropout: on LoRA's input.
        seed: of LoRA's start.
    """

    def __init__(self, axes: Floats, *, rank: int, alpha: float, dropout: float, seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        self._embedder = MiniLMEmbedder()
        self._published = minilm_weights()
        self.encoder = _bert(self._published)
        self._adapted = rank > 0
        if self._adapted:
            self.encoder = _with_lora(self.encoder, rank=rank, alpha=alpha, dropout=dropout)
        self.compressor = torch.nn.Linear(axes.shape[1], axes.shape[0], bias=False)
        with torch.no_grad():
            self.compressor.weight.copy_(torch.from_numpy(axes))

    def parameters(self) -> list[Any]:
        """What learns."""
        return [p for part in (self.encoder, self.compressor) for p in part.parameters() if p.requires_grad]

    def set_training(self, on: bool) -> None:
        """Dropout on or off."""
        self.encoder.train(on)

    def questions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Compressed token vectors [questions, tokens, dimensions] and which of them are tokens."""
        import torch

        ids = self._embedder.token_ids(texts)
        width = max(len(row) for row in ids)
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids])
        hidden = self.encoder(input_ids=padded, attention_mask=mask.long()).last_hidden_state
        return self.compressor(hidden), mask

    def passages(self, packed: Tensor, places: Tensor) -> Tensor:
        """Compressed vectors [questions, candidates, tokens, dimensions] of what `PassageStates.gather` gives."""
        compressed: Tensor = self.compressor(packed)
        return compressed.new_zeros(*places.shape, compressed.shape[-1]).masked_scatter(
            places[..., None], compressed
        )

    def state(self) -> dict[str, Tensor]:
        """A copy of what learns, by name."""
        named = [*self.encoder.named_parameters(), *self.compressor.named_parameters(prefix="compressor")]
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go back to what `state` gave."""
        import torch

        named = dict(
            [*self.encoder.named_parameters(), *self.compressor.named_parameters(prefix="compressor")]
        )
        with torch.no_grad():
            for name, value in state.items():
                named[name].copy_(value)

    def export(self) -> tuple[dict[str, Floats], Floats]:
        """The encoder's tensors that differ from the published ones, LoRA merged, and the compressor.

        The tower can't be trained any further afterwards.
        """
        encoder = self.encoder.merge_and_unload() if self._adapted else self.encoder
        changed = {}
        for name, tensor in encoder.state_dict().items():
            value = np.ascontiguousarray(tensor.detach().numpy())
            if name in self._published and not np.array_equal(value, self._published[name]):
                changed[name] = value
        return changed, np.ascontiguousarray(self.compressor.weight.detach().numpy())


def _bert(weights: dict[str, Floats]) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    vocabulary, hidden = weights["embeddings.word_embeddings.weight"].shape
    layers = len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=12,
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0], layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with quiet_transformers():
        model = BertModel(config, add_pooling_layer=False)
    wanted = {name: torch.from_numpy(weights[name]) for name in model.state_dict() if name in weights}
    model.load_state_dict(wanted, strict=False)
    return model


def _with_lora(model: Any, *, rank: int, alpha: float, dropout: float) -> Any:
    with quiet_bitsandbytes():  # which peft imports
        from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["query", "value"])
    with known_peft_warnings():
        return get_peft_model(model, config)
