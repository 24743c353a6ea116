r"""Self-RAG's vocabulary and the shape of a reflected answer (arXiv 2310.11511, table 1).

Structure first: an answer is a list of segments, and text comes from it in one place. What training must not
supervise (the passages) is known from the structure and never found by looking through text.

grammar      answer  := segment* [Utility:k]
             segment := [No Retrieval] text
                      | [Continue to Use Evidence] text
                      | [Retrieval]<paragraph>TITLE\nTEXT</paragraph>[Relevant] text support
                      | [Retrieval]<paragraph>TITLE\nTEXT</paragraph>[Irrelevant] text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from domains.records import Passage, Segment
from rag.untrusted import disarm as disarm
from rag.untrusted import neutralise

RETRIEVE = {
    "retrieve": "[Retrieval]",
    "no_retrieval": "[No Retrieval]",
    "continue": "[Continue to Use Evidence]",
}
RELEVANCE = {"relevant": "[Relevant]", "irrelevant": "[Irrelevant]"}
SUPPORT = {
    "full": "[Fully supported]",
    "partial": "[Partially supported]",
    "none": "[No support / Contradictory]",
}
UTILITY = {k: f"[Utility:{k}]" for k in (1, 2, 3, 4, 5)}
ABSTENTION_UTILITY = 1  # it does not give what was asked; a supported answer shall win against it
PARAGRAPH = ("<paragraph>", "</paragraph>")

# The 15 added tokens, in the order of their ids.
TOKENS = (*RETRIEVE.values(), *RELEVANCE.values(), *SUPPORT.values(), *UTILITY.values(), *PARAGRAPH)


@dataclass(frozen=True)
class Piece:
    """A part of a rendered answer. ``supervised`` is False inside a passage."""

    text: str
    supervised: bool


def render_passage(passage: Passage) -> str:
    """The inside of a paragraph: title and text, neutralised."""
    return neutralise(f"{passage.title}\n{passage.text.strip()}")


def render_segments(segments: Sequence[Segment], utility: int | None) -> list[Piece]:
    """A reflected answer as pieces of text, in order; joined they are what the model learns to write.

    Args:
        segments: in order; their ``text`` is neutralised here.
        utility: 1 to 5, or None to leave it open.
    """
    pieces = [piece for segment in segments for piece in render_segment(segment)]
    if utility is not None:
        pieces.append(Piece(UTILITY[utility], True))
    return pieces


def render_segment(segment: Segment) -> list[Piece]:
    """One segment, see the grammar."""
    pieces = [Piece(RETRIEVE[segment.decision], True)]
    if segment.passage is not None:
        pieces += [
            Piece(PARAGRAPH[0], True),
            Piece(render_passage(segment.passage), False),
            Piece(PARAGRAPH[1], True),
            Piece(RELEVANCE["relevant" if segment.relevant else "irrelevant"], True),
        ]
    pieces.append(Piece(neutralise(segment.text), True))
    if segment.support is not None:
        pieces.append(Piece(SUPPORT[segment.support], True))
    return pieces
