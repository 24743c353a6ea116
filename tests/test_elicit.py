"""elicit: which questions and passages, the prompt, reading replies, and whole runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from domains.config import parse_config
from domains.domain import Domain
from domains.errors import DataError, StageError
from domains.jsonl import read_jsonl
from domains.records import Document, Passage, Question, Quote, Rationale
from pipeline.elicit import choose_questions, choose_teacher, plan, run
from pipeline.ledger import Ledger
from pipeline.progress import Silent
from pipeline.run_folder import Run
from pipeline.strategies.desk import TERMS
from pipeline.teacher import Request
from pipeline.teacher_endpoint import EndpointTeacher
from pipeline.teacher_local import LocalTeacher
from pipeline.teacher_passages import holding, teacher_passages
from pipeline.teacher_prompt import read_reply, strip_boilerplate, teacher_messages
from tests.openai_server import Act, Call, OpenAIServer, status

REPLY = 'The passages say so. "Quoted words of a passage." [1]\nAnswer: yes'
DOCUMENTS = {
    "kettle": "# Kettle\n\n## Cleaning\nThe kettle is cleaned with vinegar every month.\n\n## Power\nThe kettle needs "
    "2200 watts.",
    "toaster": "# Toaster\n\n## Cleaning\nThe crumb tray is emptied every week.\n\n## Power\nThe toaster needs "
    "900 watts.",
    "fridge": "# Fridge\n\n## Cleaning\nThe fridge is defrosted twice a year.\n\n## Power\nThe fridge runs all day.",
}
QUESTIONS = [
    {
        "id": "q1",
        "kind": "open",
        "question": "How often is the kettle cleaned?",
        "answer": "Every month",
        "gold": [{"doc_id": "kettle", "quote": "The kettle is cleaned with vinegar every month."}],
    },
    {
        "id": "q2",
        "kind": "yes_no",
        "question": "Is the crumb tray emptied every week?",
        "answer": "yes",
        "gold": [{"doc_id": "toaster", "quote": "The crumb tray is emptied every week."}],
    },
    {
        "id": "q3",
        "kind": "options",
        "question": "How many watts does the toaster need?",
        "answer": "B",
        "options": {"A": "2200 watts", "B": "900 watts"},
        "gold": [{"doc_id": "toaster", "quote": "The toaster needs 900 watts."}],
    },
    {"id": "q4", "kind": "unanswerable", "question": "What does the kettle cost?", "answer": None},
    {
        "id": "q5",
        "kind": "open",
        "question": "When is it defrosted?",
        "answer": "Twice a year",
        "split": "exam",
    },
]


def question(number: int = 0, **changes: object) -> Question:
    return Question.model_validate({"about": "kettle", "split": "seed"} | QUESTIONS[number] | changes)


def passage(passage_id: str, text: str, *, doc_id: str = "d", start: int = 0) -> Passage:
    return Passage(
        passage_id=passage_id,
        doc_id=doc_id,
        title="T",
        heading="",
        text=text,
        start=start,
        end=start + len(text),
    )


def make_domain(
    folder: Path, *, questions: list[dict[str, object]] | None = None, **teacher: object
) -> Domain:
    rows = [
        {"about": "kettle", "split": "seed"} | row for row in (QUESTIONS if questions is None else questions)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in teacher.items())
    config = parse_config(
        f'[domain]\nname = "home"\ntitle = "Home"\n[corpus]\ndocuments = "documents"\n'
        f'questions = "questions.jsonl"\n[elicit]\nsamples = 2\n[teacher]\n{settings}\n',
        origin="domain.toml",
    )
    return Domain(folder, config, {"system": "Answer.", "teacher": "Explain the answer."})


@pytest.fixture(scope="session")
def index_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rag.embed import MiniLMEmbedder
    from rag.index import update_index

    folder = tmp_path_factory.mktemp("elicit") / "index"
    documents = [
        Document(doc_id=name, title=name.title(), text=text, source=f"{name}.md")
        for name, text in DOCUMENTS.items()
    ]
    update_index(folder, documents, embedder=MiniLMEmbedder(), max_chars=300, overlap_chars=0)
    return folder


@pytest.fixture
def home(tmp_path: Path, index_folder: Path) -> Run:
    this = Run(tmp_path / "runs" / "home" / "r1")
    this.bundle.mkdir(parents=True)
    this.index.symlink_to(index_folder)
    return this


# -- which questions -------------------------------------------------------------------------------


def test_kinds_are_chosen_in_proportion_and_the_choice_is_stable() -> None:
    pool = [question(0, id=f"o{n}") for n in range(60)] + [question(1, id=f"y{n}") for n in range(30)]
    pool += [question(2, id=f"m{n}") for n in range(10)]
    chosen = choose_questions(pool, count=20, seed=1)
    assert Counter(each.kind for each in chosen) == {"open": 12, "yes_no": 6, "options": 2}
    assert choose_questions(list(reversed(pool)), count=20, seed=1) == list(reversed(chosen))
    assert choose_questions(pool, count=20, seed=2) != chosen
    assert choose_questions(pool, count=0, seed=1) == choose_questions(pool, count=100, seed=1) == pool
    smaller = {each.id for each in choose_questions(pool, count=10, seed=1)}
    assert smaller < {each.id for each in chosen}


# -- which passages --------------------------------------------------------------------------------


def test_gold_passages_are_shown_among_retrieved_ones_in_no_fixed_place() -> None:
    gold = passage("gold", "Before. The quote   stands\nhere. After.")
    others = [passage(f"p{number}", f"Other text {number}.") for number in range(6)]
    queries: list[str] = []

    def find(query: str, top_k: int) -> list[Passage]:
        queries.append(query)
        return [others[0], gold, *others[1:]][:top_k]

    choose = teacher_passages([*others, gold], find, top_k=3)
    quote = Quote(doc_id="d", quote="The quote stands here.")
    places = Counter()
    for number in range(60):
        asked = question(0, id=f"q{number}", gold=[quote])
        shown = choose(asked, "reference")
        assert {each.passage_id for each in shown} == {"gold", "p0", "p1"}
        assert shown == choose(asked, "reference")
        places[shown.index(gold)] += 1
    assert min(places[place] for place in range(3)) >= 8
    assert set(queries) == {question().question}


def test_without_a_known_gold_passage_the_reference_answer_helps_to_find_one() -> None:
    queries: list[str] = []

    def find(query: str, top_k: int) -> list[Passage]:
        queries.append(query)
        return [passage("p0", "Text.")]

    choose = teacher_passages([], find, top_k=3)
    assert [each.passage_id for each in choose(question(gold=[]), "Every month")] == ["p0"]
    choose(question(), "Every month")
    assert queries == ["How often is the kettle cleaned? Every month"] * 2


def test_a_quote_across_two_passages_brings_both() -> None:
    parts = [
        passage("a", "One two three", start=5),
        passage("b", "four five.", start=19),
        passage("c", "Six.", start=30),
    ]
    assert [each.passage_id for each in holding(Quote(doc_id="d", quote="three four"), parts)] == ["a", "b"]
    assert [each.passage_id for each in holding(Quote(doc_id="d", quote="four five."), parts)] == ["b"]
    assert holding(Quote(doc_id="d", quote="seven"), parts) == []
    assert holding(Quote(doc_id="d", quote="  "), parts) == []


# -- prompt and reply ------------------------------------------------------------------------------


def test_the_teacher_sees_passages_question_gold_answer_and_evidence() -> None:
    shown = [
        passage("p1", "The fridge runs all day.", doc_id="fridge"),
        passage("p2", "The toaster needs 900 watts.", doc_id="toaster"),
    ]
    system, user = teacher_messages("Explain.", question(2), shown)
    assert system.content == "Explain."
    assert "[1] T\nThe fridge runs all day." in user.content
    assert "B. 900 watts\nAnswer with the letter" in user.content
    assert 'Right answer: B. 900 watts\nEvidence: "The toaster needs 900 watts." [2]\n' in user.content
    assert user.content.endswith("Use the words of the evidence.")
    _, without = teacher_messages("Explain.", question(2, gold=[]), shown)
    assert "Evidence" not in without.content
    assert without.content.endswith("Use the words of the passages.")


def test_control_tokens_in_untrusted_text_are_taken_apart() -> None:
    bad = "x<|im_end|>"
    asked = question(0, question=bad, answer=bad, gold=[{"doc_id": "d", "quote": bad}])
    _, user = teacher_messages("Explain.", asked, [passage("p", bad)])
    assert "<|im_end|>" not in user.content
    assert user.content.count("< |im_end| >") == 4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Based on the passages provided, the tray is emptied.", "The tray is emptied."),
        ("According to passage [2], it is so.", "According to passage [2], it is so."),
        ("According to the passages, it is clear that it is so.", "It is so."),
        ("The correct answer is B because toast needs heat.", "Toast needs heat."),
        ("The correct answer is B. 900 watts because toast needs 1.5 bars.", "Toast needs 1.5 bars."),
        ("The answer is correct because toast needs heat.", "Toast needs heat."),
        ("The answer is because toast needs heat.", "Toast needs heat."),
        ("The answer is right because it says so.", "The answer is right because it says so."),
        ("The right answer is that toast needs heat.", "Toast needs heat."),
        ("The answer is 5. Another thing fails because heat rises.", "The answer is 5. Another thing fails because heat rises."),
        ("Sure! Explanation: The passage states that ice melts.", "Ice melts."),
        ("The dose is halved because kidneys fail.", "The dose is halved because kidneys fail."),
        ("From these documents, we can see that R2 holds.", "R2 holds."),
        ("eGFR below 30 rules out metformin.", "eGFR below 30 rules out metformin."),
        ("The passage states that eGFR falls.", "eGFR falls."),
        ("mRNA is read, it says.", "mRNA is read, it says."),
        ("ice melts.", "ice melts."),
        ("The evidence confirms that R2 holds.", "R2 holds."),
        ("Based on the passages,", "Based on the passages,"),
        ('"A quote stands here." [1] So it is.', '"A quote stands here." [1] So it is.'),
        ("", ""),
    ],
)  # fmt: skip
def test_boilerplate_openings_are_stripped(before: str, after: str) -> None:
    assert strip_boilerplate(before) == after
    assert strip_boilerplate(after) == after


@pytest.mark.parametrize(
    ("text", "rationale", "answer"),
    [
        ('"It is so." [2] Thus.\nAnswer: yes', '"It is so." [2] Thus.', "yes"),
        ("The passage says that ice melts.\n**Answer:** It melts.", "Ice melts.", "It melts."),
        ("One.\nAnswer: yes\n\nQuestion: more?\nTwo.\nAnswer: no", "One.", "yes\n\nQuestion: more?\nTwo."),
        ("Just a sentence.", "Just a sentence.", "Just a sentence."),
        ("Answer: yes", "", "yes"),
    ],
)
def test_replies_are_read_as_rationale_and_answer(text: str, rationale: str, answer: str) -> None:
    assert read_reply(text) == (rationale, answer)


# -- which teacher ---------------------------------------------------------------------------------


def test_auto_takes_the_endpoint_only_with_a_key_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Silent()
    domain = make_domain(tmp_path, kind="auto", api_key_env="TEST_TEACHER_KEY")
    monkeypatch.delenv("TEST_TEACHER_KEY", raising=False)
    assert isinstance(choose_teacher(domain, progress), LocalTeacher)
    monkeypatch.setenv("TEST_TEACHER_KEY", "sk-secret-value")
    assert isinstance(choose_teacher(domain, progress), EndpointTeacher)
    assert "TEST_TEACHER_KEY is not set" in progress.lines[0]
    assert "gpt-4o-mini (endpoint), because TEST_TEACHER_KEY is set" in progress.lines[1]
    assert "sk-secret" not in " ".join(progress.lines)


# -- whole runs ------------------------------------------------------------------------------------


def endpoint_settings(server: OpenAIServer) -> dict[str, object]:
    return {
        "kind": "endpoint",
        "base_url": server.base_url,
        "model": "m1",
        "api_key_env": "",
        "max_retries": 0,
    }


def test_a_run_writes_rationales_and_its_counts_add_up(tmp_path: Path, home: Run) -> None:
    def script(call: Call) -> Act:
        if "kettle cleaned" in call.question:
            return status(400, code="context_length_exceeded")
        return Act(text=REPLY, finish="length" if "crumb tray emptied" in call.question else "stop")

    with OpenAIServer(script) as server:
        domain = make_domain(tmp_path / "d", **endpoint_settings(server))
        progress = Silent()
        estimate = plan(domain, home).total
        assert server.calls == []
        assert (estimate.requests, estimate.cached) == (6, 0)
        assert estimate.max_cost > 0
        report = run(domain, home, progress)
        calls = len(server.calls)
        again = run(domain, home, Silent())
        assert len(server.calls) == calls + 2, "only the two failures are asked again"
    counts = report.counts
    assert counts == {
        "seed_questions": 4,
        "unanswerable": 1,
        "not_chosen": 0,
        "questions": 3,
        "requests": 6,
        "cached": 0,
        "answered": 4,
        "failed": 2,
        "truncated": 2,
    }
    assert again.counts == counts | {"cached": 4}
    assert report.facts["cost"] == pytest.approx(4 * (100 * 0.15 + 20 * 0.60) / 1e6)
    assert any("restrict training" in line for line in progress.lines)
    rationales = read_jsonl(home.rationales, Rationale)
    assert [(each.question_id, each.sample) for each in rationales] == [
        ("q2", 0),
        ("q2", 1),
        ("q3", 0),
        ("q3", 1),
    ]
    assert {(each.text, each.answer, each.teacher) for each in rationales} == {
        ('The passages say so. "Quoted words of a passage." [1]', "yes", "m1")
    }
    with Ledger(home.ledger) as ledger:
        assert all(ledger.get(each.request) for each in rationales)
    steps = report.facts["steps"]
    assert [(step["step"], step["proposed"], step["kept"], step["error"]) for step in steps] == [
        ("1-label", 6, 4, 2)
    ]
    assert home.generated.read_bytes() == b""
    assert all(len(each.passages) == 3 for each in rationales)


def test_when_everything_is_in_the_ledger_nothing_is_sent(tmp_path: Path, home: Run) -> None:
    with OpenAIServer() as server:
        domain = make_domain(tmp_path / "d", **endpoint_settings(server))
        run(domain, home, Silent())
        written = home.rationales.read_bytes()
    home.rationales.unlink()
    progress = Silent()
    report = run(domain, home, progress)  # the server is gone
    assert (report.counts["cached"], report.counts["answered"]) == (6, 6)
    assert home.rationales.read_bytes() == written
    assert TERMS[:20] not in " ".join(progress.lines)


def test_more_failures_than_answers_stop_the_stage_and_keep_the_answers(tmp_path: Path, home: Run) -> None:
    def script(call: Call) -> Act:
        return (
            Act(text=REPLY) if "crumb tray emptied" in call.question else status(500, message="out of order")
        )

    with OpenAIServer(script) as server:
        domain = make_domain(tmp_path / "d", **endpoint_settings(server))
        with pytest.raises(StageError, match="failed on 4 of 6 requests: 4 x 500: out of order"):
            run(domain, home, Silent())
        assert not home.rationales.exists()
        assert plan(domain, home).total.cached == 2


def test_no_seed_questions_and_double_ids_are_errors(tmp_path: Path, home: Run) -> None:
    with pytest.raises(StageError, match="0 answerable seed questions") as caught:
        run(make_domain(tmp_path / "a", questions=QUESTIONS[3:], kind="local"), home, Silent())
    assert "preceptor import" in caught.value.next_step
    with pytest.raises(DataError, match="'q1'"):
        run(make_domain(tmp_path / "b", questions=[QUESTIONS[0], QUESTIONS[0]]), home, Silent())
    with pytest.raises(StageError, match="index"):
        run(make_domain(tmp_path / "c"), Run(tmp_path / "runs" / "home" / "empty"), Silent())


def test_the_local_model_explains_and_is_asked_once(tmp_path: Path, home: Run) -> None:
    domain = make_domain(tmp_path / "d", kind="local", temperature=0.3, max_tokens=40)
    report = run(domain, home, Silent())
    assert (report.counts["requests"], report.counts["answered"], report.counts["cached"]) == (6, 6, 0)
    rationales = read_jsonl(home.rationales, Rationale)
    said = " ".join(each.text for each in rationales).lower()
    assert sum(word in said for word in ("month", "crumb", "900", "vinegar", "week", "watts")) >= 3
    assert report.facts["spent_on_domain"] == 0
    written = home.rationales.read_bytes()
    again = run(domain, home, Silent())
    assert again.counts["cached"] == 6
    assert home.rationales.read_bytes() == written


def test_a_prompt_that_does_not_fit_the_local_context_fails_alone() -> None:
    from serve.models import inference_gguf

    heard = []
    local = LocalTeacher(inference_gguf("smollm2-135m"), context=256, parallel=2)
    requests = [
        Request(
            model=local.identity,
            messages=teacher_messages("Explain.", question(0, question=text), []),
            temperature=0.0,
            max_tokens=8,
            sample=0,
        )
        for text in ("Why? " * 400, "Why?")
    ]
    local.ask_many(requests, lambda request, outcome: not heard.append(outcome))
    assert sorted(type(outcome).__name__ for outcome in heard) == ["Failure", "Reply"]
