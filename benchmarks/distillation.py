"""Measures rationale distillation: the reranker, the students of KARD's ablation, reflection and abstention.

    python benchmarks/distillation.py              everything; never timed as a whole, see docs/results.md for parts of it
    python benchmarks/distillation.py --quick      small samples, meant for 15 minutes on 2 idle cores
    python benchmarks/distillation.py --json       the last line is one JSON object
    python benchmarks/distillation.py --parts retrieval abstention public
    python benchmarks/distillation.py --parts sweep --profile quick
    python benchmarks/distillation.py --parts public --sets kqa_answers --work DIR

Retrieval is measured on MedQuAD's answerable questions where ``--data`` has them (folders ``medquad_answerable``
and ``medquad``), else on the domain's own corpus; ``abstention`` asks the same set, its unanswerable questions too,
with the student that ``students`` trained, else with the untrained model. ``sweep`` varies KARD's rationales per question (n),
passages (k) and share of rows whose passages the question found, one at a time (left out of --quick). ``public`` chooses options
(``openstax_health``), decides yes or no (``pubmedqa``), judges support (``kqa``), answers its patients (``kqa_answers``; also
with the students that ``students`` trained in ``--work``; not with --quick) and finds sections (``prd_doc_qa``), each where ``--data`` has it, and answers closed questions of the shipped domains and of ``--domain``; chance stands beside each.
Students are trained and asked on the domain's corpus: the exam split, whose documents no training row is about. Every figure is of
this machine as it is: close what else runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

# The packages are found beside this folder, installed or not.
sys.path.insert(0, str(Path(__file__).parent.parent))

from domains.config import ReflectSection, RerankSection
from domains.domain import Domain, load_domain
from domains.jsonl import write_text_atomic
from domains.records import Answer, Example, Question
from domains.routes import LEARNING_RATES
from pipeline import ablation
from pipeline.arms import PARALLEL, Conditions
from pipeline.base_gguf import base_gguf
from pipeline.exam import draw_questions, exam_questions
from pipeline.fit_reflection import ReflectionFit, fit_student
from pipeline.job import run_job
from pipeline.metrics import Mark
from pipeline.progress import Lines, Progress
from pipeline.public_sets_bench import (
    SETS,
    answer_confidence,
    measure_public,
    medquad_indexes,
    retrieval_confidence,
)
from pipeline.recipe import QLORA, settings_of
from pipeline.reflection_bench import RESAMPLES, abstention, fit_to_development, reflection
from pipeline.retrieval_bench import measure_case
from pipeline.retrieval_cases import Case, corpus_case, medquad_case
from pipeline.run_folder import Run, open_run
from rag.retrieve import Retriever, open_retriever
from serve.assistant import Assistant
from serve.confidence import Calibration, read_calibration
from serve.engine import Engine
from serve.models import sha256_file
from serve.reflection import open_reflector
from serve.reflection_fit import with_fit
from serve.vote import Votes

ROOT = Path(__file__).parent.parent
PARTS = ("retrieval", "students", "abstention", "public", "sweep")
NOT_QUICK = {"sweep"}
BACKENDS = ("text", "tokens")
# Which arms are compared, beside each with the untrained model.
PAIRS = (
    *(("rationales", "answers"), ("kard", "rationales"), ("kard_reranked", "kard"), ("kard_oracle", "kard")),
    *(("kard_voted", "kard"), ("quotes", "kard"), ("quotes_reranked", "quotes"), ("grader", "quotes")),
    *(("text", "quotes"), ("tokens", "quotes"), ("kard_abstaining", "quotes"), ("kard_abstaining", "kard")),
    *(
        ("tokens_fitted", "tokens"),
        ("tokens_long", "tokens"),
        ("explained", "quotes"),
        ("explained_long", "explained"),
    ),
)
# Whose student an arm asks; base_rag asks the untrained model.
STUDENT_OF = {
    **{
        name: name
        for name in ("answers", "rationales", "kard", "quotes", *BACKENDS, "kard_abstaining", "explained")
    },
    **dict.fromkeys(("kard_reranked", "kard_oracle", "kard_voted"), "kard"),
    **dict.fromkeys(("grader", "quotes_reranked"), "quotes"),
    **dict.fromkeys(("tokens_fitted", "tokens_long"), "tokens"),
    "explained_long": "explained",
}
NOT_QUICK_ARMS = {
    "quotes_reranked", "kard_abstaining", "kard_voted", "tokens_fitted", "tokens_long", "explained", "explained_long",
}  # fmt: skip
SWEEP_N, SWEEP_K, SWEEP_SHARE = 3, (1, 5), (0.0, 1.0)  # beside the options' own
VOTES = 5  # replies a question in the arm kard_voted
FIT_QUESTIONS = 80  # of the seed split and of the instructions, for threshold and weights of tokens_fitted
DEVELOPMENT = 200  # prompts that the confidence of quotes is fitted to: seed questions, with and without their documents
QUICK_DEVELOPMENT = 16  # with fewer than 8 right answers among them the likelihood ranks
QUICK_ROWS = 400  # of MedQuAD, to learn the reranker from
PATIENTS_ASK = ("quotes", "kard_abstaining")  # whose students answer K-QA
QUICK_ASKED = 10  # of MedQuAD's test, for the student's abstention
SHIPPED = ("medical", "product_requirements")
QUICK = {"questions": 36, "exam": 12, "epochs": 1}


def main() -> None:
    """Measure the chosen parts and report."""
    options = parse_options()
    progress = Lines()
    result: dict[str, Any] = {"quick": options.quick, "domain": options.domain}
    with tempfile.TemporaryDirectory() as name:
        work = Path(options.work or name)
        for part in options.parts:
            began = time.monotonic()
            progress.say(f"== {part}")
            result |= MEASURES[part](options, work, progress)
            result.setdefault("seconds", {})[part] = round(time.monotonic() - began)
    show(result)
    if options.json:
        print(json.dumps(result))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small samples")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure (default: all)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="of the part public")
    parser.add_argument("--domain", default="medical", help="name or folder (default: medical)")
    parser.add_argument(
        "--profile", default="", help="of the domain: sizes (default: full, with --quick quick)"
    )
    parser.add_argument("--data", type=Path, default=found_data(), help="folder with public sets")
    parser.add_argument("--split", default="dev", choices=("dev", "hidden"), help="which half of the sets")
    parser.add_argument("--work", help="keep runs here: a second call goes on where the first stopped")
    parser.add_argument(
        "--keep",
        type=int,
        default=1,
        help="rationales per question (KARD's n; above 1 the arm quotes shows them, too)",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=STUDENT_OF,
        help="of the students, beside base_rag and quotes (default: all; with --quick the cheaper ones)",
    )
    parser.add_argument(
        "--questions", type=int, help="exam questions, 0: all (default: the profile's, with --quick 12)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="passages (KARD's k); 0: the domain's")
    parser.add_argument(
        "--question-share", type=float, default=0.4, help="KARD rows retrieved by the question"
    )
    options = parser.parse_args()
    options.profile = options.profile or ("quick" if options.quick else "full")
    options.parts = options.parts or [part for part in PARTS if not (options.quick and part in NOT_QUICK)]
    options.arms = {
        "quotes",
        *(options.arms or STUDENT_OF.keys() - (NOT_QUICK_ARMS if options.quick else set())),
    }
    return options


def found_data() -> Path | None:
    """The folder of public sets beside the checkout, where there is one."""
    beside = ROOT.parent / "shared" / "data"
    return beside if beside.is_dir() else None


def measure_retrieval(options: argparse.Namespace, work: Path, progress: Progress) -> dict[str, Any]:
    """BM25, dense, hybrid and reranked, at the level of documents."""
    case = retrieval_case(options)
    found = measure_case(
        case,
        work / "retrieval",
        progress,
        rerank=RerankSection(),
        rows=QUICK_ROWS if options.quick else 0,
    )
    arms = {name: found.pop(name) for name in ("bm25", "dense", "hybrid", "reranked")}
    milliseconds = {name: found.pop(name) for name in ("rerank_ms_50", "rerank_ms_100")}
    return {
        "retrieval": arms,
        **milliseconds,
        "retrieval_case": {"name": case.name, "split": options.split, **found},
    }


def retrieval_case(options: argparse.Namespace) -> Case:
    """MedQuAD where it lies in ``--data``, else the domain's corpus."""
    data = options.data
    if data is not None and (data / "medquad_answerable" / f"{options.split}_corpus.jsonl").is_file():
        return medquad_case(data / "medquad_answerable", data / "medquad" / "dev.jsonl", split=options.split)
    return corpus_case(load_domain(options.domain).documents.parent)


