"""A BERT encoder's forward pass in numpy (arXiv 1810.04805), mean-pooled as in Sentence-BERT (1908.10084).

Tokens of a batch lie packed behind one another, [tokens, hidden], so the linear layers, nine tenths
of the work, see no padding; only attention is padded, among texts of similar length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from domains.cores import usable_cores
from rag.blas import one_blas_thread

Floats = NDArray[np.float32]

# Tokens per batch: 512 measured best; the widest array, [tokens, 1536] float32, then fits into 3 MB of cache.
_BATCH_TOKENS = 512
# erf(x) = x·P(x²)/Q(x²) on [-4, 4], float32-accurate (the coefficients of Eigen's generic_fast_erf).
_ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
          -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
          -1.42647390514189e-02)  # fmt: skip


class BertEncoder:
    """Weights of a BERT model, ready to encode.

    Args:
        weights: tensors under Hugging Face's names (``embeddings.…``, ``encoder.layer.N.…``).
        heads: attention heads.
        epsilon: of the layer norms.
    """

    def __init__(self, weights: Mapping[str, Floats], *, heads: int, epsilon: float) -> None:
        self.heads = heads
        self.epsilon = np.float32(epsilon)
        self._words = weights["embeddings.word_embeddings.weight"]
        # Segment 0 everywhere, so its embedding is added to the positions once.
        self._positions = (
            weights["embeddings.position_embeddings.weight"]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        self._norm = _pair(weights, "embeddings.LayerNorm")
        count = sum(name.endswith("output.dense.weight") and "attention" not in name for name in weights)
        self._layers = [_Layer(weights, f"encoder.layer.{i}", heads) for i in range(count)]

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return int(self._words.shape[1])

    def encode(self, token_ids: Sequence[Sequence[int]]) -> Floats:
        """Mean of each text's last hidden states, float32 [texts, hidden], in the order given."""
        vectors = np.zeros((len(token_ids), self.dimensions), dtype=np.float32)

        def encode(batch: list[int]) -> None:
            hidden, lengths = self._encode_batch([token_ids[i] for i in batch])
            sums: Floats = np.add.reduceat(hidden, _starts(lengths), axis=0)
            sums /= lengths[:, None]
            vectors[batch] = sums

        self._in_batches(token_ids, encode)
        return vectors

    def encode_tokens(self, token_ids: Sequence[Sequence[int]]) -> list[Floats]:
        """Last hidden states of each text's tokens, float32 [tokens, hidden] each, in the order given."""
        states: list[Floats] = [np.zeros((0, self.dimensions), dtype=np.float32)] * len(token_ids)

        def encode(batch: list[int]) -> None:
            hidden, lengths = self._encode_batch([token_ids[i] for i in batch])
            for i, start, length in zip(batch, _starts(lengths), lengths, strict=True):
                states[i] = hidden[start : start + length].copy()

        self._in_batches(token_ids, encode)
        return states

    def _in_batches(self, token_ids: Sequence[Sequence[int]], encode: Callable[[list[int]], None]) -> None:
        batches = list(_batches([len(ids) for ids in token_ids]))
        with one_blas_thread():
            if len(batches) > 1:
                with ThreadPoolExecutor(min(len(batches), usable_cores(), 16)) as pool:
                    list(pool.map(encode, batches))
            else:
                for batch in batches:
                    encode(batch)

    def _encode_batch(self, texts: Sequence[Sequence[int]]) -> tuple[Floats, NDArray[np.intp]]:
        """Hidden states of all tokens, packed [tokens, hidden], and the texts' lengths."""
        lengths = np.array([len(ids) for ids in texts])
        widest = int(lengths.max())
        rows = np.repeat(np.arange(len(texts)), lengths)
        columns = np.concatenate([np.arange(n) for n in lengths])
        hidden = self._words[np.concatenate([np.asarray(ids) for ids in texts])] + self._positions[columns]
        hidden = _layer_norm(hidden, self._norm, self.epsilon)
        padding = np.arange(widest) >= lengths[:, None]  # [texts, widest]
        bias = np.where(padding, np.float32(-1e9), np.float32(0))[:, None, None, :] if padding.any() else None
        for layer in self._layers:
            hidden = layer.forward(hidden, rows, columns, bias, (len(texts), widest), self.epsilon)
        return hidden, lengths


