"""Whole elicit stages with several steps: config to files, over the OpenAI protocol, killed, and with a weak teacher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from domains.config import DomainConfig, parse_config
from domains.domain import Domain, read_prompts
from domains.errors import ConfigError, DataError, StageError
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Document, Question, Rationale
from domains.steps import CritiqueReviseStep, LabelStep
from pipeline.elicit import plan, run
from pipeline.progress import Silent
from pipeline.questions import read_all_questions
from pipeline.run_folder import Run
from pipeline.stages import STAGES, fingerprint
from pipeline.strategies.row import Row
from tests.openai_server import Act, Call, OpenAIServer
from tests.strategy_example import MARKS

HEAD = '[domain]\nname = "home"\ntitle = "Home"\n[corpus]\ndocuments = "d"\nquestions = "questions.jsonl"\n'
PLACES = ("attic", "cellar", "garage", "kitchen", "porch", "shed")
TEXT = "The {0} lamp is cleaned with vinegar every month. The {0} floor is swept every week."


def fact(place: str) -> str:
    return TEXT.format(place).split(". ")[0] + "."


@pytest.fixture(scope="module")
def index_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rag.embed import MiniLMEmbedder
    from rag.index import update_index

    folder = tmp_path_factory.mktemp("steps") / "index"
    documents = [
        Document(doc_id=place, title=place.title(), text=TEXT.format(place), source=f"{place}.md")
        for place in PLACES
    ]
    update_index(folder, documents, embedder=MiniLMEmbedder(), max_chars=300, overlap_chars=0)
    return folder


@pytest.fixture
def home(tmp_path: Path, index_folder: Path) -> Run:
    this = Run(tmp_path / "runs" / "home" / "r1")
    this.bundle.mkdir(parents=True)
    this.index.symlink_to(index_folder)
    return this


def make_domain(
    folder: Path, steps: str, *, base_url: str = "", prompts: dict[str, str] | None = None
) -> Domain:
    questions = [
        Question.model_validate(
            {
                "id": f"q-{place}",
                "kind": "open",
                "question": f"How often is the lamp in the {place} cleaned?",
                "answer": "Every month",
                "about": place,
                "gold": [{"doc_id": place, "quote": fact(place)}],
                "split": "exam" if place == "shed" else "seed",
            }
        )
        for place in PLACES
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "questions.jsonl", questions)
    teacher = (
        f'kind = "endpoint"\nbase_url = "{base_url}"\nmodel = "big"\napi_key_env = ""\nmax_retries = 0\nconcurrency = 2\n'
        if base_url
        else 'kind = "local"\nmax_tokens = 16\n'
    )
    text = f"{HEAD}[teacher]\n{teacher}[elicit]\nsamples = 1\n{steps}"
    (folder / "domain.toml").write_text(text, encoding="utf-8")
    config = parse_config(text, origin="domain.toml")
    return Domain(folder, config, {"system": "Answer.", "teacher": "Explain the answer.", **(prompts or {})})


def part(call: Call) -> str:
    return next((name for name, mark in MARKS.items() if mark in call.question), "label")


def place_in(call: Call) -> str:
    asked = call.question.split("in the ")[-1]
    return next(place for place in PLACES if asked.startswith(place))


def chain_script(call: Call) -> Act:
    kind = part(call)
    if kind == "label":
        place = place_in(call)
        return Act(text=f'"{fact(place)}" [1] The {place} lamp is cleaned every month.\nAnswer: Every month')
    if kind == "critique":
        settled = (
            "Vinegar keeps" in call.question or "attic" in call.question.split("Explanation and answer")[1]
        )
        verdict = {"issues": [], "score": 9, "revise": False}
        return Act(
            text=json.dumps(verdict if settled else {"issues": ["Say why."], "score": 6, "revise": True})
        )
    if kind == "revise":
        return Act(text="Vinegar keeps the lamp clear, so it is cleaned every month.\nAnswer: Every month")
    score = 3 if "Vinegar keeps" in call.question else 5
    return Act(text=f"Reason: As it is.\nScore: {score}")


CHAIN = (
    '[elicit.judge]\nmodel = "critic"\n'
    '[[elicit.steps]]\nuse = "label"\n'
    '[[elicit.steps]]\nuse = "critique_revise"\n'
    '[[elicit.steps]]\nuse = "rate"\nmin_score = 3\nkeep_share = 0.8\n'
)


def test_label_critique_rate_over_the_protocol(tmp_path: Path, home: Run) -> None:
    with OpenAIServer(chain_script) as server:
        domain = make_domain(tmp_path / "d", CHAIN, base_url=server.base_url)
        planned = plan(domain, home)
        assert server.calls == []
        report = run(domain, home, Silent())
        calls = Counter((part(call), call.body["model"]) for call in server.calls)
        temperatures = {call.body["temperature"] for call in server.calls if call.body["model"] == "critic"}
    assert calls == {
        ("label", "big"): 5,
        ("critique", "critic"): 9,
        ("revise", "big"): 4,
        ("rate", "critic"): 5,
    }
    assert temperatures == {0.0}
    assert [(step.step, step.requests, step.exact) for step in planned.steps] == [
        ("1-label", 5, True),
        ("2-critique_revise", 25, False),
        ("3-rate", 5, False),
    ]
    told = {step["step"]: step for step in report.facts["steps"]}
    assert told["2-critique_revise"]["kept"] == 5
    assert (told["3-rate"]["kept"], told["3-rate"]["reasons"]) == (4, {"not_among_best": 1})
    assert told["3-rate"]["histogram"] == {"1": 0, "2": 0, "3": 4, "4": 0, "5": 1}
    for step in told.values():
        assert step["proposed"] == step["kept"] + step["rejected"] + step["unparsed"] + step["error"]
    assert report.counts["requests"] == 23
    assert report.counts["rationales"] == 4
    rationales = read_jsonl(home.rationales, Rationale)
    assert len(rationales) == 4
    assert {each.teacher for each in rationales} == {"big"}, "the critic wrote none of them"
    attic = next(each for each in rationales if each.question_id == "q-attic")
    assert attic.text.startswith('"The attic lamp')
    assert all("Vinegar keeps" in each.text for each in rationales if each is not attic)
    rows = {path.stem: {row.id: row for row in read_jsonl(path, Row)} for path in home.steps.glob("*.jsonl")}
    assert set(rows) == {"1-label", "2-critique_revise", "3-rate"}
    for row in rows["3-rate"].values():  # every ancestor is there
        [second] = row.parents
        [first] = rows["2-critique_revise"][second].parents
        assert rows["1-label"][first].group == row.group


def test_a_budget_of_calls_ends_a_step_and_the_stage_goes_on(tmp_path: Path, home: Run) -> None:
    """An endpoint that costs nothing has no other cap."""
    chain = CHAIN.replace('use = "critique_revise"\n', 'use = "critique_revise"\nbudget = { calls = 8 }\n')
    with OpenAIServer(chain_script) as server:
        domain = make_domain(tmp_path / "d", chain, base_url=server.base_url)
        planned = plan(domain, home)
        report = run(domain, home, Silent())
        calls = Counter(part(call) for call in server.calls)
    assert [step.requests for step in planned.steps] == [5, 8, 5]
    assert calls["critique"] + calls["revise"] <= 8
    told = {step["step"]: step for step in report.facts["steps"]}
    step = told["2-critique_revise"]
    assert step["budget"] == {"calls": 8, "used": calls["critique"] + calls["revise"]}
    assert 0 < step["proposed"] < 5
    assert step["ended_early"].endswith(f"{5 - step['proposed']} rows were not tried")
    assert told["3-rate"]["proposed"] == step["kept"]


def test_a_dry_run_shows_every_step_and_asks_nothing(tmp_path: Path, home: Run) -> None:
    from typer.testing import CliRunner

    from preceptor import app

    folder = tmp_path / "d"
    with OpenAIServer(chain_script) as server:
        domain = make_domain(folder, CHAIN, base_url=server.base_url)
        (folder / "prompts").mkdir()
        for name, text in domain.prompts.items():
            (folder / "prompts" / f"{name}.md").write_text(text)
        command = ["elicit", str(folder), "--dry-run", "--profile", "full", "--run", "r1", "--runs"]
        said = CliRunner().invoke(app, [*command, str(tmp_path / "runs")])
        asked = CliRunner().invoke(app, [*command, str(tmp_path / "runs"), "--json"])
        assert server.calls == []
    assert "step 1-label: 5 requests for 5 rows" in said.output
    assert "step 2-critique_revise: at most 25 requests for 5 rows" in said.output
    data = json.loads(asked.output)
    assert data["requests"] == 35
    assert [step["step"] for step in data["steps"]] == ["1-label", "2-critique_revise", "3-rate"]


def test_everything_in_the_ledger_is_not_asked_again(tmp_path: Path, home: Run) -> None:
    with OpenAIServer(chain_script) as server:
        domain = make_domain(tmp_path / "d", CHAIN, base_url=server.base_url)
        run(domain, home, Silent())
    written = {path.name: path.read_bytes() for path in [*home.steps.iterdir(), home.rationales]}
    report = run(domain, home, Silent())  # the server is gone
    assert report.counts["cached"] == report.counts["requests"] == 23
    assert {path.name: path.read_bytes() for path in [*home.steps.iterdir(), home.rationales]} == written


SCRIPT = """
import sys
from pathlib import Path
from domains.domain import load_domain
from pipeline.elicit import run
from pipeline.progress import Silent
from pipeline.run_folder import Run
run(load_domain(sys.argv[1]), Run(Path(sys.argv[2])), Silent())
"""


def test_kill_9_in_the_middle_pays_nothing_twice(tmp_path: Path, home: Run) -> None:
    folder = tmp_path / "d"
    with OpenAIServer(lambda call: Act(**{**vars(chain_script(call)), "delay_s": 0.05})) as server:
        domain = make_domain(folder, CHAIN, base_url=server.base_url)
        (folder / "prompts").mkdir()
        for name, text in domain.prompts.items():
            (folder / "prompts" / f"{name}.md").write_text(text)
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), str(home.folder)], cwd=Path(__file__).parent.parent
        )
        while sum(server.answered.values()) < 9 and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        report = run(domain, home, Silent())
        asked = server.asked()
    assert report.counts["cached"] >= 7, "what was answered before the kill is in the ledger"
    assert sum(asked.values()) <= 23 + 2, "only requests in flight were put again"
    assert len(read_jsonl(home.rationales, Rationale)) == 4


def questions_script(call: Call) -> Act:
    kind = part(call)
    place = next(place for place in PLACES if f"The {place} lamp" in call.question)
    if kind == "generate_questions":
        good = {
            "question": f"How often is the floor of the {place} swept?",
            "answer": "Every week",
            "quote": f"The {place} floor is swept every week.",
        }
        wrong = {**good, "quote": "Never said."}
        return Act(text=f"```json\n{json.dumps([good, wrong])}\n```")
    if kind == "answer_question":
        return Act(text="Answer: I don't know." if place == "porch" else "Answer: every week")
    if "swept" in call.question.rsplit("Question:", 1)[-1]:
        return Act(text="The floor is swept every week.\nAnswer: Every week")
    return Act(text="The lamp is cleaned every month.\nAnswer: Every month")


GENERATE = '[[elicit.steps]]\nuse = "generate_questions"\n[[elicit.steps]]\nuse = "label"\n'


def test_generated_questions_are_labelled_and_become_seed_questions(tmp_path: Path, home: Run) -> None:
    with OpenAIServer(questions_script) as server:
        domain = make_domain(tmp_path / "d", GENERATE, base_url=server.base_url)
        planned = plan(domain, home)
        report = run(domain, home, Silent())
        asked = Counter(part(call) for call in server.calls)
    assert asked == {"generate_questions": 5, "answer_question": 5, "label": 9}, (
        "the exam's shed is left alone"
    )
    assert planned.total.requests == 5 + 10 + 5 + 10
    generated = read_jsonl(home.generated, Question)
    assert [each.about for each in generated] == ["attic", "cellar", "garage", "kitchen"]
    assert {each.split for each in generated} == {"seed"}
    assert report.counts["generated"] == 4
    assert report.facts["steps"][0]["reasons"] == {"quote": 5, "not_answerable": 1}
    assert {each.question_id for each in read_jsonl(home.rationales, Rationale)} == {
        each.id for each in read_all_questions(domain, home) if each.split == "seed"
    }


def test_curation_takes_generated_questions(tmp_path: Path, home: Run) -> None:
    from domains.records import Example
    from pipeline.curate import run as curate

    with OpenAIServer(questions_script) as server:
        domain = make_domain(tmp_path / "d", GENERATE, base_url=server.base_url)
        run(domain, home, Silent())
    report = curate(domain, home, Silent())
    assert report.counts["kept"] == 9
    trained = {example.question_id for example in read_jsonl(home.examples, Example)}
    assert {each.id for each in read_jsonl(home.generated, Question)} <= trained


def test_a_generated_exam_question_is_refused(tmp_path: Path, home: Run) -> None:
    domain = make_domain(tmp_path / "d", "")
    own = domain.read_questions()
    write_jsonl(home.generated, [own[0].model_copy(update={"id": "g1", "split": "exam"})])
    with pytest.raises(DataError, match="'g1' is no seed question"):
        read_all_questions(domain, home)
    write_jsonl(home.generated, [own[0]])
    with pytest.raises(DataError, match="has the id of another"):
        read_all_questions(domain, home)


def test_the_default_is_one_labelling_step() -> None:
    config = parse_config(HEAD, origin="x")
    assert config.elicit.steps == [LabelStep()]
    chosen = parse_config(HEAD + '[[elicit.steps]]\nuse = "critique_revise"\nmax_rounds = 1\n', origin="x")
    assert chosen.elicit.steps == [CritiqueReviseStep(use="critique_revise", max_rounds=1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[elicit.steps]]\nuse = "ratte"\n', "elicit.steps.0.use = 'ratte': unknown; did you mean 'rate'?"),
        ('[[elicit.steps]]\nuse = "rate"\nkeep_shar = 1\n', "unknown key; did you mean 'keep_share'?"),
        (
            '[[elicit.steps]]\nuse = "rate"\nkeep_share = 0\n',
            "keep_share = 0: input should be greater than 0",
        ),
        ("[[elicit.steps]]\nkeep_share = 1\n", "elicit.steps.0.use: missing; known: critique_revise"),
        (
            '[[elicit.steps]]\nuse = "orca"\nbudget = { call = 4 }\n',
            "budget.call: unknown key; did you mean 'calls'?",
        ),
        (
            '[[elicit.steps]]\nuse = "orca"\nbudget = { calls = 0 }\n',
            "budget.calls = 0: input should be greater than or equal to 1",
        ),
        ("[elicit]\nsteps = []\n", "elicit.steps = []"),
        ('[elicit.judge]\nmodle = "x"\n', "elicit.judge.modle: unknown key; did you mean 'model'?"),
        ("[elicit]\nsample = 1\n", "elicit.sample: unknown key; did you mean 'samples'?"),
    ],
)
def test_wrong_steps_name_what_was_meant(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(HEAD + text, origin="domain.toml")
    assert said in caught.value.what


def test_own_prompts_are_read_and_make_the_stage_run_again(tmp_path: Path, home: Run) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("system", "teacher", "rate"):
        (folder / f"{name}.md").write_text(f"{name}\n")
    prompts = read_prompts(folder)
    assert prompts == {"system": "system", "teacher": "teacher", "rate": "rate"}
    domain = make_domain(tmp_path / "d", "")
    own = make_domain(tmp_path / "d", "", prompts={"rate": "x"})
    moved = [
        stage.name for stage in STAGES if fingerprint(stage, domain, home) != fingerprint(stage, own, home)
    ]
    assert moved == ["elicit"]


def test_every_option_of_a_step_is_read_by_code() -> None:
    from domains.steps import STEPS

    folder = Path(__file__).parent.parent / "pipeline" / "strategies"
    code = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    for kind in STEPS.values():
        for key in kind.model_fields:
            assert f".{key}" in code, key
    assert set(DomainConfig.model_fields["elicit"].annotation.model_fields) >= {"steps", "judge"}


def test_the_small_local_model_is_refused_as_a_judge(tmp_path: Path, home: Run) -> None:
    steps = '[[elicit.steps]]\nuse = "label"\n[[elicit.steps]]\nuse = "rate"\nmax_tokens = 40\n'
    domain = make_domain(tmp_path / "d", steps)
    with pytest.raises(StageError, match="rate: ") as caught:
        run(domain, home, Silent())
    assert "stronger model" in caught.value.next_step
    rows = read_jsonl(home.steps / "2-rate.jsonl", Row)
    assert len(rows) == 5
    assert not home.rationales.exists()
