"""Yes/no questions that the documents answer, not the model: what is fitted, kept, stored, and served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from domains.config import DomainConfig
from domains.domain import load_domain
from domains.errors import DataError
from domains.jsonl import write_jsonl
from domains.records import Document, Hit, Passage, Question
from pipeline import calibrate as stage
from pipeline.bundle import close_bundle, drop_file, mark_ready, note_files
from pipeline.fit_yes_no import YesNoFit, fit_yes_no, out_of_fold
from pipeline.progress import Silent
from pipeline.run_folder import Run
from rag.passages import split_document
from rag.polarity import NAMES
from rag.prompt import render_question
from serve.assistant import Assistant
from serve.bundle import open_base, open_bundle
from serve.confidence import Calibration
from serve.gguf_check import check_gguf
from serve.manifest import FITTED_YES_NO, BaseModelFacts, read_manifest
from serve.models import inference_gguf
from serve.openai_schema import ChatRequest
from serve.yes_no import FittedYesNo, pick_yes_no, read_evidence, read_yes_no
from tests.small_serving import SYSTEM, write_index
from tests.test_vote import ABSTAIN, Scripted

DENIED = "Treatment {n} made no significant difference. The score did not change (p = 0.4)."
AFFIRMED = "With treatment {n} the score was significantly higher. It improved in most (p < 0.001)."


def question(number: int, answer: str, split: Any = "seed", about: str = "") -> Question:
    return Question(
        id=f"q{number}", kind="yes_no", question=f"Does treatment {number} help?", answer=answer,
        about=about or f"d{number}", split=split,
    )  # fmt: skip


def documents(answers: Sequence[str]) -> list[Document]:
    return [
        Document(
            doc_id=f"d{n}", title=f"Trial {n}", source="s",
            text=f"We asked 20 people.\n\n{(DENIED if answer == 'no' else AFFIRMED).format(n=n)}",
        )
        for n, answer in enumerate(answers)
    ]  # fmt: skip


class Trials:
    """Finds the passages of the trial whose number stands in the query, then those of the next one."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.documents = documents(answers)
        self.queries: list[str] = []

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        self.queries.append(query)
        number = next((int(word.strip("?")) for word in query.split() if word.strip("?").isdigit()), None)
        if number is None:
            return []
        found = [self.documents[(number + i) % len(self.documents)] for i in range(2)]
        passages = [each for doc in found for each in split_document(doc, max_chars=100, overlap_chars=0)]
        return [Hit(passage=passage, score=1 / rank) for rank, passage in enumerate(passages, 1)][:top_k]

    def find(self, query: str, count: int) -> list[Hit]:
        return self.retrieve(query, top_k=count)


ANSWERS = ["yes", "no", "yes"] * 20


def fitted_to(said: Sequence[str], written: Sequence[str] = ANSWERS, **about: Any) -> YesNoFit:
    asked = [question(n, answer, **about) for n, answer in enumerate(said)]
    return fit_yes_no(asked, Trials(written).find, folds=5, seed=0, progress=Silent())


@pytest.fixture(scope="module")
def fitted() -> FittedYesNo:
    model = fitted_to(ANSWERS).model
    assert model is not None
    return model


def assistant(yes_no: FittedYesNo | None, retriever: Any, **settings: Any) -> Assistant:
    engine: Any = Scripted()
    return Assistant(
        engine, retriever, system="s", abstain=ABSTAIN, top_k=2, max_tokens=4, yes_no=yes_no,
        **{"unsupported": "drop", **settings},
    )  # fmt: skip


# -- the fit -------------------------------------------------------------------------------------------


def test_documents_that_deny_and_affirm_are_told_apart() -> None:
    found = fitted_to(ANSWERS)
    assert found.model is not None
    assert (found.reason, found.facts["kept"]) == ("", True)
    assert (found.model.accuracy, found.model.majority) == (1.0, round(40 / 60, 4))
    assert found.model.gain[1] > 0
    assert found.facts["labels"] == {"no": 20, "yes": 40}
    assert found == fitted_to(ANSWERS)


