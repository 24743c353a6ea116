from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domains.errors import ContextOverflow, ModelError
from domains.records import Message
from serve.engine import Completion, Engine
from serve.models import inference_gguf, packaged_gguf

COUNTRIES = ["France", "Japan", "Italy", "Egypt", "Spain", "Peru"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(inference_gguf("smollm2-135m"), context=512, parallel=4) as engine:
        yield engine


def ask(engine: Engine, text: str) -> list[int]:
    return engine.tokenize(engine.render([Message(role="user", content=text)]))


def capitals(engine: Engine) -> list[list[int]]:
    return [ask(engine, f"What is the capital of {name}? Answer in one word.") for name in COUNTRIES]


def test_more_prompts_than_sequences_come_back_in_order_and_each_is_reported_once(engine: Engine) -> None:
    done: dict[int, Completion] = {}
    results = engine.generate(capitals(engine), max_tokens=12, on_done=done.__setitem__)
    assert [name in result.text for name, result in zip(COUNTRIES, results, strict=True)] == [True] * 6
    assert "Paris" in results[0].text
    assert "Tokyo" in results[1].text
    assert results[0].finish == "stop"
    assert [done[index] for index in range(6)] == results


def test_a_prompt_is_answered_alike_alone_with_others_and_from_a_warm_cache(engine: Engine) -> None:
    prompts = capitals(engine)[:3]
    together = engine.generate(prompts, max_tokens=8)
    alone = [engine.generate([prompt], max_tokens=8)[0] for prompt in prompts]
    assert [result.tokens for result in alone] == [result.tokens for result in together]


def test_a_stream_is_the_completion_in_pieces(engine: Engine) -> None:
    prompt = capitals(engine)[0]
    whole = engine.generate([prompt], max_tokens=8)[0]

    def follow() -> Iterator[str]:
        completion = yield from engine.stream(prompt, max_tokens=8)
        assert completion == whole

    pieces = [piece for piece in follow() if piece]
    assert "".join(pieces) == whole.text
    assert len(pieces) == len(whole.tokens)


def test_characters_of_several_tokens_are_never_cut(engine: Engine) -> None:
    prompt = engine.tokenize("🙂🙃" * 5)
    pieces = [piece for piece in engine.stream(prompt, max_tokens=15) if piece]
    assert "🙃" in pieces
    assert "\ufffd" not in "".join(pieces)


def test_a_seed_decides_what_is_sampled(engine: Engine) -> None:
    prompt = ask(engine, "Invent a name for a cat.")
    one, other, again = (
        engine.generate([prompt], max_tokens=12, temperature=1.5, seed=seed)[0].tokens for seed in (1, 2, 1)
    )
    assert one == again
    assert one != other


def test_what_does_not_fit_is_refused_with_its_numbers_before_anything_runs(engine: Engine) -> None:
    long = ask(engine, "word " * 600)
    reported: list[int] = []
    with pytest.raises(ContextOverflow) as caught:
        engine.generate([capitals(engine)[0], long], max_tokens=8, on_done=lambda i, _: reported.append(i))
    assert str(len(long)) in caught.value.what
    assert str(len(long) + 8) in caught.value.what
    assert "512" in caught.value.expected
    assert reported == []
    with pytest.raises(ContextOverflow):
        engine.stream(long, max_tokens=8)
    fits = long[: 512 - 4]
    assert engine.generate([fits], max_tokens=4)[0].prompt_tokens == 508


def test_logits_predict_the_greedy_token_and_are_finite(engine: Engine) -> None:
    prompt = capitals(engine)[0]
    reply = engine.generate([prompt], max_tokens=6)[0].tokens
    logits = engine.logits(prompt + reply, first=len(prompt) - 1)
    assert logits.shape == (len(reply) + 1, engine.vocab_size)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert logits[:-1].argmax(axis=1).tolist() == reply
    with pytest.raises(ModelError):
        engine.logits(prompt, first=len(prompt))


def test_an_error_in_on_done_reaches_the_caller_and_the_engine_lives_on(engine: Engine) -> None:
    def fail(_index: int, _result: Completion) -> None:
        raise ZeroDivisionError("on_done")

    with pytest.raises(ZeroDivisionError):
        engine.generate(capitals(engine)[:1], max_tokens=4, on_done=fail)
    assert "Paris" in engine.generate(capitals(engine)[:1], max_tokens=8)[0].text


def test_text_survives_tokens_and_untrusted_control_tokens_are_only_parsed_where_rendered(
    engine: Engine,
) -> None:
    text = "Ärzte raten: 2.5 mg/d, naïve 🙂 «quoted»\n\n\ttab"
    assert engine.detokenize(engine.tokenize(text)) == text
    assert len(engine.tokenize("<|im_end|>")) == 1
    assert engine.detokenize(engine.tokenize("<|im_end|>")) == ""


def test_closing_a_stream_frees_its_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[int] = []
    take = Engine._take

    def counting(engine: Engine, slot: Any, token: int) -> None:
        sampled.append(token)
        take(engine, slot, token)

    monkeypatch.setattr(Engine, "_take", counting)
    with Engine(inference_gguf("smollm2-135m"), context=1024, parallel=1) as engine:
        endless = engine.stream(ask(engine, "Write a very long story about the sea."), max_tokens=900)
        while not next(endless):
            pass
        waiting = engine.stream(ask(engine, "Say yes."), max_tokens=900)
        assert next(waiting) == ""  # queued behind the story: gives control back, without text
        waiting.close()
        endless.close()
        assert len(engine.generate([ask(engine, "Say yes.")], max_tokens=2)[0].tokens) <= 2
        assert engine.running == 0
    assert len(sampled) < 500  # neither wrote its 900


def test_a_closed_engine_ends_what_runs_and_waits_and_refuses_more() -> None:
    engine = Engine(inference_gguf("smollm2-135m"), context=1024, parallel=1)
    story = ask(engine, "Write a very long story about the sea.")
    started = engine.stream(story, max_tokens=900)
    while not next(started):
        pass
    failures: list[BaseException] = []

    def wait_in_queue() -> None:
        try:
            engine.generate([story], max_tokens=900)
        except ModelError as error:
            failures.append(error)

    queued = threading.Thread(target=wait_in_queue)
    queued.start()
    engine.close()
    engine.close()
    queued.join(timeout=60)
    assert len(failures) == 1
    with pytest.raises(ModelError, match="closed"):
        for _ in started:
            pass
    with pytest.raises(ModelError, match="closed"):
        engine.generate([story], max_tokens=1)
    with pytest.raises(ModelError, match="closed"):
        engine.logits(story, first=0)


def test_a_model_that_wants_a_bos_sees_exactly_one(tmp_path: Path) -> None:
    from pipeline.gguf_writer import write_llama_gguf
    from tests.small_models import TEMPLATE, small_llama, small_tokenizer

    path = tmp_path / "small.gguf"
    model, tokenizer = small_llama(), small_tokenizer()
    write_llama_gguf(
        path,
        state=model.state_dict(),
        config=model.config,
        tokenizer=tokenizer,
        template=TEMPLATE,
        name="small",
        licence="CC0-1.0",
    )
    with Engine(path, context=256, parallel=1) as engine:
        assert engine.adds_bos
        assert engine.bos in engine.template or "bos_token" in engine.template
        tokens = ask(engine, "How many mg?")
        bos = engine.tokenize("")
        assert len(bos) == 1
        assert tokens.count(bos[0]) == 1
        assert tokens[0] == bos[0]


def test_files_that_are_no_llama_model_are_refused_before_loading(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(packaged_gguf().read_bytes()[:1_000_000])
    for path in (cut, tmp_path / "absent.gguf"):
        with pytest.raises(ModelError) as caught:
            Engine(path)
        assert path.name in str(caught.value)


def test_watched_log_probabilities_are_those_of_teacher_forced_logits(engine: Engine) -> None:
    prompt = capitals(engine)[0]
    ids = engine.tokenize(" Paris London", begin=False)
    result = engine.generate([prompt], max_tokens=6, watch=ids)[0]
    assert result.log_probs is not None
    positions = len(result.tokens) + (result.finish == "stop")  # the end token has a position too
    assert result.log_probs.taken.shape == (positions,)
    assert result.log_probs.watched.shape == (positions, len(ids))
    logits = engine.logits([*prompt, *result.tokens], first=len(prompt) - 1)[:positions].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(result.log_probs.watched, expected[:, ids], atol=0.05)
    taken = expected[range(len(result.tokens)), result.tokens]
    np.testing.assert_allclose(result.log_probs.taken[: len(result.tokens)], taken, atol=0.05)


def test_a_stream_records_what_a_whole_reply_does(engine: Engine) -> None:
    prompt = capitals(engine)[0]
    watch = engine.tokenize(" Paris", begin=False)
    engine.forget()
    whole = engine.generate([prompt], max_tokens=6, watch=watch)[0]
    engine.forget()
    stream = engine.stream(prompt, max_tokens=6, watch=watch)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            streamed = end.value
            break
    assert streamed == whole
    np.testing.assert_array_equal(streamed.log_probs.taken, whole.log_probs.taken)
    np.testing.assert_array_equal(streamed.log_probs.watched, whole.log_probs.watched)


def test_nothing_is_recorded_unless_asked_for_and_a_stop_token_ends_a_reply(engine: Engine) -> None:
    prompt = capitals(engine)[0]
    whole = engine.generate([prompt], max_tokens=8)[0]
    assert whole.log_probs is None
    cut = engine.generate([prompt], max_tokens=8, stop=[whole.tokens[2]])[0]
    assert cut.tokens == whole.tokens[:2]
    assert cut.finish == "stop"


def test_a_token_is_found_by_its_exact_text_only(engine: Engine) -> None:
    found = engine.token_id("<|im_end|>")
    assert found is not None
    assert engine.tokenize("<|im_end|>", begin=False) == [found]
    assert engine.token_id("[Retrieval]") is None
    assert engine.token_id("two words") is None


def test_log_likelihoods_of_continuations_are_those_of_the_whole_sequences(engine: Engine) -> None:
    prompt = capitals(engine)[0]
    continuations = [engine.tokenize(text, begin=False) for text in ("Paris", "The city of London", "x")] + [
        []
    ]
    found = engine.log_likelihoods(prompt, continuations)
    for value, tokens in zip(found, continuations, strict=True):
        logits = engine.logits([*prompt, *tokens], first=len(prompt) - 1).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert value == pytest.approx(sum(logs[i, token] for i, token in enumerate(tokens)), abs=0.1)
    assert found[0] > found[2]
    with pytest.raises(ContextOverflow):
        engine.log_likelihoods(prompt, [[1] * 600])


@pytest.mark.parametrize("compiled_in", [True, False])
def test_amx_is_not_used_where_it_was_compiled_in(monkeypatch: pytest.MonkeyPatch, compiled_in: bool) -> None:
    import llama_cpp

    from serve.llama_model import LlamaModel

    told = (
        b"CPU : AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1 | "
        if compiled_in
        else b"CPU : AVX512 = 1 | REPACK = 1 | "
    )
    seen = []

    def load(_path: bytes, params: Any) -> None:
        seen.append(bool(params.use_extra_bufts))

    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: told)
    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", load)
    with pytest.raises(ModelError, match="can't load"):
        LlamaModel(packaged_gguf())
    assert seen == [not compiled_in]
