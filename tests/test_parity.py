from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domains.errors import ParityError
from domains.records import Message
from pipeline import gguf_writer
from pipeline.gguf_writer import write_llama_gguf
from pipeline.parity import (
    Gap,
    Parity,
    Replay,
    check_parity,
    measure_gap,
    replay_logits,
    require,
    torch_network,
)
from pipeline.quantize import quantize
from rag.prompt import render_chat
from tests.small_models import TEMPLATE, TEXT, small_llama, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return small_llama()


def replays(tokenizer: Any) -> list[Replay]:
    found = []
    for text in TEXT:
        messages = [Message(role="system", content="Answer."), Message(role="user", content=text)]
        prompt = render_chat(messages, template=TEMPLATE, bos=tokenizer.bos_token, adds_bos=True)
        completion = "Take one tablet in the morning, never two within 12 hours.\nAnswer: one tablet"
        found.append(
            Replay(
                messages=messages,
                prompt=prompt,
                prompt_tokens=tokenizer(prompt)["input_ids"],
                completion=completion,
                completion_tokens=tokenizer(completion, add_special_tokens=False)["input_ids"],
                end_tokens=[tokenizer.eos_token_id],
            )
        )
    return found


def write(path: Path, model: Any, tokenizer: Any, template: str = TEMPLATE) -> Path:
    write_llama_gguf(
        path, state=model.state_dict(), config=model.config, tokenizer=tokenizer, template=template,
        name="small", licence="apache-2.0",
    )  # fmt: skip
    return path


def check(folder: Path, model: Any, rows: list[Replay], **changes: Any) -> Parity:
    logits = replay_logits(torch_network(model), rows)
    served = folder / "served.gguf"
    quantize(folder / "f16.gguf", served, kind="Q8_0")
    options = {
        "training": logits, "merged": logits, "f16": folder / "f16.gguf", "served": served,
        "served_kind": "Q8_0", "context": 512, "max_kl": 0.02, "min_top1": 0.8, **changes,
    }  # fmt: skip
    return check_parity(rows, **options)


def test_a_faithful_export_is_ready(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    write(tmp_path / "f16.gguf", model, tokenizer)
    rows = replays(tokenizer)
    parity = check(tmp_path, model, rows)
    require(parity)
    assert parity.ready
    assert parity.broken is None
    assert parity.kl is not None
    assert 0 < parity.kl < 0.02
    assert parity.positions == sum(len(row.completion_tokens) + 1 for row in rows) > 20
    assert parity.steps["merge"] == Gap(kl=0.0, top1_agreement=1.0)
    assert parity.steps["GGUF"].kl < parity.steps["quantize"].kl
    assert Parity.model_validate_json(parity.model_dump_json()) == parity


def test_rows_of_q_and_k_left_in_the_other_order_are_named(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_writer, "permute_rows", lambda weight, _heads: weight)
    write(tmp_path / "f16.gguf", model, tokenizer)
    parity = check(tmp_path, model, replays(tokenizer))
    assert parity.broken == "GGUF"
    with pytest.raises(ParityError, match="step 'GGUF' alone"):
        require(parity)


def test_another_template_is_named(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    write(tmp_path / "f16.gguf", model, tokenizer, template=TEMPLATE.replace("assistant\n", "assistant: "))
    parity = check(tmp_path, model, replays(tokenizer))
    assert parity.broken == "prompt rendering"
    assert "assistant: " in parity.problem
    assert parity.kl is None


def test_a_doubled_begin_token_is_named(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    write(tmp_path / "f16.gguf", model, tokenizer)
    rows = [row.model_copy(update={"prompt_tokens": [0, *row.prompt_tokens]}) for row in replays(tokenizer)]
    parity = check(tmp_path, model, rows)
    assert parity.broken == "token ids"
    assert "from token 1 on" in parity.problem


def test_a_begin_token_doubled_on_both_sides_is_named(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    """The template spells the BOS in a way that the renderer can't take off, so both sides have two."""
    template = TEMPLATE.replace("{{ bos_token }}", "{{ '' }}").replace(
        "<|start|>{{", "<|begin|><|start|>{{", 1
    )
    write(tmp_path / "f16.gguf", model, tokenizer, template=template)
    rows = []
    for row in replays(tokenizer):
        prompt = render_chat(row.messages, template=template, bos="<|begin|>", adds_bos=True)
        rows.append(
            row.model_copy(update={"prompt": prompt, "prompt_tokens": tokenizer(prompt)["input_ids"]})
        )
    parity = check(tmp_path, model, rows)
    assert parity.broken == "token ids"
    assert "has 2 begin-of-sequence tokens" in parity.problem


def test_a_fault_of_the_merge_and_one_of_rounding_are_told_apart(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    write(tmp_path / "f16.gguf", model, tokenizer)
    rows = replays(tokenizer)
    logits = replay_logits(torch_network(model), rows)
    other = [row + np.random.default_rng(0).normal(0, 0.5, row.shape).astype(np.float32) for row in logits]
    assert check(tmp_path, model, rows, training=other).broken == "merge"
    assert check(tmp_path, model, rows, max_kl=1e-9).broken == "quantize"


def test_logits_that_are_no_numbers_never_pass() -> None:
    one = [np.zeros((2, 4), np.float32)]
    nan = [np.full((2, 4), np.nan, np.float32)]
    assert measure_gap(one, nan).kl == 1000.0
    assert measure_gap(nan, one).kl == 1000.0


def test_gap_is_the_textbook_divergence() -> None:
    p, q = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), np.array([[0.4, 0.4, 0.2], [0.6, 0.3, 0.1]])
    gap = measure_gap([np.log(p).astype(np.float32) + 7], [np.log(q).astype(np.float32)])
    assert gap.kl == pytest.approx((p * np.log(p / q)).sum() / 2, abs=1e-6)
    assert gap.top1_agreement == 0.5
