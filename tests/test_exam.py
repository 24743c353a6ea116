from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from exam_example import ABSTAIN, CLUBS, ActorEngine, Shelf, make_run, passages, questions, take_exam

from domains.domain import load_domain
from domains.errors import DataError, ModelError, StageError
from domains.jsonl import read_jsonl, write_jsonl, write_text_atomic
from domains.records import Answer, Document, Quote
from pipeline import exam
from pipeline.arms import CHUNK, Arm, Conditions, Remembered, Row, ask_arms
from pipeline.exam import draw_questions, exam_questions
from pipeline.progress import Silent
from pipeline.run_folder import Run
from serve.manifest import BaseModelFacts, Manifest, read_manifest, write_manifest

ARMS = ["base", "base_rag", "tuned", "tuned_rag", "exported_rag"]
CONDITIONS = Conditions(
    system="You answer from the passages.",
    abstain=ABSTAIN,
    top_k=3,
    max_tokens=100,
    context=20_000,
)


@pytest.fixture(autouse=True)
def _fresh_actors():
    ActorEngine.opened, ActorEngine.asked = [], 0


def test_report_says_what_the_actors_can_do(tmp_path):
    report, progress = take_exam(*make_run(tmp_path, base=25, tuned=75, exported=75))
    assert list(report["arms"]) == ARMS
    scores = {arm: metrics["score"]["mean"] for arm, metrics in report["arms"].items()}
    quarter = [name for name in CLUBS if CLUBS.index(name) < 3]
    assert scores["base_rag"] == pytest.approx(len(quarter) * 4 / 48, abs=1e-4)
    # As served, every unsupported reply is withdrawn: the unanswerable questions (a quarter) are right anyway.
    served = report["arms"]["base_rag"]["score_served"]["mean"]
    assert served == pytest.approx((len(quarter) * 3 + len(CLUBS)) / 48, abs=1e-4)
    assert scores["tuned_rag"] == scores["exported_rag"] == pytest.approx(9 * 4 / 48, abs=1e-4)
    assert scores["base"] == scores["tuned"] == 0
    difference = report["differences"]["tuned_rag-base_rag"]["score"]
    assert difference["mean"] == pytest.approx(scores["tuned_rag"] - scores["base_rag"], abs=2e-4)
    assert 0 < difference["low"] < difference["mean"] < difference["high"] < 1
    assert report["verdict_code"] == "helped"
    assert progress.lines[-1] == report["verdict"]
    assert report["arms"]["tuned_rag"]["citation_precision"]["mean"] == 1
    assert report["arms"]["tuned_rag"]["citation_recall"]["mean"] == 0.75
    assert report["arms"]["tuned_rag"]["quote_validity"]["mean"] == 1
    assert report["arms"]["tuned_rag"]["abstention_recall"]["mean"] == 0.75
    assert report["arms"]["tuned_rag"]["false_abstention"]["mean"] == 0
    assert report["arms"]["tuned_rag"]["withdrawn"]["mean"] == 0.25
    assert "citation_recall" not in report["arms"]["tuned"]


def test_report_carries_what_other_stages_left(tmp_path):
    report, _ = take_exam(*make_run(tmp_path))
    assert report["n_questions"] == 48
    assert report["kinds"] == {"open": 12, "options": 12, "unanswerable": 12, "yes_no": 12}
    assert report["resampled"] == "documents"
    assert report["parity"] == {"ready": True, "kl": 0.0012, "top1_agreement": 0.992, "bits_equal": True}
    assert report["curate"]["counts"]["kept"] == 120
    assert report["train"]["counts"]["steps"] == 30
    assert len(report["losses"]) == 33
    assert set(report["sizes_bytes"]) == {"student.gguf", "student-F16.gguf"}
    assert set(report["differences"]) == {
        "tuned_rag-base_rag",
        "exported_rag-tuned_rag",
        "base_rag-base",
        "tuned_rag-tuned",
    }
    assert set(report["differences"]["tuned_rag-base_rag"]["option_accuracy"]) == {
        "mean",
        "low",
        "high",
        "p",
        "mcnemar_p",
    }
    assert report["retrieval"]["recall@1"] == {"mean": 1, "low": 1, "high": 1}
    assert set(report["retrieval"]) == {"recall@1", "recall@3", "recall@10", "ndcg@10"}


