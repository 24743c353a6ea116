"""The distillation benchmark: which parts run, and what its figures are made of."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from domains.config import ReflectSection
from domains.domain import Domain, load_domain
from domains.records import Answer, Hit, JudgedSegment, Question, Reflection
from pipeline import ablation
from pipeline.arms import Conditions
from pipeline.fit import MIN_OUTCOMES
from pipeline.progress import Lines, Silent
from pipeline.reflection_bench import (
    abstention,
    fit_to_development,
    reflection,
    retrieval_rate,
    support_precision,
)
from serve.confidence import Calibration
from tests.exam_example import ABSTAIN, ActorEngine, Shelf, passages, questions
from tests.test_reflection_exam import Student
from tests.test_retrieval_bench import RECIPE, medquad

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import distillation

__all__ = ["medquad"]  # a fixture for this module too
pytestmark = pytest.mark.usefixtures("on_one_thread")


def test_quick_leaves_out_the_sweep_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, parts in (
        (["--quick"], ["retrieval", "students", "abstention", "public"]),
        ([], list(distillation.PARTS)),
        (["--quick", "--parts", "sweep"], ["sweep"]),
    ):
        monkeypatch.setattr(sys, "argv", ["distillation.py", *words])
        options = distillation.parse_options()
        assert options.parts == parts
        assert options.profile == ("quick" if "--quick" in words else "full")


def test_arms_are_chosen_and_quotes_is_always_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, arms in (
        (["--arms", "kard_oracle"], {"kard_oracle", "quotes"}),
        (["--quick"], set(distillation.STUDENT_OF) - distillation.NOT_QUICK_ARMS),
        (["--quick", "--arms", "tokens_long"], {"tokens_long", "quotes"}),
        ([], set(distillation.STUDENT_OF)),
    ):
        monkeypatch.setattr(sys, "argv", ["distillation.py", *words])
        assert distillation.parse_options().arms == arms
    assert {*distillation.STUDENT_OF, "base_rag"} >= {arm for pair in distillation.PAIRS for arm in pair}


def test_the_last_line_is_one_object_with_what_every_part_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def measure(name: str) -> Any:
        def part(_options: Any, _work: Path, _progress: Lines) -> dict[str, Any]:
            seen.append(name)
            return {name: {"arm": {"metric": 1.0}}}

        return part

    monkeypatch.setattr(distillation, "MEASURES", {name: measure(name) for name in distillation.PARTS})
    monkeypatch.setattr(sys, "argv", ["distillation.py", "--quick", "--json"])
    distillation.main()
    assert seen == ["retrieval", "students", "abstention", "public"]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {*seen, "quick", "domain", "seconds"} == found.keys()
    assert found["students"]["arm"]["metric"] == 1.0


# -- the figures, from the functions that the benchmark calls -----------------------------------------


def test_retrieval_says_hit_and_gain_of_four_retrievers_and_the_time_for_50_and_100(
    medquad: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "RerankSection", lambda: RECIPE)  # a small one
    data = tmp_path / "data"
    (data / "medquad").mkdir(parents=True)
    (data / "medquad_answerable").symlink_to(medquad[0])
    (data / "medquad" / "dev.jsonl").symlink_to(medquad[1])
    options = argparse.Namespace(data=data, split="dev", quick=True, domain="medical")
    found = distillation.measure_retrieval(options, tmp_path / "work", Lines())
    assert found["retrieval"].keys() == {"bm25", "dense", "hybrid", "reranked"}
    for figures in found["retrieval"].values():
        assert figures.keys() == {"hit@1", "hit@1_interval", "ndcg@10", "ndcg@10_interval"}
    assert found.keys() == {"retrieval", "rerank_ms_50", "rerank_ms_100", "retrieval_case"}
    assert found["rerank_ms_50"] > 0
    assert found["rerank_ms_100"] > 0
    json.dumps(found)


def test_students_have_the_promised_keys_with_numbers_cases_and_intervals(
    tmp_path: Path, medical: Domain
) -> None:
    marks, answers = ask(tmp_path)
    calibration = develop(medical, tmp_path, count=0)
    found = distillation.student_figures(questions(), marks, answers, calibration, seed=0)
    assert found.keys() == {
        *("students", "students_pairs", "reflecting_arm", "abstention", "abstention_aurc", "abstention_aurc_likelihood"),
        *(f"{name}{part}" for name in ("retrieval_rate", "support_precision") for part in ("", "_n", "_interval")),
    }  # fmt: skip
    assert found["students"].keys() == answers.keys()
    for arm, figures in found["students"].items():
        assert {"score", "score_interval", "option_accuracy", "token_f1", "aurc"} <= figures.keys(), arm
    assert found["students"]["quotes"]["score"] > found["students"]["base_rag"]["score"]
    assert found["students"]["tokens"]["retrieval_rate"] == found["retrieval_rate"] == 0.75
    assert found["retrieval_rate_n"] == len(questions())
    assert found["reflecting_arm"] == {"retrieval_rate": "tokens", "support_precision": "tokens"}
    assert found["students_pairs"].keys() == {"tokens - quotes"}
    for name in ("retrieval_rate", "support_precision"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low <= found[name] <= high <= 1
    json.dumps(found)


def test_intervals_draw_documents_and_count_judged_answers_only() -> None:
    given = [
        answer("a", support=0.9, carried=True),
        answer("b", support=0.8, carried=False),
        answer("c", support=0.1, carried=False),
        None,
    ]
    asked = [asking(str(number), about=about) for number, about in enumerate("xyzz")]
    found = support_precision(asked, given)
    assert (found["mean"], found["n"]) == (0.5, 2)
    assert found["interval"] == [0.0, 1.0], "two documents say little"
    same = support_precision([each.model_copy(update={"about": "x"}) for each in asked], given)
    assert same["interval"] == [0.5, 0.5], "one document is drawn whole"
    assert support_precision(asked[:1], [None]) == {"mean": None, "n": 0, "interval": None}
    rate = retrieval_rate(asked, given)
    assert (rate["mean"], rate["n"], rate["interval"]) == (1.0, 3, [1.0, 1.0])


def test_without_a_reflecting_arm_the_keys_stay_and_are_empty() -> None:
    found = reflection([asking("q")], {"quotes": [None]})
    assert found == {
        "reflecting_arm": {}, "retrieval_rate": None, "retrieval_rate_n": 0, "retrieval_rate_interval": None,
        "support_precision": None, "support_precision_n": 0, "support_precision_interval": None,
    }  # fmt: skip


# -- abstention by the fitted confidence --------------------------------------------------------------


def test_abstention_ranks_by_what_was_fitted_to_seed_questions(tmp_path: Path, medical: Domain) -> None:
    _, answers = ask(tmp_path)
    calibration = develop(medical, tmp_path, count=0)
    assert calibration.right >= MIN_OUTCOMES
    assert calibration.trained_on > 0
    found = abstention(questions(), answers["quotes"], calibration)
    assert found["abstention"]["ranked_by"] == "calibration"
    assert found["abstention"]["development"]["answers"] == calibration.answers
    assert (
        found["abstention_aurc_likelihood"] == abstention(questions(), answers["quotes"])["abstention_aurc"]
    )
    # By another confidence than the likelihood, and one that is not worse here.
    backwards = calibration.model_copy(update={"weights": [-weight for weight in calibration.weights]})
    assert abstention(questions(), answers["quotes"], backwards)["abstention_aurc"] > found["abstention_aurc"]
    assert found["abstention_aurc"] <= found["abstention_aurc_likelihood"]


def test_too_few_right_answers_are_said_and_the_likelihood_ranks(tmp_path: Path, medical: Domain) -> None:
    _, answers = ask(tmp_path)
    calibration = develop(medical, tmp_path, count=10)
    found = abstention(questions(), answers["quotes"], calibration)
    assert found["abstention_aurc"] == found["abstention_aurc_likelihood"]
    assert found["abstention"]["ranked_by"] == "likelihood"
    assert found["abstention"]["reason"].endswith("at least 8 of each are needed")


def test_threshold_and_weights_are_fitted_to_instructions_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped domains have no reflecting back-end; the arm has, and with it the domain's general instructions."""
    given = load_domain("medical")
    seen: dict[str, Any] = {}

    def fit(domain: Domain, assistant: Any, **more: Any) -> str:
        seen.update(more, domain=domain, general=domain.read_instructions())
        return "fit"

    monkeypatch.setattr(distillation, "fit_student", fit)
    monkeypatch.setattr(distillation, "Engine", lambda *_, **__: nullcontext())
    monkeypatch.setattr(distillation, "open_reflector", lambda *_: None)
    monkeypatch.setattr(distillation, "Assistant", lambda *_, **__: None)
    assert distillation.fitted_to(given, tmp_path, None, [], Silent()) == "fit"
    assert given.read_instructions() == []
    assert len(seen["general"]) > 20
    assert seen["domain"].config.reflect.backend == "tokens"
    assert seen["count"] == distillation.FIT_QUESTIONS


