from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import make_tiny_llama

from domains.config import ReflectSection
from domains.jsonl import write_jsonl
from domains.records import Example, Hit, Message, Passage, Question, Quote, Rationale
from pipeline import ablation, rerank, train
from pipeline.ablation import Asking, Oracle, Recipes, Taught, kept_rationales, summarise_marks
from pipeline.arms import Arm, Conditions, Row
from pipeline.progress import Silent
from pipeline.recipe import QLORA
from pipeline.rows import Kept, RowBuilder
from pipeline.run_folder import Run
from pipeline.training_loop import Settings

TEXTS = {"cat": "The cat eats fish.", "dog": "The dog eats bones.", "cow": "The cow eats grass."}


def passage(name: str) -> Passage:
    return Passage(
        passage_id=f"{name}-0", doc_id=name, title=name, heading="", text=TEXTS[name], start=0, end=len(TEXTS[name])
    )  # fmt: skip


def question(name: str) -> Question:
    return Question(
        id=name, kind="open", question=f"What does the {name} eat?", answer=TEXTS[name].split()[-1],
        about=name, gold=[Quote(doc_id=name, quote=TEXTS[name])], split="seed",
    )  # fmt: skip


def rationale(name: str, sample: int = 0) -> Rationale:
    return Rationale(
        question_id=name, sample=sample, text=f"Passage says {TEXTS[name].lower()}\nAnswer: it", answer="it",
        passages=[f"{name}-0"], teacher="t", request=f"{name}{sample}",
    )  # fmt: skip


def recipes(asked: list[str], *, question_share: float = 0.0) -> Recipes:
    def by_rationale(query: str, top_k: int) -> list[Passage]:
        asked.append(query)
        return [passage("cat"), passage("dog")][:top_k]

    def by_question(query: str, top_k: int) -> list[Passage]:
        assert "Passage says" not in query
        return [passage("cow")][:top_k]

    return Recipes(
        system="s", by_rationale=by_rationale, by_question=by_question, top_k=2, question_share=question_share
    )


def taught() -> list[Taught]:
    return [Taught(question(name), rationale(name, sample)) for name in ("cat", "dog") for sample in (0, 1)]


def test_kard_rows_are_retrieved_with_rationale_and_answer_and_teach_both() -> None:
    asked: list[str] = []
    rows = recipes(asked).rows("kard", taught())
    assert asked[0] == "Passage says the cat eats fish.\nAnswer: fish."
    assert rows[0].passages == ["cat-0", "dog-0"]
    assert rows[0].completion == "Passage says the cat eats fish.\nAnswer: fish."
    assert len(rows) == 4


def test_training_rows_ablation_and_reranker_search_with_the_same_words(tmp_path: Path) -> None:
    """The rationale's own words and the gold answer: no quote, and not what the teacher called the answer."""
    asked = question("cat").model_copy(
        update={"kind": "options", "answer": "B", "options": {"A": "bones", "B": "fish"}}
    )
    said = rationale("cat").model_copy(
        update={
            "text": f'"{TEXTS["cat"]}" [1]\nIt is  not\na dog.\nAnswer: (B) that one',
            "answer": "that one",
        }
    )
    searched: list[str] = []

    def by_rationale(query: str, top_k: int) -> list[Passage]:
        searched.append(query)
        return [passage("cat")][:top_k]

    builder = RowBuilder(
        system="s", abstain="?", retrieve=by_rationale, top_k=1, rationale_in_target=True, seed=0,
        by_rationale=by_rationale,
    )  # fmt: skip
    kept = [Kept(asked, said, [passage("cat")])]
    rows, _ = builder.build(kept, [], retrieved_share=0, irrelevant_share=0, abstention_share=0)
    recipes(searched).rows("kard", [Taught(asked, said)])
    run = Run(tmp_path)
    write_jsonl(run.examples, rows)
    write_jsonl(run.rationales, [said])
    searched += [row.rationale for row in rerank._rows(run, {asked.id: asked})]
    assert searched == ["It is not a dog.\nAnswer: B. fish"] * 3


def test_a_share_of_kard_rows_is_retrieved_by_the_question() -> None:
    asked: list[str] = []
    rows = recipes(asked, question_share=0.5).rows("kard", taught())
    assert sorted(row.origin for row in rows) == ["rationale", "rationale", "retrieved", "retrieved"]
    assert all(row.passages == ["cow-0"] for row in rows if row.origin == "retrieved")
    assert len(asked) == 2


def test_closed_book_rows_show_no_passage_and_answers_alone_come_once_per_question() -> None:
    asked: list[str] = []
    maker = recipes(asked)
    answers, rationales = maker.rows("answers", taught()), maker.rows("rationales", taught())
    assert [row.completion for row in answers] == ["Answer: fish.", "Answer: bones."]
    assert len(rationales) == 4
    assert not asked
    assert all("Passages:" not in row.messages[-1].content for row in answers + rationales)


