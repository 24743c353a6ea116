"""calibrate: what is asked, what is fitted to, and what lies in the bundle afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from exam_example import ABSTAIN, CLUBS, ActorEngine, Shelf, passages, questions

from domains.domain import load_domain
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Answer, Example, Hit, Message, Question
from pipeline import calibrate as stage
from pipeline.development import Row, ask_items, draw_items, judge_items, seed_questions
from pipeline.fit import MIN_OUTCOMES, calibrate
from pipeline.progress import Silent
from pipeline.right import is_right
from pipeline.run_folder import Report, Run
from serve.confidence import read_calibration
from serve.signals import LIKELIHOOD, SIGNALS


class Shelves(Shelf):
    """A shelf from which books can be taken away."""

    def retrieve(self, query: str, *, top_k: int, without: frozenset[str] = frozenset()) -> list[Hit]:
        left = [each for each in self.shelf if each.doc_id not in without]
        return Shelf(left).retrieve(query, top_k=top_k)


def seeds() -> list[Question]:
    return [question.model_copy(update={"split": "seed"}) for question in questions()]


def develop(tmp_path: Path, *, count: int = 0, skill: int = 90, seen: set[str] | None = None) -> list[Row]:
    gguf = tmp_path / "student.gguf"
    gguf.write_text(str(skill), encoding="utf-8")
    items = draw_items(seeds(), seen or set(), Shelves(passages()), count=count, top_k=3, seed=0)
    answers = ask_items(
        items,
        ActorEngine(gguf),  # type: ignore[arg-type]
        system="You answer from the passages.",
        abstain=ABSTAIN,
        top_k=3,
        max_tokens=100,
        unsupported="withdraw",
        reflector=None,
        progress=Silent(),
    )
    return judge_items(items, answers, seen or set(), folds=4, seed=0)


def test_answerable_questions_are_asked_again_without_their_gold_documents(tmp_path: Path) -> None:
    items = draw_items(seeds(), set(), Shelves(passages()), count=0, top_k=3, seed=0)
    parts = [item.part for item in items]
    assert (parts.count("answerable"), parts.count("gold_removed"), parts.count("unanswerable")) == (
        36,
        36,
        12,
    )
    for item in items:
        shown = {hit.passage.doc_id for hit in item.hits}
        assert len(item.hits) == 3
        assert (item.question.about in shown) == (item.part != "gold_removed")


def test_only_seed_questions_are_asked_and_those_of_the_training_last() -> None:
    mixed = [*questions()[:20], *seeds()[20:]]
    assert {question.split for question in seed_questions(mixed)} == {"seed"}
    assert len(seed_questions(mixed)) == len(mixed) - 20
    seen = {question.id for question in seeds() if question.about in CLUBS[:6]}
    items = draw_items(seeds(), seen, Shelves(passages()), count=50, top_k=3, seed=0)
    trained = [item.question.id in seen for item in items]
    assert len(items) == 50
    assert trained == sorted(trained)
    assert sum(trained) == 50 - 42
    again = draw_items(list(reversed(seeds())), seen, Shelves(passages()), count=50, top_k=3, seed=0)
    assert [item.question.id for item in again] == [item.question.id for item in items]


def planted(n: int = 120) -> list[Row]:
    """Answers about 20 documents, right where the model was sure; every other signal is noise."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        signals = {name: round(float(rng.normal()), 6) for name in SIGNALS}
        answer = Answer(question="?", text="a", raw="a", support="supported", citations=[], signals=signals)
        rows.append(
            Row(
                question_id=f"q{i}",
                part="answerable",
                trained_on=False,
                fold=i % 20 % 4,
                answer=answer,
                given=i % 10 > 0,
                right=i % 10 > 0 and signals[LIKELIHOOD] + 0.3 * rng.normal() > 0,
            )
        )
    return rows