def measure_students(options: argparse.Namespace, work: Path, progress: Progress) -> dict[str, Any]:
    """The arms of KARD's ablation, see `pipeline.ablation`."""
    domain, run = prepared(options, work, progress)
    config = domain.config
    top_k = options.top_k or config.retrieve.top_k
    questions = asked_questions(domain)
    taught = ablation.kept_rationales(run, domain.read_questions())
    conditions = conditions_of(domain, top_k)
    with (
        open_retriever(run.index, config.retrieve) as hybrid,
        open_retriever(run.index, config.retrieve, config.rerank) as reranked,
    ):
        index = hybrid.index
        recipes = recipes_of(domain, hybrid, top_k=top_k, question_share=options.question_share)
        students: dict[str, Path] = {}
        rows_of: dict[str, int] = {}
        wanted = {STUDENT_OF[arm] for arm in options.arms}
        for kind in ablation.RECIPES:
            if kind not in wanted:
                continue
            rows = ablation.rows_of(run) if kind == "quotes" else recipes.rows(kind, taught)
            rows_of[kind] = len(rows)
            progress.say(f"student {kind!r}: {len(rows)} rows")
            students[kind] = train(
                domain, rows, work / "students" / kind, progress, title=f"{domain.name} {kind}"
            )
        abstaining = config.curate.model_copy(update={"evidence": "rationale", "rationale_in_target": True})
        variants: dict[str, dict[str, Any]] = {
            **{name: {"reflect": reflecting(domain, name)} for name in BACKENDS},
            "kard_abstaining": {"curate": abstaining},
            "explained": {"reflect": reflecting(domain, "tokens").model_copy(update={"drafts": "explained"})},
        }
        varied: dict[str, list[Example]] = {}
        for name, sections in variants.items():
            if name not in wanted:
                continue
            rows = varied[name] = varied_rows(domain, run, work, name, progress, sections)
            rows_of[name] = len(rows)
            progress.say(f"student {name!r}: {len(rows)} rows")
            students[name] = train(
                domain, rows, work / "students" / name, progress, title=f"{domain.name} {name}",
                tokens=name in {"tokens", "explained"},
            )  # fmt: skip
        long = reflecting(domain, "tokens").model_copy(update={"form": "long"})
        ways: dict[str, dict[str, Any]] = {
            **{name: {"with_passages": False} for name in ("answers", "rationales")},
            **{name: {"retriever": reranked} for name in ("kard_reranked", "quotes_reranked")},
            **{name: {"reflect": reflecting(domain, name)} for name in ("grader", *BACKENDS)},
            "kard_oracle": {"retriever": ablation.Oracle(questions, index.passages, hybrid)},
            "kard_voted": {"votes": Votes(VOTES)},
            "explained": {"reflect": reflecting(domain, "tokens")},
            **{name: {"reflect": long} for name in ("tokens_long", "explained_long")},
        }
        fit: dict[str, Any] = {}
        if "tokens_fitted" in options.arms:
            learnt = fitted_to(domain, students["tokens"], hybrid, varied["tokens"], progress)
            # Asked whether its gate keeps it or not: is the gate right?
            ways["tokens_fitted"] = {"reflect": with_fit(reflecting(domain, "tokens"), learnt.settings)}
            fit = {"fit": learnt.facts}
        arms = {"base_rag": ablation.Asking(base_gguf(config.student.base), hybrid)}
        for name in (name for name in STUDENT_OF if name in options.arms):
            arms[name] = ablation.Asking(
                students[STUDENT_OF[name]], **{"retriever": hybrid} | ways.get(name, {})
            )
        marks, answers = ablation.ask(
            arms,
            questions,
            index.passages,
            work / "answers",
            conditions,
            progress,
            open_engine=lambda gguf: Engine(gguf, context=config.student.context, parallel=PARALLEL),
        )
        calibration = confidence_of(
            domain,
            students["quotes"],
            hybrid,
            conditions,
            work / "confidence.json",
            trained_on={row.question_id for row in ablation.rows_of(run)},
            count=QUICK_DEVELOPMENT if options.quick else DEVELOPMENT,
            progress=progress,
        )
    facts = {
        "rationales": len(taught), "rows": rows_of, "questions": len(questions), "top_k": top_k, "keep": options.keep, **fit
    }  # fmt: skip
    return {
        **student_figures(questions, marks, answers, calibration, seed=config.exam.seed),
        "students_facts": facts,
    }


