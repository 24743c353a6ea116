"""What a student is asked in training is, token for token, what it is asked in serving."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from test_curate import all_kept, builder, finds_home, finds_words, nobody, passages, questions
from test_reflect_rows import ground

from domains.records import Example, Hit, Instruction
from pipeline.gguf_writer import write_llama_gguf
from pipeline.packing import encode_examples
from pipeline.reflect_rows import token_rows
from pipeline.student import load_base
from pipeline.token_rows import add_reflection_tokens
from pipeline.verdict_rows import verdict_rows
from rag.prompt import render_question
from serve.assistant import Assistant
from serve.engine import Engine
from serve.models import inference_gguf
from serve.reflection_run import Vocabulary
from serve.reflection_tokens import Settings, TokenReflector


def plain_rows() -> list[Example]:
    return builder(finds_home).build(
        all_kept(), nobody(), retrieved_share=0.4, irrelevant_share=0.2, abstention_share=0.3
    )[0]


def kard_rows() -> list[Example]:
    return builder(finds_home, by_rationale=finds_words, rationale_in_target=True).build(
        all_kept(), nobody(), retrieved_share=0.4, irrelevant_share=0.2, abstention_share=0.3
    )[0]


def self_rag_rows() -> list[Example]:
    """Answers by a passage, refusals, and general instructions without one."""
    return token_rows(
        ground(finds_home),
        all_kept(),
        nobody(),
        [each.as_question() for each in GENERAL],
        irrelevant_share=0.2,
        abstention_share=0.3,
    )[0]


def sail_rows() -> list[Example]:
    return verdict_rows(ground(finds_home), all_kept(), nobody(), irrelevant_share=0.2, abstention_share=0.3)[
        0
    ]


GENERAL = [
    Instruction(id=f"g{place}", instruction=f"What is {place} plus 1?", answer=f"{place + 1}.")
    for place in range(9)
]


def assistant_of(engine: Engine, *, reflector: TokenReflector | None = None) -> Assistant:
    system = builder(finds_home).system
    return Assistant(
        engine,
        None,
        system=system,
        abstain="",
        top_k=3,
        max_tokens=50,
        unsupported="keep",
        reflector=reflector,
    )


@pytest.mark.parametrize(
    ("rows", "origins"),
    [
        (plain_rows(), {"gold", "retrieved", "unanswerable"}),
        (kard_rows(), {"rationale", "retrieved", "unanswerable"}),
        (sail_rows(), {"retrieved", "unanswerable"}),
    ],
    ids=["plain", "kard", "sail"],
)
def test_the_prompt_of_every_row_is_the_assistants_own(rows: list[Example], origins: set[str]) -> None:
    base = load_base("smollm2-135m", dtype=torch.float32)
    encoded, too_long = encode_examples(rows, base, max_tokens=2048)
    assert not too_long
    texts = {passage.passage_id: passage for passage in passages()}
    asked = {question.id: question for question in questions()}
    with Engine(inference_gguf("smollm2-135m"), context=2048, parallel=1) as engine:
        assistant = assistant_of(engine)
        for row, example in zip(encoded, rows, strict=True):
            shown = [Hit(passage=texts[name], score=1.0) for name in example.passages]
            prompt = assistant.prompt(render_question(asked[example.question_id]), shown, [])
            assert list(row.ids[: row.n_prompt]) == prompt
    assert {row.origin for row in rows} >= origins


def test_self_rags_rows_open_as_its_back_end_asks(tmp_path: Path) -> None:
    """The prompt has no passage; what stands between prompt and answer is what serving puts there, ids and all."""
    base = load_base("smollm2-135m", dtype=torch.float32)
    add_reflection_tokens(base)
    write_llama_gguf(
        tmp_path / "tokens.gguf",
        state=base.model.state_dict(),
        config=base.model.config,
        tokenizer=base.tokenizer,
        template=base.template,
        name="tokens",
        licence="apache-2.0",
        end_of_turn=base.end_of_turn,
    )
    rows = self_rag_rows()
    encoded, too_long = encode_examples(rows, base, max_tokens=2048)
    assert not too_long
    texts = {passage.passage_id: passage for passage in passages()}
    asked = {each.id: each for each in (*questions(), *(each.as_question() for each in GENERAL))}
    openings = Counter()
    with Engine(tmp_path / "tokens.gguf", context=2048, parallel=1) as engine:
        vocabulary = Vocabulary.of(engine)
        reflector = TokenReflector(vocabulary, Settings())
        assistant = assistant_of(engine, reflector=reflector)
        for row, example in zip(encoded, rows, strict=True):
            prompt = assistant.prepare(render_question(asked[example.question_id])).tokens
            if example.passages:
                opening = reflector.opening(Hit(passage=texts[example.passages[0]], score=1.0), engine)
            else:
                opening = [vocabulary.decisions["no_retrieval"]]
            assert list(row.ids[: row.n_prompt]) == prompt
            assert list(row.ids[row.n_prompt : row.n_prompt + len(opening)]) == opening
            openings[bool(example.passages), example.origin] += 1
    assert {True, False} == {shows for shows, _ in openings}
    assert {origin for _, origin in openings} >= {"retrieved", "unanswerable"}
