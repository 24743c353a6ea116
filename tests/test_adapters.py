from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domains.errors import ModelError
from pipeline.gguf_lora import write_lora_gguf
from serve.adapter_check import check_adapter
from serve.engine import Engine
from serve.gguf_check import check_gguf
from tests.small_adapters import ALPHA, Factors, merged_state, random_factors, write_adapter, write_base
from tests.small_models import small_llama

PROMPT = [0, 40, 80, 120, 160, 200, 240, 280]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.gguf; one.gguf and two.gguf, adapters; one-merged.gguf, the base with the first one's product added."""
    folder = tmp_path_factory.mktemp("adapters")
    write_base(folder / "base.gguf")
    for seed, name in enumerate(("one", "two")):
        factors = random_factors(seed)
        write_adapter(folder / f"{name}.gguf", factors)
        write_base(folder / f"{name}-merged.gguf", merged_state(factors))
    return folder


@pytest.fixture
def base(files: Path) -> Iterator[Engine]:
    with Engine(files / "base.gguf", context=128, parallel=2, threads=1) as engine:
        yield engine


def small_engine(model: Any, **more: Any) -> Engine:
    return Engine(model, context=128, parallel=2, threads=1, **more)


# -- one adapter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "two"])
def test_base_with_adapter_is_the_merged_model_in_everything_an_engine_computes(
    files: Path, base: Engine, name: str
) -> None:
    plain = base.logits(PROMPT, first=0)
    with (
        small_engine(files / "base.gguf", adapter=files / f"{name}.gguf") as adapted,
        small_engine(files / f"{name}-merged.gguf") as merged,
    ):
        logits, expected = adapted.logits(PROMPT, first=0), merged.logits(PROMPT, first=0)
        np.testing.assert_allclose(logits, expected, atol=2e-3)
        assert np.abs(logits - plain).max() > 1
        continuations = [[5, 6, 7], [300]]
        np.testing.assert_allclose(
            adapted.log_likelihoods(PROMPT, continuations),
            merged.log_likelihoods(PROMPT, continuations),
            atol=2e-3,
        )
        whole, same, other = (
            engine.generate([PROMPT], max_tokens=12, watch=[5])[0] for engine in (adapted, merged, base)
        )
        assert whole.tokens == same.tokens
        assert whole.tokens != other.tokens
        assert whole.log_probs is not None
        assert same.log_probs is not None
        np.testing.assert_allclose(whole.log_probs.watched, same.log_probs.watched, atol=2e-3)