def confidence_of(
    domain: Domain,
    student: Path,
    hybrid: Retriever,
    conditions: Conditions,
    path: Path,
    *,
    trained_on: Set[str],
    count: int,
    progress: Progress,
) -> Calibration:
    """How sure the student may be, fitted to its answers to seed questions, now or before; ``path`` keeps it."""
    made_of = {student.name: sha256_file(student), "prompts": str(count), "conditions": repr(conditions)}
    if path.is_file():
        known = read_calibration(path)
        if known.sources == made_of:
            return known
    progress.say("how sure may the student 'quotes' be? Asking seed questions")
    with Engine(student, context=domain.config.student.context, parallel=PARALLEL) as engine:
        found = fit_to_development(
            domain, engine, hybrid, conditions, trained_on=trained_on, count=count, progress=progress
        )
    found = found.model_copy(update={"sources": made_of})
    write_text_atomic(path, found.model_dump_json() + "\n")
    return found


def student_figures(
    questions: Sequence[Question],
    marks: Mapping[str, Mapping[str, Mapping[str, Mark]]],
    answers: Mapping[str, Sequence[Answer | None]],
    calibration: Calibration,
    *,
    seed: int,
) -> dict[str, Any]:
    """What is said of the students: each arm, the pairs of `PAIRS`, reflection, abstention.

    Args:
        questions: the exam.
        marks: by arm, question and metric, see `pipeline.ablation.ask`; ``base_rag`` and ``quotes`` are among the arms.
        answers: by arm, one for each question.
        calibration: fitted to the student of ``quotes``; an arm's own ``aurc`` is by its likelihood.
        seed: of the bootstrap.
    """
    drawing: dict[str, Any] = {"resamples": RESAMPLES, "seed": seed}
    summary = ablation.summarise_marks(marks, questions, against="base_rag", **drawing)
    for arm, given in answers.items():
        summary[arm]["aurc"] = abstention(questions, given, arm=arm)["abstention_aurc"]
    pairs = {
        f"{one} - {other}": ablation.score_difference(marks, (one, other), questions, **drawing)
        for one, other in PAIRS
        if one in marks and other in marks
    }
    return {
        "students": summary,
        "students_pairs": pairs,
        **reflection(questions, answers, seed=seed),
        **abstention(questions, answers["quotes"], calibration),
    }


