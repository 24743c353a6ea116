"""What is imported where: serving needs no torch, and ``--help`` loads nothing heavy."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "peft", "bitsandbytes")


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(','.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.strip().splitlines()[-1].split(","))


@pytest.mark.parametrize("package", ["serve", "rag", "domains"])
def test_serving_and_retrieval_load_no_torch(package: str) -> None:
    modules = [f"{package}.{path.stem}" for path in (ROOT / package).glob("*.py") if path.stem != "__init__"]
    loaded = loaded_after("; ".join(f"import {name}" for name in modules))
    assert not loaded & set(HEAVY)


def test_the_front_door_opens_without_heavy_imports() -> None:
    assert not loaded_after("import preceptor") & {*HEAVY, "chromadb", "llama_cpp", "openai", "numpy"}


def test_no_other_distribution_owns_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in ("domains", "pipeline", "rag", "serve", "preceptor"):
        assert set(owners.get(name, ["preceptor"])) == {"preceptor"}