def test_examples_are_of_every_kind_with_every_arm(tmp_path):
    report, _ = take_exam(*make_run(tmp_path))
    assert len(report["examples"]) == 5
    assert {example["kind"] for example in report["examples"]} == {
        "open",
        "options",
        "unanswerable",
        "yes_no",
    }
    for example in report["examples"]:
        assert list(example["answers"]) == ARMS


def test_answers_of_every_arm_are_kept_as_records(tmp_path):
    run, models = make_run(tmp_path)
    take_exam(run, models)
    for arm in ARMS:
        rows = read_jsonl(run.exam / f"{arm}.jsonl", Row)
        assert [row.question_id for row in rows] == [question.id for question in questions()]
        assert all(isinstance(row.answer, Answer) for row in rows)
        assert all(bool(row.answer.passages) == arm.endswith("_rag") for row in rows)


def test_the_retriever_gets_the_bare_question_once_and_the_model_the_options(tmp_path):
    run, models = make_run(tmp_path)
    shelf = Shelf(passages())
    take_exam(run, models, retriever=shelf)
    assert sorted(shelf.queries) == sorted(question.question for question in questions())
    shown = [row.answer.question for row in read_jsonl(run.exam / "base_rag.jsonl", Row)]
    assert any("B. 11 euros" in text for text in shown)


def test_models_are_opened_one_at_a_time_and_a_second_exam_asks_nothing(tmp_path):
    run, models = make_run(tmp_path)
    first, _ = take_exam(run, models)
    assert ActorEngine.opened == ["base.gguf", "student-F16.gguf", "student.gguf"]
    assert ActorEngine.asked == 5 * 48
    second, _ = take_exam(run, models)
    assert len(ActorEngine.opened) == 3
    assert ActorEngine.asked == 5 * 48
    assert second == first


def test_what_an_answer_depends_on_asks_again_and_nothing_else_does(tmp_path):
    run, models = make_run(tmp_path)
    take_exam(run, models)
    write_text_atomic(models["exported"], "10")  # another served file
    take_exam(run, models)
    assert ActorEngine.asked == 5 * 48 + 48
    moved = [passage.model_copy(update={"title": "The club"}) for passage in passages()]
    take_exam(run, models, retriever=Shelf(moved), passages=moved)  # only what is shown with passages
    assert ActorEngine.asked == 6 * 48 + 3 * 48
    take_exam(
        run,
        models,
        conditions=replace(CONDITIONS, max_tokens=99),
        retriever=Shelf(moved),
        passages=moved,
    )
    assert ActorEngine.asked == 9 * 48 + 5 * 48
    take_exam(run, models, conditions=replace(CONDITIONS, max_tokens=99), retriever=Shelf(moved), resamples=9)
    assert ActorEngine.asked == 14 * 48


def test_a_killed_exam_goes_on_with_the_next_chunk(tmp_path):
    run, models = make_run(tmp_path)
    killed_at = 48 + CHUNK + 3  # in the second chunk of the second arm
    with pytest.raises(KeyboardInterrupt):
        take_exam(run, models, open_engine=lambda gguf: ActorEngine(gguf, fail_after=killed_at))
    assert len(read_jsonl(run.exam / "base_rag.jsonl", Row)) == CHUNK
    assert not (run.bundle / "report.json").exists()
    ActorEngine.asked = 0
    resumed, _ = take_exam(run, models)
    assert ActorEngine.asked == 5 * 48 - 48 - CHUNK
    whole, _ = take_exam(*make_run(tmp_path / "other"))
    speed = {"tokens_per_s", "seconds_per_question"}
    for arm in ARMS:
        assert {key: value for key, value in resumed["arms"][arm].items() if key not in speed} == {
            key: value for key, value in whole["arms"][arm].items() if key not in speed
        }


