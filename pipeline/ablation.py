"""KARD's ablation (arXiv 2305.18395, table 1) on one domain: what rationales, passages and the reranker are worth.

A student is trained per recipe on the rationales that a run kept, all else alike, and asked the exam questions by the
assistant that serves:

    answers          question -> answer                                  asked closed-book
    rationales       question -> rationale, answer                       asked closed-book
    kard             question, passages found by the rationale -> rationale, answer    asked with hybrid retrieval
    kard_reranked    the same student, passages ordered by the reranker
    kard_oracle      the same student, with the passages that hold the gold quotes
    kard_voted       the same student, several replies and a vote
    kard_abstaining  KARD's rows as the product makes them ([curate] evidence = "rationale", rationale_in_target): with
                     abstentions, with quotes before the rationale, and with the teacher's passages where retrieval
                     finds none that answers, all of which the rows of ``kard`` lack
    quotes           the rows that the product trains on                 asked with hybrid retrieval
    text, tokens     the same rationales as SAIL's and Self-RAG's rows, judged while answering
    tokens_fitted    the same student, threshold and weights fitted on seed questions
    tokens_long      the same student, a beam over segments
    explained, explained_long    the same of a student whose rows go on: the answer, then its rationale, a segment each sentence
    grader           the student of ``quotes`` with the rules that judge passages
    base_rag         no training                                         asked with hybrid retrieval

The paper's student reads one passage and retrieves training passages with the rationale alone; ``top_k`` and
``question_share`` (rows whose passages the question itself found) are parameters here.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from domains.config import ReflectSection
from domains.jsonl import read_jsonl, write_text_atomic
from domains.records import Answer, Example, Hit, Passage, Question, Rationale
from domains.words import squash
from pipeline.arms import DEPTH, Arm, Conditions, Remembered, ask_arms
from pipeline.bootstrap import paired_difference, ratio_interval
from pipeline.metrics import Mark, locate_gold, mark_answer
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.rows import Retrieve, rationale_query, row_id
from pipeline.run_folder import Run
from pipeline.teacher_passages import holding
from pipeline.training_loop import Settings
from pipeline.verify import prose
from rag.answers import format_reply, reference_answer
from rag.prompt import neutralise, render_question, student_messages
from serve.assistant import Retrieves
from serve.engine import Engine
from serve.vote import GREEDY, Votes

Kind = Literal["answers", "rationales", "kard", "quotes"]
RECIPES: tuple[Kind, ...] = ("answers", "rationales", "kard", "quotes")
METRICS = ("score", "option_accuracy", "yes_no_accuracy", "token_f1", "abstention_recall", "false_abstention",
           "citation_precision", "citation_recall", "alce_recall", "alce_precision", "retrieval_rate", "group_missing",
           "judgement_unparsed", "tokens_per_s", "seconds_per_question")  # fmt: skip


@dataclass(frozen=True)
class Taught:
    """A question with a rationale that a run kept."""

    question: Question
    rationale: Rationale


def kept_rationales(run: Run, questions: Sequence[Question]) -> list[Taught]:
    """The rationales behind a run's training rows, in the order of the file."""
    requests = {row.request for row in read_jsonl(run.examples, Example) if row.request}
    known = {question.id: question for question in questions}
    return [
        Taught(known[item.question_id], item)
        for item in read_jsonl(run.rationales, Rationale)
        if item.request in requests and item.question_id in known
    ]


def rows_of(run: Run) -> list[Example]:
    """The rows that the run itself trains on."""
    return read_jsonl(run.examples, Example)