def test_the_fit_recovers_a_planted_signal_and_is_the_same_every_time() -> None:
    rows = planted()
    calibration, judged = calibrate(rows, folds=4, sources={"questions": "ab"})
    assert calibration.signals == list(SIGNALS)
    assert (calibration.answers, calibration.abstained) == (108, 12)
    assert calibration.right == sum(row.right for row in rows)
    weights = dict(zip(calibration.signals, map(abs, calibration.weights), strict=True))
    assert max(weights, key=lambda name: weights[name]) == LIKELIHOOD
    facts = calibration.facts
    assert facts["aurc_oracle"] <= facts["aurc"] < 0.6 * facts["aurc_random"]
    assert [row.confidence is None for row in judged] == [not row.given for row in rows]
    assert calibrate(rows, folds=4, sources={"questions": "ab"}) == (calibration, judged)


def test_confidences_of_a_document_do_not_depend_on_its_own_answers() -> None:
    rows = planted()
    flipped = [
        row.model_copy(update={"right": row.given and not row.right}) if row.fold == 0 else row
        for row in rows
    ]
    one, other = (calibrate(each, folds=4, sources={})[1] for each in (rows, flipped))
    same = [a.confidence == b.confidence for a, b in zip(one, other, strict=True)]
    assert all(agree for agree, row in zip(same, rows, strict=True) if row.fold == 0)
    assert not all(same)


def test_the_questions_of_a_document_share_a_fold(tmp_path: Path) -> None:
    folds: dict[str, set[int]] = {}
    for row in develop(tmp_path):
        folds.setdefault(row.question_id.split("-")[0], set()).add(row.fold)
    assert all(len(numbers) == 1 for numbers in folds.values())
    assert set.union(*folds.values()) == {0, 1, 2, 3}


def test_too_few_outcomes_are_no_calibration(tmp_path: Path) -> None:
    rows = develop(tmp_path, count=6)
    calibration, judged = calibrate(rows, folds=4, sources={})
    assert calibration.signals == []
    assert f"at least {MIN_OUTCOMES}" in calibration.reason
    assert calibration.confidence({}) is None
    assert judged == rows


@pytest.mark.parametrize(
    ("kind", "reference", "said", "right"),
    [
        ("open", "20 to 30 per minute", "Give 20 to 30 breaths per minute.", True),
        ("open", "20 to 30 per minute", "Give 12 to 30 breaths per minute.", False),
        ("open", "a dry cough", "It can cause a dry cough in some people.", True),
        ("open", "a dry cough", "It can cause a headache.", False),
        ("open", "Brenzal is safe in pregnancy.", "Brenzal is not safe in pregnancy.", False),
        ("open", "Brenzal is safe in pregnancy.", "Brenzal is safe in pregnancy, not in childhood.", True),
        ("open", "It cannot remove polyps.", "It can remove polyps.", False),
        ("open", "It cannot remove polyps.", "It doesn't remove polyps.", True),
        ("yes_no", "no", "No, it is not.", True),
        ("options", "B", "B. the second", True),
        ("options", "B", "Neither.", False),
        ("unanswerable", None, "Alice did.", False),
    ],
)
def test_right_is_what_the_reference_says(
    kind: str, reference: str | None, said: str, *, right: bool
) -> None:
    options = {"A": "the first", "B": "the second"} if kind == "options" else None
    question = Question(
        id="q", kind=kind, question="?", answer=reference, options=options, about="d", split="seed"
    )
    answer = Answer(question="?", text=said, raw=said, support="unsupported", citations=[])
    assert is_right(question, answer) == right


DOMAIN = """
[domain]
name = "shelf"
title = "Shelf"
[corpus]
documents = "documents"
questions = "questions.jsonl"
[student]
context = 1024
[serve]
max_tokens = 16
[calibrate]
questions = 6
folds = 2
"""
REFLECTING = (
    DOMAIN.replace("context = 1024", "context = 2048")
    + """
[retrieve]
top_k = 2
[reflect]
backend = "tokens"
passages = 4
threshold = 0.0
"""
)


@pytest.fixture
def real_run(tmp_path: Path) -> tuple[Path, Run]:
    """A run as the export stage leaves it, with the untrained 135M as student."""
    from serve.models import inference_gguf

    return exported(tmp_path, inference_gguf("smollm2-135m"), DOMAIN)


@pytest.fixture(scope="module")
def reflecting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, Report]:
    """The same with a tiny student of random weights that has the reflection tokens, calibrated."""
    from tests.tiny_llama import write_reflecting_gguf

    place = tmp_path_factory.mktemp("reflecting")
    folder, run = exported(place, write_reflecting_gguf(place), REFLECTING)
    return folder, run, stage.run(load_domain(str(folder)), run, Silent())


