"""The switches of rationale distillation in both shipped domains, from ``domain.toml`` alone: rationales, rows, reranker, and reflecting students to the end.

Each test writes a ``domain.toml`` that is the shipped one, a scripted endpoint as its teacher and one switch; prompts, checks and
the shipped corpus (a slice of it, so that it is embedded in seconds) lie where the shipped ones lie.
"""

from __future__ import annotations

import functools
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from domains.domain import Domain, load_domain
from domains.errors import ConfigError
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Critique, Example, KeptRationale, Question, Rationale
from pipeline.elicit import plan
from pipeline.index import run as build_index
from pipeline.job import Outcome, run_job
from pipeline.preflight import check_main_job
from pipeline.progress import Silent
from pipeline.questions import read_all_questions
from pipeline.ranking import SURE
from pipeline.run_folder import Run
from pipeline.stages import NAMES
from pipeline.strategies.row import Row
from rag import embed
from rag.answers import is_abstention, parse_reply
from rag.reflection import TOKENS
from rag.retrieve import open_retriever
from rag.verdicts import split_verdict
from serve.bundle import open_bundle
from serve.reflection import open_reflector
from tests.competent_teacher import BETTER, Teacher
from tests.openai_server import OpenAIServer
from tests.reflection_engine import ReflectingEngine
from tests.tiny_llama import make_tiny_llama

ROOT = Path(__file__).parent.parent
SHIPPED = ("medical", "product_requirements")
SEED_DOCUMENTS, EXAM_DOCUMENTS = 7, 2
QUESTIONS = 12  # of the profile smoke
Tables = Mapping[str, Mapping[str, Any]]


# -- a domain like the shipped one, with another domain.toml -----------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_encoder() -> Iterator[None]:
    """The embedder's weights are read and checked once, not by every stage of every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "_weights_folder", functools.cache(embed._weights_folder))
        weights = embed.minilm_weights()
        patch.setattr(embed, "minilm_weights", lambda: dict(weights))
        yield


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``corpora/`` with a slice of each shipped corpus and ``index/<domain>``, its index."""
    root = tmp_path_factory.mktemp("shelves")
    (root / "corpora").mkdir()
    shutil.copy(ROOT / "corpora" / "instructions.jsonl", root / "corpora")
    for name in SHIPPED:
        _slice(ROOT / "corpora" / name, root / "corpora" / name)
        run = Run(root / "index" / name)
        run.bundle.mkdir(parents=True)
        build_index(_copy(name, root / "domains" / name), run, Silent())
    return root


def _slice(source: Path, target: Path) -> None:
    """The questions about a few documents, and those documents."""
    questions = read_jsonl(source / "questions.jsonl", Question)
    taken: list[str] = []
    for split, count in (("seed", SEED_DOCUMENTS), ("exam", EXAM_DOCUMENTS)):
        about = dict.fromkeys(each.about for each in questions if each.split == split)
        taken += list(about)[:count]
    kept = [each for each in questions if {each.about, *(gold.doc_id for gold in each.gold)} <= {*taken}]
    (target / "documents").mkdir(parents=True)
    write_jsonl(target / "questions.jsonl", kept)
    for name in taken:
        shutil.copy(source / "documents" / f"{name}.md", target / "documents")


def _copy(name: str, folder: Path, changes: Tables | None = None) -> Domain:
    """The shipped domain in ``folder`` with a ``domain.toml`` that has ``changes`` (None takes a key away)."""
    shutil.copytree(ROOT / "domains" / name, folder, dirs_exist_ok=True)
    tables = tomllib.loads((folder / "domain.toml").read_text("utf-8"))
    for table, values in (changes or {}).items():
        merged = {**tables.get(table, {}), **values}
        tables[table] = {key: value for key, value in merged.items() if value is not None}
    (folder / "domain.toml").write_text(_toml(tables), encoding="utf-8")
    return load_domain(str(folder), profile="smoke")