@dataclass(frozen=True)
class Recipes:
    """Makes a recipe's rows.

    Attributes:
        system: the domain's system prompt.
        by_rationale: BM25, for the rationale.
        by_question: the retriever that serves.
        top_k: passages of a row.
        question_share: of KARD's rows, those whose passages the question found.
    """

    system: str
    by_rationale: Retrieve
    by_question: Retrieve
    top_k: int
    question_share: float

    def rows(self, kind: Kind, taught: Sequence[Taught]) -> list[Example]:
        """One row per rationale; for ``answers`` one per question. Not for ``quotes``."""
        if kind == "answers":
            taught = list({item.question.id: item for item in reversed(taught)}.values())[::-1]
        by_question = round(self.question_share * len(taught))
        # Ids are hashes, so the first in their order are a fair draw.
        drawn = sorted(range(len(taught)), key=lambda i: taught[i].rationale.request)[:by_question]
        return [self._row(kind, item, from_question=i in drawn) for i, item in enumerate(taught)]

    def _row(self, kind: Kind, item: Taught, *, from_question: bool) -> Example:
        question, said = item.question, squash(prose(item.rationale.text))
        passages: list[Passage] = []
        if kind == "kard" and from_question:
            passages = self.by_question(question.question, self.top_k)
        elif kind == "kard":
            passages = self.by_rationale(rationale_query(question, item.rationale), self.top_k)
        messages = student_messages(self.system, render_question(question), passages)
        completion = format_reply(
            quotes=[],
            rationale="" if kind == "answers" else neutralise(said),
            answer=neutralise(reference_answer(question)),
        )
        return Example(
            id=row_id(messages, completion),
            question_id=question.id,
            messages=messages,
            completion=completion,
            passages=[passage.passage_id for passage in passages],
            origin="retrieved" if from_question else "rationale",
            request=item.rationale.request,
        )


class Oracle:
    """Finds the passages that hold a question's gold quotes, then what another retriever finds.

    Only for the oracle arm: it knows the answers.
    """

    def __init__(
        self, questions: Sequence[Question], passages: Sequence[Passage], otherwise: Retrieves
    ) -> None:
        self._questions = {question.question: question for question in questions}
        self._passages = passages
        self._otherwise = otherwise

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        """The ``top_k`` best, gold passages first."""
        found: dict[str, Hit] = {}
        for quote in self._questions[query].gold:
            document = [passage for passage in self._passages if passage.doc_id == quote.doc_id]
            for passage in holding(quote, document):
                found[passage.passage_id] = Hit(passage=passage, score=1.0)
        for hit in self._otherwise.retrieve(query, top_k=top_k):
            found.setdefault(hit.passage.passage_id, hit)
        return list(found.values())[:top_k]


def train_recipe(
    rows: Sequence[Example],
    folder: Path,
    progress: Progress,
    *,
    base: str,
    context: int,
    settings: Settings,
    title: str,
    recipe: Recipe,
    reflection_tokens: bool = False,
) -> Path:
    """Train a student on ``rows`` and write it in F16; returns the GGUF file, made now or before of the very same."""
    from pipeline.merge import plain_network
    from pipeline.student import load_student
    from pipeline.student_files import write_f16
    from pipeline.train import train_student

    path, note = folder / "student-F16.gguf", folder / "made_of.txt"
    made_of = _digest(rows, base, context, settings, recipe, reflection_tokens)
    if path.is_file() and note.is_file() and note.read_text("utf-8") == made_of:
        return path
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    train_student(
        rows, folder / "train", progress, base=base, context=context, max_rows=0, checkpoint_steps=50,
        settings=settings, reflection_tokens=reflection_tokens, recipe=recipe,
    )  # fmt: skip
    trained = load_student(folder / "train", base=base)
    write_f16(path, plain_network(trained), trained.base, title=title)
    write_text_atomic(note, made_of)
    shutil.rmtree(folder / "train")
    gc.collect()
    return path


def _digest(rows: Sequence[Example], *others: object) -> str:
    """Of everything that a student depends on, but for the code."""
    parts = [row.model_dump_json() for row in rows] + [repr(other) for other in others]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Asking:
    """An arm: a model file, what finds its passages, whether it is shown them, how it reflects (None: not), its votes."""

    model: Path
    retriever: Retrieves
    with_passages: bool = True
    reflect: ReflectSection | None = None
    votes: Votes = GREEDY


