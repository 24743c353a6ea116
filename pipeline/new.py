"""``preceptor new``: a domain's folder, ready to run, from a folder of documents."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from domains.config import parse_config
from domains.domain import SHIPPED
from domains.errors import ConfigError, DataError
from domains.jsonl import read_jsonl, write_text_atomic
from domains.records import Question
from rag.load import Loaded, load_documents

TEMPLATE = SHIPPED / "template"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{1,48}")
STARTER_NOTE = (
    '`questions.jsonl` holds **machine-made starter questions**: "What does TITLE say about HEADING?", with the '
    "section's first sentence as answer. They show that everything works; what an exam on them says about real "
    "users' questions is little. Replace them by questions that your team is really asked, each with its answer "
    "and the sentence that decides it."
)
_NO_DOCUMENTS_NOTE = (
    "There are no documents and no questions yet. Put the documents into a folder and run "
    "`preceptor new NAME --docs FOLDER`: it writes this folder again, elsewhere, with starter questions."
)


def new_domain(
    name: str, docs: Path | None, *, into: Path, title: str = "", questions: Path | None = None
) -> Path:
    """Make the folder ``into``: settings, prompts, an example check, a README and questions.

    The documents are referred to, not copied. Without ``questions``, starter questions are made from the
    documents by rule (`pipeline.starter_questions`).

    Args:
        name: the domain's name (lower case, digits, ``-`` and ``_``).
        docs: folder or file with documents; None writes the folder without any.
        into: the folder to make; it must not exist.
        title: how the assistant is called; the name where empty.
        questions: a file of `Question` records to copy.

    Raises:
        ConfigError: the name can't be one.
        DataError: ``into`` exists, or the documents or questions are missing or unusable.
    """
    check_name(name)
    check_new(into)
    if docs is not None and not docs.exists():
        raise DataError(
            f"{str(docs)!r} does not exist", expected="a folder with documents", next_step="check the path"
        )
    note, lines = "", ""
    if questions is not None:
        given = read_jsonl(questions, Question)
        note, lines = f"`questions.jsonl` is a copy of `{questions.name}`.", to_lines(given)
    elif docs is not None:
        from pipeline.starter_questions import starter_questions

        loaded = load_documents(docs)
        note, lines = STARTER_NOTE + _skipped_note(loaded), to_lines(starter_questions(loaded.documents))
    else:
        note = _NO_DOCUMENTS_NOTE
    files = domain_files(
        name,
        documents=_reference(docs, into) if docs is not None else "documents",
        questions="questions.jsonl" if lines else "",
        title=title or name,
        path=str(into),
        note=note,
    )
    if lines:
        files["questions.jsonl"] = lines
    return write_folder(into, files)


def _skipped_note(loaded: Loaded) -> str:
    """The files that could not be read, by name, for the domain's README."""
    if not loaded.skipped:
        return ""
    lines = [f"- `{entry.source}`: {entry.reason}" for entry in loaded.skipped]
    return f"\n\n{len(lines)} files were not read:\n\n" + "\n".join(lines)


def check_name(name: str) -> None:
    """Refuse what can't be a domain's name.

    Raises:
        ConfigError: proposes the nearest name that can.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} can't be a domain's name",
            expected="2 to 49 of a-z, 0-9, - and _, beginning with a letter or digit",
            next_step=f"preceptor new {plain_name(name)} --docs DIR",
        )


def plain_name(text: str) -> str:
    """The nearest name for a domain: ``My Team!`` → ``my-team``."""
    plain = re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")[:49]
    return plain if _NAME.fullmatch(plain) else f"domain-{plain or 'x'}"


def check_new(into: Path) -> None:
    """Refuse a folder that exists.

    Raises:
        DataError: it does; nothing is ever overwritten.
    """
    if into.exists():
        raise DataError(
            f"{str(into)!r} exists already",
            expected="a new folder: nothing is overwritten",
            next_step="choose another name, or remove the folder first",
        )


def domain_files(
    name: str, *, documents: str, questions: str, title: str, path: str, note: str, ngram: int = 8
) -> dict[str, str]:
    """The files of a new domain, path → text, from ``domains/template/``.

    ``documents`` and ``questions`` are written into ``domain.toml`` as they are; relative ones start at
    the domain's folder. ``ngram`` is the length in words for ``curate.decontaminate_ngram``.
    """
    values = {
        "name": name,
        "title": title,
        "path": path,
        "questions_note": note,
        "ngram": str(ngram),
        "name_toml": _toml(name),
        "title_toml": _toml(title),
        "documents_toml": _toml(documents),
        "questions_toml": _toml(questions),
    }
    files = {
        "domain.toml": _fill(TEMPLATE / "domain.toml.in", values),
        "README.md": _fill(TEMPLATE / "README.md.in", values),
        "checks.py": (TEMPLATE / "checks.py.in").read_text(encoding="utf-8"),
    }
    for prompt in sorted((TEMPLATE / "prompts").glob("*.md")):
        files[f"prompts/{prompt.name}"] = prompt.read_text(encoding="utf-8")
    parse_config(files["domain.toml"], origin=f"{path}/domain.toml")
    return files


def write_folder(into: Path, files: Mapping[str, str]) -> Path:
    """Write a folder of texts that appears whole or not at all.

    Raises:
        DataError: it exists by now, or its place is not writable.
    """
    check_new(into)
    temporary = into.with_name(f".{into.name}.{os.getpid()}.tmp")
    try:
        for name, text in files.items():
            write_text_atomic(temporary / name, text)
        temporary.rename(into)
    except OSError as error:
        raise DataError(
            f"can't make {str(into)!r}: {error.strerror}",
            expected="a writable place with free space",
            next_step="choose another folder",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return into


def to_lines(records: Sequence[BaseModel]) -> str:
    """The records as JSON lines."""
    return "".join(record.model_dump_json() + "\n" for record in records)


def _reference(docs: Path, into: Path) -> str:
    """How ``domain.toml`` names the documents: as given where absolute, else relative to the new folder."""
    if docs.is_absolute():
        return docs.as_posix()
    return Path(os.path.relpath(docs, into)).as_posix()


def _toml(text: str) -> str:
    """A TOML basic string; JSON's escapes are TOML's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _fill(path: Path, values: Mapping[str, str]) -> str:
    text = path.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], text)