def _toml(tables: Mapping[str, Any], above: str = "") -> str:
    """TOML of tables, tables below tables and arrays of tables; values are written as JSON, which TOML reads."""
    plain, below = [], []
    for key, value in tables.items():
        name = f"{above}.{key}" if above else key
        if isinstance(value, Mapping):
            below.append(f"[{name}]\n{_toml(value, name)}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            below += [f"[[{name}]]\n{_toml(each, name)}" for each in value]
        else:
            plain.append(f"{key} = {json.dumps(value)}\n")
    return "".join(plain + below)


@dataclass
class Made:
    """What the stages left."""

    domain: Domain
    run: Run
    outcomes: Mapping[str, Outcome]
    teacher: Teacher
    lines: list[str]
    bars: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Example]:
        return read_jsonl(self.run.examples, Example)

    @property
    def answers(self) -> list[Example]:
        """Rows whose target is no abstention."""
        abstain = self.domain.config.domain.abstain
        return [
            row for row in self.rows if not is_abstention(parse_reply(row.completion).answer, abstain=abstain)
        ]

    def counts(self, stage: str) -> dict[str, int]:
        return self.outcomes[stage].entry.counts

    def facts(self, stage: str) -> dict[str, Any]:
        return self.outcomes[stage].entry.facts


class _Bars(Silent):
    """Silent, but remembers which bars there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: list[str] = []

    def start(self, what: str, total: int) -> None:
        """A bar begins."""
        self.bars.append(what)


def make(
    name: str, shelves: Path, folder: Path, changes: Tables, stages: tuple[str, ...] = ("elicit", "curate")
) -> Made:
    """Preflight, plan and stages of a domain that differs from the shipped one in ``domain.toml`` alone."""
    (folder / "corpora").symlink_to(shelves / "corpora")
    run = Run(folder / "runs" / name / "r")
    run.bundle.mkdir(parents=True)
    run.index.symlink_to(shelves / "index" / name / "bundle" / "index")
    progress = _Bars()
    questions = read_jsonl(shelves / "corpora" / name / "questions.jsonl", Question)
    domain = load_domain(name)
    reflect = domain.config.reflect.model_copy(update={"backend": "tokens"})
    general = Domain(
        domain.folder, domain.config.model_copy(update={"reflect": reflect}), {}
    ).read_instructions()
    teacher = Teacher(questions, general)
    with OpenAIServer(teacher) as server:
        endpoint = {
            "kind": "endpoint",
            "base_url": server.base_url,
            "model": "big",
            "api_key_env": "",
            "max_retries": 0,
        }
        own = _copy(name, folder / "domains" / name, {"teacher": endpoint, **changes})
        check_main_job(own, run, progress)
        planned = plan(own, run, progress)
        assert not server.calls, "a plan asks nothing"
        outcomes = {each.stage: each for each in run_job(own, run, progress, stages=stages)}
        assert 0 < outcomes["elicit"].entry.counts["requests"] <= planned.total.requests
    made = Made(own, run, outcomes, teacher, progress.lines, progress.bars)
    check_counts(made)
    return made


def check_counts(made: Made) -> None:
    """Nothing is lost between the teacher and the training rows."""
    elicit, curate = made.counts("elicit"), made.counts("curate")
    assert elicit["questions"] == QUESTIONS
    assert elicit["failed"] == 0
    for step in made.facts("elicit")["steps"]:
        assert step["proposed"] == step["kept"] + step["rejected"] + step["unparsed"] + step["error"]
        assert step["kept"] > 0, step
    assert (
        curate["in"] == len(read_jsonl(made.run.rationales, Rationale)) == curate["kept"] + curate["rejected"]
    )
    assert curate["rows"] == len(made.rows) > 0
    assert curate["kept"] >= curate["in"] * 0.5, curate
    assert made.answers


def step_of(made: Made, use: str) -> dict[str, Any]:
    """What was told of the step."""
    return next(step for step in made.facts("elicit")["steps"] if step["step"].endswith(f"-{use}"))


def steps(*uses: str, **options: Any) -> Tables:
    """``[[elicit.steps]]``; the options are the last one's."""
    return {"elicit": {"steps": [{"use": use} for use in uses[:-1]] + [{"use": uses[-1], **options}]}}


pytestmark = pytest.mark.parametrize("name", SHIPPED)


# -- KARD -------------------------------------------------------------------------------------------------