def ask(
    arms: Mapping[str, Asking],
    questions: Sequence[Question],
    passages: Sequence[Passage],
    folder: Path,
    conditions: Conditions,
    progress: Progress,
    *,
    open_engine: Callable[[Path], Engine],
) -> tuple[dict[str, dict[str, dict[str, Mark]]], dict[str, list[Answer | None]]]:
    """Marks by arm, question and metric; and the answers by arm, None where a prompt was too long.

    Args:
        arms: by name.
        questions: the exam.
        passages: all of the index.
        folder: where answers are kept, so that a killed ablation goes on.
        conditions: the same for all arms.
        progress: one bar per arm.
        open_engine: loads a model file.
    """
    gold = {question.id: locate_gold(question, passages)[0] for question in questions}
    marks: dict[str, dict[str, dict[str, Mark]]] = {}
    answers: dict[str, list[Answer | None]] = {}
    for name, asking in arms.items():
        reflects = asking.reflect is not None
        each = replace(conditions, votes=asking.votes)
        if asking.reflect is not None:
            each = replace(each, reflect=asking.reflect)
        remembered = Remembered(asking.retriever, depth=max(DEPTH, each.depth))
        arm = Arm(name, asking.model, with_passages=asking.with_passages, reflects=reflects)
        rows = ask_arms(
            [arm],
            questions,
            remembered,
            each,
            folder=folder,
            open_engine=open_engine,
            progress=progress,
        )[name]
        marks[name] = {
            question.id: mark_answer(
                question, row.answer, gold=gold[question.id], abstain=conditions.abstain, seconds=row.seconds
            )
            for question, row in zip(questions, rows, strict=True)
        }
        answers[name] = [row.answer for row in rows]
    return marks, answers


def summarise_marks(
    marks: Mapping[str, Mapping[str, Mapping[str, Mark]]],
    questions: Sequence[Question],
    *,
    against: str,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Per arm: each of `METRICS` that some question speaks of, the interval of the score, and its paired difference.

    Args:
        marks: as `ask` gives them.
        questions: the exam; intervals draw its documents.
        against: the arm that differences are taken to.
        resamples: bootstrap samples.
        seed: of the bootstrap.
    """
    ids = [question.id for question in questions]
    clusters = [question.about for question in questions]
    drawing: dict[str, Any] = {"clusters": clusters, "resamples": resamples, "seed": seed}
    summary: dict[str, dict[str, Any]] = {}
    for arm, by_question in marks.items():
        summary[arm] = {}
        for metric in METRICS:
            pairs = [by_question[name].get(metric, (0.0, 0.0)) for name in ids]
            found = ratio_interval(*_columns(pairs), **drawing)
            if found is None:
                continue
            summary[arm][metric] = round(found.mean, 4)
            if metric == "score":
                summary[arm]["score_interval"] = [round(found.low, 4), round(found.high, 4)]
        gap = score_difference(marks, (arm, against), questions, resamples=resamples, seed=seed)
        if arm != against and gap is not None:
            summary[arm][f"minus_{against}"] = gap
    return summary


def score_difference(
    marks: Mapping[str, Mapping[str, Mapping[str, Mark]]],
    pair: tuple[str, str],
    questions: Sequence[Question],
    *,
    resamples: int,
    seed: int,
) -> list[float] | None:
    """[difference, low, high] of the first arm's score to the second's on the same questions, documents drawn."""
    one, other = ([marks[arm][question.id]["score"] for question in questions] for arm in pair)
    gap = paired_difference(
        _columns(one), _columns(other), clusters=[q.about for q in questions], resamples=resamples, seed=seed
    )  # fmt: skip
    return None if gap is None else [round(value, 4) for value in (gap.mean, gap.low, gap.high)]


def _columns(pairs: Sequence[Mark]) -> tuple[list[float], list[float]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