def asked_questions(domain: Domain) -> list[Question]:
    """The exam's, as many as the profile asks."""
    pool, _ = exam_questions(domain)
    return draw_questions(pool, count=domain.config.exam.questions, seed=domain.config.exam.seed)


def conditions_of(domain: Domain, top_k: int) -> Conditions:
    """How every arm is asked."""
    return Conditions(
        system=domain.prompts["system"],
        abstain=domain.config.domain.abstain,
        top_k=top_k,
        max_tokens=domain.config.exam.max_tokens,
        context=domain.config.student.context,
    )


def measure_sweep(options: argparse.Namespace, work: Path, progress: Progress) -> dict[str, Any]:
    """KARD's student with other n, k and shares of question-retrieved rows; each paired with the options' own values."""
    domain, run = prepared(options, work, progress, name="sweep", keep=SWEEP_N)
    config, questions = domain.config, asked_questions(domain)
    taught = ablation.kept_rationales(run, domain.read_questions())
    once = list({item.question.id: item for item in reversed(taught)}.values())[::-1]
    top_k, share = options.top_k or config.retrieve.top_k, options.question_share
    variants = {"own": (once, top_k, share), f"n={SWEEP_N}": (taught, top_k, share)}
    variants |= {f"k={k}": (once, k, share) for k in SWEEP_K}
    variants |= {f"question_share={each:g}": (once, top_k, each) for each in SWEEP_SHARE}
    marks: dict[str, Any] = {}
    rows_of: dict[str, int] = {}
    with open_retriever(run.index, config.retrieve) as hybrid:
        for name, (rationales, k, by_question) in variants.items():
            recipes = recipes_of(domain, hybrid, top_k=k, question_share=by_question)
            rows = recipes.rows("kard", rationales)
            rows_of[name] = len(rows)
            progress.say(f"{name}: {len(rows)} rows")
            student = train(domain, rows, work / "sweep" / name, progress, title=f"{domain.name} {name}")
            marks |= ablation.ask(
                {name: ablation.Asking(student, hybrid)}, questions, hybrid.index.passages, work / "sweep" / "answers",
                conditions_of(domain, k), progress,
                open_engine=lambda gguf: Engine(gguf, context=config.student.context, parallel=PARALLEL),
            )[0]  # fmt: skip
    summary = ablation.summarise_marks(
        marks, questions, against="own", resamples=RESAMPLES, seed=config.exam.seed
    )
    for name, rows in rows_of.items():
        summary[name]["rows"] = rows
    return {"sweep": summary, "sweep_facts": {"n": 1, "k": top_k, "question_share": share}}