def _starts(lengths: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.concatenate([[0], np.cumsum(lengths)[:-1]])


class _Layer:
    """One transformer block, post-norm."""

    def __init__(self, weights: Mapping[str, Floats], prefix: str, heads: int) -> None:
        self.heads = heads
        self_attention = f"{prefix}.attention.self"
        kinds = ("query", "key", "value")
        # One matrix for queries, keys and values: [hidden, 3·hidden].
        self._qkv = (
            np.ascontiguousarray(
                np.concatenate([weights[f"{self_attention}.{kind}.weight"] for kind in kinds]).T
            ),
            np.concatenate([weights[f"{self_attention}.{kind}.bias"] for kind in kinds]),
        )
        scale = np.float32(1 / np.sqrt(weights[f"{self_attention}.query.weight"].shape[0] // heads))
        size = self._qkv[0].shape[0]
        self._qkv[0][:, :size] *= scale  # the scores' 1/sqrt(d), folded into the queries
        self._qkv[1][:size] *= scale
        self._out = _linear(weights, f"{prefix}.attention.output.dense")
        self._out_norm = _pair(weights, f"{prefix}.attention.output.LayerNorm")
        self._up = _linear(weights, f"{prefix}.intermediate.dense")
        self._down = _linear(weights, f"{prefix}.output.dense")
        self._down_norm = _pair(weights, f"{prefix}.output.LayerNorm")

    def forward(
        self,
        hidden: Floats,
        rows: NDArray[np.intp],
        columns: NDArray[np.intp],
        bias: Floats | None,
        padded: tuple[int, int],
        epsilon: np.float32,
    ) -> Floats:
        """[tokens, hidden] to the same; ``rows``/``columns`` place each token in the padded batch."""
        size = hidden.shape[1]
        qkv = _affine(hidden, self._qkv)
        wide = np.zeros((*padded, 3 * size), dtype=np.float32)
        wide[rows, columns] = qkv
        query, key, value = np.moveaxis(
            wide.reshape(*padded, 3, self.heads, size // self.heads), (2, 3), (0, 2)
        )  # each [texts, heads, widest, head size]
        scores = query @ key.swapaxes(-1, -2)
        if bias is not None:
            scores += bias
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.moveaxis(scores @ value, 1, 2).reshape(*padded, size)[rows, columns]
        attended = _affine(mixed, self._out)
        attended += hidden
        attended = _layer_norm(attended, self._out_norm, epsilon)
        result = _affine(_gelu(_affine(attended, self._up)), self._down)
        result += attended
        return _layer_norm(result, self._down_norm, epsilon)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of texts of similar length, at most `_BATCH_TOKENS` tokens a batch, padding included."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        count = max(1, _BATCH_TOKENS // max(lengths[order[start]], 1))
        yield order[start : start + count]
        start += count


def _pair(weights: Mapping[str, Floats], name: str) -> tuple[Floats, Floats]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _linear(weights: Mapping[str, Floats], name: str) -> tuple[Floats, Floats]:
    matrix, bias = _pair(weights, name)
    return np.ascontiguousarray(matrix.T), bias


def _affine(x: Floats, linear: tuple[Floats, Floats]) -> Floats:
    y: Floats = x @ linear[0]
    y += linear[1]
    return y


def _layer_norm(x: Floats, pair: tuple[Floats, Floats], epsilon: np.float32) -> Floats:
    x -= x.mean(axis=-1, keepdims=True)
    variance = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[1])
    x /= np.sqrt(variance + epsilon)
    x *= pair[0]
    x += pair[1]
    return x


def _gelu(x: Floats) -> Floats:
    """x·(1 + erf(x/√2))/2, exact to float32, in place."""
    z = np.clip(x * np.float32(np.sqrt(0.5)), -4, 4)
    square = z * z
    z *= _polynomial(square, _ERF_P)
    z /= _polynomial(square, _ERF_Q)
    z += np.float32(1)
    x *= np.float32(0.5)
    x *= z
    return x


def _polynomial(x: Floats, coefficients: Sequence[float]) -> Floats:
    y = x * np.float32(coefficients[0])
    for coefficient in coefficients[1:-1]:
        y += np.float32(coefficient)
        y *= x
    y += np.float32(coefficients[-1])
    return y