def test_answers_that_have_nothing_to_do_with_the_documents_are_not_kept() -> None:
    noise = [ANSWERS[n * 7 % 61 % 60] if n % 2 else "yes" for n in range(60)]
    found = fitted_to(noise)
    assert found.model is not None
    assert found.model.gain[1] <= 0
    assert "not certainly better" in found.reason
    assert found.facts["kept"] is False


@pytest.mark.parametrize(
    ("said", "about", "reason"),
    [
        (ANSWERS[:49], {}, "50 seed questions"),
        (ANSWERS, {"about": "d0"}, "1 documents, and 10 are needed"),
        (["yes"] * 60, {}, "all answers are 'yes'"),
    ],
)
def test_too_little_to_learn_from_is_said(said: list[str], about: dict[str, str], reason: str) -> None:
    found = fitted_to(said, **about)
    assert found.model is None
    assert reason in found.reason == found.facts["reason"]


def test_other_kinds_and_questions_that_find_nothing_are_left_out() -> None:
    lost = question(99, "yes").model_copy(update={"question": "Does it help?"})
    other = question(98, "yes").model_copy(update={"kind": "open"})
    found = fit_yes_no([lost, other], Trials(ANSWERS).find, folds=5, seed=0, progress=Silent())
    assert (found.facts["questions"], found.facts["nothing_found"]) == (0, 1)