def exported(tmp_path: Path, gguf: Path, config: str) -> tuple[Path, Run]:
    from pipeline.bundle import close_bundle
    from serve.gguf_check import check_gguf
    from serve.manifest import BaseModelFacts
    from tests.small_serving import SYSTEM, write_index

    folder = tmp_path / "domain"
    (folder / "prompts").mkdir(parents=True)
    (folder / "documents").mkdir()
    (folder / "domain.toml").write_text(config, encoding="utf-8")
    for name in ("system", "teacher"):
        (folder / "prompts" / f"{name}.md").write_text(SYSTEM, encoding="utf-8")
    asked = [
        ("dose", "open", "What is the adult dose of Brenzal?", "40 mg once a day", "brenzal", "seed"),
        ("milk", "yes_no", "May Moltrex be taken with milk?", "no", "moltrex", "seed"),
        ("price", "unanswerable", "What does Sanivar cost?", None, "sanivar", "seed"),
        ("exam", "open", "Where are Corvane drops kept?", "in the refrigerator", "corvane", "exam"),
    ]
    write_jsonl(
        folder / "questions.jsonl",
        [
            Question(id=name, kind=kind, question=text, answer=answer, about=about, split=split)  # type: ignore[arg-type]
            for name, kind, text, answer, about, split in asked
        ],
    )
    run = Run(tmp_path / "runs" / "shelf" / "quick")
    run.bundle.mkdir(parents=True)
    Path(run.bundle / "student.gguf").symlink_to(gguf)
    write_index(run.index)
    row = Example(
        id="x", question_id="milk", messages=[Message(role="user", content="?")], completion="no",
        passages=[], origin="gold", request="r",
    )  # fmt: skip
    write_jsonl(run.examples, [row])
    domain = load_domain(str(folder))
    close_bundle(
        run.bundle,
        config=domain.config,
        prompts={"system": SYSTEM},
        base=BaseModelFacts(name="SmolLM2-135M-Instruct", licence="apache-2.0", version=""),
        teachers=[],
        template=str(check_gguf(gguf).metadata["tokenizer.chat_template"]),
    )
    return folder, run


def test_a_real_student_is_calibrated_and_its_bundle_opens_with_it(real_run: tuple[Path, Run]) -> None:
    from serve.bundle import open_bundle

    folder, run = real_run
    report = stage.run(load_domain(str(folder)), run, Silent())
    counts = report.counts
    assert counts["asked"] == counts["answered"] + counts["abstained"] + counts["too_long"] == 5
    assert counts["answerable"] + counts["gold_removed"] + counts["unanswerable"] == 5
    assert counts["answered"] == counts["right"] + counts["wrong"]
    assert counts["trained_on"] == 2
    rows = read_jsonl(run.calibration, Row)
    assert {row.question_id for row in rows} == {"dose", "milk", "price"}  # never the exam's
    for row in rows:
        assert row.answer is not None
        assert row.answer.signals["answer_mean_log_prob"] < 0
        assert row.answer.signals["dense_top"] > 0
    calibration = read_calibration(run.bundle / "calibration.json")
    assert "are needed" in calibration.reason
    with open_bundle(run.bundle, parallel=1, unready_ok=True) as opened:
        assert opened.notes == []
    damaged = (run.bundle / "calibration.json").read_text(encoding="utf-8").replace("needed", "neeedd")
    (run.bundle / "calibration.json").write_text(damaged, encoding="utf-8")
    with pytest.raises(Exception, match=r"calibration\.json: its bytes changed"):
        open_bundle(run.bundle, parallel=1, unready_ok=True)


