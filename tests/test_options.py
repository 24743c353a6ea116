"""Options are ranked by what the documents say of them, whatever their letters and lengths."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from domains.records import Document, Passage
from rag.embed import WordHashEmbedder
from rag.index import open_index, update_index
from rag.lexical import LexicalIndex
from rag.options import best_in, choose, evidence, statement, together

TEXTS = (
    "The pancreas makes insulin, which lowers the sugar in the blood.",
    "The thyroid makes thyroxine, which sets the pace of the body.",
    "The adrenal gland makes cortisol in times of stress.",
    "Insulin, thyroxine and cortisol are hormones.",
)
OPTIONS = {"A": "insulin", "B": "thyroxine", "C": "cortisol"}


@pytest.fixture
def lexical() -> LexicalIndex:
    return LexicalIndex.build(
        [
            Passage(passage_id=str(i), doc_id=str(i), title="", heading="", text=text, start=0, end=len(text))
            for i, text in enumerate(TEXTS)
        ]
    )


@pytest.mark.parametrize(("gland", "right"), [("pancreas", "A"), ("thyroid", "B"), ("adrenal gland", "C")])
def test_the_option_that_a_passage_joins_with_the_question_wins(
    lexical: LexicalIndex, gland: str, right: str
) -> None:
    found = evidence(
        f"What does the {gland} make?", OPTIONS, lambda query: float(lexical.scores(query).max())
    )
    assert choose(found) == right


def test_an_index_scores_by_its_best_passage(tmp_path: Path) -> None:
    embedder = WordHashEmbedder()
    documents = [
        Document(doc_id=str(i), title=f"Note {i}", text=text, source=f"{i}.md")
        for i, text in enumerate(TEXTS)
    ]
    update_index(tmp_path, documents, embedder=embedder, max_chars=200, overlap_chars=0)
    with closing(open_index(tmp_path, embedder=embedder)) as index:
        best = best_in(index)
        assert choose(evidence("What does the thyroid make?", OPTIONS, best)) == "B"
        assert best("zebra") == 0


def test_the_letters_do_not_matter(lexical: LexicalIndex) -> None:
    turned = {"A": "cortisol", "B": "insulin", "C": "thyroxine"}
    found = evidence("What does the pancreas make?", turned, lambda query: float(lexical.scores(query).max()))
    assert turned[choose(found)] == "insulin"


def test_an_option_stands_in_the_blank_or_behind_the_question() -> None:
    assert statement("The pancreas makes ____.", "insulin") == "The pancreas makes insulin."
    assert statement("What does it make?", "insulin") == "What does it make? insulin"
    assert statement("From ___ to ___", r"\1") == r"From \1 to \1"


def test_scores_of_any_unit_weigh_the_same_together() -> None:
    small = {"A": 0.001, "B": 0.002, "C": 0.003}
    large = {"A": 900.0, "B": 100.0, "C": 200.0}
    assert together(small, large) == pytest.approx(together({k: 1e6 * v for k, v in small.items()}, large))
    assert choose(together(small)) == "C"
    assert choose(together(large)) == "A"


def test_a_score_that_tells_nothing_apart_adds_nothing() -> None:
    told = {"A": 1.0, "B": 2.0}
    assert together(told, {"A": 5.0, "B": 5.0}) == together(told)
    assert choose({"A": 1.0, "B": 1.0}) == "A"
