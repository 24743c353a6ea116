from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from domains.domain import Domain, load_domain
from domains.errors import ConfigError, DataError, ModelError, TeacherError
from pipeline.preflight import check_main_job, check_owner, note_owner
from pipeline.progress import Silent
from pipeline.run_folder import Run


class Told(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def with_changes(domain: Domain, **sections: dict[str, object]) -> Domain:
    changed = {name: getattr(domain.config, name).model_copy(update=keys) for name, keys in sections.items()}
    return Domain(domain.folder, domain.config.model_copy(update=changed), domain.prompts)


def test_a_shipped_domain_passes_without_a_word(tmp_path: Path) -> None:
    told = Told()
    check_main_job(load_domain("medical"), Run(tmp_path / "medical" / "quick"), told)
    assert told.said == []


def test_a_wrong_base_and_a_missing_key_are_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain, run = load_domain("medical"), Run(tmp_path / "medical" / "quick")
    with pytest.raises(ModelError, match="no base model '/no/such/model'"):
        check_main_job(with_changes(domain, student={"base": "/no/such/model"}), run, Silent())
    monkeypatch.delenv("SOME_KEY", raising=False)
    paid = with_changes(domain, teacher={"kind": "endpoint", "api_key_env": "SOME_KEY"})
    with pytest.raises(TeacherError, match="SOME_KEY is not set"):
        check_main_job(paid, run, Silent())
    monkeypatch.setenv("SOME_KEY", "x")
    check_main_job(paid, run, Silent())


@pytest.mark.parametrize("place", ["folder", "cache of the hub"])
@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_a_base_that_could_not_be_exported_is_found_before_the_teacher_is_paid(
    place: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    base = str(snapshot) if place == "folder" else "some/model"
    domain = with_changes(load_domain("medical"), student={"base": base})
    run = Run(tmp_path / "medical" / "quick")
    config = snapshot / "config.json"
    config.write_text(f'{{"{key}": true}}')
    with pytest.raises(ModelError, match=f"have biases \\({key} in its config"):
        check_main_job(domain, run, Silent())
    for harmless in (f'{{"{key}": false}}', "{}", "[]", "{broken"):  # what is broken, loading it says
        config.write_text(harmless)
        check_main_job(domain, run, Silent())
    config.unlink()
    check_main_job(domain, run, Silent())


def section_of(changes: dict[str, object]) -> dict[str, dict[str, object]]:
    section = {"rounding": "export", "kv_cache": "serve"}
    return {section.get(name, "train"): changes for name in changes}


@pytest.mark.parametrize(
    ("changes", "name", "text", "said"),
    [
        ({}, "config.json", '{"model_type": "mistral"}', "is of type 'mistral'"),
        ({}, "config.json", '{"rope_scaling": {"type": "linear", "factor": 2}}', "rotary scaling 'linear'"),
        ({}, "config.json", '{"rope_parameters": {"rope_type": "yarn"}}', "rotary scaling 'yarn'"),
        (
            {"method": "qat", "grid": "Q4_0"},
            "config.json",
            '{"hidden_size": 64, "intermediate_size": 100}',
            "rows of 100 weights",
        ),
        (
            {"rounding": "gptq"},
            "config.json",
            '{"hidden_size": 64, "intermediate_size": 100}',
            "rows of 100 weights",
        ),
        (
            {"kv_cache": "q8_0"},
            "config.json",
            '{"hidden_size": 64, "num_attention_heads": 4}',
            "q8_0 for heads of width 16",
        ),
        (
            {"method": "qat", "grid": "Q4_0"},
            "config.json",
            '{"hidden_size": 64, "num_attention_heads": 3, "head_dim": 16}',
            "rows of 48 weights",
        ),
        ({}, "tokenizer.json", '{"model": {"type": "BPE", "byte_fallback": true}}', "with byte fallback"),
        ({}, "tokenizer.json", '{"model": {"type": "Unigram"}}', "a Unigram model"),
    ],
)
def test_what_export_has_no_place_for_is_found_before_the_teacher_is_paid(
    changes: dict[str, object], name: str, text: str, said: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / name).write_text(text)
    domain = with_changes(load_domain("medical"), student={"base": str(base)}, **section_of(changes))
    with pytest.raises(ModelError, match=said):
        check_main_job(domain, Run(tmp_path / "medical" / "quick"), Silent())
    (base / name).write_text(
        '{"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}, "hidden_size": 64, "intermediate_size": 96}'
        if name == "config.json"
        else '{"model": {"type": "BPE"}}'
    )
    check_main_job(domain, Run(tmp_path / "medical" / "quick"), Silent())


def test_what_is_asked_already_needs_no_key(tmp_path: Path) -> None:
    run = Run(tmp_path / "medical" / "quick")
    run.folder.mkdir(parents=True)
    run.rationales.write_text("")
    paid = with_changes(load_domain("medical"), teacher={"kind": "endpoint", "api_key_env": "SOME_KEY"})
    check_main_job(paid, run, Silent())


def test_broken_questions_and_too_few_of_them_are_told(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    domain = with_changes(load_domain("medical"), corpus={"questions": str(questions)})
    run = Run(tmp_path / "runs" / "medical" / "quick")
    questions.write_text("{broken\n")
    with pytest.raises(DataError, match="line 1"):
        check_main_job(domain, run, Silent())
    questions.write_text(
        '{"id": "1", "kind": "open", "question": "Why?", "answer": "So.", "about": "a", "split": "seed"}\n'
    )
    told = Told()
    check_main_job(domain, run, told)
    assert "Only 1 seed questions" in told.said[0]


def test_a_copied_domain_does_not_write_into_the_runs_of_the_first(tmp_path: Path) -> None:
    shutil.copytree(load_domain("medical").folder, tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    run = Run(tmp_path / "runs" / "medical" / "quick")
    first = load_domain(str(tmp_path / "mine"))
    check_owner(first, run)
    assert not run.folder.parent.exists()  # checking writes nothing
    run.folder.mkdir(parents=True)
    note_owner(first, run)
    check_owner(first, run)
    with pytest.raises(ConfigError, match="has the same name 'medical'"):
        check_owner(load_domain(str(tmp_path / "copy")), run)
    (tmp_path / "mine").rename(tmp_path / "moved")  # the first is gone: it was moved, and its runs go along
    check_owner(load_domain(str(tmp_path / "moved")), run)


def test_general_instructions_that_are_not_there_are_told_where_something_learns_from_them(
    tmp_path: Path,
) -> None:
    run, lost = Run(tmp_path / "medical" / "quick"), str(tmp_path / "lost.jsonl")
    domain = load_domain("medical")
    check_main_job(with_changes(domain, reflect={"instructions": lost}), run, Silent())
    with pytest.raises(DataError, match=r"lost\.jsonl' does not exist"):
        check_main_job(
            with_changes(domain, reflect={"backend": "tokens", "instructions": lost}), run, Silent()
        )
    check_main_job(with_changes(domain, reflect={"backend": "tokens"}), run, Silent())