def test_the_projects_own_writer_gives_the_adapter_that_was_written_by_hand(
    files: Path, base: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.gguf"
    write_lora_gguf(
        path, random_factors(0), alpha=ALPHA, config=small_llama().config, name="one", base_name="small"
    )
    assert check_adapter(path, base.facts).targets == check_adapter(files / "one.gguf", base.facts).targets
    with (
        small_engine(base.model, adapter=path) as ours,
        small_engine(base.model, adapter=files / "one.gguf") as theirs,
    ):
        np.testing.assert_array_equal(ours.logits(PROMPT, first=0), theirs.logits(PROMPT, first=0))


def test_text_and_tokens_are_those_of_the_base(files: Path, base: Engine) -> None:
    with small_engine(files / "base.gguf", adapter=files / "one.gguf") as adapted:
        text = "Take 40 mg a day."
        assert adapted.tokenize(text) == base.tokenize(text)
        assert adapted.template == base.template
        assert adapted.path == files / "base.gguf"


# -- several on one base ---------------------------------------------------------------------------


def test_engines_on_one_loaded_model_each_keep_their_own_adapter(files: Path, base: Engine) -> None:
    before = base.logits(PROMPT, first=0)
    with (
        small_engine(base.model, adapter=files / "one.gguf") as one,
        small_engine(base.model, adapter=files / "two.gguf") as two,
    ):
        assert one.model is two.model is base.model
        shared = [engine.logits(PROMPT, first=0) for engine in (one, two, base, one)]
    for name, logits in (("one", shared[0]), ("two", shared[1])):
        with small_engine(files / "base.gguf", adapter=files / f"{name}.gguf") as alone:
            np.testing.assert_array_equal(logits, alone.logits(PROMPT, first=0))
    np.testing.assert_array_equal(shared[2], before)
    np.testing.assert_array_equal(shared[3], shared[0])
    assert np.abs(shared[0] - shared[1]).max() > 1
    np.testing.assert_array_equal(base.logits(PROMPT, first=0), before)  # after the others are gone


def test_the_model_lives_as_long_as_one_of_its_engines(files: Path) -> None:
    with ExitStack() as stack:
        first = small_engine(files / "base.gguf", adapter=files / "one.gguf")
        second = stack.enter_context(small_engine(first.model, adapter=files / "two.gguf"))
        model = first.model
        expected = second.generate([PROMPT], max_tokens=6)[0].tokens
        first.close()
        second.forget()
        assert second.generate([PROMPT], max_tokens=6)[0].tokens == expected
    with pytest.raises(ModelError, match="closed"):
        small_engine(model)


def test_engines_on_one_model_answer_at_the_same_time_what_each_answers_alone(files: Path) -> None:
    prompts = [[0, 10 + seed, 200 + seed, 30 + seed] for seed in range(6)]
    with small_engine(files / "base.gguf", adapter=files / "one.gguf") as one:
        alone_one = [result.tokens for result in one.generate(prompts, max_tokens=40)]
        with small_engine(one.model, adapter=files / "two.gguf") as two:
            alone_two = [result.tokens for result in two.generate(prompts, max_tokens=40)]
            found: dict[str, list[list[int]]] = {}

            def run(name: str, engine: Engine) -> None:
                engine.forget()
                results = engine.generate(prompts, max_tokens=40)
                found[name] = [result.tokens for result in results]

            threads = [threading.Thread(target=run, args=pair) for pair in (("one", one), ("two", two))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
    assert found == {"one": alone_one, "two": alone_two}
    assert alone_one != alone_two


# -- what is refused -------------------------------------------------------------------------------


def test_the_facts_of_an_adapter(files: Path) -> None:
    facts = check_adapter(files / "one.gguf", check_gguf(files / "base.gguf"))
    assert facts.alpha == ALPHA
    assert len(facts.targets) == 14  # seven linear layers in each of two blocks
    assert "blk.1.ffn_down.weight" in facts.targets
    assert facts.size_bytes == (files / "one.gguf").stat().st_size


def without_row(factors: Factors) -> Factors:
    name = "model.layers.1.mlp.down_proj.weight"
    return {**factors, name: (factors[name][0], factors[name][1][:-2])}


def other_rank(factors: Factors) -> Factors:
    name = "model.layers.1.mlp.down_proj.weight"
    return {**factors, name: (factors[name][0][:2], factors[name][1])}


def of_layer_nine(factors: Factors) -> Factors:
    return {name.replace("layers.1", "layers.9"): value for name, value in factors.items()}


def of_the_embedding(factors: Factors) -> Factors:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 64)).astype(np.float32), rng.normal(size=(416, 4)).astype(np.float32)
    return {**factors, "model.embed_tokens.weight": (a, b)}


@pytest.mark.parametrize(
    ("edit", "changes", "why"),
    [
        (dict, {"type": "model"}, "general.type"),
        (dict, {"method": "ia3"}, "adapter.type"),
        (dict, {"alpha": None}, "adapter.lora.alpha"),
        (dict, {"alpha": float("nan")}, "adapter.lora.alpha"),
        (dict, {"alpha": 0.0}, "adapter.lora.alpha"),
        (dict, {"architecture": "qwen2"}, "architecture"),
        (dict, {"second": ".lora_c"}, "lora_c"),
        (without_row, {}, "factors"),
        (other_rank, {}, "factors"),
        (of_layer_nine, {}, "blk.9"),
        (of_the_embedding, {}, "token_embd"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused_by_name_and_reason(
    files: Path, base: Engine, tmp_path: Path, edit: Any, changes: dict[str, Any], why: str
) -> None:
    path = write_adapter(tmp_path / "other.gguf", edit(random_factors(0)), **changes)
    with pytest.raises(ModelError) as caught:
        small_engine(base.model, adapter=path)
    assert "other.gguf" in caught.value.what
    assert why in caught.value.what
    assert caught.value.next_step
    assert base.generate([PROMPT], max_tokens=2)[0].tokens  # the shared model goes on


def test_a_model_a_cut_file_and_no_file_are_no_adapters(files: Path, base: Engine, tmp_path: Path) -> None:
    whole = (files / "one.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-40])
    for path in (files / "base.gguf", tmp_path / "cut.gguf", tmp_path / "none.gguf"):
        with pytest.raises(ModelError, match=path.name):
            small_engine(base.model, adapter=path)


# -- the key-value cache ---------------------------------------------------------------------------


def test_heads_too_narrow_for_a_quantized_cache_are_named(base: Engine) -> None:
    with pytest.raises(ModelError, match="heads of width 16") as caught:
        small_engine(base.model, kv_cache="q8_0")
    assert 'kv_cache = "f16"' in caught.value.next_step
    assert base.generate([PROMPT], max_tokens=2)[0].tokens
