"""Reflection tokens in a real GGUF file: tiny, random weights, the 15 tokens as export writes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from domains.config import ReflectSection
from domains.errors import DataError, ModelError
from domains.records import Answer, Hit, Message
from pipeline.bundle import close_bundle, drop_file, mark_ready, note_files
from rag.prompt import neutralise
from rag.reflection import TOKENS, render_segment
from serve.assistant import Assistant
from serve.bundle import open_base, open_bundle
from serve.chat import chat_lines
from serve.engine import Engine
from serve.gguf_check import check_gguf
from serve.manifest import BaseModelFacts
from serve.models import inference_gguf
from serve.reflection_fit import FittedReflection
from serve.reflection_run import Vocabulary
from serve.reflection_tokens import Settings, TokenReflector
from tests.small_serving import ABSTAIN, FixedRetriever, passage, write_domain, write_index
from tests.tiny_llama import write_reflecting_gguf


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reflecting_gguf(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(gguf: Path) -> Iterator[Engine]:
    with Engine(gguf, context=1024, parallel=4) as engine:
        yield engine


def assistant_of(engine: Engine, retriever: Any, **settings: Any) -> Assistant:
    return Assistant(
        engine,
        retriever,
        system="Be brief.",
        abstain=ABSTAIN,
        top_k=2,
        max_tokens=24,
        unsupported="keep",
        reflector=TokenReflector(Vocabulary.of(engine), Settings(drop_unsupported=False, **settings)),
    )


def make_bundle(folder: Path, gguf: Path, backend: Literal["tokens", "grader"]) -> Path:
    """A bundle as export writes it, around any GGUF."""
    domain = write_domain(folder / "domain")
    bundle = folder / "bundle"
    write_index(bundle / "index")
    shutil.copyfile(gguf, bundle / "student.gguf")
    close_bundle(
        bundle,
        config=domain.config.model_copy(update={"reflect": ReflectSection(backend=backend, threshold=0.0)}),
        prompts=domain.prompts,
        base=BaseModelFacts(name="tiny", licence="apache-2.0", version=""),
        teachers=["local"],
        template=str(check_gguf(gguf).metadata["tokenizer.chat_template"]),
    )
    (bundle / "parity.json").write_text("{}", encoding="utf-8")
    mark_ready(bundle, ready=True)
    return bundle


def test_a_bundle_reflects_as_its_domain_toml_says(tmp_path: Path, gguf: Path) -> None:
    with open_bundle(make_bundle(tmp_path, gguf, "tokens"), parallel=2) as opened:
        asked = opened.assistant.prepare("Where are Corvane drops kept?")
        assert asked.hits == []  # nothing is shown before the student wants it
        (answer,) = opened.assistant.ask_many([asked])
        *pieces, streamed = opened.assistant.stream(asked)
        chat = "".join(chat_lines(opened.assistant, ["Where are Corvane drops kept?", "/why", "/quit"]))
    assert answer.reflection is not None
    assert answer.reflection.backend == "tokens"
    assert answer.reflection.candidates
    assert isinstance(streamed, Answer)
    assert "".join(str(piece) for piece in pieces) == streamed.text
    assert "Reflection (tokens): retrieved" in chat


def test_what_was_fitted_stands_in_for_domain_toml(tmp_path: Path, gguf: Path) -> None:
    bundle = make_bundle(tmp_path, gguf, "tokens")
    fit = FittedReflection(
        threshold=1.0, relevance_weight=1, support_weight=1, utility_weight=0, sequence_weight=0,
        questions=9, score=0.5, before=0.4, retrieval_rate=0.0, gain=[0.1, 0.05, 0.15],
    )  # fmt: skip
    text = fit.model_dump_json()
    (bundle / "reflection.json").write_text(text, encoding="utf-8")
    note_files(bundle, ["reflection.json"])
    with open_bundle(bundle, parallel=2) as opened:
        answer = opened.assistant.ask("Where are Corvane drops kept?")
    assert answer.reflection is not None
    assert not answer.reflection.retrieved  # domain.toml's threshold of 0 would have
    (bundle / "reflection.json").write_text(text.replace("1.0", "0.9"), encoding="utf-8")  # as long as it was
    with pytest.raises(DataError, match=r"reflection\.json: its bytes changed"):
        open_bundle(bundle, parallel=1)
    (bundle / "reflection.json").write_text('{"threshold": 0.3}', encoding="utf-8")
    note_files(bundle, ["reflection.json"])
    with pytest.raises(DataError, match=r"damaged or of an older version: relevance_weight"):
        open_bundle(bundle, parallel=1)
    drop_file(bundle, "reflection.json")
    (bundle / "reflection.json").write_text(
        text, encoding="utf-8"
    )  # of nobody's making: the manifest knows none
    with open_bundle(bundle, parallel=2) as opened:
        answer = opened.assistant.ask("Where are Corvane drops kept?")
    assert answer.reflection is not None
    assert answer.reflection.retrieved


def test_a_bundle_whose_student_lacks_the_tokens_does_not_open(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, inference_gguf("smollm2-135m"), "tokens")
    with pytest.raises(ModelError, match="15 of the 15 reflection tokens"):
        open_bundle(bundle, parallel=1)


def test_the_untrained_base_does_not_reflect_and_says_so(tmp_path: Path) -> None:
    domain = write_domain(tmp_path / "domain")
    write_index(tmp_path / "index")
    config = domain.config.model_copy(update={"reflect": ReflectSection(backend="tokens")})
    with open_base(replace(domain, config=config), tmp_path / "index", parallel=1) as opened:
        assert any("has not learnt" in note for note in opened.notes)
        assert opened.assistant.prepare("Where are Corvane drops kept?").hits


def test_the_fifteen_tokens_are_one_id_each_and_print_as_they_are(engine: Engine) -> None:
    vocabulary = Vocabulary.of(engine)
    assert len(set(vocabulary.ids)) == 15
    for text, number in zip(TOKENS, vocabulary.ids, strict=True):
        assert engine.tokenize(f"a{text}b", begin=False)[1:-1] == [number]
        assert engine.detokenize([number]) == text


def test_a_base_without_them_is_refused() -> None:
    with (
        Engine(inference_gguf("smollm2-135m"), context=256, parallel=1) as plain,
        pytest.raises(ModelError, match="15 of the 15 reflection tokens"),
    ):
        Vocabulary.of(plain)


def test_what_serving_renders_is_what_training_learnt(engine: Engine) -> None:
    """The passage's tokens, mark-up included, are those of the rendered segment (tokenized in its pieces)."""
    from domains.records import Segment

    shown = passage("Brenzal")
    segment = Segment(decision="retrieve", passage=shown, relevant=True, text="x", support="full")
    pieces = render_segment(segment)
    trained = [token for piece in pieces[:4] for token in engine.tokenize(piece.text, begin=False)]
    reflector = TokenReflector(Vocabulary.of(engine), Settings())
    assert reflector.opening(Hit(passage=shown, score=1), engine) == trained


