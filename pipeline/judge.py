"""Which rationales are good enough, and which of several for one question are the best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from domains.checks import PASS, Check, Verdict
from domains.records import Passage, Question, Rationale, Rejection, Verification
from pipeline.decontaminate import ExamGuard
from pipeline.near_duplicates import Gram, grams, jaccard
from pipeline.progress import Progress
from pipeline.rows import Kept, own_quotes, target
from pipeline.verify import check_form, predicted, prose, quotes_stand, verify


@dataclass(frozen=True)
class Judge:
    """The checks of single rationales.

    Attributes:
        questions: all questions of the domain by id.
        passages: all passages of the index by id.
        guard: knows the exam.
        checks: the domain's own checks by name.
        min_words: fewest words of a rationale with its quotes.
        max_words: most words of it.
        rationale_trained: whether its text is trained on, before the answer or behind it.
    """

    questions: Mapping[str, Question]
    passages: Mapping[str, Passage]
    guard: ExamGuard
    checks: Mapping[str, Check]
    min_words: int
    max_words: int
    rationale_trained: bool

    def sort(self, rationales: Sequence[Rationale], progress: Progress) -> tuple[list[Kept], list[Rejection]]:
        """The rationales that pass, and the others with the first reason against them."""
        passed: list[Kept] = []
        rejected: list[Rejection] = []
        progress.start("checking rationales", len(rationales))
        for rationale in rationales:
            found = self.judge(rationale)
            if isinstance(found, Kept):
                passed.append(found)
            else:
                rejected.append(rejection(rationale, found))
            progress.advance()
        return passed, rejected

    def judge(self, rationale: Rationale) -> Kept | Verdict:
        """The rationale with its question and passages, or why it is rejected."""
        question = self.questions.get(rationale.question_id)
        if question is None:
            return Verdict(ok=False, reason="unknown_question", detail=rationale.question_id)
        if question.split == "exam" or question.kind == "unanswerable":
            reason = "exam_question" if question.split == "exam" else "unanswerable_question"
            return Verdict(ok=False, reason=reason, detail=question.id)
        missing = [passage_id for passage_id in rationale.passages if passage_id not in self.passages]
        if missing:
            return Verdict(ok=False, reason="unknown_passage", detail=missing[0])
        passages = [self.passages[passage_id] for passage_id in rationale.passages]
        verdict = self._check(question, rationale, passages)
        if not verdict.ok:
            return verdict
        found = Verification(pred=predicted(question, rationale), ok=True, method="rules")
        return Kept(question, rationale, passages, found)

    def _check(self, question: Question, rationale: Rationale, passages: list[Passage]) -> Verdict:
        verdict = check_form(rationale, min_words=self.min_words, max_words=self.max_words)
        verdict = verdict if not verdict.ok else verify(question, rationale)
        verdict = verdict if not verdict.ok else quotes_stand(rationale, passages)
        if not verdict.ok:
            return verdict
        completion = target(question, rationale, passages, rationale_in_target=self.rationale_trained)
        if completion is None:
            return Verdict(ok=False, reason="no_quote", detail="no gold or own quote stands in its passages")
        verdict = self.guard.check(question.question, completion)
        for name, check in self.checks.items():
            if not verdict.ok:
                break
            verdict = check(question, rationale, passages)
            if not verdict.ok and not verdict.reason:
                verdict = Verdict(ok=False, reason=name, detail=verdict.detail)
        return verdict


def select(
    passed: Sequence[Kept],
    *,
    keep_per_question: int,
    near_duplicate: float,
    row_of: Callable[[Kept], Hashable],
) -> tuple[list[Kept], list[Rejection]]:
    """The best rationales of each question, without near-duplicates of a better one.

    Best is: with a checked quote, then fewer words, then the earlier sample.

    Args:
        passed: those that passed the `Judge`.
        keep_per_question: the most of one question.
        near_duplicate: Jaccard similarity of word 3-grams from which two are the same.
        row_of: what a rationale's row is made of; a second one with the same would make the same row.

    Returns:
        The kept ones in the order of the questions, and a rejection for each other one.
    """
    by_question: defaultdict[str, list[Kept]] = defaultdict(list)
    for item in passed:
        by_question[item.question.id].append(item)
    kept: list[Kept] = []
    rejected: list[Rejection] = []
    for items in by_question.values():
        chosen: list[_Candidate] = []
        for item in sorted(items, key=_rank):
            text = item.rationale.text
            candidate = _Candidate(item, row_of(item), grams(prose(text) or text))
            verdict = _fits(candidate, chosen, keep_per_question, near_duplicate)
            if verdict.ok:
                chosen.append(candidate)
            else:
                rejected.append(rejection(item.rationale, verdict))
        kept += [candidate.item for candidate in chosen]
    return kept, rejected


def _rank(item: Kept) -> tuple[bool, int, int]:
    quoted = bool(own_quotes(item.rationale, item.passages))
    return not quoted, len(item.rationale.text.split()), item.rationale.sample


@dataclass(frozen=True)
class _Candidate:
    item: Kept
    row: Hashable
    own: frozenset[Gram]  # what near-duplicates are recognised by


def _fits(candidate: _Candidate, chosen: Sequence[_Candidate], most: int, threshold: float) -> Verdict:
    for better in chosen:
        similarity = jaccard(candidate.own, better.own)
        twin = f"sample {better.item.rationale.sample}"
        if similarity >= threshold:
            return Verdict(ok=False, reason="near_duplicate", detail=f"{similarity:.2f} with {twin}")
        if better.row == candidate.row:
            return Verdict(ok=False, reason="same_row", detail=f"{twin} makes the same training row")
    if len(chosen) >= most:
        return Verdict(ok=False, reason="surplus", detail=f"{most} per question are kept")
    return PASS


def rejection(rationale: Rationale, verdict: Verdict) -> Rejection:
    """The record of a rationale that was not kept."""
    return Rejection(
        question_id=rationale.question_id,
        sample=rationale.sample,
        reason=verdict.reason,
        detail=verdict.detail,
        text=rationale.text,
    )


def keep_clear(questions: Sequence[Question], guard: ExamGuard) -> tuple[list[Question], list[Rejection]]:
    """Questions that are trained on without a rationale and keep clear of the exam, and the others as rejections (sample 0)."""
    clear, contaminated = [], []
    for question in questions:
        verdict = guard.check(question.question, question.answer or "")
        if verdict.ok:
            clear.append(question)
        else:
            contaminated.append(
                Rejection(
                    question_id=question.id,
                    sample=0,
                    reason=verdict.reason,
                    detail=verdict.detail,
                    text=question.question,
                )
            )
    return clear, contaminated
