"""Questions with options, answered by what the documents speak for instead of by the model.

A small student says the same letter whatever it reads (docs/results.md). Each option is put into the question, and
the option whose best passage scores highest is the answer; that passage is its evidence. `rag.options` has the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from domains.records import Hit
from rag.options import choose, statement
from rag.prompt import closed_form, stem_of

_LOOKED_AT = 5  # passages per option, of which the one with the highest BM25 counts

# Query and number -> the best passages.
Find = Callable[[str, int], list[Hit]]


@dataclass(frozen=True)
class Picked:
    """An answer with its evidence first, then what the question itself found."""

    reply: str
    hits: list[Hit]


def pick_option(question: str, find: Find, shown: Sequence[Hit]) -> Picked | None:
    """The option that the documents speak for; None where there are no options, or no passage tells them apart.

    Args:
        question: as asked, with its options.
        find: looks for passages.
        shown: what the bare question found.
    """
    options = closed_form(question)
    if not isinstance(options, dict):
        return None
    stem = stem_of(question)
    best: dict[str, Hit] = {}
    for letter, text in options.items():
        hits = find(statement(stem, text), _LOOKED_AT)
        if hits:
            best[letter] = max(hits, key=_lexical)
    scores = {letter: _lexical(best[letter]) if letter in best else 0.0 for letter in options}
    if len(set(scores.values())) == 1:
        return None
    letter = choose(scores)
    return Picked(f"Answer: {letter}. {options[letter]}", evidence_first(best[letter], shown))


def evidence_first(evidence: Hit, shown: Sequence[Hit]) -> list[Hit]:
    """As many passages as were shown, at least one, the evidence before all others."""
    rest = [hit for hit in shown if hit.passage.passage_id != evidence.passage.passage_id]
    return [evidence, *rest][: max(1, len(shown))]


def _lexical(hit: Hit) -> float:
    return hit.scores.get("lexical", 0.0)