def test_passages_found_by_the_rationale(name: str, shelves: Path, tmp_path: Path) -> None:
    made = make(name, shelves, tmp_path, {"curate": {"evidence": "rationale", "rationale_in_target": True}})
    found = [row for row in made.rows if row.origin == "rationale"]
    assert found
    assert made.counts("curate")["rationale_rows"] == len(found)
    rationales = {each.request: each for each in read_jsonl(made.run.rationales, Rationale)}
    assert any(row.passages != rationales[row.request].passages for row in found), (
        "not the teacher's passages"
    )
    assert all("So it is this" in row.completion or "decides it" in row.completion for row in found)
    with open_retriever(made.run.index, made.domain.config.retrieve) as retriever:
        for row in found:  # the best passage for the words of the rationale is among them
            best = retriever.index.search_lexical(rationales[row.request].text, top_k=1)[0]
            assert best in row.passages


def test_a_model_checks_rationales(name: str, shelves: Path, tmp_path: Path) -> None:
    made = make(name, shelves, tmp_path, {"curate": {"verifier": "model"}})
    assert "verifier: answers from rationales alone" in made.bars
    kinds = {question.id: question.kind for question in made.domain.read_questions()}
    found = {"open": set[str](), "closed": set[str]()}
    for each in read_jsonl(made.run.kept, KeptRationale):
        found["open" if kinds[each.question_id] == "open" else "closed"].add(each.verifier.method)
    assert found == {"open": {"rules"}, "closed": {"model"}}


def test_a_reranker_learns_and_the_decision_is_on_record(name: str, shelves: Path, tmp_path: Path) -> None:
    made = make(
        name,
        shelves,
        tmp_path,
        {"rerank": {"enabled": True, "epochs": 2, "pool": 8}},
        stages=("elicit", "curate", "rerank"),
    )
    record = json.loads((made.run.rerank / "result.json").read_text("utf-8"))
    counts = record["counts"]
    assert record["enabled"] is True
    assert counts["rows"] == counts["pools"] + counts["held_out"] + counts["without_candidates"]
    assert counts["rows"] == made.counts("curate")["kept"]
    assert counts["questions"] > 0
    assert not record["kept"] or record["fitted"]["p"] < SURE
    assert made.run.reranker.is_dir() is record["kept"], "what is not proven is not served"


# -- reflection -------------------------------------------------------------------------------------------


def test_verdicts_in_words(name: str, shelves: Path, tmp_path: Path) -> None:
    made = make(name, shelves, tmp_path, {"reflect": {"backend": "text", "critic": "teacher"}})
    for row in made.rows:
        verdict, rest = split_verdict(row.completion, len(row.passages))
        assert verdict is not None, row.completion
        assert len(verdict) == len(row.passages)
        assert parse_reply(rest).has_answer_line
    labels = {label.task for label in read_jsonl(made.run.critiques, Critique)}
    assert labels == {"isrel"}
    assert made.teacher.asked["isrel"] > 0


def test_reflection_tokens(name: str, shelves: Path, tmp_path: Path) -> None:
    switch: Tables = {
        "reflect": {"backend": "tokens", "critic": "teacher"},
        "train": {"method": "qlora", "grid": None},
    }
    made = make(name, shelves, tmp_path, switch)
    assert any(row.completion.startswith("[Retrieval]<paragraph>") for row in made.rows)
    general = [row for row in made.rows if row.origin == "general"]
    assert general
    assert all(row.completion.startswith("[No Retrieval]") for row in general)
    used = {token for token in TOKENS for row in made.rows if token in row.completion}
    assert {"[Relevant]", "[Fully supported]", "[Utility:5]"} <= used
    labels = {label.task for label in read_jsonl(made.run.critiques, Critique)}
    assert {"retrieve", "isrel", "issup", "isuse"} <= labels


def test_reflection_tokens_on_a_grid_are_refused_at_once(name: str, tmp_path: Path) -> None:
    switch: Tables = {"reflect": {"backend": "tokens"}, "train": {"method": "qalora", "grid": "Q4_0"}}
    with pytest.raises(ConfigError, match="qlora"):
        _copy(name, tmp_path / "domains" / name, switch)


def test_a_grader_leaves_the_rows_alone_and_opens(name: str, shelves: Path, tmp_path: Path) -> None:
    made = make(name, shelves, tmp_path, {"reflect": {"backend": "grader"}})
    assert not any(token in row.completion for token in TOKENS for row in made.rows)
    assert not made.run.critiques.exists()
    reflector = open_reflector(made.domain.config.reflect, ReflectingEngine(lambda _: ""))  # type: ignore[arg-type]
    assert type(reflector).__name__ == "GraderReflector"


# -- [[elicit.steps]] -------------------------------------------------------------------------------------


