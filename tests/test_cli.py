"""The front door: help, errors that say what to do, Ctrl-C, machine-readable output."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pypdf import PdfWriter
from rich.console import Console

import preceptor
from domains.domain import load_domain
from pipeline import job
from pipeline.run_folder import Finished, Run
from pipeline.stages import NAMES, STAGES, fingerprint, paths_of

ROOT = Path(__file__).parent.parent
VERBS = [command.name or command.callback.__name__ for command in preceptor.app.registered_commands]
SENTENCE = "The {name} is cleaned every {days} days with a dry cloth. Its spare part has the number {number}."


@dataclass(frozen=True)
class Said:
    """What a call printed, and its exit code."""

    out: str
    err: str
    code: int

    @property
    def data(self) -> Any:
        """Standard output as one JSON object."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Call = Callable[..., Said]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """`preceptor ARGUMENTS` in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    for name in ("PRECEPTOR_PROFILE", "PRECEPTOR_RUNS", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["preceptor", *arguments])
        code: Any = 0
        try:
            preceptor.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return Said(captured.out, captured.err, code)

    return run


def start(arguments: Sequence[str], cwd: Path, *, limit_bytes: int = 0) -> subprocess.Popen[str]:
    """A real process; ``limit_bytes`` is the size beyond which its files can't grow, as on a full disk."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PRECEPTOR_")}
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    return subprocess.Popen(
        [sys.executable, "-m", "preceptor", *arguments],
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(ROOT)},
        preexec_fn=limit if limit_bytes else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Said:
    out, err = process.communicate(timeout=120)
    return Said(out, err, process.returncode)


def write_documents(folder: Path, *, count: int, sections: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        parts = [f"# Machine {i}"]
        for j in range(sections):
            text = SENTENCE.format(name=f"part {j} of machine {i}", days=i + j + 2, number=100 * i + j)
            parts.append(f"## Part {j}\n{text}")
        (folder / f"machine-{i:03}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def fake_run(domain_folder: Path, run_folder: Path, stages: Sequence[str]) -> None:
    """A run in which ``stages`` are done."""
    domain, run = load_domain(str(domain_folder), profile="quick"), Run(run_folder)
    for stage in STAGES:
        if stage.name in stages:
            for path in (path for what in stage.writes for path in paths_of(what, domain, run)):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{path.name}\n")
            run.finish(stage.name, Finished(fingerprint(stage, domain, run), {"rows": 7}, {}, 12.0))


def assert_told(said: Said, *words: str, code: int | None = None) -> None:
    """The three lines of an error: what, what was expected, what to do next."""
    assert said.code != 0
    if code is not None:
        assert said.code == code
    assert "Traceback" not in said.out + said.err
    lines = said.err.strip().splitlines()
    assert lines[0].startswith("preceptor: ")
    assert any(line.startswith("Expected: ") for line in lines), said.err
    assert lines[-1].startswith("Next: ")
    for word in words:
        assert word in said.err


# -- help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_that_parses(call: Call, verb: str) -> None:
    said = call(verb, "--help")
    assert said.code == 0
    assert said.err == ""
    text = " ".join(said.out.split())
    assert f"Usage: preceptor {verb}" in text
    examples = re.findall(r"preceptor ([\w-]+)", text[text.index("Example:") :])
    assert verb in examples
    assert set(examples) <= set(VERBS)


def test_help_lists_every_verb_and_nothing_prints_it_too(call: Call) -> None:
    said, bare = call("--help"), call()
    assert all(re.search(rf"^│ {verb} ", said.out, re.MULTILINE) for verb in VERBS)
    assert {"new", "import", "status", "doctor", "run", "ask", *NAMES} <= set(VERBS)
    assert "Usage: preceptor" in bare.out + bare.err


# -- errors for people -------------------------------------------------------------------------------


@pytest.fixture
def machines(call: Call, tmp_path: Path) -> Path:
    write_documents(tmp_path / "docs", count=3, sections=2)
    assert call("new", "machines", "--docs", "docs").code == 0
    return tmp_path / "machines"


@pytest.mark.usefixtures("machines")
@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        ("index nowhere", ["'nowhere'", "medical"], 2),
        ("run medcal", ["did you mean 'medical'"], 2),
        ("status nowhere", ["'nowhere'"], 2),
        ("ask nowhere why?", ["'nowhere'"], 2),
        ("serve nowhere", ["'nowhere'"], 2),
        ("index machines --profile slow", ["'slow'", "'quick'"], 2),
        ("index machines --run latest", ["'latest'", "--run"], 2),
        ("index machines --run ../up", ["'../up'", "--run"], 2),
        ("elicit machines", ["preceptor index machines", "index.json"], 1),
        ("elicit machines --dry-run", ["preceptor index"], 1),
        ("exam machines", ["preceptor index machines"], 1),
        ("ask machines why?", ["no finished run", "preceptor run machines"], 1),
        ("ask machines why? --base", ["no index", "preceptor run machines"], 1),
        ("why machines why?", ["no finished run"], 1),
        ("chat machines", ["no finished run"], 1),
        ("serve machines", ["no finished run"], 1),
        ("ask ./nothing/bundle why?", ["./nothing/bundle"], 2),
        ("index machines --runs docs/machine-000.md", ["is a file", "--runs"], 1),
        ("run machines --runs docs/machine-000.md", ["is a file", "--runs"], 1),
        ("status machines --runs docs/machine-000.md", ["is a file", "--runs"], 1),
        ("doctor --no-speed --runs docs/machine-000.md", ["is a file", "--runs"], 1),
        ("ask machines why? --runs docs/machine-000.md", ["is a file", "--runs"], 1),
        ("index machines --runs docs/machine-000.md/below", ["can't write"], 1),
        ("import medqaud x.jsonl --into made", ["did you mean 'medquad'"], 1),
        ("import medquad x.jsonl --into made", ["'x.jsonl' does not exist"], 1),
        ("import medquad docs --into machines", ["exists already"], 1),
        ("new machines --docs docs", ["exists already", "nothing is overwritten"], 1),
        ("new other --docs nowhere", ["'nowhere' does not exist"], 1),
        ("new Other! --docs docs", ["preceptor new other"], 2),
    ],
)
def test_errors_say_what_was_expected_and_what_to_do(
    call: Call, tmp_path: Path, arguments: str, words: list[str], code: int
) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = call(*arguments.split())
    assert_told(said, code=code)
    for word in words:
        assert word.lower() in said.err.lower()
    assert said.out == ""
    left = {path for path in tmp_path.rglob("*") if path not in before and path.is_file()}
    assert {path.name for path in left} <= {"run.lock"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("frobnicate", "No such command"),
        ("status", "Missing argument"),
        ("serve medical --port 70000", "--port"),
        ("import mcq x --into y --cop-base 2", "--cop-base"),
        ("new x1", "--docs"),
    ],
)
def test_wrong_usage_points_to_the_help(call: Call, arguments: str, words: str) -> None:
    said = call(*arguments.split())
    assert said.code == 2
    assert words in said.err
    assert "--help" in said.err
    assert "Traceback" not in said.out + said.err


def test_an_empty_question_is_wrong_usage(call: Call) -> None:
    said = call("ask", "medical", " ")
    assert said.code == 2
    assert "the question is empty" in said.err


def test_all_problems_of_a_domain_are_told_at_once(call: Call, machines: Path) -> None:
    text = (machines / "domain.toml").read_text().replace("top_k = ", "topk = ")
    (machines / "domain.toml").write_text(text + "\n[profiles.x.train]\nrank = 0\n")
    said = call("status", "machines")
    assert_told(said, "2 problems", "did you mean 'top_k'", "profile 'x': train.rank = 0", code=2)


def test_titles_and_paths_are_printed_as_they_are(call: Call, tmp_path: Path) -> None:
    write_documents(tmp_path / "docs", count=3, sections=2)
    title, folder = "Team [/b] [red]", f"{'long-' * 20}[bold]"
    said = call("new", "team", "--docs", "docs", "--title", title, "--into", folder)
    assert said.out == f"Made {folder}. Look at its README.md, then:\n  preceptor run {folder}\n"
    said = call("run", folder, "--run", "no/name")
    assert_told(said, code=2)
    said = call("status", folder, "--runs", "[/x]")
    assert said.code == 0
    assert "[/x]/team/quick" in said.out


# -- what nobody foresaw -----------------------------------------------------------------------------


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_job(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(job, "run_job", run_job)


@pytest.mark.usefixtures("machines")
def test_a_bug_prints_a_short_traceback_and_asks_to_report_it(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-" + "x" * 20

    def deep(level: int, key: str) -> None:
        if level == 0:
            raise ZeroDivisionError("by zero [/b]")
        deep(level - 1, key)

    monkeypatch.setattr(job, "run_job", lambda *_, **__: deep(50, secret))
    said = call("index", "machines")
    assert said.code == preceptor.BUG_EXIT_CODE
    assert said.err.count("Traceback") == 1
    assert "ZeroDivisionError: by zero [/b]" in said.err
    assert "Please report it" in said.err
    assert len(said.err.splitlines()) <= 25
    assert secret not in said.err
    assert said.out.strip() == ""


@pytest.mark.usefixtures("machines")
@pytest.mark.parametrize(
    ("name", "words"), [("torch", "preceptor[train]"), ("chromadb.api", "pip install preceptor")]
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    call: Call, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    fail_with(ModuleNotFoundError(f"No module named {name!r}", name=name), monkeypatch)
    said = call("index", "machines")
    assert_told(said, repr(name.split(".")[0]), words, code=1)


@pytest.mark.usefixtures("machines")
def test_ctrl_c_says_that_the_same_command_goes_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    for arguments in (["index", "machines"], ["index", "machines", "--json"]):
        said = call(*arguments)
        assert said.code == 130
        assert said.err.strip() == preceptor.STOPPED
        assert said.out.strip() == ""


# -- status and JSON ---------------------------------------------------------------------------------


def states(said: Said) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in said.data["stages"]}


def test_status_knows_missing_done_and_stale(call: Call, machines: Path, tmp_path: Path) -> None:
    assert states(call("status", "machines", "--json")) == dict.fromkeys(NAMES, "missing")
    assert not (tmp_path / "runs").exists()  # looking makes nothing
    fake_run(machines, tmp_path / "runs" / "machines" / "quick", NAMES[:5])
    assert states(call("status", "machines", "--json")) == {
        **dict.fromkeys(NAMES, "missing"),
        **dict.fromkeys(NAMES[:5], "done"),
    }
    toml = machines / "domain.toml"
    toml.write_text(re.sub(r"learning_rate = .*", "learning_rate = 5e-5", toml.read_text()))
    said = call("status", "machines", "--json")
    assert states(said)["train"] == "stale"
    assert states(said)["curate"] == "done"
    assert said.data["run"] == "runs/machines/quick"
    rows = {row["stage"]: row for row in said.data["stages"]}
    assert (rows["train"]["counts"], rows["train"]["seconds"]) == ({"rows": 7}, 12.0)
    # Another profile is another run.
    assert set(states(call("status", "machines", "--profile", "full", "--json")).values()) == {"missing"}

    table = call("status", "machines").out
    assert re.search(r"train +│ stale +│ 12 +│ rows 7", table)
    assert re.search(r"exam +│ missing", table)


def test_status_of_a_damaged_run_says_how_to_go_on(call: Call, machines: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "machines" / "quick"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{")
    assert_told(call("status", "machines"), "run.json is damaged", "delete", code=1)
    assert_told(call("index", "machines"), "run.json is damaged", code=1)


def test_new_and_doctor_print_one_json_object(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import doctor

    write_documents(tmp_path / "docs", count=3, sections=2)
    said = call("new", "plants", "--docs", "docs", "--into", "there", "--json")
    assert said.data == {"domain": "plants", "folder": "there"}
    assert load_domain("there").name == "plants"

    monkeypatch.setattr(doctor, "_student", lambda: "student")
    monkeypatch.setattr(doctor, "_embedder", lambda: "embedder")
    monkeypatch.setattr(doctor, "_installed_bytes", lambda: 1)
    said = call("doctor", "--no-speed", "--json")
    assert said.data["ok"] is (said.code == 0)
    assert {"what", "found", "ok"} == set(said.data["findings"][0])
    monkeypatch.setattr(doctor, "_student", lambda: 1 / 0)
    said = call("doctor", "--no-speed", "--json")
    assert (said.code, said.data["ok"]) == (1, False)
    said = call("doctor", "--no-speed")
    assert said.code == 1
    assert "bad student model: ZeroDivisionError" in said.out


# -- real runs of the index --------------------------------------------------------------------------


def test_broken_documents_are_named_and_counted_and_the_rest_goes_on(call: Call, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    write_documents(docs, count=3, sections=2)
    (docs / "empty.md").write_text("")
    (docs / "latin.txt").write_bytes("Das Öl wird täglich geprüft.".encode("latin-1"))
    scan = PdfWriter()
    scan.add_blank_page(200, 200)
    scan.write(docs / "scan.pdf")
    (docs / "torn.docx").write_bytes(b"PK\x03\x04 not really")
    (docs / "table.xyz").write_text("?")
    (docs / "machine-001.txt").write_text("Another text under the name of machine 1.")
    rows = [{"id": "row", "title": "A", "text": "Row one."}, {"id": "row", "title": "B", "text": "Row two."}]
    (docs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")

    assert call("new", "machines", "--docs", "docs").code == 0
    said = call("index", "machines", "--json")
    assert said.code == 0
    skipped = {entry["source"]: entry["reason"] for entry in said.data["facts"]["skipped"]}
    expected = {
        "empty.md": "empty",
        "latin.txt": "not UTF-8",
        "scan.pdf": "OCR",
        "torn.docx": "damaged",
        "table.xyz": "unknown suffix",
        "machine-001.txt": "the same id, 'machine-001', as machine-001.md",
        "rows.jsonl:2": "the same id, 'row', as rows.jsonl:1",
        "rows.jsonl:3": "JSON",
    }
    assert skipped.keys() == expected.keys()
    for source, words in expected.items():
        assert words in skipped[source]
        assert f"skipped {source}: {skipped[source]}\n" in said.err
    assert said.data["counts"]["documents"] == 4
    assert said.data["counts"]["skipped"] == len(expected)
    assert said.data["skipped"] is False
    assert call("index", "machines", "--json").data["skipped"] is True
    assert "done before" in call("index", "machines").out


def test_the_untrained_student_answers_as_soon_as_the_index_exists(call: Call, machines: Path) -> None:
    text = (machines / "domain.toml").read_text()
    (machines / "domain.toml").write_text(text.replace("[serve]", "[serve]\nmax_tokens = 8"))
    assert call("index", "machines").code == 0
    said = call("ask", "machines", "Why is this so long? " * 600, "--base")
    assert_told(said, "at most 2048", "shorter question", code=1)

    question = "How often is part 1 of machine 2 cleaned?"
    said = call("ask", "machines", question, "--base", "--json")
    assert said.data["question"] == question
    assert isinstance(said.data["citations"], list)
    said = call("why", "machines", question, "--base", "--json")
    assert said.data["answer"]["question"] == question
    assert any("machine-002" in line or "Machine 2" in line for line in said.data["explanation"])

    service = start(["serve", "machines", "--base", "--port", "0"], machines.parent)
    assert service.stdout is not None
    first = service.stdout.readline()
    assert re.search(r"http://127\.0\.0\.1:\d+/v1", first), first
    service.send_signal(signal.SIGINT)
    said = finish(service)
    assert (said.code, said.err) == (0, "")
    assert said.out.endswith("Stopped.\n")


def test_ctrl_c_and_a_full_disk_lose_nothing_and_one_process_works_at_a_time(tmp_path: Path) -> None:
    """Real processes on one folder, one after the other: refused, stopped, out of space, completed."""
    write_documents(tmp_path / "docs", count=12, sections=8)
    assert finish(start(["new", "machines", "--docs", "docs"], tmp_path)).code == 0
    run = tmp_path / "runs" / "machines" / "quick"

    with Run(run):
        refused = finish(start(["index", "machines"], tmp_path))
    assert_told(refused, f"pid {os.getpid()}", "--run", code=4)

    stopped = start(["index", "machines"], tmp_path)
    until(lambda: (run / "bundle" / "index" / "chroma" / "chroma.sqlite3").exists(), stopped)
    stopped.send_signal(signal.SIGINT)
    said = finish(stopped)
    assert said.code == 130
    assert said.err.strip() == preceptor.STOPPED
    assert json.loads((run / "run.json").read_text()) == {}
    assert not (run / "bundle" / "index" / "index.json").exists()

    full = finish(start(["index", "machines"], tmp_path, limit_bytes=200_000))
    assert_told(full, "can't write", "free some space", code=1)
    assert json.loads((run / "run.json").read_text()) == {}

    done = finish(start(["index", "machines", "--json"], tmp_path))
    assert done.code == 0, done.err
    assert (done.data["counts"]["documents"], done.data["counts"]["passages"]) == (12, 12 * 8)
    assert list(json.loads((run / "run.json").read_text())) == ["index"]


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not true():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"]])
def test_a_pipe_that_is_closed_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    process = start(arguments, tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) in {0, 1}


def test_a_searchs_table_shows_what_untying_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = io.StringIO()
    monkeypatch.setattr(preceptor, "console", Console(file=paper, width=80))
    row = {
        "name": "gptq-q4_0", "bytes": 92 * 10**6, "untied_bytes": 0, "block_bits_per_weight": 4.5, "kl": 0.28, "top1_agreement": 0.8,
        "exam": 0.25, "prompt_tokens_per_s": 800.0, "decode_tokens_per_s": 90.0,
    }  # fmt: skip
    rotated = {**row, "name": "r1r2-gptq-q4_0", "bytes": 122 * 10**6, "untied_bytes": 30 * 10**6}
    preceptor._print_search(
        {
            "candidates": [row, rotated, {**row, "name": "llamacpp-q4_k_m-imatrix"}],
            "asked": 24,
            "winner": "r1r2-gptq-q4_0",
            "reasons": [],
            "rotation": "",
            "caveat": "on text",
        }
    )
    assert "  on text\n" in paper.getvalue()
    assert "24 seed questions that training has not seen" in paper.getvalue()
    assert "llamacpp-q4_k_m-imatrix" in paper.getvalue()
    plain, turned = (line.split() for line in paper.getvalue().splitlines() if "gptq-q4_0" in line)
    assert plain[:3] == ["gptq-q4_0", "92", "-"]
    assert turned[:4] == ["*", "r1r2-gptq-q4_0", "122", "30"]