def recipes_of(domain: Domain, hybrid: Retriever, *, top_k: int, question_share: float) -> ablation.Recipes:
    """KARD's recipes on the domain's index."""
    index = hybrid.index
    return ablation.Recipes(
        system=domain.prompts["system"],
        by_rationale=lambda query, k: [index.by_id[name] for name in index.search_lexical(query, top_k=k)],
        by_question=hybrid.find,
        top_k=top_k,
        question_share=question_share,
    )


def train(
    domain: Domain,
    rows: Sequence[Example],
    folder: Path,
    progress: Progress,
    *,
    title: str,
    tokens: bool = False,
) -> Path:
    """A student of these rows, by QLoRA whatever the domain's method: Self-RAG's tokens know no other, and arms are to be alike."""
    student, settings = domain.config.student, settings_of(domain)
    settings = replace(settings, learning_rate=LEARNING_RATES["qlora"])
    return ablation.train_recipe(
        rows, folder, progress, base=student.base, context=student.context, settings=settings,
        title=title, reflection_tokens=tokens, recipe=QLORA,
    )  # fmt: skip


def reflecting(domain: Domain, backend: str) -> ReflectSection:
    """The domain's ``[reflect]`` with another back-end; the grader is that of rules, which costs no model."""
    return domain.config.reflect.model_copy(update={"backend": backend})


def varied_rows(
    domain: Domain, run: Run, work: Path, name: str, progress: Progress, sections: dict[str, Any]
) -> list[Example]:
    """The rows that the product makes with other sections, from the same rationales, in a run of their own."""
    other = Domain(domain.folder, domain.config.model_copy(update=sections), domain.prompts)
    own = open_run(work / "runs", domain.name, name)
    if not own.index.exists():
        shutil.copytree(run.index, own.index)  # the same documents: nothing is embedded again
    run_job(other, own, progress, stages=("index", "elicit", "curate"))
    return ablation.rows_of(own)


def fitted_to(
    domain: Domain, student: Path, hybrid: Retriever, rows: Sequence[Example], progress: Progress
) -> ReflectionFit:
    """Threshold and weights of Self-RAG's back-end, fitted to this student on seed questions, unseen ones first."""
    config, reflect = domain.config, reflecting(domain, "tokens")
    with Engine(student, context=config.student.context, parallel=PARALLEL) as engine:
        assistant = Assistant(
            engine, hybrid, system=domain.prompts["system"], abstain=config.domain.abstain, top_k=config.retrieve.top_k,
            max_tokens=config.serve.max_tokens, unsupported="keep", reflector=open_reflector(reflect, engine),
        )  # fmt: skip
        seen = {row.question_id for row in rows}
        # With the back-end that is fitted, or the domain would have no general instructions.
        own = Domain(domain.folder, config.model_copy(update={"reflect": reflect}), domain.prompts)
        return fit_student(own, assistant, count=FIT_QUESTIONS, trained_on=seen, progress=progress)


