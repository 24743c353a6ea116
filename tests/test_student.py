"""Loading the student, its tokens, and NF4 + LoRA as they are trained and read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import make_tiny_llama

from domains.errors import ModelError
from domains.records import Message
from pipeline.grids import decode
from pipeline.methods.grid_base import base_blocks, outer_packed
from pipeline.qlora import attach_lora, dequantized_base_weight, quantize_nf4
from pipeline.student import Base, encode_completion, encode_prompt, load_base, load_trained, render_prompt
from serve.models import SMOLLM2, packaged_gguf

CHAT = [
    Message(role="system", content="Answer from the passages."),
    Message(role="user", content="Question: what is the dose?"),
]
TEXTS = [
    "Hello world", " leading blank", "trailing blank ", "two  blanks", "three   blanks here", "  7", "   42 mg",
    "2024-11-24", "0.5mg/12h", "1,000,000", "١٢٣", "½ ¾ ²", "a\nb", "a\n\nb", "a\n\n\n  b", "\n", "\n\n", "\t\ttab",
    "a\r\nb", "don't can't it's we'll I'VE", "'s 't", "Ärzte raten: höchstens 40 mg", "naïve café", "e\u0301clair",
    "日本語のテスト", "中文，标点。", "русский текст", "עברית", "emoji 🙂👩‍⚕️🇩🇪", "\u200bzero\u200bwidth", "\u00a0nbsp\u00a0",
    "…—–“quotes”", "x=1; y+=2 // ok", "{'a': [1, 2]}", "<b>html</b>", "https://example.org/a?b=c&d=1",
    "snake_case CamelCase kebab-case", "ALL CAPS", "[1] Title - Heading", "A. yes\nB. no", "Answer: 12 %", "$5.00 €3",
    "5'10\"", "H2O CO2", "...", "!!!", "- item\n- item\n  - sub", "| a | b |\n|---|---|", "   ", "a" * 60,
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "Question: how  many   12  34?\n\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def base(tiny: Path) -> Base:
    return load_base(str(tiny), dtype=torch.float32)


def test_a_folder_named_like_the_packaged_model_keeps_its_own_weights(tmp_path: Path) -> None:
    own = load_base(str(make_tiny_llama(tmp_path / SMOLLM2)), dtype=torch.float32)
    assert own.name == SMOLLM2
    assert own.gguf is None
    for name, blocks in base_blocks(own, "Q8_0").items():
        weight = own.model.get_parameter(name)
        assert (decode(blocks) - weight).abs().max() < 0.01 * weight.abs().max()
    assert outer_packed(own).keys() >= {"model.embed_tokens.weight"}


@pytest.fixture(scope="module")
def smollm2() -> Base:
    return load_base(SMOLLM2, dtype=torch.bfloat16)


def test_a_folder_loads_with_template_bos_and_licence(base: Base, tiny: Path) -> None:
    assert (base.name, base.licence, base.bos, base.eos) == (
        tiny.name,
        "apache-2.0",
        "<|begin_of_text|>",
        "<|eot_id|>",
    )
    assert base.tokenizer.convert_ids_to_tokens(base.end_of_turn) == "<|eot_id|>"
    assert base.version.startswith("sha256:")
    assert base.adds_bos
    assert not base.model.training


def test_a_prompt_has_exactly_one_bos(base: Base) -> None:
    ids = encode_prompt(base, render_prompt(base, CHAT))
    begin = base.tokenizer.bos_token_id
    assert ids[0] == begin
    assert ids.count(begin) == 1
    assert encode_prompt(base, base.bos + "x") == encode_prompt(base, "x")
    assert base.tokenizer.decode(ids[1:]) == render_prompt(base, CHAT)


def test_a_control_token_in_a_completion_is_plain_text(base: Base) -> None:
    ids = encode_completion(base, "stop <|eot_id|> here")
    assert base.end_of_turn not in ids
    assert base.tokenizer.decode(ids) == "stop <|eot_id|> here"
    assert base.end_of_turn in encode_prompt(base, "stop <|eot_id|> here")


def test_smollm2_wants_no_bos_and_names_its_origin(smollm2: Base) -> None:
    ids = encode_prompt(smollm2, render_prompt(smollm2, CHAT))
    assert (smollm2.bos, smollm2.adds_bos) == ("<|im_start|>", False)  # as its file says
    assert smollm2.tokenizer.convert_ids_to_tokens(ids[:2]) == ["<|im_start|>", "system"]
    assert smollm2.tokenizer.decode(ids) == render_prompt(smollm2, CHAT)
    assert smollm2.gguf == packaged_gguf()
    assert (smollm2.licence, smollm2.name) == ("apache-2.0", SMOLLM2)
    assert smollm2.model.lm_head.weight is smollm2.model.model.embed_tokens.weight


def test_smollm2_tokens_are_llama_cpps(smollm2: Base) -> None:
    from llama_cpp import Llama

    engine = Llama(str(packaged_gguf()), vocab_only=True, verbose=False)
    try:
        for text in TEXTS:
            theirs = engine.tokenize(text.encode(), add_bos=True, special=True)
            assert encode_prompt(smollm2, text) == theirs, text
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("base", "message"),
    [("no/such/folder", "no base model"), ("./nowhere", "no base model"), ("smollm3", "no base model")],
)
def test_what_is_no_base_is_told_apart(base: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_base(base, dtype=torch.float32)
    assert SMOLLM2 in caught.value.expected


def test_an_id_out_of_reach_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"meta-llama/Llama-3\.2-1B-Instruct") as caught:
        load_base("meta-llama/Llama-3.2-1B-Instruct", dtype=torch.float32)
    for word in ("huggingface-cli login", "licence", "HF_HOME", "folder"):
        assert word in caught.value.next_step


def _edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def _without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _of_another_architecture(folder: Path) -> None:
    _edit_json(folder / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])


def _as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _lacking_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _with_own_code(folder: Path) -> None:
    _edit_json(
        folder / "config.json",
        model_type="strange",
        auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.M"},
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_template, "no chat template"),
        (_of_another_architecture, "type 'qwen2'"),
        (_as_pickle, "from the folder"),
        (_cut_short, "from the folder"),
        (_lacking_a_tensor, "lacks 1 tensors"),
        (_with_own_code, "from the folder"),
    ],
)
def test_an_unfit_folder_is_refused(damage: Any, message: str, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_base(str(folder), dtype=torch.float32)


def test_nf4_rounds_the_blocks_and_nothing_else(base: Base) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    quantize_nf4(base.model, keep_quantized=False)
    for name, tensor in base.model.state_dict().items():
        if name.endswith("_proj.weight"):
            blocks = tensor.reshape(-1, 64)
            scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
            assert all(len(block.unique()) <= 16 for block in scaled)
            assert 0 < (tensor - before[name]).norm() / before[name].norm() < 0.15
        else:
            assert torch.equal(tensor, before[name]), name


def test_weights_kept_in_4_bit_give_the_same_network(tiny: Path) -> None:
    networks = []
    for keep in (False, True):
        model = load_base(str(tiny), dtype=torch.float32).model
        assert quantize_nf4(model, keep_quantized=keep) is keep
        networks.append(attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=0))
    plain, packed = networks
    ids = list(range(40, 80))
    results = []
    for network in networks:
        network.eval()  # where bitsandbytes would repack the weights
        logits = network(input_ids=torch.tensor([ids]), use_cache=False).logits
        logits.square().sum().backward()
        gradients = [p.grad for name, p in network.named_parameters() if "lora_B" in name]
        results.append((logits, gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)
    for name, module in plain.named_modules():
        if name.endswith("base_layer"):
            other = packed.get_submodule(name)
            assert type(other).__name__ == "Linear4bit"
            assert torch.equal(dequantized_base_weight(module), dequantized_base_weight(other))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_our_lora_layer_is_pefts(tiny: Path, dropout: float) -> None:
    from peft.tuners.lora import LoraLayer

    model = attach_lora(
        load_base(str(tiny), dtype=torch.float32).model, rank=4, alpha=8, dropout=dropout, seed=1
    )
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    results = []
    for forward in (layer.forward, lambda x: type(layer).forward(layer, x)):
        x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model.zero_grad()
        torch.manual_seed(5)
        y = forward(x)
        y.square().sum().backward()
        weights = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        results.append([y, x.grad, *weights])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_lora_sits_on_every_linear_layer_and_its_seed_decides(tiny: Path) -> None:
    def adapter(seed: int) -> dict[str, torch.Tensor]:
        model = load_base(str(tiny), dtype=torch.bfloat16).model
        adapted = attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=seed)
        return {name: p for name, p in adapted.named_parameters() if p.requires_grad}

    one, again, other = adapter(0), adapter(0), adapter(1)
    assert len(one) == 2 * 2 * 7  # layers, A and B, linear layers of a block
    assert {p.dtype for p in one.values()} == {torch.float32}
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_folder_without_an_adapter_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no trained adapter"):
        load_trained(tmp_path, base=str(tiny))