def test_answers_without_a_likelihood_have_no_risk_coverage_curve() -> None:
    found = abstention([asking("q")], [None])
    assert found == {"abstention_aurc": None, "abstention_aurc_likelihood": None}


# -- what they are made of ----------------------------------------------------------------------------


def asking(name: str, *, about: str = "d") -> Question:
    return Question(id=name, kind="open", question="?", answer="a", about=about, split="exam")


def answer(text: str, *, support: float, carried: bool) -> Answer:
    judged = JudgedSegment(decision="retrieve", text=text, number=1, relevance=1.0, support=support)
    return Answer(
        question="?", text=text, raw=text, support="supported" if carried else "unsupported", citations=[],
        reflection=Reflection(backend="tokens", retrieved=True, segments=[judged]),
    )  # fmt: skip


CONDITIONS = Conditions(
    system="You answer from the passages.", abstain=ABSTAIN, top_k=3, max_tokens=100, context=20_000
)


class Shelves(Shelf):
    """A shelf from which books can be taken away."""

    def retrieve(self, query: str, *, top_k: int, without: Set[str] = frozenset()) -> list[Hit]:
        return Shelf([each for each in self.shelf if each.doc_id not in without]).retrieve(query, top_k=top_k)


class Distracted(ActorEngine):
    """Where it knows no answer it quotes, as sure as ever, what was not asked."""

    def _reply(self, prompt: str) -> str:
        said = super()._reply(prompt)
        if "complicated" not in said or "in the old mill" not in prompt:
            return said
        return '"They meet on Mondays in the old mill." [1]\nAnswer: They meet on Mondays in the old mill.'


