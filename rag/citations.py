"""Does an answer stand in the documents? Literal quotes checked, and support found by word overlap.

Both are pure functions over the passages that the student saw.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from domains.records import Citation, Passage
from domains.words import NUMBER_WORDS, amounts, numbers
from rag.words import NEGATIONS, is_negation, sentence_spans, stem, words

_NAME = re.compile(r"\b[A-Z][\w-]+")
_MIN_CHARS, _MIN_WORDS = 8, 2
_SAME = str.maketrans({
    **dict.fromkeys("‘’‚‛′`´", "'"),
    **dict.fromkeys("“”„‟″«»", '"'),
    **dict.fromkeys("‐‑‒–—―−", "-"),
    "\u00ad": None,  # soft hyphen
    "\u200b": None,  # zero width space
    "\ufeff": None,
})  # fmt: skip
_BULLET = re.compile(r"^[ \t]*[-*+•][ \t]+", re.MULTILINE)
# Words that say nothing about whether a sentence supports a claim. Negations are not among them.
_FUNCTION = """
a an the and or but if then than so as of at by for from in into on onto to with about over under
between during through up down out off is are was were be been being am do does did doing done has have
had having can could may might must shall should will would i you he she it we they me him her us them
my your his its our their this that these those there here who whom whose which what when where why how
also just very too only own same such both each any some all most more other another e g i.e according
answer passage document says said states stated mentions
"""
_FUNCTION_WORDS = frozenset(_FUNCTION.split())
# Answers without words of their own: what they mean stands in the question.
_BARE = frozenset({"yes", "mayb", "maybe", *"abcdefgh"})
# Where a negation does not reach across: "given to adults, not to children", "a tablet that does not cause drowsiness".
_CLAUSE = re.compile(
    r"[,;:](?=\s)|[()—]"
    r"|(?=\b(?:and|or|but|that|which|who|because|although|though|while|unless|if|when)\b)",
    re.IGNORECASE,
)
_STOP = re.compile(r"[,;:](?=\s)|[()—]")  # a denial does reach across "that": "not shown that it helps"
# These reach past two content words ("not shown to help") and back ("is not advised"); "no" and "without" three words on.
_DENIALS = frozenset({"not", "never", "cannot"})
_REACH, _NEAR = 2, 3
_YES = "yes"
_MARK = re.compile(r"\[\d{1,2}\]")  # the number of a passage, not a number that is claimed


@dataclass(frozen=True)
class _Normal:
    """A text with one spelling of spaces, quotes and dashes; ``origin[i]`` is where ``text[i]`` stood."""

    text: str
    origin: list[int]


def check_quotes(
    quotes: Sequence[tuple[str, int]], passages: Sequence[Passage]
) -> tuple[list[Citation], list[str]]:
    """Which quotes stand in the passages, word for word.

    White space, list bullets, the shape of quotation marks and dashes, and the case of the first
    letter do not count; nor does closing punctuation. A quote that stands in another passage than
    its number says gets the right number. One of fewer than 8 characters or 2 words proves nothing.

    Args:
        quotes: (text, passage number from 1), as the student wrote them.
        passages: what the student saw, [1] first.

    Returns:
        The citations, each once, in the order of the quotes; and the quotes that stand nowhere.
    """
    citations: list[Citation] = []
    rejected = []
    normal = [_normalise(passage.text) for passage in passages]
    for quote, number in quotes:
        order = sorted(range(len(passages)), key=lambda i: (i != number - 1, i))
        found = next(((i, span) for i in order if (span := _find(quote, normal[i]))), None)
        if found is None:
            rejected.append(quote)
            continue
        citation = _citation(found[0] + 1, passages[found[0]], found[1], by_model=True)
        if citation not in citations:
            citations.append(citation)
    return citations, rejected


def find_support(
    claim: str, passages: Sequence[Passage], *, own: str = "", min_overlap: float = 0.6
) -> Citation | None:
    """The passage sentence that covers the largest share of the claim's content words.

    Words are compared by stem. Every number of the claim must stand in the sentence, with no other unit, every
    capitalised word of it in the passage or its title (a claim about another medicine or product is not
    supported), and the matched part of the sentence must be negated exactly if the claim is. Ties go
    to the shorter sentence, then to the earlier passage. A one-word claim is found wherever the word stands: put the
    question's words into the claim when the answer is that short, and name the answer's ``own``.

    Args:
        claim: one sentence.
        passages: what the student saw.
        own: the part of the claim that was not asked but answered: the sentence, with its passage's title and heading,
            must have the same least share of its content words, whatever else it shares with the claim.
        min_overlap: the least share of content words, in [0, 1].
    """
    claim, own = _MARK.sub(" ", claim), _MARK.sub(" ", own)
    wanted, answered = content(claim), content(own)
    names = content(" ".join(_NAME.findall(claim)))
    negated = _is_negated(words(claim))
    best: tuple[float, int, int, tuple[int, int]] | None = None
    if not wanted:
        return None
    for i, passage in enumerate(passages):
        context = content(f"{passage.title} {passage.heading}")
        if not names <= context | content(passage.text):
            continue
        for span in sentence_spans(passage.text):
            sentence = passage.text[span[0] : span[1]]
            found = _matched(wanted, "", sentence, "", negated=negated)
            if not found or len(found) < min_overlap * len(wanted):
                continue
            if not numbers(claim) <= numbers(sentence) | _named(passage) or not _amounts_agree(
                claim, sentence
            ):
                continue
            if len(answered & (found | context)) < min_overlap * len(answered):
                continue
            candidate = (-len(found) / len(wanted), span[1] - span[0], i, span)
            if best is None or candidate < best:
                best = candidate
    if best is None:
        return None
    return _citation(best[2] + 1, passages[best[2]], best[3], by_model=False)


def supports(
    claim: str,
    citations: Sequence[Citation],
    passages: Sequence[Passage],
    *,
    question: str = "",
    min_overlap: float = 0.6,
) -> bool:
    """Whether the cited words together carry a claim; more citations never support less.

    As in `find_support`: numbers and names of the claim must stand in what is cited, whoever said them first, and
    negation must agree; it is looked for in the whole sentences that the citations were taken from. Other words that
    the question said need no support; a claim that says nothing beyond it ("Yes") rests on any citation, "yes" on one
    that has the question's numbers.

    Args:
        claim: one sentence of an answer.
        citations: checked ones, see `check_quotes`.
        passages: what the student saw; a citation counts with its passage's title and heading.
        question: what was asked.
        min_overlap: the least share of content words, in [0, 1].
    """
    shown = {passage.passage_id: passage for passage in passages}
    cited = [(item, shown[item.passage_id]) for item in citations if item.passage_id in shown]
    claim = _MARK.sub(" ", claim)
    wanted = content(claim) - _BARE
    fresh = wanted - content(question) or wanted
    if not cited:
        return False
    quoted = numbers(" ".join(item.quote for item, _ in cited))
    # "Yes" claims what was asked, and so its numbers.
    asked = question if words(claim)[:1] == [_YES] else ""
    if not numbers(asked) <= quoted or not numbers(claim) <= quoted.union(*(_named(p) for _, p in cited)):
        return False
    if not _amounts_agree(f"{claim} {asked}", " ".join("".join(_around(item, p)) for item, p in cited)):
        return False
    if not fresh:
        return True
    context = content(" ".join(f"{p.title} {p.heading}" for _, p in cited))
    said = context | content(" ".join(p.text for _, p in cited))
    if not _names(claim, question) - _BARE <= said:
        return False
    negated = _is_negated(words(claim))
    found = set().union(*(_matched(wanted, *_around(item, p), negated=negated) for item, p in cited))
    if not found:
        return False
    return len(fresh & (found | context)) >= min_overlap * len(fresh)


def _amounts_agree(claim: str, said: str) -> bool:
    """Whether no number of a claim stands with other units only in what was said, nor a period or "twice" with another."""
    theirs = amounts(said)
    return all(units & theirs.get(number, units) for number, units in amounts(claim).items())


def _named(passage: Passage) -> set[str]:
    """Numbers of a passage's title and heading that are part of a name ("type 1 diabetes") and no amounts."""
    above = f"{passage.title} {passage.heading}"
    return numbers(above) - amounts(above).keys()