def test_what_was_fitted_is_used_where_it_is_certainly_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.fit_reflection import Fit
    from serve.manifest import read_manifest
    from serve.models import sha256_file
    from serve.reflection_fit import FittedReflection, fitted
    from tests.tiny_llama import write_reflecting_gguf

    monkeypatch.setattr(Fit, "refusal", lambda _: "")  # when it does is tested in test_fit_reflection
    folder, run = exported(tmp_path, write_reflecting_gguf(tmp_path), REFLECTING)
    report = stage.run(load_domain(str(folder)), run, Silent())
    path = run.bundle / "reflection.json"
    found = FittedReflection.model_validate_json(path.read_text("utf-8"))
    assert found.questions == 3  # the seed questions, never the exam's
    assert found.score >= found.before
    served = fitted(load_domain(str(folder)).config.reflect, run.bundle)
    assert (served.threshold, served.support_weight) == (found.threshold, found.support_weight)
    facts = report.facts["reflection"]
    assert (facts["threshold"], facts["weights"]["support"]) == (found.threshold, found.support_weight)
    assert read_calibration(run.bundle / "calibration.json").sources["reflection.json"] == sha256_file(path)
    assert "reflection.json" in read_manifest(run.bundle).files


def test_what_is_not_certainly_better_leaves_domain_toml_in_charge(
    reflecting: tuple[Path, Run, Report],
) -> None:
    from serve.manifest import read_manifest
    from serve.reflection_fit import fitted

    folder, run, report = reflecting
    facts = report.facts["reflection"]
    assert facts == json.loads(run.reflection_fit.read_text("utf-8"))
    assert (facts["kept"], "about 3 documents" in facts["reason"]) == (False, True)
    assert not (run.bundle / "reflection.json").exists()
    assert "reflection.json" not in read_manifest(run.bundle).files
    reflect = load_domain(str(folder)).config.reflect
    assert fitted(reflect, run.bundle) == reflect
    cases = run.reflection_fit.with_suffix(".jsonl").read_text("utf-8").splitlines()
    assert {json.loads(case)["question_id"] for case in cases} == {"dose", "milk", "price"}
    assert all(0 <= each["confidence"] <= 1 for each in facts["retrieval_reliability"])
    assert 0 <= facts["retrieval_calibration_error"] <= 1


def test_a_reflecting_student_is_shown_as_many_passages_as_serving_shows(
    reflecting: tuple[Path, Run, Report],
) -> None:
    _, run, _ = reflecting
    answers = [row.answer for row in read_jsonl(run.calibration, Row)]
    shown = {len(each.passages) for each in answers if each and each.reflection and each.reflection.retrieved}
    assert shown == {4}  # [reflect] passages, not [retrieve] top_k


def test_a_calibration_of_another_student_is_refused(real_run: tuple[Path, Run]) -> None:
    from domains.errors import DataError
    from pipeline.bundle import note_files
    from serve.bundle import open_bundle

    _, run = real_run
    (run.bundle / "calibration.json").write_text(json.dumps({"sources": {"student.gguf": "ab"}}), "utf-8")
    note_files(run.bundle, ["calibration.json"])
    with pytest.raises(DataError, match="fitted to another student"):
        open_bundle(run.bundle, parallel=1, unready_ok=True)


def test_a_bound_that_cannot_be_kept_is_told_before_the_first_question(real_run: tuple[Path, Run]) -> None:
    from domains.config import read_config
    from serve.bundle import open_base

    folder, run = real_run
    text = (
        (folder / "domain.toml")
        .read_text("utf-8")
        .replace("max_tokens = 16", "max_tokens = 16\nmax_wrong = 0.05")
    )
    (folder / "domain.toml").write_text(text, "utf-8")
    assert read_config(folder / "domain.toml").serve.max_wrong == 0.05
    with open_base(load_domain(str(folder)), run.index, parallel=1) as opened:
        assert "can't be kept" in opened.notes[0]


def test_switched_off_it_leaves_a_file_that_says_so(real_run: tuple[Path, Run]) -> None:
    folder, run = real_run
    (run.bundle / "reflection.json").write_text("{}", "utf-8")
    text = (folder / "domain.toml").read_text("utf-8").replace("[calibrate]", "[calibrate]\nenabled = false")
    (folder / "domain.toml").write_text(text, "utf-8")
    assert stage.run(load_domain(str(folder)), run, Silent()).counts == {"asked": 0}
    assert "enabled is false" in read_calibration(run.bundle / "calibration.json").reason
    assert not (run.bundle / "reflection.json").exists(), "what an earlier fit left"