class _Fixed:
    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        assert query
        return [Hit(passage=passage(name), score=0.5) for name in ("dog", "cat", "cow")][:top_k]


def test_the_oracle_shows_gold_first_and_never_twice() -> None:
    oracle = Oracle([question("cow")], [passage(name) for name in TEXTS], _Fixed())
    hits = oracle.retrieve(question("cow").question, top_k=3)
    assert [hit.passage.doc_id for hit in hits] == ["cow", "dog", "cat"]


def test_only_rationales_behind_training_rows_are_taught(tmp_path: Path) -> None:
    run = Run(tmp_path)
    row = Example(
        id="1", question_id="cat", messages=[Message(role="user", content="x")], completion="y", passages=[],
        origin="gold", request="cat1",
    )  # fmt: skip
    write_jsonl(run.examples, [row])
    write_jsonl(run.rationales, [rationale("cat", 0), rationale("cat", 1), rationale("dog")])
    kept = kept_rationales(run, [question("cat"), question("dog")])
    assert [item.rationale.request for item in kept] == ["cat1"]


def test_an_arm_that_reflects_is_asked_with_its_own_back_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[str, bool]] = {}

    def asked(arms: list[Arm], questions: list[Question], *rest: Any, **_: Any) -> dict[str, list[Row]]:
        seen[arms[0].name] = (rest[1].reflect.backend, arms[0].reflects)
        return {arms[0].name: [Row(key="k", question_id=q.id, seconds=0, answer=None) for q in questions]}

    monkeypatch.setattr(ablation, "ask_arms", asked)
    marks, answers = ablation.ask(
        {
            "plain": Asking(tmp_path, _Fixed()),
            "judged": Asking(tmp_path, _Fixed(), reflect=ReflectSection(backend="text")),
        },
        [question("cat")],
        [passage("cat")],
        tmp_path,
        Conditions(system="s", abstain="?", top_k=1, max_tokens=8, context=256),
        Silent(),
        open_engine=lambda _: pytest.fail("nothing is opened here"),
    )
    assert seen == {"plain": ("none", False), "judged": ("text", True)}
    assert answers["judged"] == [None]
    assert marks["plain"]["cat"]["score"] == (0, 1)


def test_differences_are_paired_and_taken_to_the_named_arm() -> None:
    questions = [question(name) for name in TEXTS]
    marks = {
        "base": {q.id: {"score": (0.0, 1.0)} for q in questions},
        "kard": {q.id: {"score": (1.0, 1.0)} for q in questions},
    }
    summary = summarise_marks(marks, questions, against="base", resamples=50, seed=0)
    assert summary["kard"]["score"] == 1
    assert summary["kard"]["minus_base"] == pytest.approx([1, 1, 1])
    assert "minus_base" not in summary["base"]
    assert "option_accuracy" not in summary["kard"]


def test_two_trained_arms_are_compared_on_the_same_questions() -> None:
    questions = [question(name) for name in TEXTS]
    marks = {
        "one": {q.id: {"score": (1.0 if q.id == "cat" else 0.0, 1.0)} for q in questions},
        "other": {q.id: {"score": (1.0, 1.0)} for q in questions},
    }
    gap = ablation.score_difference(marks, ("one", "other"), questions, resamples=200, seed=0)
    assert gap is not None
    assert gap[0] == pytest.approx(1 / len(questions) - 1, abs=1e-4)
    assert gap[1] <= gap[0] <= gap[2] <= 0


def test_a_student_is_used_again_only_where_it_was_made_of_the_very_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(make_tiny_llama(tmp_path / "tiny"))
    rows = recipes([]).rows("kard", taught())
    settings = Settings(
        rank=2, alpha=4.0, dropout=0.0, learning_rate=1e-3, warmup_share=0.0, epochs=1, pack_tokens=512, packs_per_step=1,
        max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    trained: list[int] = []
    real = train.train_student

    def counted(rows: Any, *args: Any, **more: Any) -> Any:
        trained.append(len(rows))
        return real(rows, *args, **more)

    monkeypatch.setattr(train, "train_student", counted)

    def make(rows: list[Example], seed: int = 0) -> Path:
        return ablation.train_recipe(
            rows, tmp_path / "student", Silent(), base=base, context=512, settings=replace(settings, seed=seed),
            title="t", recipe=QLORA,
        )  # fmt: skip

    path = make(rows)
    assert path.is_file()
    make(rows)
    assert trained == [4]
    make(rows[:3])
    make(rows[:3], seed=1)
    assert trained == [4, 3, 3]
