"""KARD's filter without a second model (arXiv 2305.18395 §3.1): the rationale must entail the gold answer.

The teacher saw the answer, so agreement alone proves nothing: a rationale is kept only if its own words
and quotes carry the answer. The paper asks a judge model; here rules do, which reject more: a correct
paraphrase may fail. Another option, another number and a negation on one side only are seen (`pipeline.negation`);
of an open answer, other words for its opposite ("unsafe") are not, if enough of its own stand beside them, and of a yes/no
question without a gold quote nothing is seen but that the rationale speaks of what was asked and nowhere says the other word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from domains.checks import PASS, Verdict
from domains.records import Passage, Question, Rationale
from domains.words import numbers, squash
from pipeline.negation import opposed
from pipeline.wording import content_words, recall
from rag.answers import is_abstention, parse_option, parse_reply, parse_yes_no
from rag.citations import check_quotes
from rag.prompt import neutralise
from rag.words import words

MIN_RECALL = 0.5
# The teacher's short answer may be terser than the reference.
MIN_ANSWER_RECALL = 1 / 3
MIN_DECIDING_RECALL = 1 / 3
_END = re.compile(r"[.!?…:;)\]\"”’'*]$")
_NAMES_LETTER = re.compile(
    r"\b(?:option|choice|answer)s?(?:\s+(?:is|was|would be))?\s*:?\s*\(?([A-H])\)?(?![\w'’-])|\(([A-H])\)"
)
_POLARITY = re.compile(
    r"\banswer\s+(?:\w+\s+){0,3}?(?:is|was|would be|should be)\W{1,3}(yes|no|maybe)\b"
    r"|\banswer:\W{0,3}(yes|no|maybe)\b"
    r"|(?:^|[.!?]\s+)(yes|no|maybe)\s*[,.:;]"
    r"|\b(?:so|therefore|thus|hence),?\s+(yes|no|maybe)\b\s*[,.!]",
    re.IGNORECASE,
)


def prose(text: str) -> str:
    """A rationale's own words: quotes with their passage numbers and the answer line taken out."""
    reply = parse_reply(text)
    if reply.has_answer_line:
        return reply.rationale
    plain = text
    for quote, number in reply.quotes:
        plain = re.sub(rf'["“]\s*{re.escape(quote)}\s*["”]\s*[.,;]?\s*\[{number}\]', "", plain)
    return plain.strip()


def stated_answer(rationale: Rationale) -> str:
    """The answer that the teacher gave on a line of its own; empty where it wrote only an explanation."""
    answer, text = squash(rationale.answer).lower(), squash(rationale.text).lower()
    return "" if answer.endswith(text) else rationale.answer


def check_form(rationale: Rationale, *, min_words: int, max_words: int) -> Verdict:
    """Empty, too short, too long, or broken off in the middle of a sentence."""
    reply = parse_reply(rationale.text)
    own = prose(rationale.text)
    said = " ".join([*(quote for quote, _ in reply.quotes), own])
    if not words(said):
        return Verdict(ok=False, reason="empty", detail="neither a sentence nor a quote")
    count = len(said.split())
    if not min_words <= count <= max_words:
        return Verdict(
            ok=False, reason="length", detail=f"{count} words, {min_words} to {max_words} are allowed"
        )
    # What stands before an answer line is whole, however it ends.
    if own and not stated_answer(rationale) and not reply.has_answer_line and not _END.search(own):
        return Verdict(ok=False, reason="truncated", detail=f"ends with {own[-40:]!r}")
    return PASS


def verify(question: Question, rationale: Rationale) -> Verdict:
    """Whether the rationale entails the question's reference answer.

    Reasons: ``teacher_answer`` (its stated answer is another one), ``names_other_option``,
    ``contradicts_answer``, ``does_not_support_answer``, ``number_missing``.
    """
    if question.kind == "options":
        return _verify_options(question, rationale)
    if question.kind == "yes_no":
        return _verify_yes_no(question, rationale)
    return _verify_open(question, rationale)


def predicted(question: Question, rationale: Rationale) -> str:
    """The answer that the rules read in a rationale; empty where they read none.

    Of options the one whose words it has most of; else what the teacher stated, or the prose says of yes and no.
    """
    stated = stated_answer(rationale)
    if question.options:
        shares = _option_shares(question.options, _said(rationale))
        return max(shares, key=lambda letter: shares[letter])
    if question.kind == "yes_no":
        match = _POLARITY.search(prose(rationale.text))
        said = next(group for group in match.groups() if group).lower() if match else ""
        return parse_yes_no(stated) or said
    return squash(stated)


def _said(rationale: Rationale) -> str:
    """Prose and quotes, without the answer line: what has to carry the answer."""
    return f"{prose(rationale.text)} {_quoted(rationale)}"


def _quoted(rationale: Rationale) -> str:
    return " ".join(quote for quote, _ in parse_reply(rationale.text).quotes)