def test_a_file_of_answers_that_cannot_be_read_is_made_anew(tmp_path):
    run, models = make_run(tmp_path)
    write_text_atomic(run.exam / "tuned.jsonl", '{"question_id": "alder-open"}\n')
    report, _ = take_exam(run, models)
    assert report["n_questions"] == len(read_jsonl(run.exam / "tuned.jsonl", Row)) == 48


def test_a_question_that_does_not_fit_is_wrong_and_counted(tmp_path):
    run, models = make_run(tmp_path, base=100, tuned=100, exported=100)
    long = questions()
    long[0] = long[0].model_copy(update={"question": long[0].question + " Please say." * 2000})
    long[3] = long[3].model_copy(update={"question": long[3].question + " Please say." * 2000})
    result, _ = take_exam(run, models, questions=long)
    assert result["left_out"]["too_long"] == dict.fromkeys(ARMS, 2)
    assert result["arms"]["tuned_rag"]["score"]["mean"] == pytest.approx(46 / 48, abs=1e-4)
    assert result["arms"]["tuned_rag"]["abstention_recall"]["mean"] == pytest.approx(11 / 12, abs=1e-4)
    assert read_jsonl(run.exam / "base.jsonl", Row)[0].answer is None


def test_counts_add_up(tmp_path):
    run, models = make_run(tmp_path)
    reports = []
    original = exam.examine

    def keep(*args, **kwargs):
        reports.append(original(*args, **kwargs))
        return reports[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exam, "examine", keep)
        take_exam(run, models)
    counts = reports[0].counts
    assert counts["exam_questions"] == counts["asked"] + counts["not_drawn"] == 50
    for arm in ARMS:
        assert counts["asked"] == counts[f"answered.{arm}"] + counts[f"too_long.{arm}"]


def test_a_gold_quote_that_stands_nowhere_is_reported_and_not_marked(tmp_path):
    asked = questions()
    lost = Quote(doc_id="alder", quote="Members of the alder club pay nothing at all.")
    asked[0] = asked[0].model_copy(update={"gold": [lost]})
    report, progress = take_exam(*make_run(tmp_path), questions=asked)
    assert report["left_out"]["gold_not_found"] == [{"question": "alder-open", "quote": lost.quote}]
    assert any("alder-open" in line and "nowhere" in line for line in progress.lines)
    assert report["retrieval"]["recall@1"]["mean"] == 1


def test_few_documents_are_resampled_by_question(tmp_path):
    report, _ = take_exam(*make_run(tmp_path), questions=questions()[:12])
    assert (report["n_documents"], report["resampled"]) == (3, "questions")


def test_documents_that_training_asked_about_are_counted_and_said(tmp_path):
    report, progress = take_exam(*make_run(tmp_path), seen_documents={"alder", "elm", "some-seed-document"})
    assert report["n_seen_documents"] == 2
    assert any("2 of the exam's 12 documents have seed questions too" in line for line in progress.lines)


def test_a_metric_that_no_question_speaks_of_is_left_out(tmp_path):
    asked = [question for question in questions() if question.kind == "open"]
    report, _ = take_exam(*make_run(tmp_path), questions=asked)
    assert not {"option_accuracy", "abstention_recall", "unparsable"} & set(report["arms"]["tuned_rag"])
    assert "token_f1" in report["arms"]["tuned_rag"]


def test_numbers_in_the_report_have_four_digits(tmp_path):
    report, _ = take_exam(*make_run(tmp_path))

    def floats(value):
        if isinstance(value, dict):
            return [number for item in value.values() for number in floats(item)]
        if isinstance(value, list):
            return [number for item in value for number in floats(item)]
        return [value] if isinstance(value, float) else []

    found = floats(report)
    assert len(found) > 100
    assert all(round(number, 4) == number for number in found)


