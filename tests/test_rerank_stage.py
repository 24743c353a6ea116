"""The rerank stage on a small domain, and its files on the way to a bundle that answers with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_index_stage import Counting
from test_rerank_train import CARE, THINGS

from domains.domain import Domain, load_domain
from domains.errors import DataError, StageError
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Document, Example, Message, Question, Quote, Rationale
from pipeline import rerank as stage
from pipeline.bundle import close_bundle, open_bundle
from pipeline.new import new_domain
from pipeline.progress import Silent
from pipeline.ranking import Fitted
from pipeline.rerank_pools import Pool
from pipeline.run_folder import Run
from rag.embed import MiniLMEmbedder
from rag.index import open_index, update_index
from rag.rerank import open_reranker
from rag.retrieve import open_retriever
from serve.bundle import _check_files
from serve.manifest import BaseModelFacts, read_manifest

ASKED = "How is the crane cleaned?"


def documents() -> list[Document]:
    return [
        Document(
            doc_id=thing,
            title=thing.title(),
            source=f"{thing}.md",
            text="\n\n".join(f"## {what.title()}\n{text}" for what, text in CARE.items()),
        )
        for thing in THINGS[:8]
    ]


def questions() -> list[Question]:
    return [
        Question(
            id=f"{thing}-{what}", kind="open", question=f"How is the {thing} {what}?", answer=text, about=thing,
            gold=[Quote(doc_id=thing, quote=text)], split="seed",
        )
        for thing in THINGS[:8] for what, text in CARE.items()
    ]  # fmt: skip


def rationale(question: Question) -> Rationale:
    return Rationale(
        question_id=question.id, sample=0, text=f"The document {question.about} says it.", answer=str(question.answer),
        passages=[], teacher="t", request=f"r-{question.id}",
    )  # fmt: skip


def example(question: Question) -> Example:
    return Example(
        id=question.id, question_id=question.id, messages=[Message(role="user", content=question.question)],
        completion="x", passages=[], origin="gold", request=f"r-{question.id}",
    )  # fmt: skip


def with_rerank(domain: Domain, **values: object) -> Domain:
    section = domain.config.rerank.model_copy(update=values)
    return replace(domain, config=domain.config.model_copy(update={"rerank": section}))


def make(folder: Path) -> tuple[Domain, Run]:
    write_jsonl(folder / "docs.jsonl", documents())
    write_jsonl(folder / "questions.jsonl", questions())
    new_domain(
        "machines", folder / "docs.jsonl", into=folder / "machines", questions=folder / "questions.jsonl"
    )
    domain = with_rerank(
        load_domain(str(folder / "machines")), enabled=True, epochs=1, dimensions=16, batch=24
    )
    run = Run(folder / "runs" / "machines" / "one")
    update_index(run.index, documents(), embedder=MiniLMEmbedder(), max_chars=300, overlap_chars=0)
    write_jsonl(run.rationales, [rationale(question) for question in questions()])
    write_jsonl(run.examples, [example(question) for question in questions()[:-1]])
    return domain, run


@pytest.fixture(scope="module", autouse=True)
def three_questions_suffice() -> Iterator[None]:
    """The held-out questions of so small a domain prove nothing; what follows is about a reranker that is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fitted, "helps", property(lambda self: True))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Domain, Run]:
    domain, run = make(tmp_path_factory.mktemp("rerank"))
    progress = Counting()
    report = stage.run(domain, run, progress)
    assert all(done == total for total, done in progress.bars)
    counts = report.counts
    assert counts["rows"] == 23 == counts["pools"] + counts["held_out"] + counts["without_candidates"]
    assert counts["questions"] == counts["held_out"] == 3
    assert any("held-out questions 3" in line for line in progress.lines)
    return domain, run


def test_the_stage_writes_pools_files_and_a_result(made: tuple[Domain, Run]) -> None:
    _domain, run = made
    pools = read_jsonl(run.rerank / "pools.jsonl", Pool)
    assert len(pools) == 23
    assert f"{questions()[-1].id}" not in {pool.item_id for pool in pools}  # curation did not keep it
    result = json.loads((run.rerank / "result.json").read_text())
    assert result["enabled"]
    assert set(result["sha256"]) == {path.name for path in run.reranker.iterdir()}
    assert len(result["history"]) == 2
    size = (run.reranker / "passages.safetensors").stat().st_size
    assert size * 0.9 < result["size_bytes"] < size


