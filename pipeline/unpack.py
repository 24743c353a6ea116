"""The packaged SmolLM2 GGUF as an ordinary Hugging Face folder, kept in the cache."""

from __future__ import annotations

import io
import os
import shutil
from contextlib import redirect_stderr
from functools import lru_cache
from pathlib import Path

from pipeline.quiet_libraries import quiet_transformers
from serve.models import cache_folder, sha256_file

_CACHE_FORMAT = "v1"  # of the folder that `unpacked_gguf` writes


@lru_cache(maxsize=1)
def gguf_licence(path: Path) -> str:
    """What the file says of its licence."""
    from gguf import GGUFReader

    field = GGUFReader(str(path)).get_field("general.license")
    return str(field.contents()) if field else "unspecified"


def unpacked_gguf(packaged: Path) -> Path:
    """The packaged GGUF as a Hugging Face folder in float32, made once and kept in the cache."""
    target = cache_folder() / f"smollm2-135m-hf-{sha256_file(packaged)[:12]}-{_CACHE_FORMAT}"
    if target.is_dir():
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with quiet_transformers():
            _unpack(packaged, temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _unpack(packaged: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place, file = str(packaged.parent), packaged.name
    with redirect_stderr(io.StringIO()):  # the conversion draws a progress bar that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
    # A model loaded from GGUF refuses to be saved; one built from its configuration and weights does not.
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(model.state_dict())
    # transformers forgets SmolLM2's first splitting step; without it "  7" gets other ids than in llama.cpp.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