def test_the_bundles_manifest_learns_of_the_report(tmp_path):
    run, models = make_run(tmp_path)
    write_manifest(
        run.bundle,
        Manifest(
            ready=True,
            domain="clubs",
            title="Clubs",
            domain_licence="CC0-1.0",
            base=BaseModelFacts(name="x", licence="", version=""),
            teachers=["local"],
            template_sha256="",
            versions={"gguf": "0.1"},
            notices=[],
            files={},
        ),
    )
    report, _ = take_exam(run, models)
    manifest = read_manifest(run.bundle)
    assert manifest.ready
    for name in ("report.json", "report.html"):
        assert manifest.files[name].size_bytes == (run.bundle / name).stat().st_size
    assert report["versions"] == {"gguf": "0.1"}
    assert report["teachers"] == ["local"]


def test_engines_are_closed_even_when_one_fails(tmp_path):
    engines = []

    def open_engine(gguf):
        engines.append(ActorEngine(gguf, fail_after=3))
        return engines[-1]

    run, models = make_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        take_exam(run, models, open_engine=open_engine)
    assert [engine.closed for engine in engines] == [True]


def test_remembered_passages_are_a_prefix_of_one_retrieval():
    shelf = Shelf(passages())
    remembered = Remembered(shelf, depth=4)
    two, four = remembered.retrieve("the elm club", top_k=2), remembered.retrieve("the elm club", top_k=4)
    assert four[:2] == two
    assert two[0].passage.doc_id == "elm"
    assert shelf.queries == ["the elm club"]
    with pytest.raises(ValueError, match="only 4 passages"):
        remembered.retrieve("the elm club", top_k=5)


# -- drawing questions


def test_every_kind_is_drawn_in_proportion():
    pool = [q for q in questions() if q.kind != "yes_no" or q.about in CLUBS[:4]]  # 12 + 12 + 12 + 4
    drawn = draw_questions(pool, count=10, seed=0)
    assert Counter(question.kind for question in drawn) == {
        "open": 3,
        "options": 3,
        "unanswerable": 3,
        "yes_no": 1,
    }
    assert [question.id for question in drawn] == [q.id for q in pool if q in drawn]
    assert drawn == draw_questions(pool, count=10, seed=0)
    assert drawn != draw_questions(pool, count=10, seed=1)


def test_adding_questions_to_the_file_keeps_most_of_the_draw():
    pool = questions()
    before = draw_questions(pool[:40], count=20, seed=0)
    after = draw_questions(pool, count=20, seed=0)
    assert len({q.id for q in before} & {q.id for q in after}) >= 14


@pytest.mark.parametrize("count", [0, 48, 500])
def test_all_questions_are_drawn(count):
    assert draw_questions(questions(), count=count, seed=0) == questions()


# -- the stage with its files


def _domain(folder, asked):
    write_jsonl(folder / "questions.jsonl", asked)
    write_text_atomic(
        folder / "domain.toml",
        '[domain]\nname = "clubs"\ntitle = "Clubs"\n[corpus]\ndocuments = "docs"\nquestions = "questions.jsonl"\n'
        "[exam]\nquestions = 4\nmax_tokens = 24\nresamples = 200\n[student]\ncontext = 1024\n",
    )
    for name in ("system", "teacher"):
        write_text_atomic(folder / "prompts" / f"{name}.md", "Answer from the passages.\n")
    return load_domain(str(folder))


def test_the_stage_names_what_is_missing(tmp_path):
    domain = _domain(tmp_path / "clubs", questions())
    with pytest.raises(StageError, match=r"student-F16\.gguf is missing"):
        exam.run(domain, Run(tmp_path / "runs" / "clubs" / "first"), Silent())


def test_without_exam_questions_the_stage_says_what_to_write(tmp_path):
    seeds = [question.model_copy(update={"split": "seed"}) for question in questions()]
    with pytest.raises(StageError, match="0 of 48 questions") as caught:
        exam_questions(_domain(tmp_path, seeds))
    assert '"split": "exam"' in str(caught.value)