def test_orca(name: str, shelves: Path, tmp_path: Path) -> None:
    made = make(name, shelves, tmp_path, steps("orca"))
    rows = read_jsonl(made.run.steps / "1-orca.jsonl", Row)
    assert len(rows) == QUESTIONS
    assert len({row.made.op for row in rows}) > 1, "several system messages"
    assert step_of(made, "orca")["kept"] >= QUESTIONS * 0.8


def test_explain_options(name: str, shelves: Path, tmp_path: Path) -> None:
    made = make(name, shelves, tmp_path, steps("explain_options"))
    rows = [
        row for row in read_jsonl(made.run.steps / "1-explain_options.jsonl", Row) if row.status == "kept"
    ]
    assert {row.question.kind for row in rows if row.question} == {"options"}
    assert all(row.question and row.notes.keys() == (row.question.options or {}).keys() for row in rows)


def test_generated_questions_are_explained_too(name: str, shelves: Path, tmp_path: Path) -> None:
    switch = steps("generate_questions", "label")
    switch["elicit"]["steps"][0]["passages"] = 8
    made = make(name, shelves, tmp_path, switch)
    generated = {each.id for each in read_jsonl(made.run.generated, Question)}
    assert step_of(made, "generate_questions")["kept"] == len(generated) >= 4
    assert made.counts("elicit")["generated"] == len(generated)
    exam = {each.about for each in made.domain.read_questions() if each.split == "exam"}
    assert not exam & {
        each.about for each in read_all_questions(made.domain, made.run) if each.id in generated
    }
    assert generated & {row.question_id for row in made.rows}, "some become training rows"


def test_critics_make_better_explanations(name: str, shelves: Path, tmp_path: Path) -> None:
    made = make(name, shelves, tmp_path, steps("label", "critique_revise"))
    rows = read_jsonl(made.run.steps / "2-critique_revise.jsonl", Row)
    settled = [row for row in rows if row.status == "kept"]
    assert len(settled) >= QUESTIONS * 0.8
    assert all(BETTER in row.rationale and row.chosen and row.rejected for row in settled)
    assert {each.text for each in read_jsonl(made.run.rationales, Rationale)} == {
        row.rationale for row in settled
    }


def test_only_the_best_rated_share_goes_on(name: str, shelves: Path, tmp_path: Path) -> None:
    made = make(name, shelves, tmp_path, steps("label", "rate", keep_share=0.7))
    told = step_of(made, "rate")
    assert told["kept"] == 9  # the best 0.7 of 12, rounded up
    assert sum(told["histogram"].values()) == told["proposed"] == QUESTIONS
    assert len(read_jsonl(made.run.rationales, Rationale)) == told["kept"]


# -- all the way to an answer -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tokens", "text"])
def test_a_reflecting_student_is_trained_calibrated_examined_and_served(
    backend: str, name: str, shelves: Path, tmp_path: Path
) -> None:
    """The student is tiny and knows nothing: what is asked of it is that every step takes what the one before left."""
    tiny = make_tiny_llama(tmp_path / "tiny")
    made = make(
        name,
        shelves,
        tmp_path,
        {
            "student": {"base": str(tiny), "context": 8192},
            "train": {"method": "qlora", "grid": None, "epochs": 1, "pack_tokens": 8192},
            "export": {"serve": "Q8_0", "formats": ["Q8_0"]},
            "reflect": {
                "backend": backend,
                "critic": "trained",
                "critic_sample": 30,
                **({"form": "long", "depth": 2} if backend == "tokens" else {}),
            },
            "serve": {"max_tokens": 24, "options": "student"},
            "calibrate": {"questions": 6},
            "exam": {"questions": 3},
        },
        stages=NAMES[1:],
    )
    fit = made.run.reflection_fit
    assert fit.is_file() is (backend == "tokens")
    if backend == "tokens":
        facts = json.loads(fit.read_text("utf-8"))
        assert facts["general"] > 0, "general instructions are among what it is fitted to"
        assert made.facts("calibrate")["reflection"] == facts
    report = json.loads((made.run.bundle / "report.json").read_text("utf-8"))
    assert report["reflection"]["arms"]["exported_rag"]["backend"] == backend
    with open_bundle(made.run.bundle, parallel=1, unready_ok=True) as opened:
        answer = opened.assistant.ask("What is known of it?")
    assert answer.reflection is not None
    assert answer.reflection.backend == backend
