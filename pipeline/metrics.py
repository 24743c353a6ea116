"""What an answer is worth. Pure functions; no judge model, so the same answers always get the same marks.

A mark is (numerator, denominator); a metric over an exam is Σ numerators / Σ denominators (`pipeline.bootstrap`).
A question that a metric does not speak of (a citation metric of an unanswerable question) has no mark for it.

``score`` is the headline, one number in [0, 1] per question, so that one interval answers "did it help?":

    open           token F1 with the reference answer, 0 where the assistant abstained
    options        1 for the right letter, else 0
    yes_no         1 for the right word, else 0
    unanswerable   1 where the assistant said that it does not know, else 0

Answers are paid for what they say and abstentions where they are due; neither guessing always nor abstaining
always wins. F1 rather than exact match, because a free answer is rarely worded like its reference; 0 or 1 for the
others, because half an option does not exist. What can't be read as an option is wrong, never a lucky "A".

Citations are measured by place. A citation covers a gold quote when both lie in the same document and share at
least half of the shorter one's characters. ``citation_precision`` is the share of citations that stand literally in
the passage they name and cover a gold quote; ``citation_document`` asks only for the right document;
``citation_recall`` is the share of gold quotes that some citation covers. A fact that a document states twice may
be cited where the gold quote is not, so precision is a lower bound.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from domains.config import OnUnsupported
from domains.records import Answer, Citation, Hit, Passage, Question
from domains.words import find_literal
from pipeline.reflection_report import mark_reflection
from rag.answers import is_abstention, one_reply, parse_option, parse_reply, parse_yes_no
from rag.citations import check_quotes
from rag.sentences import citation_quality

Mark = tuple[float, float]
Span = tuple[int, int]

RECALL_AT = (1, 3, 10)
NDCG_AT = 10
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’“”–—")


@dataclass(frozen=True)
class Gold:
    """A gold quote and every place in its document where it stands (offsets in characters)."""

    doc_id: str
    spans: tuple[Span, ...]


# -- texts -------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """SQuAD's normal form (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """1 where both have the same normal form."""
    return float(normalise(answer) == normalise(reference))