def _verify_options(question: Question, rationale: Rationale) -> Verdict:
    options, gold = question.options or {}, question.answer or ""
    stated = stated_answer(rationale)
    if stated and parse_option(stated, options) != gold:
        return Verdict(ok=False, reason="teacher_answer", detail=f"says {stated[:60]!r}, gold is {gold}")
    own = prose(rationale.text)
    named = {letter for match in _NAMES_LETTER.finditer(own) for letter in match.groups() if letter}
    if other := sorted(named & options.keys() - {gold}):
        return Verdict(ok=False, reason="names_other_option", detail=f"names option {other[0]}")
    text = f" {' '.join(words(own))} "
    known = f" {' '.join(words(question.question + ' ' + options[gold]))} "
    for letter, option in options.items():
        plain = f" {' '.join(words(option))} "
        if letter != gold and len(plain) > 4 and plain in text and plain not in known:
            return Verdict(ok=False, reason="names_other_option", detail=f"names {option!r} ({letter})")
    return _supports_option(options, gold, _said(rationale))


def _supports_option(options: dict[str, str], gold: str, said: str) -> Verdict:
    """The gold option's words must be found more fully than any other option's."""
    shares = _option_shares(options, said)
    best = max((share, letter) for letter, share in shares.items() if letter != gold)
    if shares[gold] > best[0]:
        return PASS
    detail = f"shares {shares[gold]:.0%} of option {gold}'s words, {best[0]:.0%} of option {best[1]}'s"
    return Verdict(ok=False, reason="does_not_support_answer", detail=detail)


def _option_shares(options: dict[str, str], said: str) -> dict[str, float]:
    """How many of each option's words are found, from 0 to 1, by letter."""
    found = content_words(said) | set(words(said))
    shares = {}
    for letter, option in options.items():
        wanted = content_words(option) or set(words(option))
        shares[letter] = len(wanted & found) / len(wanted) if wanted else 0.0
    return shares


def _verify_yes_no(question: Question, rationale: Rationale) -> Verdict:
    stated = stated_answer(rationale)
    if stated and parse_yes_no(stated) != question.answer:
        detail = f"says {stated[:60]!r}, gold is {question.answer}"
        return Verdict(ok=False, reason="teacher_answer", detail=detail)
    for match in _POLARITY.finditer(prose(rationale.text)):
        said = next(group for group in match.groups() if group).lower()
        if said != question.answer:
            return Verdict(ok=False, reason="contradicts_answer", detail=f"{squash(match[0])!r}")
    # Nothing in "no" can be looked for; what decides it can. Without a gold quote it must be about what was asked.
    quoted = " ".join(gold.quote for gold in question.gold)
    deciding, whose = (quoted, "gold quote") if quoted else (question.question, "question")
    share = recall(deciding, _said(rationale))
    if share < MIN_DECIDING_RECALL:
        return Verdict(
            ok=False, reason="does_not_support_answer", detail=f"has {share:.0%} of the {whose}'s words"
        )
    own = prose(rationale.text)
    if quoted and opposed(quoted, own):
        detail = f"{squash(own)[:80]!r} says the opposite of the gold quote {quoted[:60]!r}"
        return Verdict(ok=False, reason="contradicts_answer", detail=detail)
    return PASS


def _verify_open(question: Question, rationale: Rationale) -> Verdict:
    gold, said, stated = question.answer or "", _said(rationale), stated_answer(rationale)
    if is_abstention(stated or said, abstain="I don't know"):
        return Verdict(ok=False, reason="teacher_answer", detail=f"abstains: {(stated or said)[:60]!r}")
    if stated and not _agrees(gold, stated):
        return Verdict(
            ok=False, reason="teacher_answer", detail=f"says {stated[:60]!r}, gold is {gold[:60]!r}"
        )
    if missing := sorted(numbers(gold) - numbers(said)):
        return Verdict(ok=False, reason="number_missing", detail=f"{', '.join(missing)} occurs nowhere")
    share = recall(gold, said)
    if share < MIN_RECALL:
        detail = f"has {share:.0%} of the reference's words, {MIN_RECALL:.0%} are needed"
        return Verdict(ok=False, reason="does_not_support_answer", detail=detail)
    # Each by itself: a quote that says the answer must not hide that the teacher says the opposite.
    for part in (prose(rationale.text), _quoted(rationale)):
        if opposed(gold, part):
            detail = f"{squash(part)[:80]!r} says the opposite of {gold[:60]!r}"
            return Verdict(ok=False, reason="contradicts_answer", detail=detail)
    return PASS


def _agrees(gold: str, stated: str) -> bool:
    """Enough of the reference's words, not its opposite, and not other numbers in the place of its own."""
    wanted, given = numbers(gold), numbers(stated)
    if recall(gold, stated) < MIN_ANSWER_RECALL or opposed(gold, stated):
        return False
    return not (wanted and given and not wanted & given)


def as_shown(passages: Sequence[Passage]) -> list[Passage]:
    """The passages with the text that a prompt shows: control tokens taken apart."""
    return [passage.model_copy(update={"text": neutralise(passage.text)}) for passage in passages]


def quotes_stand(rationale: Rationale, passages: Sequence[Passage]) -> Verdict:
    """Every quote must stand in a passage that the teacher saw, word for word (`rag.citations`).

    A right quote with a wrong number passes: the row is written with the right one.
    """
    quotes = parse_reply(rationale.text).quotes
    rejected = check_quotes(quotes, as_shown(passages))[1] if quotes else []
    if not rejected:
        return PASS
    return Verdict(ok=False, reason="quote", detail=f"{rejected[0][:80]!r} stands in no passage it was shown")
