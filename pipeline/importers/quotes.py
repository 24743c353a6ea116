"""Reference answers and gold quotes cut out of longer texts, always literally."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from domains.words import find_literal, squash
from pipeline.wording import content_words, sentences

# What `rag.answers` can write between quotation marks and read back.
MIN_QUOTE_CHARS = 8
MAX_QUOTE_CHARS = 600
LEAD_WORDS = 40
ANSWER_WORDS = 60


def quotable(text: str) -> bool:
    """Whether a sentence can stand between quotation marks: long enough, not endless, no marks inside."""
    return MIN_QUOTE_CHARS <= len(text) <= MAX_QUOTE_CHARS and not set('"“”') & set(text)


def decides(text: str) -> bool:
    """Whether a sentence states something: it neither asks nor announces what follows."""
    return not text.rstrip(" *_").endswith(("?", ":"))


def lead(text: str, *, max_words: int = LEAD_WORDS) -> tuple[str, str] | None:
    """The first one or two sentences as reference answer, and the literal first one as gold quote.

    The second sentence is taken only where both have at most ``max_words`` words together. Sentences that
    ask or only announce ("What are the symptoms?", "The symptoms are:") are passed over. None where no
    sentence can be quoted.
    """
    usable = (sentence for sentence in sentences(text) if quotable(sentence.text) and decides(sentence.text))
    found = [*islice(usable, 2)]
    if not found:
        return None
    first = found[0].text
    both = squash(f"{first} {found[1].text}") if len(found) > 1 else squash(first)
    return (both if len(both.split()) <= max_words else squash(first)), first


def best_sentence(text: str, query: str) -> str | None:
    """The quotable sentence of ``text`` that shares most content words with ``query``; the first on a tie.

    Score: the F1 of the two sets of stems, so that a long sentence does not win by its length.
    None where no sentence shares a word.
    """
    wanted = content_words(query)
    best, best_score = None, 0.0
    for sentence in sentences(text):
        if not quotable(sentence.text) or not decides(sentence.text):
            continue
        own = content_words(sentence.text)
        common = len(own & wanted)
        score = 2 * common / (len(own) + len(wanted)) if common else 0.0
        if score > best_score:
            best, best_score = sentence.text, score
    return best


def shorten(answer: str, *, max_words: int = ANSWER_WORDS) -> str | None:
    """As many whole sentences of ``answer`` from its beginning as have ``max_words`` words together.

    None where the first sentence alone is longer.
    """
    if len(answer.split()) <= max_words:
        return answer
    kept: list[str] = []
    for sentence in sentences(answer):
        candidate = [*kept, squash(sentence.text)]
        if len(" ".join(candidate).split()) > max_words:
            break
        kept = candidate
    return " ".join(kept) or None


def locate(answer: str, text: str) -> str | None:
    """The first sentence of ``answer`` that can be quoted and stands in ``text``, as it is written there."""
    for sentence in sentences(answer):
        stated = quotable(sentence.text) and decides(sentence.text)
        if stated and (literal := find_literal(sentence.text, text)):
            return literal
    return None


def sections(parts: Iterable[tuple[str, str]]) -> str:
    """A document's text from (heading, text) pairs, with ``## `` headings."""
    return "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in parts)
