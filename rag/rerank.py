"""KARD's reranker (arXiv 2305.18395) at work: numpy alone, from three files beside the index.

reranker/
    encoder.safetensors      the tensors of the question tower that differ from all-MiniLM-L6-v2, and the compressor
    passages.safetensors     token vectors of the passages in eight bits, with a hash of each passage's text
    reranker.json            what belongs to them; written last

The score is ColBERT's late interaction (arXiv 2004.12832): each token of the question finds its best token in the
passage. Passages were encoded by the frozen encoder, so a query costs one pass of the question and some products.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from domains.errors import DataError
from domains.jsonl import write_text_atomic
from domains.records import Passage, Record
from rag.embed import MiniLMEmbedder, minilm_encoder
from rag.fuse import Fused
from rag.lexical import passage_text
from rag.manifest import text_digest
from rag.token_vectors import Floats, TokenVectors, quantize

FOLDER = "reranker"
_CHUNK = 256  # passages encoded at a time
_AGAIN = "preceptor rerank DOMAIN   (trains the reranker again)"


class RerankFacts(Record):
    """``reranker.json``. The final score is late interaction + ``fused_weight`` · log(fused score)."""

    format: Literal[1] = 1
    encoder: str = MiniLMEmbedder.name
    dimensions: int
    passages: int
    fused_weight: float


@dataclass(frozen=True)
class Tower:
    """A trained question tower: ``changed`` tensors of the encoder, and the compressor [dimensions, hidden]."""

    changed: dict[str, Floats]
    compressor: Floats


class Reranker:
    """Orders passages for a query by what the trained tower makes of them.

    Args:
        tower: the question tower and the compressor of both sides.
        vectors: the passages'.
        numbers: passage id to its number in ``vectors``.
        fused_weight: of the logarithm of the fused score that retrieval gave.
        embedder: tokenizes.
    """

    def __init__(
        self,
        tower: Tower,
        vectors: TokenVectors,
        numbers: dict[str, int],
        *,
        fused_weight: float,
        embedder: MiniLMEmbedder,
    ) -> None:
        self.vectors = vectors
        self.fused_weight = fused_weight
        self._compressor = np.ascontiguousarray(tower.compressor.T)
        self._encoder = minilm_encoder(tower.changed)
        self._numbers = numbers
        self._embedder = embedder

    def query_vectors(self, query: str) -> Floats:
        """Compressed vectors of the query's tokens, [tokens, dimensions]."""
        vectors: Floats = self._encoder.encode_tokens(self._embedder.token_ids([query]))[0] @ self._compressor
        return vectors

    def scores(self, query: str, passages: Sequence[str]) -> Floats:
        """Late interaction of the query with each of the passages (ids), [passages]; any real number."""
        return self.vectors.late_interaction(
            self.query_vectors(query), [self._numbers[name] for name in passages]
        )

    def reorder(self, query: str, fused: Sequence[Fused]) -> list[Fused]:
        """The items anew, best first, by the final score; ``scores`` keeps the ``fused`` and the ``rerank`` score."""
        scores = self.scores(query, [entry.item for entry in fused])
        again = []
        for entry, score in zip(fused, scores.tolist(), strict=True):
            final = score + self.fused_weight * math.log(entry.score)
            own = {**entry.scores, "fused": entry.score, "rerank": score}
            again.append(Fused(entry.item, final, entry.ranks, own))
        return sorted(again, key=lambda entry: (-entry.score, entry.item))


def compress_passages(
    passages: Sequence[Passage],
    compressor: Floats,
    embedder: MiniLMEmbedder,
    *,
    advance: Callable[[int], object] = lambda _: None,
) -> TokenVectors:
    """Token vectors of passages: the frozen encoder's hidden states, compressed, in eight bits."""
    matrix = np.ascontiguousarray(compressor.T)
    parts = [quantize([], dimensions=matrix.shape[1])]
    for begin in range(0, len(passages), _CHUNK):
        chunk = passages[begin : begin + _CHUNK]
        states = embedder.token_states([passage_text(passage) for passage in chunk])
        parts.append(quantize([tokens @ matrix for tokens in states], dimensions=matrix.shape[1]))
        advance(len(chunk))
    offsets = np.cumsum([0, *(n for part in parts for n in np.diff(part.offsets))], dtype=np.int64)
    return TokenVectors(
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        offsets=offsets,
    )


def save_reranker(
    folder: Path, tower: Tower, passages: Sequence[Passage], vectors: TokenVectors, *, fused_weight: float
) -> RerankFacts:
    """Write the three files, each whole or not at all; same content, same bytes."""
    facts = RerankFacts(
        dimensions=tower.compressor.shape[0], passages=len(passages), fused_weight=fused_weight
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reranker.json").unlink(missing_ok=True)
    _save(folder / "encoder.safetensors", {**tower.changed, "compressor": tower.compressor})
    arrays: dict[str, NDArray[Any]] = {
        "codes": vectors.codes,
        "scales": vectors.scales,
        "offsets": vectors.offsets,
    }
    arrays["digests"] = _digests(passages)
    _save(folder / "passages.safetensors", arrays)
    write_text_atomic(folder / "reranker.json", facts.model_dump_json(indent=1) + "\n")
    return facts


def open_reranker(folder: Path, passages: Sequence[Passage]) -> Reranker:
    """Open a reranker for an index's passages; those that it does not know yet are encoded now.

    Raises:
        DataError: a file is missing or damaged.
        ModelError: the encoder's published weights are not installed.
    """
    from safetensors.numpy import load_file

    try:
        facts = RerankFacts.model_validate_json((folder / "reranker.json").read_bytes())
        changed = load_file(folder / "encoder.safetensors")
        compressor = changed.pop("compressor")
        stored = load_file(folder / "passages.safetensors")
        vectors = TokenVectors(codes=stored["codes"], scales=stored["scales"], offsets=stored["offsets"])
        known = {bytes(row).hex(): number for number, row in enumerate(stored["digests"])}
        sizes = (
            compressor.shape[0],
            vectors.codes.shape[1],
            vectors.count,
            len(stored["digests"]),
        )
        if sizes != (facts.dimensions, facts.dimensions, facts.passages, facts.passages):
            raise ValueError(f"sizes {sizes}")
    except (OSError, KeyError, ValueError, ValidationError) as error:
        raise _damaged(folder, error) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in {"safetensors", "safetensors_rust", "builtins"}:
            raise
        raise _damaged(folder, error) from error
    embedder = MiniLMEmbedder()
    new = [passage for passage in passages if text_digest(passage) not in known]
    if new:
        known |= {text_digest(passage): vectors.count + i for i, passage in enumerate(new)}
        vectors = vectors.joined(compress_passages(new, compressor, embedder))
    numbers = {passage.passage_id: known[text_digest(passage)] for passage in passages}
    return Reranker(
        Tower(changed, compressor), vectors, numbers, fused_weight=facts.fused_weight, embedder=embedder
    )


def _damaged(folder: Path, error: Exception) -> DataError:
    detail = (str(error).splitlines() or [""])[0]
    return DataError(
        f"the reranker in {str(folder)!r} can't be opened ({type(error).__name__}: {detail})",
        expected="the files that the rerank stage wrote",
        next_step=_AGAIN,
    )


def _digests(passages: Sequence[Passage]) -> NDArray[np.uint8]:
    raw = b"".join(bytes.fromhex(text_digest(passage)) for passage in passages)
    return np.frombuffer(raw, dtype=np.uint8).reshape(len(passages), -1 if raw else 16)


def _save(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    from safetensors.numpy import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
