"""An index holds exactly the documents it was last given, whatever happened on the way."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import rag.index
import rag.update
from domains.errors import DataError, IndexMismatch, RunLocked
from domains.records import Document
from rag.embed import Vectors, WordHashEmbedder
from rag.index import Index, IndexReport, open_index, update_index
from rag.lexical import LexicalIndex
from rag.manifest import open_client, read_manifest
from rag.retrieve import Retriever

ROOT = Path(__file__).parent.parent


class CountingEmbedder(WordHashEmbedder):
    """Keeps what it embedded, and can be told to fail after so many calls."""

    def __init__(self, dimensions: int = 64, *, fail_after: int = 10**6) -> None:
        super().__init__(dimensions)
        self.texts: list[str] = []
        self.calls_left = fail_after

    def embed(self, texts: Sequence[str]) -> Vectors:
        if self.calls_left == 0:
            raise KeyboardInterrupt
        self.calls_left -= 1
        self.texts += texts
        return super().embed(texts)


def documents(count: int = 5) -> list[Document]:
    return [
        Document(
            doc_id=f"doc-{i}",
            title=f"Club {i}",
            text=f"## Colour\nThe club number{i} wears coats.\n\n## Price\nMembers of number{i} pay {i} euros.",
            source=f"doc-{i}.md",
        )
        for i in range(count)
    ]


def update(folder: Path, docs: list[Document], embedder: WordHashEmbedder, **settings: int) -> IndexReport:
    chosen = {"max_chars": 200, "overlap_chars": 0} | settings
    return update_index(folder, docs, embedder=embedder, **chosen)


def counts(report: IndexReport) -> tuple[int, ...]:
    return (report.added, report.changed, report.removed, report.unchanged, report.passages, report.embedded)


def found(folder: Path, query: str, embedder: WordHashEmbedder | None = None) -> list[str]:
    """The documents that each list finds first, and the number of passages that dense search can find."""
    index = open_index(folder, embedder=embedder or WordHashEmbedder())
    try:
        retriever = Retriever(index, candidates=50, rrf_k=60, lexical_weight=1, dense_weight=1)
        return [hit.passage.doc_id for hit in retriever.retrieve(query, top_k=2)]
    finally:
        index.close()


def stored(folder: Path) -> set[str]:
    """Ids of all vectors in Chroma, valid or not."""
    client = open_client(folder)
    try:
        return {key for held in client.list_collections() for key in held.get(include=[])["ids"]}
    finally:
        client.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_what_changed_is_embedded(tmp_path: Path) -> None:
    embedder = CountingEmbedder()
    docs = documents()
    seen: list[tuple[int, int]] = []
    first = update_index(
        tmp_path,
        docs,
        embedder=embedder,
        max_chars=200,
        overlap_chars=0,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert counts(first) == (5, 0, 0, 0, 10, 10)
    assert seen[-1] == (10, 10)
    assert first.size_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    embedder.texts.clear()
    assert counts(update(tmp_path, docs[::-1], embedder)) == (0, 0, 0, 5, 10, 0)
    assert embedder.texts == []

    changed = docs[2].model_copy(update={"text": docs[2].text.replace("coats", "capes")})
    new = documents(6)[5]
    assert counts(update(tmp_path, [*docs[1:2], changed, *docs[3:], new], embedder)) == (1, 1, 1, 3, 10, 3)
    assert sorted(embedder.texts) == sorted([
        "Club 2\nColour\nThe club number2 wears capes.",
        "Club 5\nColour\nThe club number5 wears coats.",
        "Club 5\nPrice\nMembers of number5 pay 5 euros.",
    ])  # fmt: skip
    assert set(found(tmp_path, "capes")) >= {"doc-2"}
    assert "doc-0" not in found(tmp_path, "number0")
    assert not any(key.startswith("doc-0#") for key in stored(tmp_path))


def test_a_new_title_or_setting_counts_as_a_change(tmp_path: Path) -> None:
    embedder = WordHashEmbedder()
    docs = documents(2)
    update(tmp_path, docs, embedder)
    renamed = docs[0].model_copy(update={"title": "Union 0"})
    assert counts(update(tmp_path, [renamed, docs[1]], embedder)) == (0, 1, 0, 1, 4, 2)
    assert update(tmp_path, [renamed, docs[1]], embedder, max_chars=300).changed == 2


def test_same_documents_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "from test_index import documents, update, WordHashEmbedder\n"
        "update(Path(sys.argv[1]), documents(), WordHashEmbedder())"
    )
    update(tmp_path / "here", documents(), WordHashEmbedder())
    other_seed = {**os.environ, "PYTHONHASHSEED": "1"}  # another order of sets than in this process
    command = [sys.executable, "-c", script, str(tmp_path / "there")]
    subprocess.run(command, cwd=ROOT, env=other_seed, check=True)
    written = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "chroma" not in path.parts]
        written.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert len(written[0]) > 5
    assert written[0] == written[1]


def test_an_update_killed_while_embedding_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rag.update, "_BATCH", 2)
    update(tmp_path, documents(2), WordHashEmbedder())
    dying = CountingEmbedder(fail_after=2)
    with pytest.raises(KeyboardInterrupt):
        update(tmp_path, documents(5), dying)
    # The former index works, and knows nothing of the vectors that are there too.
    assert found(tmp_path, "number1")[0] == "doc-1"
    assert "doc-4" not in found(tmp_path, "number4 number3 number2")
    again = CountingEmbedder()
    assert counts(update(tmp_path, documents(5), again)) == (3, 0, 0, 2, 10, 2)
    assert not set(again.texts) & set(dying.texts)
    assert found(tmp_path, "number4")[0] == "doc-4"


@pytest.mark.parametrize("step", ["_write_generation", "write_text_atomic", "_clean"])
def test_an_update_killed_at_any_later_step_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    update(tmp_path, documents(3), WordHashEmbedder())

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rag.update, step, die)
        with pytest.raises(KeyboardInterrupt):
            update(tmp_path, documents(4)[1:], WordHashEmbedder())
    expected = "doc-3" if step == "_clean" else "doc-0"
    assert found(tmp_path, "number3 number0")[0] == expected
    report = update(tmp_path, documents(4)[1:], WordHashEmbedder())
    assert (report.passages, report.embedded) == (6, 0)
    assert found(tmp_path, "number3 number0")[0] == "doc-3"
    assert {key.split("#")[0] for key in stored(tmp_path)} == {"doc-1", "doc-2", "doc-3"}
    generation = json.loads((tmp_path / "index.json").read_text())["generation"]
    assert names(tmp_path) == {"index.json", "chroma", "writer.lock", generation}


def test_an_index_can_be_moved_and_names_no_place(tmp_path: Path) -> None:
    update(tmp_path / "here", documents(), WordHashEmbedder())
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    assert found(tmp_path / "there", "number3")[0] == "doc-3"
    for path in (tmp_path / "there").rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path


def test_several_processes_read_at_once(tmp_path: Path) -> None:
    update(tmp_path, documents(), WordHashEmbedder())
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "from test_index import open_index, WordHashEmbedder\n"
        "index = open_index(Path(sys.argv[1]), embedder=WordHashEmbedder())\n"
        "print('open', flush=True); sys.stdin.readline()\n"
        "vectors = index.embedder.embed(['number3 coats'])\n"
        "print(index.search_dense(vectors, top_k=1)[0][0].split('#')[0])"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "open\n"
    assert found(tmp_path, "number2 coats")[0] == "doc-2"  # read here while it is open there
    assert reader.communicate("\n", timeout=60)[0] == "doc-3\n"


def test_an_open_index_survives_an_update(tmp_path: Path) -> None:
    embedder = WordHashEmbedder()
    update(tmp_path, documents(3), embedder)
    index = open_index(tmp_path, embedder=embedder)
    update(tmp_path, documents(4)[1:], embedder)
    ids = index.search_dense(embedder.embed(["number1 coats"]), top_k=6)[0]
    assert ids[0].startswith("doc-1#")
    assert set(ids) <= set(index.by_id)
    index.close()


def test_a_read_only_index_is_read_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update(tmp_path / "index", documents(), WordHashEmbedder())
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "index").rglob("*"))}
    index = open_index(tmp_path / "index", embedder=WordHashEmbedder())
    assert index.search_dense(index.embedder.embed(["number3 coats"]), top_k=1)[0][0].startswith("doc-3#")
    assert names(tmp_path / "tmp")
    index.close()
    assert not names(tmp_path / "tmp")
    assert before == {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "index").rglob("*"))}


def test_an_index_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(tmp_path, documents(2), WordHashEmbedder())
    former = read_manifest(tmp_path)
    update(tmp_path, documents(3), WordHashEmbedder())
    answers = [former]
    monkeypatch.setattr(
        rag.index, "read_manifest", lambda folder: answers.pop() if answers else read_manifest(folder)
    )
    assert found(tmp_path, "number2")[0] == "doc-2"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / "writer.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunLocked, match="another process writes"):
            update(tmp_path, documents(), WordHashEmbedder())
    assert update(tmp_path, documents(), WordHashEmbedder()).added == 5


def test_another_embedder_is_named_and_an_update_rebuilds(tmp_path: Path) -> None:
    update(tmp_path, documents(), WordHashEmbedder(64))
    with pytest.raises(IndexMismatch, match="'word-hash-64'") as caught:
        open_index(tmp_path, embedder=WordHashEmbedder(32))
    assert "'word-hash-32'" in caught.value.expected
    assert "preceptor index" in caught.value.next_step
    assert counts(update(tmp_path, documents(), WordHashEmbedder(32))) == (5, 0, 0, 0, 10, 10)
    assert found(tmp_path, "number3", WordHashEmbedder(32))[0] == "doc-3"


def test_another_format_is_named_and_an_update_rebuilds(tmp_path: Path) -> None:
    update(tmp_path, documents(), WordHashEmbedder())
    manifest = tmp_path / "index.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(IndexMismatch, match="format 99"):
        open_index(tmp_path, embedder=WordHashEmbedder())
    update(tmp_path, documents(), WordHashEmbedder())
    assert found(tmp_path, "number3")[0] == "doc-3"


def test_a_missing_index_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no index") as caught:
        open_index(tmp_path / "nowhere", embedder=WordHashEmbedder())
    assert "preceptor index" in caught.value.next_step
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "victim", ["index.json", "passages.jsonl", "vocab.index.json", "chroma.sqlite3", "chroma"]
)
def test_damage_is_noticed_and_an_update_repairs_it(tmp_path: Path, victim: str) -> None:
    update(tmp_path, documents(), WordHashEmbedder())
    path = next(tmp_path.rglob(victim))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(b"damaged" * 200)
    with pytest.raises(DataError, match="damaged"):
        open_index(tmp_path, embedder=WordHashEmbedder())
    update(tmp_path, documents(), WordHashEmbedder())
    assert found(tmp_path, "number3")[0] == "doc-3"


def test_documents_that_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        update(tmp_path, [], WordHashEmbedder())
    with pytest.raises(DataError, match="'doc-0'"):
        update(tmp_path, documents(1) * 2, WordHashEmbedder())
    assert names(tmp_path) == set()


def test_the_lexical_index_reads_titles_headings_and_stems(tmp_path: Path) -> None:
    update(tmp_path, documents(), WordHashEmbedder())
    index: Index = open_index(tmp_path, embedder=WordHashEmbedder())
    try:
        assert {i.split("#")[0] for i in index.search_lexical("prices of the CLUBS", top_k=50)} == {
            f"doc-{i}" for i in range(5)
        }
        assert index.search_lexical("number4 wearing coat", top_k=1)[0].startswith("doc-4#")
        assert index.search_lexical("the of and", top_k=5) == []
        assert index.search_lexical("unheard", top_k=5) == []
        assert len(index.search_lexical("coats", top_k=3)) == 3
    finally:
        index.close()


def test_ties_of_the_lexical_index_are_in_order(tmp_path: Path) -> None:
    update(tmp_path, documents(), WordHashEmbedder())
    index = open_index(tmp_path, embedder=WordHashEmbedder())
    index.close()
    LexicalIndex.build(index.passages).save(tmp_path / "again")
    assert LexicalIndex.load(tmp_path / "again").search("coats", top_k=10) == [0, 2, 4, 6, 8]
