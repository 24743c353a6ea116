"""The front door: one command, ``preceptor <verb>``. It composes and prints; it holds no logic.

Imports stay inside the verbs, so that ``--help`` is quick and a machine that only serves needs no torch.
"""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from domains.errors import PreceptorError

if TYPE_CHECKING:
    from domains.domain import Domain
    from pipeline.job import Outcome
    from pipeline.run_folder import Run
    from serve.bundle import OpenBundle
    from serve.shared_models import SharedModels

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # `main` prints them
    rich_markup_mode="markdown",
    help="Turn a domain's documents into a small assistant that quotes its sources and runs on a laptop.",
    epilog="A domain is a folder with a domain.toml. Begin with `preceptor run medical`, "
    "or `preceptor new my-team --docs DIR`.",
)
console = Console()
errors = Console(stderr=True)
BUG_EXIT_CODE = 70  # sysexits.h: EX_SOFTWARE
TRACEBACK_LINES = 6
STOPPED = "Stopped. What was finished is kept: the same command goes on from there."
TRAIN_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "matplotlib")

DomainName = Annotated[
    str, typer.Argument(metavar="DOMAIN", help="A domain's name, or the path of its folder.")
]
Profile = Annotated[
    str,
    typer.Option(
        envvar="PRECEPTOR_PROFILE",
        help="quick (10 to 17 minutes on 2 cores), full, or a profile of domain.toml.",
    ),
]
RunName = Annotated[
    str, typer.Option("--run", help="Name of the run folder; the profile's name when left out.")
]
Runs = Annotated[Path, typer.Option(envvar="PRECEPTOR_RUNS", help="Where run folders lie.")]
Force = Annotated[bool, typer.Option("--force", help="Do it again even when nothing changed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Base = Annotated[
    bool, typer.Option("--base", help="Use the untrained student: works as soon as the index exists.")
]
Target = Annotated[
    str, typer.Argument(metavar="DOMAIN", help="A domain with a finished run, or the path of a bundle.")
]
Targets = Annotated[
    list[str],
    typer.Argument(metavar="DOMAIN", help="Domains with finished runs, or paths of bundles; one or more."),
]


def _not_empty(text: str) -> str:
    if not text.strip():
        raise typer.BadParameter("the question is empty")
    return text


QuestionText = Annotated[str, typer.Argument(help="The question, in quotes.", callback=_not_empty)]


def main() -> None:
    """Run the command line; errors meant for people are printed without a traceback."""
    try:
        app(prog_name="preceptor")
    except PreceptorError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        _print_error(_missing_package(error))
        sys.exit(PreceptorError.exit_code)
    except SystemExit as end:
        if end.code == 130:  # typer made it out of the KeyboardInterrupt of Ctrl-C
            errors.print(f"\n{STOPPED}", highlight=False, soft_wrap=True)
        raise
    except Exception as error:
        traceback.print_exception(error, limit=-TRACEBACK_LINES)
        errors.print(
            f"\nThis is a bug in preceptor ({type(error).__name__}). Please report it with the lines above, the "
            "command, and what `preceptor doctor` prints. Finished work is kept.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        sys.exit(BUG_EXIT_CODE)


def _print_error(error: PreceptorError) -> None:
    errors.print(f"[bold red]preceptor:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _missing_package(error: ModuleNotFoundError) -> PreceptorError:
    name = (error.name or str(error)).split(".")[0]
    train = name in TRAIN_PACKAGES
    return PreceptorError(
        f"the Python package {name!r} is not installed",
        expected="the packages for training; this machine can serve without them"
        if train
        else "a whole installation",
        next_step="pip install 'preceptor[train]'"
        if train
        else "pip install preceptor, or make setup in its folder",
    )


# -- making a domain ---------------------------------------------------------------------------------


@app.command(epilog="Example: `preceptor new my-team --docs ~/notes`")
def new(
    name: Annotated[str, typer.Argument(help="Name of the new domain, such as my-team.")],
    docs: Annotated[Path, typer.Option(help="Folder of md, html, pdf, docx, txt, jsonl or JATS XML files.")],
    questions: Annotated[
        Path | None, typer.Option(help="Your own questions.jsonl; starter ones are made when left out.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="Where to make the folder; domains/NAME or NAME when left out.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title shown to users.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a domain from a folder of documents."""
    from pipeline.new import new_domain

    folder = new_domain(name, docs, into=into or _domains_folder() / name, title=title, questions=questions)
    if as_json:
        _print_json({"domain": name, "folder": str(folder)})
        return
    console.print(
        f"Made {folder}. Look at its README.md, then:\n  preceptor run {_as_argument(folder, name)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command("import", epilog="Example: `preceptor import medquad MedQuAD.jsonl --into domains/my-medquad`")
def import_(
    format_: Annotated[str, typer.Argument(metavar="FORMAT", help="beir, medquad, pubmedqa, mcq or jsonl.")],
    source: Annotated[Path, typer.Argument(help="The set's file or folder (for jsonl: the questions).")],
    into: Annotated[Path, typer.Option(help="Folder of the new domain.")],
    documents: Annotated[Path | None, typer.Option(help="Documents, where the set keeps them apart.")] = None,
    questions: Annotated[Path | None, typer.Option(help="Questions, where SOURCE is a folder.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many questions; 0 is all.")] = 0,
    field: Annotated[
        list[str] | None, typer.Option(help="Field map OURS=THEIRS of questions; repeat it.")
    ] = None,
    document_field: Annotated[
        list[str] | None, typer.Option(help="Field map OURS=THEIRS of documents.")
    ] = None,
    cop_base: Annotated[
        int | None, typer.Option(min=0, max=1, help="mcq: whether `cop` counts from 0 or 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split into seed and exam documents.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a domain from a public question set."""
    from pipeline.importers import import_set

    report = import_set(
        format_,
        source,
        into=into,
        documents=documents,
        questions=questions,
        limit=limit,
        fields=field or [],
        document_fields=document_field or [],
        cop_base=cop_base,
        seed=seed,
    )
    if as_json:
        _print_json(report)
        return
    for key, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {count}" for name, count in value.items())
        if value not in ("", []):
            console.print(f"  {key}: {value}", highlight=False, markup=False)
    first = ""
    if not report["documents"] and documents is None:
        first = f"put your documents into {into / 'documents'} (the set brings none), then "
    console.print(f"\nNext: {first}preceptor run {into}", highlight=False, markup=False, soft_wrap=True)


# -- the stages --------------------------------------------------------------------------------------


def _stage(
    name: str,
    domain_name: str,
    profile: str,
    run_name: str,
    runs: Path,
    force: bool,
    as_json: bool,
    *,
    search: bool = False,
) -> None:
    from pipeline.job import run_job

    domain, run = _open_run(domain_name, profile, run_name, runs)
    if search:
        from domains.domain import with_search

        domain = with_search(domain)
    with _progress(as_json) as progress:
        (outcome,) = run_job(domain, run, progress, stages=[name], force=force)
    _learn(domain, outcome)
    if as_json:
        _print_json({"stage": name, "skipped": outcome.skipped, **asdict(outcome.entry)})
    else:
        _print_outcome(outcome)
        if found := outcome.entry.facts.get("search"):
            _print_search(found, told=not outcome.skipped)


@app.command(epilog="Example: `preceptor index medical`")
def index(domain: DomainName, profile: Profile = "quick", run: RunName = "", runs: Runs = Path("runs"), force: Force = False, as_json: AsJson = False) -> None:  # fmt: skip
    """Documents to passages to a searchable index (changed documents only)."""
    _stage("index", domain, profile, run, runs, force, as_json)


@app.command(epilog="Example: `preceptor elicit product_requirements --dry-run`")
def elicit(
    domain: DomainName,
    profile: Profile = "quick",
    run: RunName = "",
    runs: Runs = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would ask and cost.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """The teacher explains the answers of the seed questions; nothing is paid twice."""
    if not dry_run:
        _stage("elicit", domain, profile, run, runs, force, as_json)
        return
    from pipeline.elicit import plan

    opened, folder = _open_run(domain, profile, run, runs)
    planned = plan(opened, folder)
    if as_json:
        _print_json({**asdict(planned.total), "steps": [asdict(step) for step in planned.steps]})
        return
    for step in planned.steps if len(planned.steps) > 1 else []:
        most = "" if step.exact else "at most "
        console.print(
            f"  step {step.step}: {most}{step.requests} requests for {step.rows} rows", highlight=False
        )
    for key, value in asdict(planned.total).items():
        console.print(f"  {key.replace('_', ' ')}: {value}", highlight=False)


@app.command(epilog="Example: `preceptor curate medical`")
def curate(domain: DomainName, profile: Profile = "quick", run: RunName = "", runs: Runs = Path("runs"), force: Force = False, as_json: AsJson = False) -> None:  # fmt: skip
    """Verified rationales to training rows; what is rejected keeps its reason."""
    _stage("curate", domain, profile, run, runs, force, as_json)


@app.command(epilog="Example: `preceptor rerank medical`")
def rerank(domain: DomainName, profile: Profile = "quick", run: RunName = "", runs: Runs = Path("runs"), force: Force = False, as_json: AsJson = False) -> None:  # fmt: skip
    """A reranker learns from rationales to order passages by the question, where [rerank] is enabled."""
    _stage("rerank", domain, profile, run, runs, force, as_json)


@app.command(epilog="Example: `preceptor train medical --profile full`")
def train(domain: DomainName, profile: Profile = "quick", run: RunName = "", runs: Runs = Path("runs"), force: Force = False, as_json: AsJson = False) -> None:  # fmt: skip
    """Train the student by [train] method; a killed training goes on from its checkpoint."""
    _stage("train", domain, profile, run, runs, force, as_json)


@app.command(epilog="Example: `preceptor export medical --search`")
def export(
    domain: DomainName,
    profile: Profile = "quick",
    run: RunName = "",
    runs: Runs = Path("runs"),
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Make every format, measure them all, serve the best: 80 minutes on 2 cores with the default student.",
        ),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Merge, write GGUF, quantize, and compare the served file with the trained network."""
    _stage("export", domain, profile, run, runs, force, as_json, search=search)


@app.command(epilog="Example: `preceptor calibrate medical`")
def calibrate(domain: DomainName, profile: Profile = "quick", run: RunName = "", runs: Runs = Path("runs"), force: Force = False, as_json: AsJson = False) -> None:  # fmt: skip
    """How sure the served student is: fitted to its answers to seed questions."""
    _stage("calibrate", domain, profile, run, runs, force, as_json)


@app.command(epilog="Example: `preceptor exam medical --json`")
def exam(domain: DomainName, profile: Profile = "quick", run: RunName = "", runs: Runs = Path("runs"), force: Force = False, as_json: AsJson = False) -> None:  # fmt: skip
    """Five arms on held-out documents, with intervals and a verdict."""
    _stage("exam", domain, profile, run, runs, force, as_json)
    if not as_json:
        _print_exam(_run_folder(domain, profile, run, runs).bundle)


@app.command(
    epilog="Example: `preceptor run medical` (10 to 17 minutes on 2 cores), `preceptor run medical --profile full`"
)
def run(
    domain: DomainName,
    profile: Profile = "quick",
    run_name: RunName = "",
    runs: Runs = Path("runs"),
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """The main job: index, elicit, curate, rerank, train, export, exam. Skips what is done."""
    from pipeline.job import run_job
    from pipeline.preflight import check_main_job
    from pipeline.stages import NAMES

    opened, folder = _open_run(domain, profile, run_name, runs)
    with _progress(as_json) as progress:
        check_main_job(opened, folder, progress)
    if not as_json:
        _print_estimate(opened, folder)

    def after(outcome: Outcome) -> None:
        _learn(opened, outcome)
        if as_json:
            return
        _print_outcome(outcome)
        if outcome.stage == "index" and not (folder.bundle / "report.json").exists():
            _first_answer(opened, folder, domain)

    with _progress(as_json) as progress:
        run_job(opened, folder, progress, stages=NAMES, force=force, after=after)
    if as_json:
        console.print_json((folder.bundle / "report.json").read_text(encoding="utf-8"))
        return
    _print_exam(folder.bundle)
    _print_sample(folder, opened)
    for line in (
        f"\nReport:  {folder.bundle / 'report.html'}",
        f"Chat:    preceptor chat {domain}",
        f"Serve:   preceptor serve {domain}  (OpenAI-compatible, loopback, token)",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


# -- answering ---------------------------------------------------------------------------------------


@app.command(epilog='Example: `preceptor ask medical "What is metformin used for?"`')
def ask(
    target: Target,
    question: QuestionText,
    base: Base = False,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Answer one question with checked quotes."""
    with closing(_open(target, runs, base, parallel=1)) as bundle:
        answer = bundle.assistant.ask(question)
    if as_json:
        _print_json(answer.model_dump(mode="json"))
    else:
        _print_answer(answer.text, answer.citations)
        _print_disclaimer(bundle)


@app.command(epilog='Example: `preceptor why medical "What is metformin used for?"`')
def why(
    target: Target,
    question: QuestionText,
    base: Base = False,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Explain an answer: which passages were found and where, what was quoted, what was refused."""
    from serve.chat import explain

    with closing(_open(target, runs, base, parallel=1)) as bundle:
        asked = bundle.assistant.prepare(question)
        (answer,) = bundle.assistant.ask_many([asked])
        lines = explain(asked, answer, context=bundle.engine.context)
    if as_json:
        _print_json({"answer": answer.model_dump(mode="json"), "explanation": lines})
        return
    _print_answer(answer.text, answer.citations)
    console.print()
    for line in lines:
        console.print(line, highlight=False, markup=False)


@app.command(
    epilog="Example: `preceptor chat medical`, or `preceptor chat medical --base` before anything is trained"
)
def chat(target: Target, base: Base = False, runs: Runs = Path("runs")) -> None:
    """Chat in the terminal; every answer shows the sentences it rests on."""
    from serve.chat import chat_session

    with closing(_open(target, runs, base, parallel=1)) as bundle:
        chat_session(bundle, console)


@app.command(
    epilog="Example: `preceptor serve medical --port 8080`, or several: `preceptor serve medical product_requirements`"
)
def serve(
    targets: Targets,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; [serve] port when left out.")
    ] = None,
    base: Base = False,
    runs: Runs = Path("runs"),
) -> None:
    """Serve an OpenAI-compatible API on this machine, protected by a token.

    Of several domains a request chooses one by its `model`; those on the same base share it in memory.
    """
    from serve.http import serve_bundles
    from serve.secrets import service_token
    from serve.shared_models import SharedModels

    token = service_token()
    with ExitStack() as stack:
        shared = stack.enter_context(SharedModels()) if len(targets) > 1 else None
        bundles = [stack.enter_context(_open(target, runs, base, shared=shared)) for target in targets]
        chosen = bundles[0].config.serve.port if port is None else port

        def on_ready(url: str) -> None:
            for bundle in bundles:
                title = f"{bundle.config.domain.title} (model {bundle.name})"
                console.print(f"Serving {escape(title)} at [bold]{url}/v1[/]  (Ctrl-C stops)", soft_wrap=True)
                _print_disclaimer(bundle)
            console.print(f"Token: {token}", highlight=False, soft_wrap=True)
            console.print(
                f'Python: OpenAI(base_url="{url}/v1", api_key=TOKEN)', highlight=False, markup=False
            )

        try:
            serve_bundles(bundles, port=chosen, token=token, on_ready=on_ready)
        except KeyboardInterrupt:  # how a service is meant to end
            console.print("\nStopped.")


# -- looking -----------------------------------------------------------------------------------------


@app.command(epilog="Example: `preceptor status medical`")
def status(domain: DomainName, profile: Profile = "quick", run: RunName = "", runs: Runs = Path("runs"), as_json: AsJson = False) -> None:  # fmt: skip
    """Which stages are done, stale or missing, and what they counted."""
    from pipeline.status import stage_rows

    opened, folder = _open_run(domain, profile, run, runs)
    rows = stage_rows(opened, folder)
    if as_json:
        _print_json({"run": str(folder.folder), "stages": [asdict(row) for row in rows]})
        return
    table = Table(title=escape(str(folder.folder)), title_justify="left")
    for heading in ("stage", "state", "seconds", "counts"):
        table.add_column(heading)
    for row in rows:
        counts = ", ".join(f"{name} {value}" for name, value in row.counts.items())
        table.add_row(row.stage, row.state, f"{row.seconds:.0f}" if row.seconds else "", counts)
    console.print(table)


@app.command(epilog="Example: `preceptor doctor`")
def doctor(
    runs: Runs = Path("runs"),
    speed: Annotated[bool, typer.Option(help="Load the default model and measure it.")] = True,
    as_json: AsJson = False,
) -> None:
    """What this machine has, what is installed, and what earlier runs took."""
    from pipeline.doctor import examine
    from pipeline.run_folder import need_folder

    need_folder(runs)
    findings = examine(runs, speed=speed)
    if as_json:
        _print_json(
            {"ok": all(finding.ok for finding in findings), "findings": [asdict(f) for f in findings]}
        )
    else:
        for finding in findings:
            mark = "[green]ok [/]" if finding.ok else "[red]bad[/]"
            console.print(f"{mark} {finding.what}: {escape(finding.found)}", highlight=False)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


# -- composing and printing --------------------------------------------------------------------------


def _domains_folder() -> Path:
    return Path("domains") if Path("domains").is_dir() else Path()


def _as_argument(folder: Path, name: str) -> str:
    return name if folder == Path("domains") / name else str(folder)


def _run_folder(domain_name: str, profile: str, run_name: str, runs: Path) -> Run:
    return _open_run(domain_name, profile, run_name, runs)[1]


def _open_run(domain_name: str, profile: str, run_name: str, runs: Path) -> tuple[Domain, Run]:
    from domains.domain import load_domain
    from pipeline.run_folder import open_run

    domain = load_domain(domain_name, profile=profile)
    return domain, open_run(runs, domain.name, run_name or profile)


def _open(
    target: str,
    runs: Path,
    base: bool,
    *,
    parallel: int | None = None,
    shared: SharedModels | None = None,
) -> OpenBundle:
    from serve.bundle import find_bundle, open_base, open_bundle

    if base:
        from domains.domain import load_domain

        domain = load_domain(target)
        index = find_bundle(target, runs, base=True) / "index"
        return open_base(domain, index, parallel=parallel, shared=shared)
    return open_bundle(find_bundle(target, runs), parallel=parallel, shared=shared)


def _progress(as_json: bool) -> Any:
    from pipeline.console import ConsoleProgress

    return ConsoleProgress(errors if as_json else console)


def _learn(domain: Domain, outcome: Outcome) -> None:
    from pipeline.estimate import learn

    if not outcome.skipped:
        learn(domain, outcome.stage, outcome.entry)


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _print_estimate(domain: Domain, folder: Run) -> None:
    from pipeline.estimate import estimate
    from pipeline.run_folder import check_space

    cost = estimate(domain)
    check_space(folder.folder, int(cost.disk_bytes))
    title = escape(domain.config.domain.title)
    console.print(f"[bold]{title}[/] -> {escape(str(folder.folder))}", highlight=False, soft_wrap=True)
    if domain.config.domain.description:
        console.print(f"  {domain.config.domain.description}", highlight=False, markup=False)
    parts = ", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in cost.seconds.items())
    source = "this machine's earlier runs" if cost.own_rates else "a 2-core server CPU"
    console.print(
        f"Estimate: {cost.minutes:.0f} minutes ({parts}), by the speed of {source};", highlight=False
    )
    console.print(
        f"  {cost.disk_bytes / 1e9:.1f} GB of disk, {cost.memory_bytes / 1e9:.1f} GB of memory at the peak. "
        "What is done already is skipped.",
        highlight=False,
    )


def _print_outcome(outcome: Outcome) -> None:
    counts = ", ".join(f"{name} {value}" for name, value in outcome.entry.counts.items())
    took = "done before" if outcome.skipped else f"{outcome.entry.seconds:.0f} s"
    console.print(f"[green]✓[/] {outcome.stage} ({took}): {counts}", highlight=False)


def _print_search(found: dict[str, Any], *, told: bool = False) -> None:
    """``told``: the reasons were said while it searched."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("file", no_wrap=True)
    for name in ("MB", "untied", "bits", "KL", "top 1", "score", "prompt/s", "reply/s"):
        table.add_column(name, justify="right")
    for row in found["candidates"]:
        score = "-" if row["exam"] is None else f"{100 * row['exam']:.0f}"
        table.add_row(
            ("* " if row["name"] == found["winner"] else "  ") + row["name"],
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['untied_bytes'] / 1e6:.0f}" if row["untied_bytes"] else "-",
            f"{row['block_bits_per_weight']:.2f}",
            f"{row['kl']:.4f}",
            f"{100 * row['top1_agreement']:.1f}",
            score,
            f"{row['prompt_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.0f}",
        )
    console.print(table)
    for reason in () if told else found["reasons"]:
        console.print(f"  {escape(reason)}", highlight=False, soft_wrap=True)
    if found.get("asked"):
        said = f"  exam: {found['asked']} seed questions that training has not seen"
        console.print(said, highlight=False, markup=False)
    for more in ("rotation", "caveat"):
        if found.get(more):
            console.print(f"  {escape(found[more])}", highlight=False, soft_wrap=True)
    said = (
        "untied: MB of these for an output matrix of its own; top 1: % of positions with the same top token"
    )
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    console.print('To keep the choice for `run`: [export] rounding = "search" in domain.toml.', markup=False)


def _first_answer(domain: Domain, folder: Run, name: str) -> None:
    """Something to use while the rest runs: the untrained student with retrieval."""
    from pipeline.showcase import first_answer

    answer = first_answer(domain, folder)
    if answer is None:
        return
    console.print("\nA first answer, from the untrained student with retrieval:", highlight=False)
    _print_answer(answer.text, answer.citations, question=answer.question)
    more = f"Ask more meanwhile in another terminal: preceptor chat {name} --base\n"
    console.print(more, highlight=False, markup=False, soft_wrap=True)


def _print_exam(bundle: Path) -> None:
    from pipeline.report import exam_table

    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    console.print()
    console.print(exam_table(report))
    console.print(f"\n[bold]Verdict:[/] {escape(report['verdict'])}", highlight=False)


def _print_sample(folder: Run, opened: Domain) -> None:
    """One cited answer of the exported student, from the exam."""
    from pipeline.showcase import cited_sample

    answer, reference = cited_sample(folder, opened)
    if answer is None:
        console.print("\nThe exported student gave no answer with a checked quote.", highlight=False)
        return
    console.print("\nOne answer of the exported student:", highlight=False)
    _print_answer(answer.text, answer.citations, question=answer.question)
    console.print(f"  The exam's own answer: {reference}", highlight=False, markup=False)


def _print_disclaimer(bundle: OpenBundle) -> None:
    for line in (bundle.config.domain.disclaimer, *bundle.notes):
        if line:
            console.print(f"\n[dim]{escape(line)}[/]", highlight=False)


def _print_answer(text: str, citations: list[Any], *, question: str = "") -> None:
    if question:
        console.print(f"  Q: {question}", highlight=False, markup=False)
    console.print(f"  A: {text}" if question else text, highlight=False, markup=False)
    for item in citations:
        row = item if isinstance(item, dict) else item.model_dump()
        console.print(f'  [{row["number"]}] {row["title"]}: "{row["quote"]}"', highlight=False, markup=False)


if __name__ == "__main__":
    main()
