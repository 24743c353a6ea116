"""Dense and lexical lists are fused by rank; nothing is found for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.errors import ConfigError
from domains.records import Document
from rag.embed import MiniLMEmbedder
from rag.fuse import fuse
from rag.index import Index, open_index, update_index
from rag.retrieve import Retriever

TEXTS = {
    "gout": "Gout is a form of arthritis caused by crystals of monosodium urate in the joints.",
    "asthma": "Asthma narrows the airways of the lungs and makes breathing out difficult.",
    "migraine": "Migraine is a headache disorder, often on one side and with nausea.",
    "form-7b": "Form 7B records the temperature of the vaccine refrigerator every morning.",
    "sepsis": "Sepsis is a life-threatening reaction of the body to an infection.",
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    folder = tmp_path_factory.mktemp("index")
    documents = [
        Document(doc_id=name, title=name.title(), text=text, source=f"{name}.md")
        for name, text in TEXTS.items()
    ]
    embedder = MiniLMEmbedder()
    update_index(folder, documents, embedder=embedder, max_chars=300, overlap_chars=0)
    index = open_index(folder, embedder=embedder)
    yield index
    index.close()


def retriever(index: Index, *, lexical: float = 1.0, dense: float = 1.0, candidates: int = 50) -> Retriever:
    return Retriever(index, candidates=candidates, rrf_k=60, lexical_weight=lexical, dense_weight=dense)


def test_fusion_adds_weighted_reciprocal_ranks() -> None:
    fused = fuse({"dense": ["a", "b"], "lexical": ["b", "c"]}, weights={"dense": 1, "lexical": 2}, k=60)
    assert [(entry.item, entry.ranks) for entry in fused] == [
        ("b", {"dense": 2, "lexical": 1}),
        ("c", {"lexical": 2}),
        ("a", {"dense": 1}),
    ]
    assert fused[0].score == pytest.approx(1 / 62 + 2 / 61)


def test_ties_are_broken_by_the_item() -> None:
    assert [entry.item for entry in fuse({"x": ["b"], "y": ["a"]}, weights={"x": 1, "y": 1}, k=60)] == [
        "a",
        "b",
    ]
    assert fuse({}, weights={}, k=60) == []


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=4))
def test_fusion_keeps_every_item_once_and_the_order_of_a_single_list(lists: list[list[str]]) -> None:
    rankings = {f"list{i}": items for i, items in enumerate(lists)}
    fused = fuse(rankings, weights=dict.fromkeys(rankings, 1.0), k=60)
    assert sorted(entry.item for entry in fused) == sorted({item for items in lists for item in items})
    for items in lists:
        assert [entry.item for entry in fuse({"one": items}, weights={"one": 0.3}, k=60)] == items


def test_meaning_and_wording_are_both_found(index: Index) -> None:
    meant = retriever(index).retrieve("Why do my joints hurt after too much uric acid?", top_k=2)
    assert meant[0].passage.doc_id == "gout"
    worded = retriever(index).retrieve("What is 7B?", top_k=2)
    assert worded[0].passage.doc_id == "form-7b"
    assert worded[0].ranks["lexical"] == 1
    assert worded[0].score >= worded[1].score
    assert worded[0].passage.text == TEXTS["form-7b"]


def test_a_weight_of_zero_leaves_a_list_out(index: Index) -> None:
    lexical = retriever(index, dense=0).retrieve("urate crystals", top_k=5)
    assert [hit.passage.doc_id for hit in lexical] == ["gout"]
    assert lexical[0].ranks == {"lexical": 1}
    dense = retriever(index, lexical=0).retrieve("urate crystals", top_k=5)
    assert len(dense) == 5
    assert dense[0].passage.doc_id == "gout"
    assert all(set(hit.ranks) == {"dense"} for hit in dense)
    with pytest.raises(ConfigError, match="both 0"):
        retriever(index, dense=0, lexical=0)


def test_many_queries_equal_one_after_the_other(index: Index) -> None:
    queries = ["headache on one side", "  ", "refrigerator log", "trouble with exhaling"]
    many = retriever(index).retrieve_many(queries, top_k=3)
    assert many == [retriever(index).retrieve(query, top_k=3) for query in queries]
    assert many[1] == []
    assert retriever(index).retrieve_many([], top_k=3) == []


def test_top_k_may_exceed_the_candidates_and_the_passages(index: Index) -> None:
    assert len(retriever(index, candidates=1).retrieve("infection", top_k=4)) == 4
    assert len(retriever(index).retrieve("infection", top_k=100)) == len(TEXTS)


def test_queries_of_odd_characters_and_great_length_are_answered(index: Index) -> None:
    for query in ('"AND (NOT *) \\', "🙂", "\0", "urate " * 5000, "?"):
        assert retriever(index).retrieve(query, top_k=2)


def test_threads_may_share_a_retriever(index: Index) -> None:
    queries = [*TEXTS.values(), "headache on one side", "refrigerator"] * 4
    shared = retriever(index)
    expected = [shared.retrieve(query, top_k=3) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: shared.retrieve(query, top_k=3), queries)) == expected


def test_a_long_document_that_is_left_out_does_not_shorten_the_lists(tmp_path: Path) -> None:
    pages = [
        Document(
            doc_id="manual",
            title="Manual",
            text=" ".join(f"Rule {n} is about infection number {n}." for n in range(60)),
            source="m.md",
        )
    ]
    others = [
        Document(doc_id=f"note-{n}", title="Note", text=f"Infection note {n}.", source=f"{n}.md")
        for n in range(6)
    ]
    embedder = MiniLMEmbedder()
    update_index(tmp_path, [*pages, *others], embedder=embedder, max_chars=100, overlap_chars=0)
    alone = tmp_path / "alone"
    update_index(alone, others, embedder=embedder, max_chars=100, overlap_chars=0)
    with (
        retriever(open_index(tmp_path, embedder=embedder), candidates=5) as both,
        retriever(open_index(alone, embedder=embedder), candidates=5) as few,
    ):
        assert sum(passage.doc_id == "manual" for passage in both.index.passages) > 20
        assert {hit.passage.doc_id for hit in both.retrieve("rule about infection", top_k=5)} == {"manual"}
        without = both.retrieve("rule about infection", top_k=5, without={"manual"})
        wanted = few.retrieve("rule about infection", top_k=5)
        assert len(without) == 5
        assert {hit.passage.doc_id for hit in without} == {hit.passage.doc_id for hit in wanted}
        assert sorted(hit.ranks["dense"] for hit in without if "dense" in hit.ranks) == [1, 2, 3, 4, 5]


def test_documents_are_left_out_as_if_they_were_not_in_the_index(index: Index) -> None:
    whole = retriever(index).retrieve("urate crystals", top_k=3)
    assert whole[0].passage.doc_id == "gout"
    assert set(whole[0].scores) == {"dense", "lexical"}
    rest = retriever(index).retrieve("urate crystals", top_k=3, without={"gout"})
    assert len(rest) == 3
    assert "gout" not in {hit.passage.doc_id for hit in rest}
    assert rest[0].ranks["dense"] == 1
    assert rest[0].scores["dense"] < whole[0].scores["dense"]