def token_f1(answer: str, reference: str) -> float:
    """SQuAD's F1 over the words of the normal forms, counted with repetition."""
    said, wanted = normalise(answer).split(), normalise(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004) with beta = 1: F of the longest common subsequence of lower-cased words."""
    said, wanted = _rouge_words(answer), _rouge_words(reference)
    if not said or not wanted:
        return float(said == wanted)
    return 2 * _longest_common(said, wanted) / (len(said) + len(wanted))


def _rouge_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    row = [0] * (len(other) + 1)
    for a in one:
        diagonal = 0
        for j, b in enumerate(other, 1):
            above = row[j]
            row[j] = diagonal + 1 if a == b else max(above, row[j - 1])
            diagonal = above
    return row[-1]


# -- gold quotes and retrieval -----------------------------------------------------------------------


def locate_gold(question: Question, passages: Sequence[Passage]) -> tuple[list[Gold], list[str]]:
    """The gold quotes by place, and those that stand nowhere in their document.

    A document is put together from its passages by their offsets, so a quote that two passages share is found
    too. White space does not count.

    Args:
        question: with its gold quotes.
        passages: all passages of the index.
    """
    found, missing = [], []
    for gold in question.gold:
        text = _document_text([passage for passage in passages if passage.doc_id == gold.doc_id])
        pattern = r"\s+".join(re.escape(part) for part in gold.quote.split())
        spans = tuple(match.span() for match in re.finditer(pattern, text)) if pattern else ()
        if spans:
            found.append(Gold(gold.doc_id, spans))
        else:
            missing.append(gold.quote)
    return found, missing


def _document_text(passages: Sequence[Passage]) -> str:
    """The document as far as passages hold it; blanks elsewhere, so that offsets stay true."""
    text = [" "] * max((passage.end for passage in passages), default=0)
    for passage in passages:
        text[passage.start : passage.end] = passage.text
    return "".join(text)


def contains(passage: Passage, gold: Gold) -> bool:
    """Whether the passage holds the whole quote: what makes it relevant."""
    return passage.doc_id == gold.doc_id and any(
        passage.start <= start and end <= passage.end for start, end in gold.spans
    )


def mark_retrieval(gold: Sequence[Gold], hits: Sequence[Hit]) -> dict[str, Mark]:
    """``recall@k`` and ``ndcg@10`` of one question; no marks where it has no gold quotes.

    Recall is the share of gold quotes that a passage among the first k holds. For nDCG a passage gains 1 if it holds
    a quote that no passage before it held, and the ideal list has one such passage at the top for each that was
    found and for each quote that was not; with a single gold quote this is the usual binary nDCG.
    """
    if not gold:
        return {}
    marks: dict[str, Mark] = {}
    for k in RECALL_AT:
        covered = sum(any(contains(hit.passage, item) for hit in hits[:k]) for item in gold)
        marks[f"recall@{k}"] = (covered / len(gold), 1)
    open_items = list(gold)
    gain, useful = 0.0, 0
    for rank, hit in enumerate(hits[:NDCG_AT], 1):
        left = [item for item in open_items if not contains(hit.passage, item)]
        if len(left) < len(open_items):
            gain, useful, open_items = gain + 1 / math.log2(1 + rank), useful + 1, left
    ideal = sum(1 / math.log2(1 + rank) for rank in range(1, min(useful + len(open_items), NDCG_AT) + 1))
    marks[f"ndcg@{NDCG_AT}"] = (gain / ideal, 1)
    return marks


# -- answers -----------------------------------------------------------------------------------------


def mark_answer(
    question: Question,
    answer: Answer | None,
    *,
    gold: Sequence[Gold],
    abstain: str,
    seconds: float,
    unsupported: OnUnsupported = "withdraw",
) -> dict[str, Mark]:
    """All marks of one answer.

    Args:
        question: with its reference.
        answer: what the assistant said; None where the prompt did not fit the context, which is wrong.
        gold: its gold quotes by place, see `locate_gold`.
        abstain: the domain's sentence.
        seconds: its share of the wall time.
        unsupported: ``[serve] unsupported``, for what users would see of it.
    """
    abstained = answer is not None and is_abstention(answer.text, abstain=abstain)
    marks = _mark_content(question, None if answer is None or abstained else answer.text)
    marks |= _mark_abstention(question, abstained=abstained)
    if question.kind == "unanswerable":
        marks["score"] = (float(abstained), 1)
    else:
        marks["score_answerable"] = marks["score"]
    marks["too_long"] = (float(answer is None), 1)
    if answer is not None:
        marks |= _mark_evidence(question, answer, gold)
        marks |= _mark_withdrawal(question, answer, score=marks["score"][0], unsupported=unsupported)
        marks |= mark_reflection(answer.reflection)
        marks["tokens_per_s"] = (answer.completion_tokens, seconds)
        marks["seconds_per_question"] = (seconds, 1)
    return marks


def _mark_withdrawal(
    question: Question, answer: Answer, *, score: float, unsupported: OnUnsupported
) -> dict[str, Mark]:
    """What ``[serve] unsupported`` leaves of the answer; ``withdrawn`` where that is nothing.

    ``withdraw``: no shown passage supports the answer. ``drop``: none carries any of its sentences; what is left
    of the others is marked. Only for answers that were shown passages.
    """
    if not answer.passages:
        return {}
    said, left = answer.text, answer.text
    if answer.support != "abstained" and unsupported == "drop":
        left = " ".join(statement.text for statement in answer.statements if statement.citations)
    elif answer.support == "unsupported" and unsupported == "withdraw":
        left = ""
    if not left:
        return {"withdrawn": (1.0, 1), "score_served": (float(question.kind == "unanswerable"), 1)}
    partly = answer.support != "abstained" and unsupported == "drop" and question.kind != "unanswerable"
    served = _mark_content(question, left)["score"][0] if partly and left != said else score
    return {"withdrawn": (0.0, 1), "score_served": (served, 1)}


def _mark_content(question: Question, said: str | None) -> dict[str, Mark]:
    """Marks for what was said; ``said`` is None where nothing was."""
    reference = question.answer or ""
    if question.kind == "open":
        scorers = {
            "score": token_f1,
            "token_f1": token_f1,
            "rouge_l": rouge_l,
            "exact_match": exact_match,
        }
        return {name: (0 if said is None else scorer(said, reference), 1) for name, scorer in scorers.items()}
    if question.kind == "unanswerable":
        return {}
    if question.kind == "options":
        name, chosen = "option_accuracy", parse_option(said or "", question.options or {})
    else:
        name, chosen = "yes_no_accuracy", parse_yes_no(said or "")
    right = float(chosen == reference)
    # An abstention is wrong here but was understood.
    unparsable = float(said is not None and chosen is None)
    return {"score": (right, 1), name: (right, 1), "unparsable": (unparsable, 1)}


def _mark_abstention(question: Question, *, abstained: bool) -> dict[str, Mark]:
    """F1 of abstaining as 2 TP / (2 TP + FP + FN), a positive being an unanswerable question."""
    if question.kind == "unanswerable":
        f1 = (2.0, 2.0) if abstained else (0.0, 1.0)
        return {"abstention_recall": (float(abstained), 1), "abstention_f1": f1}
    return {
        "false_abstention": (float(abstained), 1),
        "abstention_f1": (0.0, float(abstained)),
    }


def _mark_evidence(question: Question, answer: Answer, gold: Sequence[Gold]) -> dict[str, Mark]:
    """Marks for quotes and citations; none for a closed-book answer."""
    passages = [hit.passage for hit in answer.passages]
    if not passages:
        return {}
    marks = _mark_statements(answer, passages)
    if quotes := parse_reply(one_reply(answer.raw)).quotes:
        _, rejected = check_quotes(quotes, passages)
        marks["quote_validity"] = (len(quotes) - len(rejected), len(quotes))
    if question.kind != "unanswerable" and (not gold or len(gold) < len(question.gold)):
        return marks  # no gold quote, or one that stands nowhere: no place to compare with
    real = [citation for citation in answer.citations if _is_literal(citation, passages)]
    if answer.citations:
        right = sum(any(covers(citation, item) for item in gold) for citation in real)
        near = sum(any(citation.doc_id == item.doc_id for item in gold) for citation in real)
        marks["citation_precision"] = (right, len(answer.citations))
        marks["citation_document"] = (near, len(answer.citations))
    if gold:
        covered = sum(any(covers(citation, item) for citation in real) for item in gold)
        marks["citation_recall"] = (covered, len(gold))
    return marks


def _mark_statements(answer: Answer, passages: Sequence[Passage]) -> dict[str, Mark]:
    """ALCE's citation recall and precision (arXiv 2305.14627) with literal support, see `rag.sentences`.

    They ask whether the citations carry what is said, not whether it is right.
    """
    if answer.support == "abstained" or not answer.statements:
        return {}
    texts = [statement.text for statement in answer.statements]
    carried, needed = citation_quality(texts, answer.citations, passages, question=answer.question)
    marks: dict[str, Mark] = {"alce_recall": (carried, len(texts))}
    if answer.citations:
        marks["alce_precision"] = (needed, len(answer.citations))
    return marks


def covers(citation: Citation, gold: Gold) -> bool:
    """Same document, and the spans share at least half of the shorter one."""
    if citation.doc_id != gold.doc_id:
        return False
    for start, end in gold.spans:
        shared = min(end, citation.end) - max(start, citation.start)
        if 2 * shared >= min(end - start, citation.end - citation.start) > 0:
            return True
    return False


def _is_literal(citation: Citation, passages: Sequence[Passage]) -> bool:
    shown = {passage.passage_id: passage.text for passage in passages}
    return find_literal(citation.quote, shown.get(citation.passage_id, "")) is not None
