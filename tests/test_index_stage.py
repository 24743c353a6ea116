"""The index stage on a small domain: counts add up, and what is skipped is said by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_serving import write_domain

from domains.domain import load_domain
from domains.errors import DataError
from pipeline import index as stage
from pipeline.progress import Silent
from pipeline.run_folder import Run
from rag.embed import MiniLMEmbedder
from rag.index import open_index


class Counting(Silent):
    """Progress that adds up what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: list[list[int]] = []

    def start(self, what: str, total: int) -> None:
        self.bars.append([total, 0])

    def advance(self, amount: int = 1) -> None:
        self.bars[-1][1] += amount


def test_the_stage_indexes_counts_and_names_what_it_skips(tmp_path: Path) -> None:
    folder = write_domain(tmp_path / "shelf").folder
    documents = folder / "documents"
    shutil.rmtree(documents, ignore_errors=True)
    documents.mkdir()
    (documents / "one.md").write_text(
        "# One\n\nBrenzal is a tablet.\n\n## Dose\nTake 40 mg.", encoding="utf-8"
    )
    (documents / "two.txt").write_text("Corvane drops. " * 4, encoding="utf-8")
    (documents / "wide.txt").write_text("§ " * 690, encoding="utf-8")
    (documents / "sheet.csv").write_text("a,b", encoding="utf-8")
    with (folder / "domain.toml").open("a", encoding="utf-8") as file:
        file.write("\n[index]\npassage_chars = 700\n")
    domain = load_domain(str(folder))
    run, progress = Run(tmp_path / "run"), Counting()
    report = stage.run(domain, run, progress)
    assert report.counts == {
        "documents": 3,
        "skipped": 1,
        "passages": 5,
        "embedded": 5,
        "added": 3,
        "changed": 0,
        "removed": 0,
        "unchanged": 0,
        "cut": 2,
    }
    assert report.facts["skipped"][0]["source"] == "sheet.csv"
    assert report.facts["size_bytes"] > 0
    assert report.facts["passages_per_s"] > 0
    assert any(line.startswith("skipped sheet.csv: unknown suffix") for line in progress.lines)
    assert any(line.startswith("2 of 5 passages are longer") for line in progress.lines)
    assert progress.bars[-1] == [5, 5]
    index = open_index(run.index, embedder=MiniLMEmbedder())
    assert len(index.passages) == 5
    index.close()

    (documents / "one.md").unlink()
    again = stage.run(domain, run, Silent())
    assert (again.counts["removed"], again.counts["unchanged"], again.counts["embedded"]) == (1, 2, 0)


def test_a_domain_without_documents_is_an_error(tmp_path: Path) -> None:
    domain = write_domain(tmp_path / "shelf")
    shutil.rmtree(domain.documents, ignore_errors=True)
    with pytest.raises(DataError, match="does not exist"):
        stage.run(domain, Run(tmp_path / "run"), Silent())
