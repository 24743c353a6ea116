"""What of a reply is given to the user: the quotes checked, and what no passage supports dealt with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from domains.config import OnUnsupported
from domains.records import Citation, Passage, Statement, Support, Withheld
from rag.answers import Reply, is_abstention, one_reply, parse_reply
from rag.citations import check_quotes
from rag.sentences import found_support, kept_text, link_sentences


@dataclass(frozen=True)
class Checked:
    """A reply after the check; see `domains.records.Answer` for the fields."""

    text: str
    support: Support
    citations: list[Citation] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    withheld: Withheld | None = None

    @property
    def given(self) -> bool:
        """Whether there is an answer: neither the model nor the check put the abstention in its place."""
        return self.support != "abstained" and self.withheld != "unsupported"

    def withheld_as_unsure(self, abstain: str) -> Checked:
        """The abstention in place of an answer that is not sure enough."""
        return replace(
            self, text=abstain, support="abstained", citations=[], statements=[], withheld="unsure"
        )


def check_reply(
    text: str,
    *,
    question: str,
    passages: Sequence[Passage],
    abstain: str,
    unsupported: OnUnsupported,
    closed_book: bool = False,
) -> Checked:
    """Check what a model wrote against what it was shown.

    Args:
        text: as the model wrote it.
        question: what was asked.
        passages: what it was shown, [1] first; without any, nothing is supported.
        abstain: the domain's abstention.
        unsupported: what becomes of text that no passage supports, see ``[serve]``.
        closed_book: an answer without any passage may stand, unsupported: there are no documents, or `serve.reflection` let it.
    """
    reply = parse_reply(one_reply(text))
    citations, rejected = check_quotes(reply.quotes, passages)
    if not reply.answer or is_abstention(reply.answer, abstain=abstain):
        return Checked(abstain, "abstained", rejected=rejected)
    strict = bool(passages) or not closed_book
    if strict and unsupported in {"drop", "mark"}:
        checked = _by_sentence(reply, question, citations, passages, mark=unsupported == "mark")
    else:
        checked = _as_a_whole(reply, question, citations, passages)
    checked = replace(checked, rejected=rejected)
    if strict and checked.support == "unsupported" and unsupported in {"drop", "withdraw"}:
        return replace(checked, text=abstain, statements=[], withheld="unsupported")
    return checked


def _as_a_whole(
    reply: Reply, question: str, citations: list[Citation], passages: Sequence[Passage]
) -> Checked:
    """A quote that stands supports the answer that was written with it; else a sentence that carries it."""
    if passages and not citations:
        found = found_support(question, reply.answer, reply.rationale, passages)
        citations = [found] if found else []
    linked = link_sentences(
        reply.answer,
        question=question,
        rationale=reply.rationale,
        citations=citations,
        passages=passages,
        search=False,
    )
    places = [citations.index(item) for item in linked.citations]
    statements = [
        Statement(text=item.text, citations=[places[i] for i in item.citations]) for item in linked.statements
    ]
    support: Support = "supported" if citations else "unsupported"
    return Checked(reply.answer, support, citations, statements=statements)


def _by_sentence(
    reply: Reply, question: str, citations: list[Citation], passages: Sequence[Passage], *, mark: bool
) -> Checked:
    """Every sentence must stand for itself."""
    linked = link_sentences(
        reply.answer,
        question=question,
        rationale=reply.rationale,
        citations=citations,
        passages=passages,
        search=True,
    )
    return Checked(
        kept_text(reply.answer, linked, mark=mark),
        "supported" if linked.citations else "unsupported",
        linked.citations,
        statements=linked.statements,
        withheld=None if mark or all(linked.supported) else "partly",
    )
