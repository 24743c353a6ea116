"""The reranker at work: late interaction in numpy, eight bits, files, and the retriever that uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.config import RerankSection, RetrieveSection
from domains.errors import DataError, ModelError
from domains.records import Document, Passage
from rag.embed import MiniLMEmbedder, minilm_encoder, minilm_weights
from rag.fuse import Fused
from rag.index import Index, open_index, update_index
from rag.rerank import (
    FOLDER,
    Reranker,
    Tower,
    compress_passages,
    open_reranker,
    save_reranker,
)
from rag.retrieve import Retriever, open_retriever
from rag.token_vectors import quantize

TEXTS = {
    "gout": "Gout is a form of arthritis caused by crystals of monosodium urate in the joints.",
    "asthma": "Asthma narrows the airways of the lungs and makes breathing out difficult.",
    "migraine": "Migraine is a headache disorder, often on one side and with nausea.",
    "sepsis": "Sepsis is a life-threatening reaction of the body to an infection.",
}
QUESTION = "Which disorder of the lungs makes breathing hard?"
SIZE = 24


def documents(texts: dict[str, str]) -> list[Document]:
    return [
        Document(doc_id=name, title=name.title(), text=text, source=f"{name}.md")
        for name, text in texts.items()
    ]


@pytest.fixture(scope="module")
def embedder() -> MiniLMEmbedder:
    return MiniLMEmbedder()


@pytest.fixture(scope="module")
def tower() -> Tower:
    """Not trained: the compressor mixes at random, and one tensor of the encoder differs."""
    rng = np.random.default_rng(3)
    name = "encoder.layer.5.attention.self.query.weight"
    changed = {name: minilm_weights()[name] * np.float32(0.5)}
    return Tower(changed, rng.standard_normal((SIZE, 384)).astype(np.float32))


@pytest.fixture
def folder(tmp_path: Path, embedder: MiniLMEmbedder, tower: Tower) -> Path:
    """A bundle's folder with an index and a reranker."""
    update_index(tmp_path / "index", documents(TEXTS), embedder=embedder, max_chars=300, overlap_chars=0)
    index = open_index(tmp_path / "index", embedder=embedder)
    vectors = compress_passages(index.passages, tower.compressor, embedder)
    save_reranker(tmp_path / FOLDER, tower, index.passages, vectors, fused_weight=0.0)
    index.close()
    return tmp_path


@pytest.fixture
def index(folder: Path, embedder: MiniLMEmbedder) -> Iterator[Index]:
    index = open_index(folder / "index", embedder=embedder)
    yield index
    index.close()


def exact(query: np.ndarray, passage: np.ndarray) -> float:
    return float((query @ passage.T).max(axis=1).sum())


arrays = st.lists(
    st.integers(1, 6).flatmap(lambda n: st.integers(0, 2**31).map(lambda seed: (n, seed))),
    min_size=1,
    max_size=6,
)


@given(arrays, st.floats(1e-3, 1e3))
def test_eight_bits_are_off_by_half_a_step_at_most(sizes: list[tuple[int, int]], scale: float) -> None:
    vectors = [
        (np.random.default_rng(seed).standard_normal((n, 8)) * scale).astype(np.float32) for n, seed in sizes
    ]
    stored = quantize(vectors, dimensions=8)
    for number, tokens in enumerate(vectors):
        step = stored.scales[stored.offsets[number] : stored.offsets[number + 1], None].astype(np.float64)
        assert (np.abs(stored.decode(number) - tokens) <= 0.5001 * step).all()
        # a step is 1/127 of the largest number, rounded up in float16
        largest = np.abs(tokens).max(axis=1, keepdims=True)
        assert (step <= largest / 127 * 1.003 + 1e-7).all()


