"""``preceptor doctor``: what this machine has, what is installed, and what earlier runs measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from domains.cores import usable_cores
from domains.errors import PreceptorError
from domains.records import Message
from pipeline.run_folder import Run

NEEDED = ("llama-cpp-python", "langchain-core", "chromadb", "openai")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", *NEEDED)
_INSTALL = "make setup (in the project's folder), or pip install 'preceptor[train]'"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether that is all right."""

    what: str
    found: str
    ok: bool = True


def examine(runs: Path, *, speed: bool = True) -> list[Finding]:
    """Look at the machine, the packages, the models and the runs.

    Args:
        runs: the folder of runs.
        speed: also load the default model and measure it (about ten seconds).
    """
    findings = [*_machine(runs), *_packages()]
    for what, check in (("student model", _student), ("embedder", _embedder)):
        findings.append(_guarded(what, check))
    if speed:
        findings.append(_guarded("speed of llama.cpp", _speed))
    return findings + _runs(runs)


def _guarded(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, check())
    except PreceptorError as error:
        return Finding(what, str(error), ok=False)
    except Exception as error:  # a library that is broken or missing: that is what the doctor is called for
        return Finding(what, f"{type(error).__name__}: {error}\nNext: {_INSTALL}", ok=False)


def _machine(runs: Path) -> list[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    place = runs if runs.exists() else Path.cwd()
    free = shutil.disk_usage(place).free
    return [
        Finding("python", platform.python_version(), sys.version_info >= (3, 11)),
        Finding("cores", str(usable_cores())),
        Finding("fast bf16 on the CPU", "yes" if "avx512_bf16" in _cpu_flags() else "no (fp32 is used)"),
        Finding("memory", f"{memory / 1e9:.1f} GB", memory > 3.5e9),
        Finding("free disk", f"{free / 1e9:.1f} GB", free > 2e9),
    ]


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            if name in NEEDED:
                findings.append(Finding(name, f"not installed\nNext: {_INSTALL}", ok=False))
            else:
                findings.append(Finding(name, "not installed: this machine can serve, not train"))
    findings.append(Finding("installed size", f"{_installed_bytes() / 1e9:.2f} GB in {_site_packages()}"))
    took = Path(sys.prefix) / ".ready"  # written by the Makefile
    if took.is_file() and (seconds := took.read_text(encoding="utf-8").strip()).isdigit():
        findings.append(Finding("installation took", f"{int(seconds) / 60:.1f} minutes"))
    return findings


def _site_packages() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def _installed_bytes() -> int:
    return sum(path.lstat().st_size for path in _site_packages().rglob("*") if not path.is_dir())


def _student() -> str:
    from serve.models import packaged_gguf

    path = packaged_gguf()
    return f"{path.name}, {path.stat().st_size / 1e6:.0f} MB, checksum right"


def _embedder() -> str:
    from rag.embed import MiniLMEmbedder

    embedder = MiniLMEmbedder()
    return f"{embedder.name}, {embedder.dimensions} dimensions, checksum right"


def _speed() -> str:
    from serve.engine import Engine
    from serve.models import SMOLLM2, inference_gguf

    with Engine(inference_gguf(SMOLLM2), context=1024, parallel=1) as engine:
        words = "The quick brown fox jumps over the lazy dog. " * 45
        prompt = engine.tokenize(engine.render([Message(role="user", content=words)]))
        start = time.perf_counter()
        engine.generate([prompt], max_tokens=1)
        middle = time.perf_counter()
        tokens = len(engine.generate([prompt], max_tokens=64)[0].tokens)
        end = time.perf_counter()
    return f"{len(prompt) / (middle - start):.0f} prompt tokens/s, {tokens / (end - middle):.0f} decoded tokens/s (Q8_0)"


def _runs(runs: Path) -> list[Finding]:
    findings = []
    for file in sorted(runs.glob("*/*/run.json")):
        if file.parent.is_symlink():
            continue
        findings.append(_guarded(f"run {file.parent.relative_to(runs)}", partial(_run, file.parent)))
    return findings


def _run(folder: Path) -> str:
    times = ", ".join(f"{name} {entry.seconds:.0f} s" for name, entry in Run(folder).finished().items())
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{times or 'nothing finished'}; {size / 1e6:.0f} MB"
