"""curate: which of the teacher's rationales become training rows. Nothing is dropped silently.

reads    rationales.jsonl, the domain's questions and generated.jsonl, the index
writes   train.jsonl (`Example`), kept.jsonl (`KeptRationale`), rejected.jsonl (`Rejection`); critiques.jsonl (`Critique`) where answers reflect
counts   in = kept + rejected = kept + Σ reasons.*
         rows = kept + irrelevant_extra + unanswerable_rows   (answers that reflect: see `pipeline.reflect_rows`, `pipeline.verdict_rows`)
              = gold_rows + rationale_rows + retrieved_rows + irrelevant_rows + unanswerable_rows

A rationale is rejected for the first check that it fails, in this order (`pipeline.judge`): known question
and passages, form, entailment (`pipeline.verify`, `pipeline.verify_model`), quotes, a target that can be written, exam
(`pipeline.decontaminate`), the domain's own checks; then, best first within a question (with a checked quote before without,
then the shorter), near-duplicates and more than ``keep_per_question``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from domains.checks import Check, load_checks
from domains.config import DomainConfig
from domains.domain import Domain
from domains.errors import StageError
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Example, KeptRationale, Passage, Question, Rationale, Rejection
from pipeline.augment import Sampling
from pipeline.critics import open_critic
from pipeline.decontaminate import ExamGuard
from pipeline.judge import Judge, keep_clear, select
from pipeline.progress import Progress
from pipeline.questions import read_all_questions
from pipeline.reflect_ground import Ground
from pipeline.reflect_rows import token_rows
from pipeline.rows import Kept, Origin, RowBuilder, target
from pipeline.run_folder import Report, Run, disk_errors, need
from pipeline.verdict_rows import verdict_rows
from pipeline.verify_model import verify_by_model
from rag.retrieve import Retriever, open_retriever
from serve.engine import Engine
from serve.models import inference_gguf

FEW_ROWS = 32
REFLECTING = {"tokens", "text"}  # back-ends that want rows of their own
ORIGINS = get_args(Origin)
FEW = (
    "Few rows: the student will learn little. Commonest rejection: {}. "
    "More questions, more samples or a stronger teacher give more."
)
ONE_SEGMENT = (
    'No row goes on after its first segment: the answers have one sentence each. For [reflect] form = "long" '
    'longer answers are needed, or drafts = "explained".'
)
HINTS = {
    "verifier": 'use a stronger [curate] verifier_gguf, or verifier = "rules"',
    "teacher_answer": 'use a stronger teacher: [teacher] kind = "endpoint", see docs/configuration.md',
    "does_not_support_answer": 'use a stronger teacher: [teacher] kind = "endpoint", see docs/configuration.md',
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
    checks = load_checks(domain.folder, domain.config.curate.checks)
    questions = read_all_questions(domain, run)
    rationales = read_jsonl(need(run.rationales, stage="elicit"), Rationale)
    with open_retriever(need(run.index, stage="index"), domain.config.retrieve) as retriever:
        guard = ExamGuard(
            [question for question in questions if question.split == "exam"],
            ngram=domain.config.curate.decontaminate_ngram,
            near_duplicate=domain.config.curate.near_duplicate,
        )
        kept, rejected = _check(domain, questions, rationales, retriever, guard, checks, progress)
        with disk_errors(run.folder):
            write_jsonl(run.kept, [_verified(item) for item in kept])
            write_jsonl(run.rejections, rejected)
        reasons = Counter(rejection.reason for rejection in rejected)
        require_some(kept, reasons, run.rejections)
        unanswerable = [q for q in questions if q.kind == "unanswerable" and q.split == "seed"]
        clear, contaminated = keep_clear(unanswerable, guard)
        progress.start("writing training rows", 0)
        facts: dict[str, Any] = {"exam_templates": guard.templates}
        if domain.config.reflect.backend in REFLECTING:
            general, double = keep_clear([each.as_question() for each in domain.read_instructions()], guard)
            contaminated = [*contaminated, *double]
            rows, counts, facts["critic"] = _reflecting(
                domain, run, retriever, kept, clear, general, progress
            )
        else:
            run.critiques.unlink(missing_ok=True)
            rows, counts = _builder(domain, retriever).build(
                kept,
                clear,
                retrieved_share=domain.config.curate.retrieved_share,
                irrelevant_share=domain.config.curate.irrelevant_share,
                abstention_share=domain.config.curate.abstention_share,
            )
    with disk_errors(run.folder):
        write_jsonl(run.rejections, [*rejected, *contaminated])
        write_jsonl(run.examples, rows)
    progress.say(f"{len(kept)} of {len(rationales)} rationales kept, {len(rows)} training rows")
    if len(rows) < FEW_ROWS:
        progress.say(FEW.format(_commonest(reasons)))
    return Report(counts=_counts(len(rationales), len(kept), reasons, len(contaminated), counts), facts=facts)


def _reflecting(
    domain: Domain,
    run: Run,
    retriever: Retriever,
    kept: Sequence[Kept],
    unanswerable: Sequence[Question],
    general: Sequence[Question],
    progress: Progress,
) -> tuple[list[Example], Counter[str], dict[str, int]]:
    """Rows for a student that judges passages and itself, and how many labels whoever gave."""
    config = domain.config
    with open_critic(
        config.reflect.critic,
        teacher=config.teacher,
        ledger=run.ledger,
        question_ids=[item.question.id for item in kept],
        general_ids=[question.id for question in general],
        sample=config.reflect.critic_sample,
        max_unparsed=config.reflect.max_unparsed,
        embed=retriever.index.embedder.embed,
        seed=config.reflect.seed,
        progress=progress,
    ) as (critic, told):
        ground = Ground(
            system=domain.prompts["system"],
            abstain=config.domain.abstain,
            find=retriever.find,
            critic=critic,
            top_k=config.retrieve.top_k,
            passages=config.reflect.passages,
            rationale_in_target=config.curate.rationale_in_target,
            sampling=Sampling(
                no_retrieval_share=config.reflect.no_retrieval_share,
                partial_share=config.reflect.partial_share,
                unsupported_share=config.reflect.unsupported_share,
                seed=config.reflect.seed,
            ),
        )
        build = verdict_rows
        if config.reflect.backend == "tokens":
            build = partial(token_rows, instructions=general, explained=_explained(config))
        rows, counts, labels = build(
            ground,
            kept,
            unanswerable,
            irrelevant_share=config.curate.irrelevant_share,
            abstention_share=config.curate.abstention_share,
        )
    if not counts.get("rows_of_several_segments", 1):
        progress.say(ONE_SEGMENT)
    with disk_errors(run.folder):
        write_jsonl(run.critiques, labels)
    given = Counter(f"{label.task}: {label.label}, by {label.teacher}" for label in labels)
    return rows, counts, {**told, **dict(sorted(given.items()))}


def _counts(
    given: int, kept: int, reasons: Counter[str], contaminated: int, rows: Counter[str]
) -> dict[str, int]:
    """The stage's counts in reading order, see the module's docstring."""
    origins = {f"{origin}_rows": rows[f"{origin}_rows"] for origin in ORIGINS}
    return {
        "in": given,
        "kept": kept,
        "rejected": reasons.total(),
        **{f"reasons.{reason}": reasons[reason] for reason in sorted(reasons)},
        "rows": sum(origins.values()),
        **origins,
        "unanswerable_contaminated": contaminated,
        **{name: rows[name] for name in sorted(rows.keys() - origins.keys())},
    }


def _commonest(reasons: Counter[str]) -> str:
    return "{} ({})".format(*reasons.most_common(1)[0]) if reasons else "none"


def _check(
    domain: Domain,
    questions: Sequence[Question],
    rationales: Sequence[Rationale],
    retriever: Retriever,
    guard: ExamGuard,
    checks: Mapping[str, Check],
    progress: Progress,
) -> tuple[list[Kept], list[Rejection]]:
    config = domain.config
    judge = Judge(
        {question.id: question for question in questions},
        retriever.index.by_id,
        guard,
        checks,
        min_words=config.curate.min_words,
        max_words=config.curate.max_words,
        rationale_trained=_rationale_trained(config),
    )
    passed, rejected = judge.sort(rationales, progress)
    if config.curate.verifier == "model":
        with Engine(inference_gguf(config.curate.verifier_gguf), parallel=8) as engine:
            passed, refuted = verify_by_model(engine, passed, progress)
        rejected += refuted
    kept, surplus = select(
        passed,
        keep_per_question=config.curate.keep_per_question,
        near_duplicate=config.curate.near_duplicate,
        row_of=_row_of(domain, retriever),
    )
    return kept, [*rejected, *surplus]


def _explained(config: DomainConfig) -> bool:
    """Whether the rationale stands behind the answer, as segments."""
    return config.reflect.backend == "tokens" and config.reflect.drafts == "explained"


def _rationale_trained(config: DomainConfig) -> bool:
    return config.curate.rationale_in_target or _explained(config)


def _row_of(domain: Domain, retriever: Retriever) -> Callable[[Kept], Hashable]:
    """What makes a rationale's row: two that give the same are one row twice.

    Rows that reflect show passages drawn at random; there it is what they are drawn for and from.
    """
    config = domain.config
    if config.reflect.backend not in REFLECTING:
        return _builder(domain, retriever).row_of
    trained = _rationale_trained(config)

    def drawn(item: Kept) -> Hashable:
        written = target(item.question, item.rationale, item.passages, rationale_in_target=trained)
        return tuple(item.rationale.passages), written

    return drawn


def _verified(item: Kept) -> KeptRationale:
    assert item.verifier is not None  # the judge says what it passed
    return KeptRationale(**item.rationale.model_dump(), verifier=item.verifier)


def _builder(domain: Domain, retriever: Retriever) -> RowBuilder:
    config = domain.config
    return RowBuilder(
        system=domain.prompts["system"],
        abstain=config.domain.abstain,
        retrieve=retriever.find,
        top_k=config.retrieve.top_k,
        rationale_in_target=config.curate.rationale_in_target,
        seed=config.curate.seed,
        by_rationale=_by_words(retriever) if config.curate.evidence == "rationale" else None,
    )


def _by_words(retriever: Retriever) -> Callable[[str, int], list[Passage]]:
    """KARD's retriever of training passages: BM25 alone."""
    index = retriever.index
    return lambda query, top_k: [index.by_id[name] for name in index.search_lexical(query, top_k=top_k)]


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
