"""No exam question, and nothing close to one, may enter training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from domains.checks import PASS, Verdict
from domains.records import Question
from pipeline.near_duplicates import Gram, NearDuplicates, grams
from rag.words import words

# A word sequence that exam questions about this many documents share is the wording of a questionnaire
# ("which of the following is the most likely"), not the content of one question.
TEMPLATE_DOCUMENTS = 3


class ExamGuard:
    """Knows the exam's questions and recognises their traces in training text.

    Word sequences that recur in exam questions about `TEMPLATE_DOCUMENTS` documents are templates and
    do not count; a question that equals an exam question is refused whatever it is made of.

    Args:
        exam: the exam's questions.
        ngram: length in words of a sequence that must not be shared.
        near_duplicate: Jaccard similarity of word 3-grams from which two questions are the same.
    """

    def __init__(self, exam: Sequence[Question], *, ngram: int, near_duplicate: float) -> None:
        self._ngram = ngram
        self._exam = list(exam)
        self._exact = {tuple(words(question.question)): question.id for question in reversed(self._exam)}
        self._templates = _templates(exam, ngram)
        self._small_templates = _templates(exam, 3)
        self._owner: dict[Gram, str] = {}
        for question in exam:
            for gram in _long_grams(question.question, ngram) - self._templates:
                self._owner.setdefault(gram, question.id)
        sets = [grams(question.question) - self._small_templates for question in exam]
        self._near = NearDuplicates(sets, threshold=near_duplicate)
        for item in sets:
            self._near.add(item)

    @property
    def templates(self) -> int:
        """How many n-grams were found to be wording that many exam questions share."""
        return len(self._templates)

    def check(self, question: str, target: str) -> Verdict:
        """Whether a training row with this question and target keeps clear of the exam."""
        if twin := self._exact.get(tuple(words(question))):
            return Verdict(ok=False, reason="exam_question", detail=f"equals exam question {twin}")
        for text in (question, target):
            shared = sorted(_long_grams(text, self._ngram) & self._owner.keys())
            if shared:
                detail = f"shares {' '.join(shared[0])!r} with exam question {self._owner[shared[0]]}"
                return Verdict(ok=False, reason="exam_ngram", detail=detail)
        item = grams(question) - self._small_templates
        near = self._near.find(item) if item else None
        if near is not None:
            detail = f"nearly equals exam question {self._exam[near].id}"
            return Verdict(ok=False, reason="exam_near_duplicate", detail=detail)
        return PASS


def _long_grams(text: str, size: int) -> frozenset[Gram]:
    return frozenset(gram for gram in grams(text, size=size) if len(gram) == size)


def _templates(exam: Sequence[Question], size: int) -> frozenset[Gram]:
    documents: defaultdict[Gram, set[str]] = defaultdict(set)
    for question in exam:
        for gram in _long_grams(question.question, size):
            documents[gram].add(question.about)
    return frozenset(gram for gram, about in documents.items() if len(about) >= TEMPLATE_DOCUMENTS)