@pytest.mark.parametrize("form", ["short", "long"])
def test_a_question_is_answered_from_probabilities_of_the_file(engine: Engine, form: str) -> None:
    assistant = assistant_of(engine, FixedRetriever("Brenzal", "Corvane"), form=form, threshold=0.0, depth=3)
    answer = assistant.ask("What is the dose?")
    reflection = answer.reflection
    assert reflection is not None
    assert reflection.retrieved
    asked = assistant.prepare("What is the dose?")
    vocabulary = Vocabulary.of(engine)
    row = engine.logits(asked.tokens, first=len(asked.tokens) - 1)[0].astype(np.float64)
    odds = np.exp(row - row.max())
    pair = odds[[vocabulary.decisions["retrieve"], vocabulary.decisions["no_retrieval"]]]
    assert reflection.p_retrieve == pytest.approx(pair[0] / pair.sum(), abs=2e-3)
    for segment in [*reflection.segments, *reflection.candidates]:
        assert segment.number is None or 0 <= (segment.relevance or 0) <= 1
        assert not any(token in segment.text for token in TOKENS)
    assert not any(token in answer.raw for token in TOKENS)


def test_relevance_is_the_softmax_over_two_ids_right_behind_the_passage(engine: Engine) -> None:
    assistant = assistant_of(engine, FixedRetriever("Brenzal"), threshold=0.0)
    asked = assistant.prepare("What is the dose?")
    (answer,) = assistant.ask_many([asked])
    vocabulary = Vocabulary.of(engine)
    opening = TokenReflector(vocabulary, Settings()).opening(answer.passages[0], engine)
    tokens = [*asked.tokens, *opening]
    row = engine.logits(tokens, first=len(tokens) - 1)[0].astype(np.float64)
    yes, no = (np.exp(row[number] - row.max()) for number in vocabulary.relevance)
    assert answer.reflection is not None
    assert answer.reflection.candidates[0].relevance == pytest.approx(yes / (yes + no), abs=2e-3)


@pytest.mark.parametrize("form", ["short", "long"])
@pytest.mark.parametrize("token", TOKENS)
def test_attacks_change_nothing(engine: Engine, token: str, form: str) -> None:
    """A passage, a question and a history with a token in them give the very answer of the disarmed words."""

    def ask(word: str) -> Answer:
        found = FixedRetriever("Brenzal")
        hits = [Hit(passage=passage("Brenzal", f"Take 40 mg. {word} Then {word} wait."), score=1)]
        found.retrieve = lambda query, *, top_k: hits  # type: ignore[method-assign]
        engine.forget()
        assistant = assistant_of(engine, found, form=form, threshold=0.0, depth=2)
        turns = [
            Message(role="user", content=f"Hello {word}"),
            Message(role="assistant", content=f"Yes {word}?"),
        ]
        return assistant.ask(f"What is {word} the dose?", query="dose", history=turns)

    attacked, harmless = ask(token), ask(neutralise(token))
    assert attacked.reflection == harmless.reflection
    assert (attacked.raw, attacked.prompt_tokens) == (harmless.raw, harmless.prompt_tokens)
    vocabulary = Vocabulary.of(engine)
    assistant = assistant_of(engine, None)
    prompt = assistant.prepare(
        f"What is {token} the dose?", history=[Message(role="user", content=token)]
    ).tokens
    assert not set(prompt) & set(vocabulary.ids)
