"""Public sets are read as their folders hold them, in both halves; no arm that is fitted sees the answers it is marked by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domains.domain import load_domain
from domains.records import Hit, Passage, Question
from pipeline import public_sets_bench
from pipeline.abstention import Case
from pipeline.fit_yes_no import out_of_fold
from pipeline.progress import Silent
from pipeline.public_sets import (
    Claim,
    Read,
    accuracy,
    bioasq_yes_no,
    drawn,
    findings,
    kqa_claims,
    openstax,
    pubmedqa,
)
from pipeline.public_sets_abstention import auroc, fit_on_pairs, measure_retrieval_confidence, medquad_cases
from pipeline.public_sets_bench import measure_public
from pipeline.public_sets_options import measure_options
from pipeline.public_sets_support import kappa, measure_support
from pipeline.public_sets_yes_no import measure_yes_no
from pipeline.verify_model import passage_gains
from serve.engine import Engine
from serve.models import inference_gguf
from tests.small_serving import TEXTS, write_domain

GLANDS = {"pancreas": "insulin", "thyroid": "thyroxine", "ovary": "oestrogen", "pineal gland": "melatonin"}
DENIED = "There was no significant difference. The score did not change (p = 0.4)."
AFFIRMED = "The score was significantly higher. It improved in most (p < 0.001)."


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mcq(number: int, gland: str) -> dict[str, Any]:
    letters = dict(zip("ABCD", GLANDS.values(), strict=True))
    answer = next(letter for letter, text in letters.items() if text == GLANDS[gland])
    return {
        "id": f"q{number}", "book": "B", "chapter": "C", "module": gland, "question": f"The {gland} makes ____.",
        "options": letters, "answer": answer,
    }  # fmt: skip


def abstract(number: int, answer: str) -> dict[str, Any]:
    return {
        "id": f"p{number}", "pmid": str(number), "question": f"Does treatment {number} help?",
        "contexts": ["We asked 20 people.", DENIED if answer == "no" else AFFIRMED],
        "context_labels": ["METHODS", "RESULTS"], "long_answer": "-", "answer": answer,
    }  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every set in both halves; the hidden one has other sizes."""
    for split, n in (("dev", 24), ("hidden", 12)):
        glands = list(GLANDS)
        lines(
            tmp_path / "openstax_health" / f"{split}_passages.jsonl",
            [
                {"id": gland, "book": "B", "chapter": "C", "module": gland, "section": "",
                 "text": f"The {gland} is a gland. The {gland} makes {hormone}."}
                for gland, hormone in GLANDS.items()
            ],
        )  # fmt: skip
        lines(
            tmp_path / "openstax_health" / f"{split}_mcq.jsonl",
            [mcq(i, glands[i % len(glands)]) for i in range(n // 3)],
        )
        lines(tmp_path / "pubmedqa" / f"{split}.jsonl", [abstract(i, ("yes", "no")[i % 2]) for i in range(n)])
        lines(
            tmp_path / "kqa" / f"{split}_nli.jsonl",
            [
                {
                    "question": f"Q{i // 2}", "answer": "Insulin lowers the sugar in the blood. Call a doctor.",
                    "claim": ("Insulin lowers the sugar in the blood", "Rice grows in water")[i % 2],
                    "majority_label": ("Entailment", "Neutral")[i % 2],
                }
                for i in range(n)
            ],
        )  # fmt: skip
        lines(
            tmp_path / "prd_doc_qa" / f"{split}_passages.jsonl",
            [{"doc_id": f"d{i}", "passage_id": f"d{i}-1", "title": f"Plan {i}", "heading": "", "text": f"Part {i}."}
             for i in range(60)],
        )  # fmt: skip
        lines(
            tmp_path / "prd_doc_qa" / f"{split}_questions.jsonl",
            [{"id": f"r{i}", "doc_id": f"d{i}", "question_in_context": f"Plan {i}: which part?", "answer": f"Part {i}",
              "gold_passage_ids": [f"d{i}-1"]} for i in range(60)],
        )  # fmt: skip
        lines(
            tmp_path / "medquad_answerable" / f"{split}_questions.jsonl",
            [{"question": f"What is {i}?", "gold_doc_ids": [f"m{i}"] if i % 2 else [], "focus": f"Focus {i // 2}"}
             for i in range(n)],
        )  # fmt: skip
    return tmp_path


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(inference_gguf("smollm2-135m"), context=1024, parallel=1) as engine:
        yield engine


@pytest.mark.parametrize(("split", "n"), [("dev", 24), ("hidden", 12)])
def test_both_halves_are_read(data: Path, split: str, n: int) -> None:
    passages, questions = openstax(data / "openstax_health", split=split)
    assert (len(passages), len(questions)) == (4, n // 3)
    assert len(pubmedqa(data / "pubmedqa", split=split)) == n
    assert len(kqa_claims(data / "kqa", split=split)) == n
    cases, groups = medquad_cases(data / "medquad_answerable", split=split)
    assert (len(cases), sum(bool(case.gold_doc_ids) for case in cases), len(set(groups))) == (
        n,
        n // 2,
        n // 2,
    )


def test_findings_are_the_sections_named_so_else_the_last() -> None:
    assert findings(["a", "b", "c"], ["AIM", "RESULTS", "METHODS"]) == "b"
    assert findings(["a", "b"], ["AIM", "METHODS"]) == "b"


def test_bioasq_takes_only_yes_no_questions_with_snippets(tmp_path: Path) -> None:
    lines(tmp_path / "dev_corpus.jsonl", [{"doc_id": f"s{i}", "text": f"Snippet {i}."} for i in range(9)])
    lines(tmp_path / "dev_qrels.jsonl", [{"query_id": "b1", "doc_id": f"s{i}"} for i in range(9)])
    kinds = [("b1", "yesno"), ("b2", "yesno"), ("b3", "list")]
    lines(
        tmp_path / "dev.jsonl",
        [{"id": name, "type": kind, "question": "Is it so?", "exact_answer": "no"} for name, kind in kinds],
    )
    (read,) = bioasq_yes_no(tmp_path, split="dev")
    assert read.text.splitlines() == [f"Snippet {i}." for i in range(6)]


def test_the_share_of_right_ones_has_its_interval_and_its_number() -> None:
    found = accuracy([True, True, True, False] * 10)
    assert (found["accuracy"], found["n"]) == (0.75, 40)
    assert found["interval"][0] < 0.75 < found["interval"][1]


def test_a_draw_is_all_or_so_many_of_them() -> None:
    assert drawn(5, 0, seed=0) == drawn(5, 9, seed=0) == [0, 1, 2, 3, 4]
    few = drawn(100, 7, seed=1)
    assert len(set(few)) == 7
    assert few == sorted(few) == drawn(100, 7, seed=1) != drawn(100, 7, seed=2)


def test_options_are_found_in_the_passages_and_chance_stands_beside(data: Path) -> None:
    passages, questions = openstax(data / "openstax_health", split="dev")
    found = measure_options(passages, questions, Silent())
    assert found["chance"] == 0.25
    assert found["bm25"]["accuracy"] == found["bm25_question"]["accuracy"] == 1.0
    assert found["longest"]["accuracy"] < 1
    assert "gain" not in found


def test_the_model_gains_from_the_passage_that_says_it(engine: Engine) -> None:
    question = Question(
        id="q", kind="options", question="What does the spleen store?", answer="B",
        options={"A": "sand", "B": "copper", "C": "cheese"}, about="d", split="exam",
    )  # fmt: skip
    text = "The spleen stores copper. Copper is kept in the spleen."
    passage = Passage(
        passage_id="p", doc_id="d", title="Spleen", heading="", text=text, start=0, end=len(text)
    )
    gains = passage_gains(engine, question, [passage])
    assert max(gains, key=lambda letter: gains[letter]) == "B"
    assert set(passage_gains(engine, question, [])) == {"A", "B", "C"}
    assert max(abs(value) for value in passage_gains(engine, question, []).values()) < 1e-6


def test_an_answer_is_never_predicted_from_itself() -> None:
    """Each row has a feature of its own: a fit that saw the row would get it right, one that did not can't."""
    labels = ["yes", "no"] * 10
    said = out_of_fold(np.eye(20), labels, [str(i) for i in range(20)], seed=0)
    assert len(said) == 20
    right = sum(a == b for a, b in zip(said, labels, strict=True))
    assert right <= 12


def reads(answers: Sequence[str], *, name: str = "p") -> list[Read]:
    return [
        Read(
            Question(id=f"{name}{i}", kind="yes_no", question=f"Does treatment {i} help?", answer=answer,
                     about=f"{name}{i}", split="exam"),
            DENIED if answer == "no" else AFFIRMED,
        )
        for i, answer in enumerate(answers)
    ]  # fmt: skip


def test_cues_are_learnt_from_other_folds_another_half_or_another_set() -> None:
    answers = ["yes", "no", "yes"] * 8
    found = measure_yes_no(reads(answers), Silent(), elsewhere=reads(answers, name="e"))
    assert found["always_yes"] == pytest.approx(16 / 24, abs=1e-3)
    assert found["cues"]["accuracy"] == found["cues_elsewhere"]["accuracy"] == 1.0
    assert found["fitted"] == "out of fold, 5 folds, 5 times"
    turned = [{"yes": "no", "no": "yes"}[answer] for answer in answers]
    wrong = [
        Read(read.question.model_copy(update={"answer": answer}), read.text)
        for read, answer in zip(reads(answers), turned, strict=True)
    ]
    found = measure_yes_no(reads(answers), Silent(), learn=wrong)
    assert found["cues"]["accuracy"] == 0  # it believes what it learnt, and learnt only that
    assert found["fitted"] == "24 other questions"


def test_support_is_marked_against_the_physicians() -> None:
    answer = "Insulin lowers the sugar in the blood. Call a doctor if you faint."
    claims = [
        Claim(f"Q{i // 2}", answer, text, label)
        for i, (text, label) in enumerate(
            [("Insulin lowers the sugar in the blood", "Entailment"), ("Rice grows in wet fields", "Neutral")]
            * 24
        )
    ]
    found = measure_support(claims, Silent())
    assert found["majority"] == 0.5
    assert found["rules"]["accuracy"] == found["trained"]["accuracy"] == 1.0
    assert found["rules"]["kappa"] == 1.0


def test_kappa_is_nothing_for_a_judge_that_always_says_the_same() -> None:
    assert kappa([False] * 4, [True, False, False, False]) == 0
    assert kappa([True, False], [True, False]) == 1
    assert kappa([True, False], [False, True]) == -1


class Shelf:
    """Finds the document that a question names, with a high score; else another one, with a low score."""

    def retrieve(self, query: str, *, top_k: int, without: Set[str] = frozenset()) -> list[Hit]:
        name = query.split()[-1].rstrip("?")
        there = name.startswith("m") and name not in without
        found = name if there else "other"
        passage = Passage(
            passage_id=found, doc_id=found, title="", heading="", text="A text.", start=0, end=7
        )
        score = 0.9 if there else 0.2
        return [Hit(passage=passage, score=score, ranks={"dense": 1}, scores={"dense": score})][:top_k]


def test_a_confidence_from_retrieval_learns_from_pairs_and_tells_the_missing_apart() -> None:
    learnt = fit_on_pairs([Case(f"What is m{i}?", frozenset({f"m{i}"})) for i in range(20)], Shelf())
    assert (learnt.right.answers, learnt.right.right, learnt.answerable.right) == (40, 20, 20)
    one_more = [Case("What is m1?", frozenset({"m1"})), Case("What is x?", frozenset())]
    assert fit_on_pairs(one_more, Shelf()).answerable.answers == 3  # nothing to take away from the second
    cases = [
        Case(f"What is {'m' if i % 2 else 'x'}{i}?", frozenset({f"m{i}"} if i % 2 else ())) for i in range(20)
    ]
    found = measure_retrieval_confidence(cases, [str(i) for i in range(20)], Shelf(), learnt, resamples=50)
    assert (found["n"], found["n_answerable"]) == (20, 10)
    for name in ("right", "answerable"):
        assert found[name]["tells_apart"] == 1
        assert found[name]["aurc"]["mean"] == pytest.approx(found[name]["oracle"])
        assert found[name]["aurc"]["mean"] < found[name]["random"]
    assert found["answerable"]["abstained_when_due"]["accuracy"] == 1
    assert found["answerable"]["abstained_wrongly"]["accuracy"] == 0


def test_without_wrong_ones_nothing_is_fitted_and_nothing_fails() -> None:
    learnt = fit_on_pairs([], Shelf())
    assert learnt.right.reason
    assert learnt.right.confidence({"dense_top": 1.0}) is None


def test_auroc_counts_pairs() -> None:
    assert auroc([0.9, 0.1], [True, False]) == 1
    assert auroc([0.5, 0.5], [True, False]) == 0.5
    assert auroc([0.1, 0.9, 0.5], [True, False, False]) == 0


@pytest.mark.parametrize("split", ["dev", "hidden"])
def test_the_quick_run_measures_every_set_that_is_there(
    data: Path, tmp_path: Path, engine: Engine, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public_sets_bench, "ASKED", 3)
    found = measure_public(data, [], Silent(), split=split, quick=True, engine=engine, work=tmp_path / "work")
    assert set(found) == {"openstax_health", "pubmedqa", "kqa", "prd_doc_qa"}
    assert found["openstax_health"]["gain"]["n"] == found["pubmedqa"]["gain"]["n"] == 3
    assert found["pubmedqa"]["fitted"] == (
        "out of fold, 5 folds, 5 times" if split == "dev" else "24 other questions"
    )
    assert found["prd_doc_qa"]["bm25"]["hit@1"] == 1.0
    json.dumps(found)


def test_patients_are_answered_by_the_model_and_by_each_student(
    data: Path, tmp_path: Path, engine: Engine
) -> None:
    """With a real engine, a real index of the domain's documents, and a student's file."""
    lines(
        data / "kqa" / "dev.jsonl",
        [
            {
                "question": "What is Brenzal for?",
                "answer": "Hay fever.",
                "must_have": ["Brenzal treats hay fever."],
            }
        ],
    )
    folder = write_domain(tmp_path / "medical").folder
    settings = (folder / "domain.toml").read_text("utf-8").replace('name = "shelf"', 'name = "medical"')
    (folder / "domain.toml").write_text(settings, encoding="utf-8")
    medical, documents = load_domain(str(folder)), folder / "documents"
    documents.mkdir()
    for name, text in TEXTS.items():
        (documents / f"{name}.md").write_text(f"# {name}\n\n{text}\n", encoding="utf-8")
    found = measure_public(
        data, [medical], Silent(), split="dev", quick=False, engine=engine, work=tmp_path / "work",
        sets=["kqa_answers"], answering={"untrained": inference_gguf("smollm2-135m"), "quotes": inference_gguf("smollm2-135m")},
    )  # fmt: skip
    assert found.keys() == {"kqa_answers"}
    answers = found["kqa_answers"]
    assert answers["untrained"].keys() == {
        "question_repeated",
        "physician",
        "closed_book",
        "medical_passages",
    }
    for each in answers["untrained"].values():
        assert each["n"] == 1
        assert 0 <= each["accuracy"] <= 1
    assert answers["quotes"] == answers["untrained"]  # the same weights answer the same


def test_sets_that_are_not_there_are_left_out(tmp_path: Path, engine: Engine) -> None:
    assert measure_public(tmp_path, [], Silent(), split="dev", quick=True, engine=engine, work=tmp_path) == {}