def _names(claim: str, question: str) -> set[str]:
    """Stems of a claim's capitalised words; not of its first where the question has it as a plain word ("Take …")."""
    found = _NAME.findall(claim)
    plain = re.findall(r"\b[a-z][\w-]+", question)
    return content(" ".join(name for i, name in enumerate(found) if i or name.lower() not in plain))


def _around(citation: Citation, passage: Passage) -> tuple[str, str, str]:
    """What stands before the cited words in their sentences, these, and what stands behind them."""
    begin, end = citation.start - passage.start, citation.end - passage.start
    spans = [span for span in sentence_spans(passage.text) if span[0] < end and begin < span[1]]
    if not spans:
        return "", citation.quote, ""
    return passage.text[spans[0][0] : begin], citation.quote, passage.text[end : spans[-1][1]]


def best_overlap(claim: str, passages: Sequence[Passage]) -> float:
    """The largest share of a claim's content words that one passage sentence has, in [0, 1]; see `find_support`."""
    claim = _MARK.sub(" ", claim)
    wanted, negated = content(claim), _is_negated(words(claim))
    if not wanted:
        return 0.0
    sentences = [
        passage.text[start:end] for passage in passages for start, end in sentence_spans(passage.text)
    ]
    return max((_share(wanted, sentence, negated=negated) for sentence in sentences), default=0.0)


def coverage(text: str, passage: Passage) -> float:
    """The share of a text's content words that a passage has, its title and heading included, in [0, 1]."""
    wanted = content(text)
    if not wanted:
        return 0.0
    return len(wanted & content(f"{passage.title} {passage.heading} {passage.text}")) / len(wanted)


def _citation(number: int, passage: Passage, span: tuple[int, int], *, by_model: bool) -> Citation:
    start, end = span
    return Citation(
        number=number,
        passage_id=passage.passage_id,
        doc_id=passage.doc_id,
        title=passage.title,
        quote=passage.text[start:end],
        start=passage.start + start,
        end=passage.start + end,
        by="model" if by_model else "overlap",
    )