def measure_unanswerable(options: argparse.Namespace, work: Path, progress: Progress) -> dict[str, Any]:
    """Does retrieval, and does a student, know what MedQuAD's documents do not answer?"""
    data: Path | None = options.data
    folder = data / "medquad_answerable" if data else None
    if data is None or folder is None or not (folder / f"{options.split}_questions.jsonl").is_file():
        progress.say("no medquad_answerable in --data: left out")
        return {}
    domain = load_domain(options.domain, profile=options.profile)
    trained = work / "students" / "quotes" / "student-F16.gguf"
    model = trained if trained.is_file() else base_gguf(domain.config.student.base)
    rows = QUICK_ROWS if options.quick else 0
    with medquad_indexes(data, work / "retrieval", progress, split=options.split, rows=rows) as found:
        index, learn, pairs = found
        confidence, result = retrieval_confidence(index, learn, pairs, folder, split=options.split)
        with Engine(model, context=domain.config.student.context, parallel=PARALLEL) as engine:
            answered = answer_confidence(
                index,
                folder,
                confidence,
                progress,
                split=options.split,
                engine=engine,
                domain=domain,
                asked=QUICK_ASKED if options.quick else 0,
            )
    student = "quotes" if model == trained else "untrained"
    return {
        "abstention_aurc_medquad": round(result["right"]["aurc"]["mean"], 4),
        "unanswerable": {"retrieval": result, "student": answered | {"model": student}},
    }


def measure_sets(options: argparse.Namespace, work: Path, progress: Progress) -> dict[str, Any]:
    """The other public sets, with the untrained model where one is needed; K-QA's patients ask ``--work``'s students, too."""
    if options.data is None:
        progress.say("no --data: left out")
        return {}
    domains = [load_domain(name) for name in dict.fromkeys((*SHIPPED, options.domain))]
    base = base_gguf(load_domain(options.domain).config.student.base)
    with Engine(base, context=2048, parallel=1) as engine:
        found = measure_public(
            options.data,
            domains,
            progress,
            split=options.split,
            quick=options.quick,
            engine=engine,
            work=work,
            sets=options.sets,
            answering={"untrained": base, **trained_in(work)},
        )
    return {"public": found}


def trained_in(work: Path) -> dict[str, Path]:
    """The students of `PATIENTS_ASK` that an earlier call trained in this folder."""
    paths = {name: work / "students" / name / "student-F16.gguf" for name in PATIENTS_ASK}
    return {name: path for name, path in paths.items() if path.is_file()}


def prepared(
    options: argparse.Namespace, work: Path, progress: Progress, *, name: str = "ablation", keep: int = 0
) -> tuple[Domain, Run]:
    """The domain with the benchmark's sizes, and a run with index, rationales, rows and reranker."""
    keep = keep or options.keep
    domain = load_domain(options.domain, profile=options.profile)
    config = domain.config
    changes: dict[str, dict[str, Any]] = {
        # What the file chose must not leak into arms that are named for something else.
        "curate": {"keep_per_question": keep, "rationale_in_target": keep > 1, "evidence": "gold"},
        "reflect": {"backend": "none", "drafts": "answer"},
        "elicit": {"samples": keep},
        "rerank": {"enabled": True, "keep": "always"},  # its arms are to be measured, gain or not
    }
    if options.quick or name == "sweep":  # n rationales for each of few questions
        changes["elicit"] |= {"questions": QUICK["questions"]}
    if options.quick:
        changes["exam"] = {"questions": QUICK["exam"]}
        changes["train"] = {"epochs": QUICK["epochs"]}
    if options.questions is not None:
        changes["exam"] = {"questions": options.questions}
    sections = {key: getattr(config, key).model_copy(update=values) for key, values in changes.items()}
    domain = Domain(domain.folder, config.model_copy(update=sections), domain.prompts)
    run = open_run(work / "runs", domain.name, name)
    run_job(domain, run, progress, stages=("index", "elicit", "curate", "rerank"))
    return domain, run


def show(result: dict[str, Any]) -> None:
    """The figures for people."""
    sets = {"unanswerable": result.get("unanswerable", {}), **result.get("public", {})}
    for name, metrics in {
        **result.get("retrieval", {}),
        **result.get("students", {}),
        **result.get("sweep", {}),
        **sets,
    }.items():
        print(name)
        for metric, value in metrics.items():
            print(f"    {metric:24} {value}")
    for name, value in result.items():
        if not isinstance(value, dict):
            print(f"{name:28} {value}")


MEASURES: dict[str, Callable[[argparse.Namespace, Path, Progress], dict[str, Any]]] = {
    "retrieval": measure_retrieval,
    "students": measure_students,
    "abstention": measure_unanswerable,
    "public": measure_sets,
    "sweep": measure_sweep,
}


if __name__ == "__main__":
    main()