def test_the_retriever_of_the_run_uses_it(made: tuple[Domain, Run]) -> None:
    domain, run = made
    config = domain.config
    index = open_index(run.index, embedder=MiniLMEmbedder())
    names = [passage.passage_id for passage in index.passages]
    scores = dict(
        zip(names, open_reranker(run.reranker, index.passages).scores(ASKED, names).tolist(), strict=True)
    )
    index.close()
    with open_retriever(run.index, config.retrieve, config.rerank) as retriever:
        hits = retriever.retrieve(ASKED, top_k=len(names))
    weight = json.loads((run.rerank / "result.json").read_text())["fitted"]["weight"]
    assert all("rerank" in hit.scores for hit in hits)
    if weight == 0:
        assert [hit.score for hit in hits] == pytest.approx(
            [scores[hit.passage.passage_id] for hit in hits], rel=1e-5
        )
    with open_retriever(run.index, config.retrieve) as plain:
        assert all("rerank" not in hit.scores for hit in plain.retrieve(ASKED, top_k=3))


def test_nothing_of_the_answer_reaches_the_query(
    made: tuple[Domain, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the weight is chosen, as when answering, retrieval and reranker see the question and no more."""
    from rag.rerank import Reranker
    from rag.retrieve import Retriever

    domain, run = made
    seen: list[str] = []
    search, score = Retriever.candidates, Reranker.scores

    def candidates(self: Retriever, queries: list[str], *, depth: int) -> object:
        seen.extend(queries)
        return search(self, queries, depth=depth)

    def scores(self: Reranker, query: str, passages: list[str]) -> object:
        seen.append(query)
        return score(self, query, passages)

    monkeypatch.setattr(Retriever, "candidates", candidates)
    monkeypatch.setattr(Reranker, "scores", scores)
    stage.run(domain, Run(run.folder), Silent())
    assert len(seen) == 6
    assert set(seen) <= {question.question for question in questions()}


def test_same_input_same_bytes(made: tuple[Domain, Run]) -> None:
    domain, run = made
    files = [run.rerank / "pools.jsonl", run.rerank / "result.json", *sorted(run.reranker.iterdir())]
    before = [path.read_bytes() for path in files]
    stage.run(domain, run, Silent())
    assert [path.read_bytes() for path in files] == before


def test_the_bundle_carries_it(made: tuple[Domain, Run]) -> None:
    domain, run = made
    open_bundle(run.bundle, keep=["student.gguf"])
    (run.bundle / "student.gguf").write_bytes(b"GGUF model")
    close_bundle(
        run.bundle, config=domain.config, prompts={"system": "Answer."},
        base=BaseModelFacts(name="b", licence="mit", version="1"), teachers=[], template="t",
    )  # fmt: skip
    manifest = read_manifest(run.bundle)
    names = {"reranker/encoder.safetensors", "reranker/passages.safetensors", "reranker/reranker.json"}
    assert names <= set(manifest.files)
    _check_files(run.bundle, manifest)
    for name in names:
        path = run.bundle / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"#")  # of the same size
        with pytest.raises(DataError, match=name):
            _check_files(run.bundle, manifest)
        path.write_bytes(whole)


def test_switched_off_it_writes_no_reranker_and_takes_the_old_one_away(tmp_path: Path) -> None:
    domain, run = make(tmp_path)
    run.reranker.mkdir(parents=True)
    (run.reranker / "reranker.json").write_text("{}")
    progress = Silent()
    report = stage.run(with_rerank(domain, enabled=False), run, progress)
    assert set(report.counts.values()) == {0}
    assert any("enabled = false" in line for line in progress.lines)
    assert not run.reranker.exists()
    assert json.loads((run.rerank / "result.json").read_text()) == {"enabled": False}


def test_what_does_not_certainly_help_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain, run = make(tmp_path)
    run.reranker.mkdir(parents=True)
    (run.reranker / "reranker.json").write_text("{}")
    monkeypatch.setattr(Fitted, "helps", property(lambda self: False))
    progress = Silent()
    assert stage.run(domain, run, progress).facts["kept"] is False
    assert any("hybrid order stays" in line for line in progress.lines)
    assert not run.reranker.exists()
    assert json.loads((run.rerank / "result.json").read_text())["sha256"] == {}
    assert stage.run(with_rerank(domain, keep="always"), run, Silent()).facts["kept"] is True
    assert run.reranker.exists()


def test_too_little_to_learn_from_is_said(tmp_path: Path) -> None:
    domain, run = make(tmp_path)
    write_jsonl(run.examples, [example(question) for question in questions()[:3]])
    with pytest.raises(StageError, match="can't be split"):
        stage.run(domain, run, Silent())
    write_jsonl(run.examples, [])
    with pytest.raises(StageError, match="no rationale was kept"):
        stage.run(domain, run, Silent())
    assert not (run.rerank / "result.json").exists()