def model(folder: Path, skill: int) -> Path:
    path = folder / f"{skill}.gguf"
    path.write_text(str(skill), encoding="utf-8")
    return path


def ask(folder: Path) -> tuple[dict[str, Any], dict[str, list[Answer | None]]]:
    """Marks and answers of three arms: a weak one, a good one, one that reflects."""
    student = folder / "student.gguf"
    student.write_text("reflects", encoding="utf-8")
    shelf = Shelf(passages())
    arms = {
        "base_rag": ablation.Asking(model(folder, 20), shelf),
        "quotes": ablation.Asking(model(folder, 80), shelf),
        "tokens": ablation.Asking(student, shelf, reflect=ReflectSection(backend="tokens")),
    }
    return ablation.ask(
        arms, questions(), passages(), folder / "answers", CONDITIONS, Silent(),
        open_engine=lambda gguf: Student(gguf) if gguf == student else Distracted(gguf),
    )  # type: ignore[arg-type, return-value]  # fmt: skip


@pytest.fixture
def medical(monkeypatch: pytest.MonkeyPatch) -> Domain:
    """A shipped domain that has the seed questions of the clubs."""
    seeds = [each.model_copy(update={"split": "seed"}) for each in questions()]
    monkeypatch.setattr(Domain, "read_questions", lambda _: [*seeds, asking("exam")])
    return load_domain("medical")


def develop(domain: Domain, folder: Path, *, count: int) -> Calibration:
    return fit_to_development(
        domain,
        Distracted(model(folder, 60)),  # type: ignore[arg-type]
        Shelves(passages()),
        CONDITIONS,
        trained_on={"elm-open", "fir-open"},
        count=count,
        progress=Silent(),
    )