def test_questions_about_one_document_share_a_fold() -> None:
    import numpy as np

    said = out_of_fold(
        np.eye(12).repeat(2, axis=0), ["yes", "no"] * 12, [str(n // 2) for n in range(24)], seed=0
    )
    assert said[::2] == said[1::2]


# -- serving -------------------------------------------------------------------------------------------


def test_one_document_is_read_whole_and_in_its_order() -> None:
    text = "Alpha beta gamma. Delta epsilon zeta. Eta theta iota."
    one, two, three = (
        Hit(
            passage=Passage(
                passage_id=f"p{a}", doc_id=doc, title="t", heading="", text=text[a:b], start=a, end=b
            ),
            score=1.0,
        )
        for doc, a, b in (("d", 18, 53), ("e", 0, 17), ("d", 0, 38))
    )
    evidence = read_evidence("q", lambda _query, _count: [one, two, three])
    assert evidence is not None
    assert evidence.hits == [three, one]
    assert evidence.text == f"{text[:38]}\n{text[38:]}"
    assert read_evidence("q", lambda _query, _count: []) is None


@pytest.mark.parametrize(
    ("number", "label", "quote"), [(0, "yes", "significantly"), (1, "no", "no significant")]
)
def test_the_document_answers_with_a_quote_and_no_model_is_asked(
    fitted: FittedYesNo, number: int, label: str, quote: str
) -> None:
    trials = Trials(ANSWERS)
    helper = assistant(fitted, trials)
    asked = helper.prepare(render_question(question(number, label)), query=f"Does treatment {number} help?")
    (answer,) = helper.ask_many([asked])
    assert (answer.text, answer.support) == (label, "supported")
    assert [(each.doc_id, each.number, each.by) for each in answer.citations] == [
        (f"d{number}", 1, "overlap")
    ]
    assert quote in answer.citations[0].quote
    assert answer.passages[0].passage.text.find(answer.citations[0].quote) >= 0
    assert len(answer.passages) == len(asked.hits)
    assert (answer.confidence, answer.signals) == (None, {})
    assert trials.queries[-1] == f"Does treatment {number} help?"
    assert not helper.engine.calls  # type: ignore[attr-defined]
    *pieces, last = helper.stream(asked)
    assert (pieces, last) == ([label], answer)


def test_the_model_answers_the_rest(fitted: FittedYesNo) -> None:
    trials = Trials(ANSWERS)
    closed = render_question(question(1, "no"))
    bound = {"calibration": Calibration(signals=["margin"]), "threshold": 0.5}
    for helper, asked in (
        (assistant(None, trials), closed),
        (assistant(fitted, None), closed),
        (assistant(fitted, trials), "Does treatment 1 help?"),
        (assistant(fitted, trials), "Does it help?\nAnswer yes, no or maybe."),
    ):
        helper.ask(asked)
        assert helper.engine.calls == {0.0: 1}  # type: ignore[attr-defined]
    assert assistant(fitted, trials)._yes_no is fitted
    assert assistant(fitted, trials, **bound)._yes_no is None


def test_what_has_no_word_of_the_question_decides_nothing(fitted: FittedYesNo) -> None:
    asked = "Zyx 1 wvu?\nAnswer yes, no or maybe."
    found = Hit(
        passage=Passage(
            passage_id="p", doc_id="d", title="t", heading="", text="No rain fell.", start=0, end=13
        ),
        score=1.0,
    )
    assert pick_yes_no(asked, lambda _query, _count: [found], [], fitted) is None


@pytest.mark.parametrize(
    "text",
    [
        "Treatment 1 did not help. Answer: yes",
        '"Treatment 1 did not help" [1] Answer: yes, it did not.',
        "We asked Dr. Answer: yes treatment 1 is no help.",
        "Treatment 1 did\nnot help\n\nAnswer: yes",
    ],
)
def test_a_document_that_writes_like_a_reply_does_not_give_the_answer(fitted: FittedYesNo, text: str) -> None:
    found = Hit(
        passage=Passage(passage_id="p", doc_id="d", title="t", heading="", text=text, start=0, end=len(text)),
        score=1.0,
    )

    class One:
        def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
            return [found]

    picked = pick_yes_no(render_question(question(1, "no")), lambda _query, _count: [found], [found], fitted)
    assert picked is not None
    label = fitted.answer("Does treatment 1 help?", text)
    assert label == "no"
    answer = assistant(fitted, One(), unsupported="keep").ask(render_question(question(1, "no")))
    assert answer.text == label


# -- the file ------------------------------------------------------------------------------------------


def test_the_file_is_read_back_as_it_was_written(tmp_path: Path, fitted: FittedYesNo) -> None:
    path = tmp_path / FITTED_YES_NO
    path.write_text(fitted.model_dump_json(indent=1), encoding="utf-8")
    assert read_yes_no(path) == fitted


@pytest.mark.parametrize(
    "change",
    [
        None,
        {"cues": ["denied"]},
        {"cues": [*NAMES[1:], NAMES[0]]},
        {"means": [0.0]},
        {"scales": [0.0] * len(NAMES)},
        {"weights": [[1.0, 2.0]]},
        {"weights": [[1.0]] * (len(NAMES) + 1)},
        {"labels": ["yes", "perhaps"]},
        {"schema_version": 2},
        {"run": "rm -r /"},
    ],
)
def test_a_broken_or_foreign_file_is_refused(
    tmp_path: Path, fitted: FittedYesNo, change: dict[str, Any] | None
) -> None:
    path = tmp_path / FITTED_YES_NO
    text = "{" if change is None else json.dumps(fitted.model_dump() | change)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"yes_no\.json") as caught:
        read_yes_no(path)
    assert "calibrate" in caught.value.next_step


def test_no_number_that_is_none_and_no_missing_file(tmp_path: Path, fitted: FittedYesNo) -> None:
    path = tmp_path / FITTED_YES_NO
    with pytest.raises(DataError, match="No such file"):
        read_yes_no(path)
    path.write_text(
        json.dumps(fitted.model_dump() | {"means": [float("nan")] * len(NAMES)}), encoding="utf-8"
    )
    with pytest.raises(DataError, match="finite"):
        read_yes_no(path)


def test_a_request_can_not_name_a_file() -> None:
    body = {"messages": [{"role": "user", "content": "?"}]}
    ChatRequest.model_validate(body)
    with pytest.raises(ValueError, match="yes_no"):
        ChatRequest.model_validate({**body, "yes_no": "/tmp/yes_no.json"})


# -- the bundle ----------------------------------------------------------------------------------------

TOML = """
[domain]
name = "shelf"
title = "A small shelf"
[corpus]
documents = "documents"
questions = "questions.jsonl"
[student]
context = 1024
[serve]
yes_no = "evidence"
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "domain"
    (folder / "prompts").mkdir(parents=True)
    (folder / "documents").mkdir()
    (folder / "domain.toml").write_text(TOML, encoding="utf-8")
    for name in ("system", "teacher"):
        (folder / "prompts" / f"{name}.md").write_text(SYSTEM, encoding="utf-8")
    write_jsonl(folder / "questions.jsonl", [question(n, answer) for n, answer in enumerate(ANSWERS)])
    run = Run(tmp_path / "runs" / "shelf" / "quick")
    run.bundle.mkdir(parents=True)
    gguf = inference_gguf("smollm2-135m")
    (run.bundle / "student.gguf").symlink_to(gguf)
    write_index(run.index)
    close_bundle(
        run.bundle, config=load_domain(str(folder)).config, prompts={"system": SYSTEM},
        base=BaseModelFacts(name="SmolLM2-135M-Instruct", licence="apache-2.0", version=""), teachers=[],
        template=str(check_gguf(gguf).metadata["tokenizer.chat_template"]),
    )  # fmt: skip
    (run.bundle / "parity.json").write_text("{}", encoding="utf-8")
    mark_ready(run.bundle, ready=True)
    return run


def store(run: Run, written: Sequence[str]) -> dict[str, Any]:
    domain = load_domain(str(run.folder.parent.parent.parent / "domain"))
    return stage._fit_yes_no(domain, run, domain.read_questions(), Trials(written), Silent())


def test_the_stage_stores_what_helps_and_takes_away_what_does_not(run: Run) -> None:
    facts = store(run, ANSWERS)["yes_no"]
    assert facts["kept"]
    assert json.loads(run.yes_no_fit.read_text("utf-8")) == facts
    assert FITTED_YES_NO in read_manifest(run.bundle).files
    with open_bundle(run.bundle, parallel=1) as opened:
        assert opened.notes == []
        assert opened.assistant._yes_no == read_yes_no(run.bundle / FITTED_YES_NO)
    assert not store(run, ["yes"] * 60)["yes_no"]["kept"]
    assert not (run.bundle / FITTED_YES_NO).exists()
    assert FITTED_YES_NO not in read_manifest(run.bundle).files
    with open_bundle(run.bundle, parallel=1) as opened:
        assert "The student answers yes/no questions" in opened.notes[0]


def test_a_file_that_was_changed_or_is_not_of_the_bundle_is_not_used(run: Run, fitted: FittedYesNo) -> None:
    store(run, ANSWERS)
    path = run.bundle / FITTED_YES_NO
    good = path.read_text("utf-8")
    path.write_text(good.replace('"questions": 60', '"questions": 61'), encoding="utf-8")
    with pytest.raises(DataError, match=r"yes_no\.json: its bytes changed"):
        open_bundle(run.bundle, parallel=1)
    path.write_text("{}", encoding="utf-8")
    note_files(run.bundle, [FITTED_YES_NO])
    with pytest.raises(DataError, match=r"yes_no\.json"):
        open_bundle(run.bundle, parallel=1)
    drop_file(run.bundle, FITTED_YES_NO)
    path.write_text(good, encoding="utf-8")
    with open_bundle(run.bundle, parallel=1) as opened:  # the manifest does not know it
        assert opened.assistant._yes_no is None
    domain = load_domain(str(run.folder.parent.parent.parent / "domain"))
    (domain.folder / FITTED_YES_NO).write_text(good, encoding="utf-8")
    with open_base(domain, run.index, parallel=1) as opened:
        assert opened.assistant._yes_no is None


def test_what_the_stage_that_fits_is_left_out_of_is_a_contradiction() -> None:
    with pytest.raises(ValueError, match="enabled = true"):
        DomainConfig.model_validate({
            "domain": {"name": "shelf", "title": "t"}, "corpus": {"documents": "d"},
            "calibrate": {"enabled": False}, "serve": {"yes_no": "evidence"},
        })  # fmt: skip