def test_scores_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal((n, 8)).astype(np.float32) for n in (3, 1, 7, 2)]
    query = rng.standard_normal((5, 8)).astype(np.float32)
    stored = quantize(vectors, dimensions=8)
    chosen = [2, 0, 3]
    expected = [exact(query, stored.decode(i)) for i in chosen]
    assert stored.late_interaction(query, chosen) == pytest.approx(expected, rel=1e-5)
    assert stored.late_interaction(query, []).shape == (0,)
    # A passage's score does not depend on its neighbours.
    assert stored.late_interaction(query, [3]) == pytest.approx(expected[2:], rel=1e-5)
    # each query token is off by at most half a step times the length of its vector
    bound = 0.51 * stored.scales.max() * np.abs(query).sum()
    assert np.abs(np.array([exact(query, vectors[i]) for i in chosen]) - expected).max() <= bound


def test_joined_passages_keep_their_numbers() -> None:
    rng = np.random.default_rng(1)
    first = quantize([rng.standard_normal((n, 4)).astype(np.float32) for n in (2, 3)], dimensions=4)
    second = quantize([rng.standard_normal((n, 4)).astype(np.float32) for n in (1, 2)], dimensions=4)
    both = first.joined(second)
    assert both.count == 4
    assert [both.decode(i).tolist() for i in range(4)] == [
        *(first.decode(i).tolist() for i in range(2)),
        *(second.decode(i).tolist() for i in range(2)),
    ]


def test_token_states_average_to_the_embedding(embedder: MiniLMEmbedder) -> None:
    texts = [*TEXTS.values(), "", "word " * 400]
    states = embedder.token_states(texts)
    assert [len(tokens) for tokens in states] == [len(ids) for ids in embedder.token_ids(texts)]
    means = np.stack([tokens.mean(axis=0) for tokens in states])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(means - embedder.embed(texts)).max() < 1e-5


def test_a_tensor_that_the_encoder_does_not_have_is_refused() -> None:
    with pytest.raises(ModelError, match="'pooler'"):
        minilm_encoder({"pooler": np.zeros((2, 2), dtype=np.float32)})


def test_files_round_trip(folder: Path, index: Index, tower: Tower, embedder: MiniLMEmbedder) -> None:
    opened = open_reranker(folder / FOLDER, index.passages)
    names = [passage.passage_id for passage in index.passages]
    query = (
        minilm_encoder(tower.changed).encode_tokens(embedder.token_ids([QUESTION]))[0] @ tower.compressor.T
    )
    expected = [exact(query, opened.vectors.decode(i)) for i in range(len(names))]
    assert opened.scores(QUESTION, names) == pytest.approx(expected, rel=1e-4)
    before = {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()}
    save_reranker(folder / FOLDER, tower, index.passages, opened.vectors, fused_weight=0.0)
    assert {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()} == before
    assert set(before) == {"encoder.safetensors", "passages.safetensors", "reranker.json"}


def test_a_passage_that_came_later_is_encoded_when_opened(folder: Path, embedder: MiniLMEmbedder) -> None:
    more = {"croup": "Croup swells the windpipe of small children.", **TEXTS}
    del more["sepsis"]
    update_index(folder / "index", documents(more), embedder=embedder, max_chars=300, overlap_chars=0)
    index = open_index(folder / "index", embedder=embedder)
    opened = open_reranker(folder / FOLDER, index.passages)
    names = [passage.passage_id for passage in index.passages]
    assert len(opened.scores(QUESTION, names)) == len(names) == 4
    fresh = compress_passages(index.passages, _compressor(folder), embedder)
    again = Reranker(
        Tower(_changed(folder), _compressor(folder)),
        fresh,
        {name: i for i, name in enumerate(names)},
        fused_weight=0.0,
        embedder=embedder,
    )
    assert opened.scores(QUESTION, names) == pytest.approx(again.scores(QUESTION, names), rel=1e-3)
    index.close()


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    tensors: dict[str, np.ndarray] = load_file(folder / FOLDER / "encoder.safetensors")
    return tensors


def _compressor(folder: Path) -> np.ndarray:
    return _tensors(folder)["compressor"]


def _changed(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in _tensors(folder).items() if name != "compressor"}


