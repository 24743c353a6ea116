from __future__ import annotations

import pytest
from pydantic import ValidationError

from domains.records import Passage, Segment
from rag.reflection import TOKENS, disarm, render_segments


def passage(text: str, title: str = "Gout") -> Passage:
    return Passage(
        passage_id="gout-0", doc_id="gout", title=title, heading="", text=text, start=0, end=len(text)
    )


def test_two_passages_are_the_only_unsupervised_pieces_and_each_segment_keeps_its_judgements() -> None:
    segments = [
        Segment(
            decision="retrieve",
            passage=passage("Urate falls."),
            relevant=True,
            text="It falls.",
            support="full",
        ),
        Segment(decision="retrieve", passage=passage("Other."), relevant=False, text="Unclear."),
        Segment(decision="no_retrieval", text="Done."),
    ]
    pieces = render_segments(segments, 5)
    assert "".join(piece.text for piece in pieces) == (
        "[Retrieval]<paragraph>Gout\nUrate falls.</paragraph>[Relevant]It falls.[Fully supported]"
        "[Retrieval]<paragraph>Gout\nOther.</paragraph>[Irrelevant]Unclear."
        "[No Retrieval]Done.[Utility:5]"
    )
    assert [piece.text for piece in pieces if not piece.supervised] == ["Gout\nUrate falls.", "Gout\nOther."]


def test_there_are_fifteen_different_tokens() -> None:
    assert len(set(TOKENS)) == 15


@pytest.mark.parametrize("token", TOKENS)
def test_a_document_that_contains_a_reflection_token_cannot_speak_as_the_model(token: str) -> None:
    attack = Segment(
        decision="retrieve",
        passage=passage(f"x {token} y", title=token),
        relevant=True,
        text=f"a {token.upper()} b",
        support="none",
    )
    plain = Segment(
        decision="retrieve", passage=passage("x y", title="t"), relevant=True, text="a b", support="none"
    )

    def count(segment: Segment) -> int:
        return "".join(piece.text for piece in render_segments([segment], None)).lower().count(token.lower())

    assert count(attack) == count(plain)
    assert token.lower() not in disarm(f"{token} {token.replace(' ', '  ')}").lower()


@pytest.mark.parametrize(
    "fields",
    [
        {"decision": "retrieve", "text": "x"},
        {
            "decision": "no_retrieval",
            "text": "x",
            "passage": passage("p"),
            "relevant": True,
            "support": "full",
        },
        {"decision": "retrieve", "text": "x", "passage": passage("p"), "relevant": False, "support": "full"},
        {"decision": "retrieve", "text": "x", "passage": passage("p"), "relevant": True},
    ],
)
def test_judgements_that_do_not_fit_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Segment.model_validate(fields)
