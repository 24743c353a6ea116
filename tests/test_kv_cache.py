"""[serve] kv_cache: how keys and values are kept changes answers by little, memory by much, and is what is examined."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from domains.config import KvCache
from domains.errors import ModelError
from domains.records import Message
from pipeline.fidelity import compare
from pipeline.gguf_writer import write_llama_gguf
from pipeline.parity import Replay, check_parity
from serve.bundle import open_bundle
from serve.engine import Engine
from tests.small_adapters import write_base, write_bundle
from tests.small_models import TEMPLATE, small_llama, small_tokenizer

ROOT = Path(__file__).parent.parent
ROTATION_OFF = "LLAMA_ATTN_ROT_DISABLE"
TOKENS = [0, *((7 * place) % 380 + 4 for place in range(200))]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose heads are 64 wide."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    model = small_llama(width=256)
    write_llama_gguf(
        path,
        state=model.state_dict(),
        config=model.config,
        tokenizer=small_tokenizer(),
        template=TEMPLATE,
        name="wide",
        licence="CC0-1.0",
        file_type="F32",
    )
    return path


@pytest.fixture(scope="module")
def plain(wide: Path) -> Iterator[Engine]:
    with Engine(wide, context=256, parallel=2, threads=1) as engine:
        yield engine


def logits(plain: Engine, kind: KvCache) -> Any:
    with Engine(plain.model, context=256, parallel=2, threads=1, kv_cache=kind) as engine:
        return engine.logits(TOKENS[:-1], first=0)


def kl(plain: Engine, kind: KvCache) -> float:
    before = plain.logits(TOKENS[:-1], first=0)
    return compare(before, logits(plain, kind), TOKENS[1:])[0] / len(TOKENS[1:])


def test_fewer_bits_are_farther_from_f16_and_rotation_makes_them_nearer(
    plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kl(plain, "f16") == pytest.approx(0, abs=1e-9)
    rotated = {kind: kl(plain, kind) for kind in ("q8_0", "q4_0")}
    turned = logits(plain, "q4_0")
    assert 0 < rotated["q8_0"] < rotated["q4_0"] / 5
    monkeypatch.setenv(ROTATION_OFF, "1")
    assert np.abs(logits(plain, "q4_0") - turned).max() > 1e-3  # the built-in rotation is on by default
    monkeypatch.delenv(ROTATION_OFF)
    np.testing.assert_array_equal(logits(plain, "q4_0"), turned)


def test_a_reply_is_written_alike_from_a_quantized_cache_alone_and_with_others(plain: Engine) -> None:
    prompts = [TOKENS[:20], TOKENS[:40], TOKENS[50:90]]
    with Engine(plain.model, context=256, parallel=2, threads=1, kv_cache="q8_0") as engine:
        together = engine.generate(prompts, max_tokens=8)
        alone = [engine.generate([prompt], max_tokens=8)[0] for prompt in prompts]
    assert [result.tokens for result in together] == [result.tokens for result in alone]


def test_a_bundles_setting_reaches_its_engine(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")  # its heads are 16 wide, too narrow for a block
    bundle = write_bundle(tmp_path / "bundle", base, None, name="one", documents=["Brenzal"])
    toml = (bundle / "domain.toml").read_text(encoding="utf-8")
    assert 'kv_cache = "f16"' in toml
    open_bundle(bundle).close()
    changed = toml.replace('kv_cache = "f16"', 'kv_cache = "q8_0"')
    (bundle / "domain.toml").write_text(changed, encoding="utf-8")
    manifest = (bundle / "manifest.json").read_text(encoding="utf-8")
    data = json.loads(manifest)
    data["files"]["domain.toml"]["size_bytes"] = len(changed.encode())
    (bundle / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ModelError, match="heads of width 16"):
        open_bundle(bundle)


def test_the_parity_gate_measures_with_the_cache_that_is_served(wide: Path, plain: Engine) -> None:
    messages = [Message(role="user", content="Take one tablet in the morning.")]
    prompt = plain.render(messages)
    replay = Replay(
        messages=messages,
        prompt=prompt,
        prompt_tokens=plain.tokenize(prompt),
        completion="Never two within 12 hours.",
        completion_tokens=plain.tokenize("Never two within 12 hours.", begin=False),
    )
    tokens = replay.prompt_tokens + replay.completion_tokens
    training = [plain.logits(tokens[:-1], first=len(replay.prompt_tokens) - 1)]

    def found(kv_cache: KvCache) -> float | None:
        return check_parity(
            [replay], training=training, merged=None, f16=None, served=wide, served_kind="F16", context=256,
            max_kl=1.0, min_top1=0.0, kv_cache=kv_cache,
        ).kl  # fmt: skip

    exact, rounded = found("f16"), found("q4_0")
    assert exact == pytest.approx(0, abs=1e-6)
    assert rounded is not None
    assert rounded > 1e-6


def test_the_benchmark_reports_every_kind(wide: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    text.write_text("Take one tablet in the morning with a glass of water. " * 90, encoding="utf-8")
    script = (
        "import sys; sys.argv[0] = 'benchmarks/kv_cache.py'; sys.path.insert(0, 'benchmarks'); import kv_cache; "
        "kv_cache.TOKENS, kv_cache.FIRST, kv_cache.DECODED = 160, 60, 8; kv_cache.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--gguf", str(wide), "--text", str(text), "--rows", "--texts", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [*rows] == ["f16", "q8_0", "q4_0"]
    assert [row["bytes_per_token"] for row in rows.values()] == [1024, 544, 288]  # 2 layers, 2 heads, k and v
    assert rows["f16"]["kl"] == [0, 0, 0]
    assert rows["q4_0"]["kl"][0] > rows["q8_0"]["kl"][0] > 0
