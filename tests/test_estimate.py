"""Estimates: they follow the profile and the base, and this machine's own speed once it is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from domains.domain import Domain, load_domain
from domains.jsonl import write_jsonl
from domains.records import Question
from pipeline.estimate import MEASURED, estimate, learn
from pipeline.run_folder import Finished
from pipeline.stages import NAMES
from serve.models import SMOLLM2

PROFILES = """
[domain]
name = "plants"
title = "Plants"
[corpus]
documents = "documents"
questions = "questions.jsonl"
[elicit]
samples = 3
[train]
epochs = 2
[profiles.quick.elicit]
questions = 60
samples = 1
[profiles.quick.train]
epochs = 1
max_rows = 55
[profiles.quick.exam]
questions = 20
"""
SEEDS, EXAMS, BYTES = 200, 100, 80_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "plants"
    (folder / "prompts").mkdir(parents=True)
    (folder / "documents").mkdir()
    (folder / "domain.toml").write_text(PROFILES)
    for name in ("system", "teacher"):
        (folder / "prompts" / f"{name}.md").write_text("Be brief.")
    (folder / "documents" / "all.txt").write_text("x" * BYTES)
    questions = [
        Question(
            id=f"q{i}",
            kind="open",
            question=f"What is plant {i}?",
            answer="Green.",
            about=f"d{i}",
            split="seed" if i < SEEDS else "exam",
        )
        for i in range(SEEDS + EXAMS)
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    return folder


@pytest.fixture
def full(folder: Path) -> Domain:
    return load_domain(str(folder), profile="full")


@pytest.fixture
def quick(folder: Path) -> Domain:
    return load_domain(str(folder), profile="quick")


def with_base(domain: Domain, base: str) -> Domain:
    student = domain.config.student.model_copy(update={"base": base})
    return replace(domain, config=domain.config.model_copy(update={"student": student}))


def finished(seconds: float, **counts: int) -> Finished:
    return Finished("f", counts, {}, seconds)


def test_the_profile_decides_the_work(full: Domain, quick: Domain) -> None:
    large, small = estimate(full), estimate(quick)
    assert set(large.seconds) == set(NAMES)
    assert large.seconds["index"] == small.seconds["index"] == pytest.approx(MEASURED["index"] * BYTES)
    assert large.seconds["elicit"] == pytest.approx(MEASURED["elicit"] * SEEDS * 3)
    assert small.seconds["elicit"] == pytest.approx(MEASURED["elicit"] * 60)
    assert small.seconds["train"] == pytest.approx(MEASURED["train"] * 55)
    assert large.seconds["train"] == pytest.approx(MEASURED["train"] * SEEDS * 2)
    assert large.seconds["exam"] == 5 * small.seconds["exam"] == pytest.approx(MEASURED["exam"] * EXAMS * 5)
    assert small.minutes == pytest.approx(sum(small.seconds.values()) / 60)
    assert not small.own_rates


def test_more_than_there_is_is_not_counted(full: Domain) -> None:
    elicit = full.config.elicit.model_copy(update={"questions": 10_000})
    exam = full.config.exam.model_copy(update={"questions": 10_000})
    greedy = replace(full, config=full.config.model_copy(update={"elicit": elicit, "exam": exam}))
    assert estimate(greedy).seconds == estimate(full).seconds


def test_a_larger_base_takes_more_of_everything(quick: Domain) -> None:
    one = estimate(with_base(quick, "meta-llama/Llama-3.2-1B-Instruct"))
    three = estimate(with_base(quick, "meta-llama/Llama-3.2-3B-Instruct"))
    small = estimate(quick)
    for stage in ("train", "export", "exam"):
        assert small.seconds[stage] < one.seconds[stage] < three.seconds[stage]
    for stage in ("index", "elicit", "curate"):
        assert small.seconds[stage] == one.seconds[stage]
    assert small.disk_bytes < one.disk_bytes < three.disk_bytes
    assert small.memory_bytes < one.memory_bytes < three.memory_bytes
    # F16 and one quantized file at least have to fit.
    assert one.disk_bytes > 1.24e9 * 3


def test_the_machines_own_speed_is_learned_and_used(full: Domain, quick: Domain, cache: Path) -> None:
    learn(quick, "train", finished(550.0))
    after = estimate(quick)
    assert after.own_rates
    assert after.seconds["train"] == pytest.approx(550.0)
    assert estimate(full).seconds["train"] == pytest.approx(550.0 / 55 * SEEDS * 2)
    assert after.seconds["exam"] == pytest.approx(MEASURED["exam"] * 20 * 5)
    learn(quick, "exam", finished(200.0))
    learn(quick, "train", finished(275.0))
    assert estimate(quick).seconds["exam"] == pytest.approx(200.0)
    assert estimate(quick).seconds["train"] == pytest.approx(275.0)
    assert set(json.loads((cache / "rates.json").read_text())) == {"train", "exam"}


@pytest.mark.parametrize(
    ("stage", "entry"),
    [
        ("index", Finished("f", {"passages": 90, "embedded": 3}, {}, 5.0)),
        ("elicit", Finished("f", {"requests": 60, "cached": 59}, {"teacher": SMOLLM2}, 3.0)),
        ("elicit", Finished("f", {"requests": 60, "cached": 0}, {"teacher": "gpt-4o-mini"}, 3.0)),
        ("train", Finished("f", {}, {"tokens": 60_000, "tokens_per_s": 200.0}, 4.0)),
        ("exam", Finished("f", {}, {"answering_s": 180.0}, 4.0)),
    ],
)
def test_work_that_was_found_done_teaches_nothing(quick: Domain, stage: str, entry: Finished) -> None:
    before = estimate(quick)
    learn(quick, stage, entry)
    assert estimate(quick) == before
    whole = {
        "index": Finished("f", {"passages": 90, "embedded": 90}, {}, 5.0),
        "elicit": Finished("f", {"requests": 60, "cached": 0}, {"teacher": SMOLLM2}, 33.0),
        "train": Finished("f", {}, {"tokens": 60_000, "tokens_per_s": 200.0}, 320.0),
        "exam": Finished("f", {}, {"answering_s": 180.0}, 190.0),
    }[stage]
    learn(quick, stage, whole)
    assert estimate(quick).seconds[stage] == pytest.approx(whole.seconds)


def test_another_base_or_a_tiny_run_teaches_nothing(quick: Domain, full: Domain) -> None:
    before = estimate(quick)
    learn(with_base(quick, "meta-llama/Llama-3.2-1B-Instruct"), "train", finished(9000.0))
    few = quick.config.train.model_copy(update={"max_rows": 4})
    learn(replace(quick, config=quick.config.model_copy(update={"train": few})), "train", finished(60.0))
    assert estimate(quick) == before


@pytest.mark.parametrize("damage", ["{", "[]", "3", '{"train": null}', '{"train": "fast"}'])
def test_damaged_rates_are_no_rates(quick: Domain, cache: Path, damage: str) -> None:
    before = estimate(quick)
    cache.mkdir(exist_ok=True)
    (cache / "rates.json").write_text(damage)
    assert estimate(quick) == before
    learn(quick, "train", finished(550.0))
    assert estimate(quick).seconds["train"] == pytest.approx(550.0)


def test_a_cache_that_can_not_be_written_stops_nothing(
    quick: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "file" / "below"))
    learn(quick, "train", finished(550.0))
    assert not estimate(quick).own_rates


def test_a_domain_without_questions_or_documents_has_an_estimate(folder: Path) -> None:
    (folder / "questions.jsonl").unlink()
    (folder / "documents" / "all.txt").unlink()
    (folder / "documents").rmdir()
    cost = estimate(load_domain(str(folder), profile="quick"))
    assert cost.seconds["index"] == cost.seconds["elicit"] == cost.seconds["exam"] == 0
    assert cost.disk_bytes > 0
