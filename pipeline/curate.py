"""curate: which of the teacher's rationales become training rows. Nothing is dropped silently.

reads    rationales.jsonl, the domain's questions, the index
writes   train.jsonl (`Example`), rejected.jsonl (`Rejection`)
counts   in = kept + rejected = kept + Σ reasons.*
         rows = kept + irrelevant_extra + unanswerable_rows
              = gold_rows + retrieved_rows + irrelevant_rows + unanswerable_rows

A rationale is rejected for the first check that it fails, in this order: known question and passages,
form, entailment (`pipeline.verify`), quotes, exam (`pipeline.decontaminate`), the domain's own checks,
a target that can be written; then, best first within a question (with a checked quote before without,
then the shorter), near-duplicates and more than ``keep_per_question``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from domains.checks import PASS, Check, Verdict, load_checks
from domains.domain import Domain
from domains.errors import ConfigError, StageError
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Passage, Question, Rationale, Rejection
from pipeline.decontaminate import ExamGuard
from pipeline.near_duplicates import grams, jaccard
from pipeline.progress import Progress
from pipeline.rows import Kept, Origin, RowBuilder, own_quotes, target
from pipeline.run_folder import Report, Run, disk_errors, need
from pipeline.verify import check_form, prose, quotes_stand, verify
from rag.index import open_index

ORIGINS = get_args(Origin)
HINTS = {
    "teacher_answer": 'use a stronger teacher: [teacher] kind = "endpoint", see docs/teachers.md',
    "does_not_support_answer": 'use a stronger teacher: [teacher] kind = "endpoint", see docs/teachers.md',
    "quote": "use a stronger teacher, or lower [teacher] temperature",
    "length": "change [curate] min_words or max_words",
    "truncated": "raise [teacher] max_tokens",
    "exam_ngram": "raise [curate] decontaminate_ngram, or take the exam's wording out of the seed questions",
    "unknown_question": "preceptor elicit DOMAIN (the questions changed since)",
    "unknown_passage": "preceptor elicit DOMAIN (the documents changed since)",
}


def run(domain: Domain, run: Run, progress: Progress) -> Report:
    """Check every rationale and write the training rows.

    Raises:
        StageError: an input is missing, or no rationale was kept (names the commonest reason).
        ConfigError: the domain has no questions, or a named check does not exist.
    """
    from rag.retrieve import Retriever

    config = domain.config
    checks = load_checks(domain.folder, config.curate.checks)
    questions = read_questions(domain)
    rationales = read_jsonl(need(run.rationales, stage="elicit"), Rationale)
    index = open_index(need(run.index, stage="index"))
    guard = ExamGuard(
        [question for question in questions if question.split == "exam"],
        ngram=config.curate.decontaminate_ngram,
        near_duplicate=config.curate.near_duplicate,
    )
    judge = Judge(
        {question.id: question for question in questions},
        {passage.passage_id: passage for passage in index.passages},
        guard,
        checks,
        min_words=config.curate.min_words,
        max_words=config.curate.max_words,
        rationale_in_target=config.curate.rationale_in_target,
    )
    passed, rejected = judge.sort(rationales, progress)
    kept, surplus = select(
        passed,
        keep_per_question=config.curate.keep_per_question,
        near_duplicate=config.curate.near_duplicate,
        rationale_in_target=config.curate.rationale_in_target,
    )
    rejected += surplus
    reasons = Counter(rejection.reason for rejection in rejected)
    with disk_errors(run.folder):
        write_jsonl(run.rejections, rejected)
    require_some(kept, reasons, run.rejections)
    retriever = Retriever(
        index,
        candidates=config.retrieve.candidates,
        rrf_k=config.retrieve.rrf_k,
        lexical_weight=config.retrieve.lexical_weight,
        dense_weight=config.retrieve.dense_weight,
    )
    builder = RowBuilder(
        system=domain.prompts["system"],
        abstain=config.domain.abstain,
        retrieve=lambda query, top_k: [hit.passage for hit in retriever.retrieve(query, top_k=top_k)],
        top_k=config.retrieve.top_k,
        rationale_in_target=config.curate.rationale_in_target,
        seed=config.curate.seed,
    )
    unanswerable = [q for q in questions if q.kind == "unanswerable" and q.split == "seed"]
    clear, contaminated = keep_clear(unanswerable, guard)
    rows, counts = builder.build(
        kept,
        clear,
        retrieved_share=config.curate.retrieved_share,
        irrelevant_share=config.curate.irrelevant_share,
    )
    with disk_errors(run.folder):
        write_jsonl(run.rejections, [*rejected, *contaminated])
        write_jsonl(run.examples, rows)
    progress.say(f"{len(kept)} of {len(rationales)} rationales kept, {len(rows)} training rows")
    return Report(
        counts={
            "in": len(rationales),
            "kept": len(kept),
            "rejected": len(rejected),
            **{f"reasons.{reason}": count for reason, count in sorted(reasons.items())},
            "rows": len(rows),
            **{f"{origin}_rows": 0 for origin in ORIGINS},
            "unanswerable_contaminated": len(contaminated),
            **dict(sorted(counts.items())),
        },
        facts={"exam_templates": guard.templates},
    )


def read_questions(domain: Domain) -> list[Question]:
    """The domain's questions.

    Raises:
        ConfigError: the domain names no file of questions.
    """
    if domain.questions is None:
        raise ConfigError(
            f"domain {domain.name!r} has no questions",
            expected="corpus.questions: a file of seed and exam questions",
            next_step="preceptor new NAME --docs DIR makes starter questions",
        )
    return read_jsonl(domain.questions, Question)


def require_some(kept: Sequence[Kept], reasons: Counter[str], rejections: Path) -> None:
    """Stop where nothing was kept.

    Raises:
        StageError: names the commonest reason, where all are written down, and what helps.
    """
    if kept:
        return
    if not reasons:
        raise StageError(
            "0 of 0 rationales kept: there are none",
            expected="at least one rationale",
            next_step="preceptor elicit DOMAIN",
        )
    reason, count = reasons.most_common(1)[0]
    raise StageError(
        f"0 of {reasons.total()} rationales kept; most common reason: {reason} ({count}); all in {rejections}",
        expected="at least one rationale that passes every check",
        next_step=HINTS.get(
            reason, f"look at {rejections} and mend the questions, the prompts or the checks"
        ),
    )


def keep_clear(questions: Sequence[Question], guard: ExamGuard) -> tuple[list[Question], list[Rejection]]:
    """Unanswerable seed questions that keep clear of the exam, and the others as rejections (sample 0)."""
    clear, contaminated = [], []
    for question in questions:
        verdict = guard.check(question.question, "")
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
        rationale_in_target: whether its text becomes part of the target.
    """

    questions: Mapping[str, Question]
    passages: Mapping[str, Passage]
    guard: ExamGuard
    checks: Mapping[str, Check]
    min_words: int
    max_words: int
    rationale_in_target: bool

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
        return verdict if not verdict.ok else Kept(question, rationale, passages)

    def _check(self, question: Question, rationale: Rationale, passages: list[Passage]) -> Verdict:
        verdict = check_form(rationale.text, min_words=self.min_words, max_words=self.max_words)
        verdict = verdict if not verdict.ok else verify(question, rationale)
        verdict = verdict if not verdict.ok else quotes_stand(rationale, passages)
        if not verdict.ok:
            return verdict
        completion = target(question, rationale, passages, rationale_in_target=self.rationale_in_target)
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
    passed: Sequence[Kept], *, keep_per_question: int, near_duplicate: float, rationale_in_target: bool
) -> tuple[list[Kept], list[Rejection]]:
    """The best rationales of each question, without near-duplicates of a better one.

    Best is: with a checked quote, then fewer words, then the earlier sample. Where the rationale is not
    part of the target, a second one with the same passages would make the same row.

    Returns:
        The kept ones in the order of the questions, and a rejection for each other one.
    """
    by_question: defaultdict[str, list[Kept]] = defaultdict(list)
    for item in passed:
        by_question[item.question.id].append(item)
    kept: list[Kept] = []
    rejected: list[Rejection] = []
    for items in by_question.values():
        chosen: list[Kept] = []
        for item in sorted(items, key=_rank):
            verdict = _fits(item, chosen, keep_per_question, near_duplicate, rationale_in_target)
            if verdict.ok:
                chosen.append(item)
            else:
                rejected.append(rejection(item.rationale, verdict))
        kept += chosen
    return kept, rejected


def _rank(item: Kept) -> tuple[bool, int, int]:
    quoted = bool(own_quotes(item.rationale, item.passages))
    return not quoted, len(item.rationale.text.split()), item.rationale.sample


def _fits(
    item: Kept, chosen: Sequence[Kept], most: int, threshold: float, rationale_in_target: bool
) -> Verdict:
    own = grams(prose(item.rationale.text) or item.rationale.text)
    for better in chosen:
        similarity = jaccard(own, grams(prose(better.rationale.text) or better.rationale.text))
        twin = f"sample {better.rationale.sample}"
        if similarity >= threshold:
            return Verdict(ok=False, reason="near_duplicate", detail=f"{similarity:.2f} with {twin}")
        if not rationale_in_target and better.rationale.passages == item.rationale.passages:
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
