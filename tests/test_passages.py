"""Passages stand where they say, lose nothing and stay within their section."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from domains.errors import ConfigError
from domains.records import Document, Passage
from rag.passages import split_document

PIECES = st.sampled_from([
    *("# Title", "## Causes", "### Deep", "#", "# ", "```", "\n", "\n\n", "- item one.", "2) second", "| a | b |"),
    *("Gout hurts. It often starts at night! Does it?", "e.g. aspirin", "word", "x" * 47, " ", "\t", "a b c d e f"),
    *("Fièvre ≥ 38 °C.", "\u00a0", "\x85"),
])  # fmt: skip
TEXTS = st.lists(PIECES, min_size=1, max_size=30).map("\n".join).filter(lambda text: bool(text.strip()))


def document(text: str, **meta: str) -> Document:
    return Document(doc_id="gout", title="Gout", text=text, source="gout.md", meta=meta)


def split(text: str, max_chars: int = 200, overlap_chars: int = 0) -> list[Passage]:
    return split_document(document(text), max_chars=max_chars, overlap_chars=overlap_chars)


@given(TEXTS, st.integers(10, 120))
@settings(max_examples=300, deadline=None)
@example("## Only a heading", 200)
def test_passages_restore_the_document_by_their_offsets(text: str, max_chars: int) -> None:
    passages = split(text, max_chars)
    covered = bytearray(len(text))
    end = 0
    for passage in passages:
        assert passage.text == text[passage.start : passage.end]
        assert passage.passage_id == f"gout#{passage.start}-{passage.end}"
        assert len(passage.text) <= max_chars
        assert passage.text == passage.text.strip()
        assert passage.start >= end
        end = passage.end
        covered[passage.start : passage.end] = b"\1" * len(passage.text)
    lost = "".join(" " if covered[i] else char for i, char in enumerate(text))
    # What no passage holds is white space, or the headings of sections, which `heading` holds.
    assert all(re.fullmatch(r"#{1,6}[ \t]+.*|\s*", line) for line in re.split(r"\n", lost))
    assert passages


@given(TEXTS, st.integers(20, 120), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_an_overlap_keeps_the_bounds_and_only_repeats(text: str, max_chars: int, overlap: int) -> None:
    overlap = min(overlap, max_chars - 1)
    plain, overlapped = split(text, max_chars), split(text, max_chars, overlap)
    assert [passage.end for passage in plain] == [passage.end for passage in overlapped]
    for one, other in zip(plain, overlapped, strict=True):
        assert one.start - overlap <= other.start <= one.start
        assert other.text == text[other.start : other.end]
        assert len(other.text) <= max_chars
        assert other.heading == one.heading


def test_words_are_cut_only_where_one_is_longer_than_a_passage() -> None:
    text = "alpha beta gamma delta " * 20
    words = {word for passage in split(text, 25) for word in passage.text.split()}
    assert words == {"alpha", "beta", "gamma", "delta"}
    assert [passage.text for passage in split("ab " + "x" * 30, 20)] == ["ab", "x" * 20, "x" * 10]


def test_paragraphs_and_items_are_packed_whole_and_sections_kept_apart() -> None:
    text = "# Gout\n\nGout hurts.\n\n## Causes\nUrate.\n\nBeer.\n- item a\n- item b\n## Care\nRest it."
    passages = split(text, 30)
    assert [(passage.heading, passage.text) for passage in passages] == [
        ("", "Gout hurts."),
        ("Causes", "Urate.\n\nBeer.\n- item a"),
        ("Causes", "- item b"),
        ("Care", "Rest it."),
    ]


def test_long_paragraphs_are_cut_at_sentence_ends() -> None:
    text = "Take 2.5 mg daily, e.g. at night. Dr. Who agrees with that dose. Stop after a week."
    assert [passage.text for passage in split(text, 50)] == [
        "Take 2.5 mg daily, e.g. at night.",
        "Dr. Who agrees with that dose. Stop after a week.",
    ]


def test_an_overlap_begins_at_a_sentence_where_one_is_in_reach() -> None:
    text = "First one here. Second one here. Third one here. Fourth one here."
    starts = [passage.text.split()[0] for passage in split(text, 50, 20)]
    assert starts == ["First", "Third"]
    assert split(text, 50, 20)[1].text == "Third one here. Fourth one here."


def test_a_comment_in_a_code_block_is_no_heading() -> None:
    assert [p.heading for p in split("## Setup\n```\n# install\nmake\n```\nDone.")] == ["Setup"]


@pytest.mark.parametrize("status", ["superseded", "Rejected"])
def test_documents_that_no_longer_hold_say_so_in_the_title(status: str) -> None:
    (passage,) = split_document(document("Text.", status=status), max_chars=200, overlap_chars=0)
    assert passage.title == f"Gout ({status.lower()})"
    (current,) = split_document(document("Text.", status="current"), max_chars=200, overlap_chars=0)
    assert current.title == "Gout"


def test_an_overlap_as_long_as_the_passage_is_refused() -> None:
    with pytest.raises(ConfigError, match="overlap_chars = 200"):
        split("Text.", 200, 200)