def _normalise(text: str) -> _Normal:
    bullets = {i for match in _BULLET.finditer(text) for i in range(*match.span())}
    out: list[str] = []
    origin: list[int] = []
    for i, char in enumerate(text):
        if i in bullets or char.isspace():
            if out and out[-1] != " ":
                out.append(" ")
                origin.append(i)
            continue
        # Before and after: NFKC would take the acute accent for a blank, and makes a hyphen of others.
        for piece in unicodedata.normalize("NFKC", char.translate(_SAME)).translate(_SAME):
            if piece != " ":
                out.append(piece)
                origin.append(i)
    return _Normal("".join(out), origin)


def _find(quote: str, passage: _Normal) -> tuple[int, int] | None:
    """Offsets of a quote in a passage's own text, or None."""
    plain = _normalise(quote).text.strip().strip("\"'").strip().rstrip(".,;:!? ")
    if len(plain) < _MIN_CHARS or len(plain.split()) < _MIN_WORDS:
        return None
    at = passage.text.find(plain[1:], 1)
    while at >= 0:
        start, end = at - 1, at - 1 + len(plain)
        if passage.text[start].casefold() == plain[0].casefold() and _whole(passage.text, start, end):
            closing = passage.text[end : end + 1]
            if closing and closing in ".!?" and quote.rstrip(" \"'”’").endswith(closing):
                end += 1
            return passage.origin[start], passage.origin[end - 1] + 1
        at = passage.text.find(plain[1:], at + 1)
    return None


def _whole(text: str, start: int, end: int) -> bool:
    """No word or number is cut: "5 mg daily" does not stand in "2.5 mg daily" or "15 mg daily"."""
    before, after = text[:start][-2:], text[end : end + 2]
    if before and before[-1].isalnum() and text[start].isalnum():
        return False
    if after and after[0].isalnum() and text[end - 1].isalnum():
        return False
    if text[start].isdigit() and re.fullmatch(r"\d[.,]", before):
        return False
    return not (text[end - 1].isdigit() and re.fullmatch(r"[.,]\d", after))


def content(text: str) -> set[str]:
    """The stems of a text's words that say something: no function words, no negations; number words as digits."""
    return set(_stems(word for word in words(text) if word not in _FUNCTION_WORDS | NEGATIONS))


def _stems(text_words: Iterable[str]) -> list[str]:
    return stem([NUMBER_WORDS.get(word, word) for word in text_words])


def _is_negated(text_words: Sequence[str]) -> bool:
    return any(is_negation(word) for word in text_words)


def _share(wanted: set[str], sentence: str, *, negated: bool) -> float:
    """The share of the wanted stems that the sentence has; 0 where the negation differs."""
    return len(_matched(wanted, "", sentence, "", negated=negated)) / len(wanted)


def _matched(wanted: set[str], before: str, text: str, behind: str, *, negated: bool) -> set[str]:
    """The wanted stems that a text has; none where the negation differs.

    A negation up to three words ahead of the matched part belongs to it ("do not give X", "no known harm"), a "not" also
    with up to two content words between ("not shown to help") and behind it in the same clause ("giving X is not
    advised"), in the text or ``before`` and ``behind`` it.
    """
    pieces = [words(piece) for piece in _CLAUSE.split(text)]
    said = [word for piece in pieces for word in piece]
    stems = _stems(said)
    matched = [i for i, term in enumerate(stems) if term in wanted]
    if not matched:
        return set()
    first, last = matched[0], matched[-1]
    ahead = [*words(before), *said[:first]][-_NEAR:]
    parts = [words(piece) for piece in _STOP.split(text)]
    phrase, begins = _rest(parts, first, forwards=False)
    if begins:  # so does what stands before the text
        phrase = [*words(_STOP.split(before)[-1]), *phrase]
    clause, ends = _rest(pieces, last, forwards=True)
    if ends:
        clause = [*clause, *words(_CLAUSE.split(behind)[0])]
    found = _is_negated([*ahead, *said[first : last + 1]]) or _denied(phrase[::-1]) or _denied(clause)
    return {stems[i] for i in matched} if found == negated else set()


def _rest(pieces: Sequence[Sequence[str]], at: int, *, forwards: bool) -> tuple[list[str], bool]:
    """The words behind (or before) word ``at`` in its piece, and whether that is the last (or first) one."""
    start = 0
    for number, piece in enumerate(pieces):
        if at < start + len(piece):
            rest = piece[at - start + 1 :] if forwards else piece[: at - start]
            return list(rest), number == (len(pieces) - 1 if forwards else 0)
        start += len(piece)
    return [], False


def _denied(text_words: Sequence[str]) -> bool:
    """Whether a denial stands before the third content word."""
    passed = 0
    for word in text_words:
        if word in _DENIALS or word.endswith("n't"):
            return True
        passed += word not in _FUNCTION_WORDS | NEGATIONS
        if passed > _REACH:
            return False
    return False
