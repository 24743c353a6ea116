"""The arms of an exam are asked here: the assistant that serves, one chunk after the other, resumable.

An arm is a model file, with or without passages. Each of its rows carries a key over everything that its answer
depends on; a row whose key still holds is kept, so a killed exam goes on with the next chunk.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from domains.config import AnswersBy, KvCache, ReflectSection
from domains.errors import ContextOverflow, DataError
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Answer, Hit, Question, Record
from pipeline.bundle import adapter_of
from pipeline.progress import Progress
from rag.prompt import render_question
from serve.assistant import Asked, Assistant, Retrieves
from serve.engine import Engine
from serve.models import sha256_file
from serve.reflection import Reflector, open_reflector, retrieval_depth
from serve.vote import GREEDY, Votes

PARALLEL = 8
CHUNK = 2 * PARALLEL  # what a kill can cost, and how often the bar moves
DEPTH = 10  # retrieved per question, for recall@10; the assistant shows fewer
REFLECTING = (
    "judges",
    "reflection",
    "reflection_beam",
    "reflection_grader",
    "reflection_long",
    "reflection_run",
    "reflection_scores",
    "reflection_text",
    "reflection_tokens",
)
_CODE = (
    "serve.assistant",
    *(f"serve.{name}" for name in REFLECTING),
    "serve.checking",
    "serve.signals",
    "serve.engine",
    "serve.llama",
    "serve.llama_model",
    "serve.options",
    "serve.vote",
    "serve.yes_no",
    "rag.answers",
    "rag.citations",
    "rag.options",
    "rag.polarity",
    "rag.prompt",
    "rag.reflection",
    "rag.sentences",
    "rag.untrusted",
    "rag.verdicts",
    "rag.words",
)


@dataclass(frozen=True)
class Arm:
    """One configuration of the exam. ``reflects``: with the back-end of ``[reflect]``, which wants a trained student."""

    name: str
    model: Path
    with_passages: bool
    reflects: bool = False


@dataclass(frozen=True)
class Conditions:
    """What is the same for all arms, see `serve.assistant.Assistant`. ``context`` is in tokens.

    ``reflect`` counts for the arms that reflect. ``options`` and yes/no questions stay with the student: models are compared, and
    evidence would answer for all of them alike (its own accuracy stands in docs/results.md).
    """

    system: str
    abstain: str
    top_k: int
    max_tokens: int
    context: int
    reflect: ReflectSection = field(default_factory=ReflectSection)
    votes: Votes = GREEDY
    options: AnswersBy = "student"
    kv_cache: KvCache = "f16"

    @property
    def depth(self) -> int:
        """The most passages that one retrieval asks for."""
        return retrieval_depth(self.reflect, self.top_k)


class Row(Record):
    """One question of one arm. ``answer`` is None where the prompt did not fit the context.

    ``seconds`` is the question's share of its chunk's wall time.
    """

    key: str
    question_id: str
    seconds: float
    answer: Answer | None


class Remembered:
    """A retriever that is asked once per query, however many arms want its passages."""

    def __init__(self, retriever: Retrieves, *, depth: int) -> None:
        self._retriever = retriever
        self._depth = depth
        self._known: dict[str, list[Hit]] = {}

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        """The first ``top_k`` of the passages found for ``query``."""
        if query not in self._known:
            self._known[query] = self._retriever.retrieve(query, top_k=self._depth)
        if top_k > self._depth:
            raise ValueError(f"top_k = {top_k}, but only {self._depth} passages are remembered")
        return self._known[query][:top_k]


def ask_arms(
    arms: Sequence[Arm],
    questions: Sequence[Question],
    retriever: Remembered,
    conditions: Conditions,
    *,
    folder: Path,
    open_engine: Callable[[Path], Engine],
    progress: Progress,
) -> dict[str, list[Row]]:
    """Ask every arm every question; ``<folder>/<arm>.jsonl`` holds what is known already.

    A model is opened once for the arms that follow each other with it, and not at all where nothing is missing.

    Args:
        arms: in the order in which they are asked.
        questions: the exam.
        retriever: asked with the bare question only: options would give the answer's words away (MIRAGE's rule).
        conditions: the same for all arms.
        folder: where the answers are kept.
        open_engine: loads a model file.
        progress: one bar per arm.
    """
    progress.start("exam: retrieval", len(questions))
    for question in questions:  # so that the bars below show the models' work only
        retriever.retrieve(question.question, top_k=conditions.depth)
        progress.advance()
    rows = {}
    for model, group in groupby(arms, key=lambda arm: arm.model):
        adapter = adapter_of(model)
        digest = sha256_file(model) + (sha256_file(adapter) if adapter else "")
        with ExitStack() as stack:

            @cache
            def opened(model: Path = model, stack: ExitStack = stack) -> Engine:
                return stack.enter_context(open_engine(model))

            for arm in group:
                found = retriever if arm.with_passages else None
                own = conditions if arm.reflects else replace(conditions, reflect=ReflectSection())
                keys = [_row_key(digest, question, found, own) for question in questions]
                path = folder / f"{arm.name}.jsonl"
                progress.start(f"exam: {arm.name}", len(questions))
                rows[arm.name] = _ask_arm(path, keys, questions, found, own, opened, progress)
    return rows


def _ask_arm(
    path: Path,
    keys: Sequence[str],
    questions: Sequence[Question],
    retriever: Retrieves | None,
    conditions: Conditions,
    opened: Callable[[], Engine],
    progress: Progress,
) -> list[Row]:
    known = {row.key: row for row in _read_rows(path)}
    missing = [pair for pair in zip(keys, questions, strict=True) if pair[0] not in known]
    progress.advance(len(questions) - len(missing))
    reflector = open_reflector(conditions.reflect, opened()) if missing else None
    with closing(reflector) if reflector else nullcontext():
        for begin in range(0, len(missing), CHUNK):
            chunk = missing[begin : begin + CHUNK]
            asked = _ask_chunk(chunk, retriever, conditions, opened(), reflector)
            known |= {row.key: row for row in asked}
            write_jsonl(path, [known[key] for key in keys if key in known])
            progress.advance(len(chunk))
    rows = [known[key] for key in keys]
    write_jsonl(path, rows)  # rows of another exam are left out, however much was known
    return rows


def _read_rows(path: Path) -> list[Row]:
    try:
        return read_jsonl(path, Row) if path.is_file() else []
    except DataError:  # written by another version: the questions are asked again
        return []


def _ask_chunk(
    chunk: Sequence[tuple[str, Question]],
    retriever: Retrieves | None,
    conditions: Conditions,
    engine: Engine,
    reflector: Reflector | None,
) -> list[Row]:
    assistant = Assistant(
        engine,
        retriever,
        system=conditions.system,
        abstain=conditions.abstain,
        top_k=conditions.top_k,
        max_tokens=conditions.max_tokens,
        # Models are compared by what they say; what serving would withdraw is marked (metrics.score_served).
        unsupported="keep",
        signals=True,
        reflector=reflector,
        votes=conditions.votes,
        options=conditions.options,
    )
    asked = [_prepare(assistant, question) for _, question in chunk]
    engine.forget()  # so that a resumed exam gives the answers of an uninterrupted one
    begin = time.perf_counter()
    answers = iter(assistant.ask_many([item for item in asked if item]))
    elapsed = time.perf_counter() - begin
    seconds = round(elapsed / max(1, sum(item is not None for item in asked)), 4)
    return [
        Row(
            key=key,
            question_id=question.id,
            seconds=seconds if item else 0.0,
            answer=next(answers) if item else None,
        )
        for (key, question), item in zip(chunk, asked, strict=True)
    ]


def _prepare(assistant: Assistant, question: Question) -> Asked | None:
    """The prompt, or None where it does not fit: that is counted, and nothing is cut to make it fit."""
    try:
        return assistant.prepare(render_question(question), query=question.question)
    except ContextOverflow:
        return None


def _row_key(
    model_sha256: str, question: Question, retriever: Retrieves | None, conditions: Conditions
) -> str:
    """A hash of the model, the prompt's parts, the conditions, and the code that asks and judges."""
    hits = retriever.retrieve(question.question, top_k=conditions.depth) if retriever else []
    parts = {
        "model": model_sha256,
        "code": _code_digest(),
        "id": question.id,
        "question": render_question(question),
        "hits": [hit.model_dump() for hit in hits],
        "conditions": {
            **vars(conditions),
            "reflect": conditions.reflect.model_dump(),
            "votes": asdict(conditions.votes),
        },
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for name in _CODE:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(name)
        digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()