def test_documents_of_seed_questions_are_known(tmp_path):
    mixed = [q.model_copy(update={"split": "seed"}) if q.about == "elm" else q for q in questions()]
    exam_part, seen = exam_questions(_domain(tmp_path, mixed))
    assert (len(exam_part), seen) == (44, {"elm"})


def test_two_questions_of_one_id_are_refused(tmp_path):
    with pytest.raises(DataError, match="alder-open"):
        exam_questions(_domain(tmp_path, [*questions(), questions()[0]]))


def test_real_models_take_the_exam(tmp_path):
    from rag.embed import MiniLMEmbedder
    from rag.update import update_index
    from serve.models import inference_gguf

    domain = _domain(tmp_path / "clubs", questions())
    run = Run(tmp_path / "runs" / "clubs" / "first")
    documents = [
        Document(doc_id=p.doc_id, title=p.title, text=f"## Rules\n{p.text}", source="test")
        for p in passages()
    ]
    update_index(run.index, documents, embedder=MiniLMEmbedder(), max_chars=700, overlap_chars=0)
    for place in (run.export / "student-F16.gguf", run.bundle / "student.gguf"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(inference_gguf("smollm2-135m"))
    stage = exam.run(domain, run, Silent())
    report = json.loads((run.bundle / "report.json").read_text("utf-8"))
    assert stage.counts["asked"] == report["n_questions"] == 4
    assert report["kinds"] == {"open": 1, "options": 1, "unanswerable": 1, "yes_no": 1}
    assert report["retrieval"]["recall@3"]["mean"] == 1
    rows = {arm: read_jsonl(run.exam / f"{arm}.jsonl", Row) for arm in ARMS}
    # The same weights in three files give the same words: the prompts of the arms are the same too.
    said = {arm: [row.answer.raw for row in rows[arm]] for arm in ARMS}
    assert said["base"] == said["tuned"]
    assert said["base_rag"] == said["tuned_rag"] == said["exported_rag"]
    assert any(said["base"])
    assert report["differences"]["tuned_rag-base_rag"]["score"]["mean"] == 0
    assert report["arms"]["base_rag"]["tokens_per_s"]["mean"] > 0
    before = (run.exam / "base.jsonl").read_bytes()
    exam.run(domain, run, Silent())
    assert (run.exam / "base.jsonl").read_bytes() == before


def test_an_arm_of_its_own_can_be_asked(tmp_path):
    """What other code does with `ask_arms`: a single arm, no report."""
    model = tmp_path / "one.gguf"
    model.write_text("100", encoding="utf-8")
    rows = ask_arms(
        [Arm("only", model, with_passages=True)],
        questions()[:4],
        Remembered(Shelf(passages()), depth=10),
        CONDITIONS,
        folder=tmp_path / "answers",
        open_engine=ActorEngine,
        progress=Silent(),
    )
    assert [row.answer.text for row in rows["only"]] == ["11 euros", "B", "yes", ABSTAIN]


# -- other bases


def test_another_base_is_written_once_as_gguf(tmp_path, monkeypatch):
    from small_models import TEMPLATE, small_llama, small_tokenizer

    from pipeline.base_gguf import base_gguf
    from serve.engine import Engine

    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path / "tiny"
    small_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = base_gguf(str(folder))
    written = path.stat().st_mtime_ns
    assert base_gguf(str(folder)) == path
    assert path.stat().st_mtime_ns == written
    with Engine(path, context=256, parallel=1) as engine:
        assert engine.generate([engine.tokenize("Take one")], max_tokens=3)[0].tokens


def test_a_base_that_does_not_exist_is_named(tmp_path):
    from pipeline.base_gguf import base_gguf

    with pytest.raises(ModelError, match="no base model"):
        base_gguf(str(tmp_path / "nothing"))
