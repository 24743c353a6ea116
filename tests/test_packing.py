"""Rows and packs: what is supervised, what is reported, and that packed rows do not see each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import make_tiny_llama

from domains.records import Example, Message
from pipeline.packing import (
    IGNORED,
    Pack,
    Row,
    encode_examples,
    pack,
    pack_hidden,
    use_packed_attention,
)
from pipeline.student import Base, encode_prompt, load_base, render_prompt


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")), dtype=torch.float32)


def example(number: int, *, completion: str = "Take it at noon.", question: str = "When?") -> Example:
    return Example(
        id=f"row-{number}",
        question_id=f"q-{number}",
        messages=[
            Message(role="system", content="Answer."),
            Message(role="user", content=f"[1] Dose {number}\nTake {number} at noon. {question}"),
        ],
        completion=completion,
        passages=[],
        origin="gold",
        request="r",
    )


def test_exactly_the_completion_and_the_turns_end_are_supervised(base: Base) -> None:
    examples = [
        example(1),
        example(2, completion="Ärzte: 40 mg\n\nnever  two"),
        example(3, completion="a <|eot_id|> b"),
    ]
    rows, too_long = encode_examples(examples, base, max_tokens=400)
    assert too_long == []
    for given_example, row in zip(examples, rows, strict=True):
        labels = Pack((row,)).labels
        supervised = labels[labels != IGNORED].tolist()
        assert base.tokenizer.decode(supervised) == given_example.completion + "<|eot_id|>"
        assert supervised[-1] == base.end_of_turn
        assert base.end_of_turn not in supervised[:-1]
        assert (labels[: row.n_prompt] == IGNORED).all()
        prompt = encode_prompt(base, render_prompt(base, given_example.messages))
        assert list(row.ids[: row.n_prompt]) == prompt
        assert row.supervised == len(supervised) > 0


def test_a_long_row_is_reported_and_never_cut(base: Base) -> None:
    short, long = example(1), example(2, question="why " * 200)
    (row,), too_long = encode_examples([long, short], base, max_tokens=200)
    assert too_long == ["row-2"]
    assert row.id == "row-1"
    exact = len(row.ids)
    assert encode_examples([short], base, max_tokens=exact)[1] == []
    assert encode_examples([short], base, max_tokens=exact - 1)[1] == ["row-1"]


def test_packed_rows_get_the_logits_of_single_rows(base: Base) -> None:
    rows, _ = encode_examples([example(n, completion="yes " * n) for n in range(1, 5)], base, max_tokens=400)
    network = base.model
    alone = []
    with torch.no_grad():
        for row in rows:
            logits = network(input_ids=torch.tensor([row.ids])).logits[0]  # transformers' own attention
            alone.append(logits[row.n_prompt - 1 : -1])
        implementation = network.config._attn_implementation
        use_packed_attention(network)
        hidden, targets = pack_hidden(network, Pack(tuple(rows)))
        packed = network.lm_head(hidden)
        network.set_attn_implementation(implementation)
    assert (packed - torch.cat(alone)).abs().max() < 1e-4
    assert targets.tolist() == [token for row in rows for token in row.ids[row.n_prompt :]]


def test_a_pack_restarts_positions_and_numbers_its_rows() -> None:
    packed = Pack((Row("a", (5, 6, 7), 2), Row("b", (8, 9), 1)))
    assert packed.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert packed.labels.tolist() == [IGNORED, IGNORED, 7, IGNORED, 9]
    assert packed.segment_ids.tolist() == [0, 0, 0, 1, 1]
    assert packed.bounds == [(0, 3), (3, 5)]
    assert packed.supervised == 2


ROWS = st.lists(st.integers(2, 64), max_size=40).map(
    lambda sizes: [Row(f"r{i}", tuple(range(size)), 1) for i, size in enumerate(sizes)]
)


@given(rows=ROWS, room=st.integers(64, 200), seed=st.integers(0, 5), epoch=st.integers(0, 3))
@settings(deadline=None)
def test_packing_keeps_every_row_once(rows: list[Row], room: int, seed: int, epoch: int) -> None:
    packs = pack(rows, room, seed=seed, epoch=epoch)
    assert sorted((row for p in packs for row in p.rows), key=lambda row: row.id) == sorted(
        rows, key=lambda row: row.id
    )
    assert all(0 < sum(len(row.ids) for row in p.rows) <= room for p in packs)
    assert packs == pack(rows[::-1], room, seed=seed, epoch=epoch)  # the file's order does not matter
    total = sum(len(row.ids) for row in rows)
    half_empty = [p for p in packs if sum(len(row.ids) for row in p.rows) <= room // 2]
    assert len(half_empty) <= 1  # first fit would have joined two of them
    assert len(packs) <= 2 * total // room + 1


def test_epochs_and_seeds_differ_in_order() -> None:
    rows = [Row(f"r{i}", tuple(range(10)), 1) for i in range(40)]
    orders = {
        tuple(row.id for p in pack(rows, 30, seed=seed, epoch=epoch) for row in p.rows)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_a_row_longer_than_a_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 'a' has 5 tokens, more than a pack's 4"):
        pack([Row("a", (1, 2, 3, 4, 5), 1)], 4, seed=0, epoch=0)