@pytest.mark.parametrize("name", ["encoder.safetensors", "passages.safetensors", "reranker.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_damage_is_said(folder: Path, index: Index, name: str, damage: str) -> None:
    path = folder / FOLDER / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if damage == "cut" else b"not what was written")
    with pytest.raises(DataError, match="reranker") as caught:
        open_reranker(folder / FOLDER, index.passages)
    assert "preceptor rerank" in caught.value.next_step


def test_the_order_is_the_rerankers(folder: Path, index: Index) -> None:
    retrieve = RetrieveSection(top_k=4)
    with open_retriever(folder / "index", retrieve) as plain:
        before = plain.retrieve(QUESTION, top_k=4)
    with open_retriever(folder / "index", retrieve, RerankSection(enabled=True)) as reranking:
        after = reranking.retrieve(QUESTION, top_k=4)
        assert reranking.retrieve("  ", top_k=4) == []
    with open_retriever(folder / "index", retrieve, RerankSection(enabled=False)) as switched_off:
        assert switched_off.retrieve(QUESTION, top_k=4) == before
    opened = open_reranker(folder / FOLDER, index.passages)
    names = [hit.passage.passage_id for hit in before]
    scores = dict(zip(names, opened.scores(QUESTION, names).tolist(), strict=True))
    assert [hit.passage.passage_id for hit in after] == sorted(names, key=lambda name: -scores[name])
    assert [hit.passage.passage_id for hit in after] != names
    fused = {hit.passage.passage_id: (hit.score, hit.ranks) for hit in before}
    for hit in after:
        name = hit.passage.passage_id
        assert hit.scores["fused"] == pytest.approx(fused[name][0], abs=1e-6)
        assert hit.ranks == fused[name][1]
        assert hit.scores["rerank"] == pytest.approx(hit.score, abs=1e-5)
        assert hit.score == pytest.approx(scores[name], rel=1e-4)


def test_only_the_first_candidates_are_ordered_anew(folder: Path, index: Index) -> None:
    opened = open_reranker(folder / FOLDER, index.passages)
    few = Retriever(
        index,
        candidates=50,
        rrf_k=60,
        lexical_weight=1,
        dense_weight=1,
        reranker=opened,
        rerank_candidates=2,
    )
    plain = Retriever(index, candidates=50, rrf_k=60, lexical_weight=1, dense_weight=1)
    expected = {hit.passage.passage_id for hit in plain.retrieve(QUESTION, top_k=2)}
    assert {hit.passage.passage_id for hit in few.retrieve(QUESTION, top_k=2)} == expected
    assert len(few.retrieve(QUESTION, top_k=4)) == 4


def test_a_folder_without_a_reranker_answers_as_before(folder: Path) -> None:
    for path in (folder / FOLDER).iterdir():
        path.unlink()
    (folder / FOLDER).rmdir()
    with open_retriever(folder / "index", RetrieveSection(), RerankSection(enabled=True)) as retriever:
        assert retriever.retrieve(QUESTION, top_k=1)[0].passage.doc_id == "asthma"


def test_a_heavy_weight_gives_back_the_fused_order(
    index: Index, tower: Tower, embedder: MiniLMEmbedder
) -> None:
    names = [passage.passage_id for passage in index.passages]
    vectors = compress_passages(index.passages, tower.compressor, embedder)
    fused = [Fused(name, 1 / (61 + rank), {"dense": rank + 1}) for rank, name in enumerate(names)]
    orders = []
    for weight in (0.0, 1e9):
        reranker = Reranker(
            tower,
            vectors,
            {name: i for i, name in enumerate(names)},
            fused_weight=weight,
            embedder=embedder,
        )
        orders.append([entry.item for entry in reranker.reorder(QUESTION, fused)])
        assert reranker.reorder(QUESTION, []) == []
    assert orders[1] == names
    assert orders[0] != names
    assert sorted(orders[0]) == sorted(names)


def test_two_passages_of_one_text_share_a_vector(
    tmp_path: Path, tower: Tower, embedder: MiniLMEmbedder
) -> None:
    twins = [
        Passage(passage_id=f"{name}#0-5", doc_id=name, title="T", heading="", text="alike", start=0, end=5)
        for name in ("a", "b")
    ]
    vectors = compress_passages(twins, tower.compressor, embedder)
    save_reranker(tmp_path / "r", tower, twins, vectors, fused_weight=1.0)
    one, other = open_reranker(tmp_path / "r", twins).scores("alike?", ["a#0-5", "b#0-5"])
    assert one == other
