"""On which text the files of a search are compared, and the room that they need."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from domains.errors import DataError
from domains.records import Example, Message, Passage, Question
from pipeline.progress import Silent
from pipeline.search import HeldOut, Work, search, unseen_passages


def passage(doc: str, part: int) -> Passage:
    return Passage(
        passage_id=f"{doc}#{part}", doc_id=doc, title=doc, heading="", text="Text.", start=0, end=5
    )


def row(*shown: str) -> Example:
    return Example(
        id="e", question_id="q", messages=[Message(role="user", content="?")], completion="!", passages=list(shown),
        origin="gold", request="",
    )  # fmt: skip


PASSAGES = [passage("seed", 0), passage("seed", 1), passage("exam", 0), passage("exam", 1)]
EXAM = Question(id="x", kind="open", question="?", answer="!", about="exam", split="exam")


def test_text_of_the_exams_documents_that_no_row_shows_comes_first() -> None:
    found, caveat = unseen_passages(PASSAGES, [EXAM], [row("seed#0", "exam#1")])
    assert [each.passage_id for each in found] == ["exam#0"]
    assert caveat == ""


def test_what_training_may_have_seen_is_said() -> None:
    found, caveat = unseen_passages(PASSAGES, [EXAM], [row("exam#0", "exam#1", "seed#0")])
    assert [each.passage_id for each in found] == ["seed#1"]
    assert "of documents that rows may be about" in caveat
    found, caveat = unseen_passages(PASSAGES, [EXAM], [row(*(each.passage_id for each in PASSAGES))])
    assert found == PASSAGES
    assert "passages that training rows show" in caveat


def test_a_disk_that_cannot_hold_all_candidates_is_said_before_any_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=5_000_000)  # the fifteen files of a million weights want more than 12 MB
    monkeypatch.setattr("pipeline.run_folder.shutil.disk_usage", lambda _place: usage)
    nothing: Any = None
    network = torch.nn.Linear(1000, 1000)
    network.get_output_embeddings = lambda: network  # type: ignore[assignment]
    work = Work(network, nothing, nothing, tmp_path, (), 512, nothing)
    with pytest.raises(DataError, match="5 MB free"):
        search(work, HeldOut((), "", 0, None, 1.0, 0.0), Silent())
