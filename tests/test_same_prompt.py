"""What a student is asked in training is, token for token, what it is asked in serving."""

from __future__ import annotations

import pytest
import torch
from test_curate import all_kept, builder, finds_home, finds_words, nobody, passages, questions
from test_reflect_rows import ground

from domains.records import Example, Hit
from pipeline.packing import encode_examples
from pipeline.student import load_base
from pipeline.verdict_rows import verdict_rows
from rag.prompt import render_question
from serve.assistant import Assistant
from serve.engine import Engine
from serve.models import inference_gguf


def plain_rows() -> list[Example]:
    return builder(finds_home).build(
        all_kept(), nobody(), retrieved_share=0.4, irrelevant_share=0.2, abstention_share=0.3
    )[0]


def kard_rows() -> list[Example]:
    return builder(finds_home, by_rationale=finds_words, rationale_in_target=True).build(
        all_kept(), nobody(), retrieved_share=0.4, irrelevant_share=0.2, abstention_share=0.3
    )[0]


def sail_rows() -> list[Example]:
    return verdict_rows(ground(finds_home), all_kept(), nobody(), irrelevant_share=0.2, abstention_share=0.3)[
        0
    ]


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
        assistant = Assistant(
            engine,
            None,
            system=builder(finds_home).system,
            abstain="",
            top_k=3,
            max_tokens=50,
            unsupported="keep",
        )
        for row, example in zip(encoded, rows, strict=True):
            shown = [Hit(passage=texts[name], score=1.0) for name in example.passages]
            prompt = assistant.prompt(render_question(asked[example.question_id]), shown, [])
            assert list(row.ids[: row.n_prompt]) == prompt
    assert {row.origin for row in rows} >= origins
