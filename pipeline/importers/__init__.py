"""Public question sets as domains: each format is one module with ``read(source, options)``.

``preceptor import FORMAT SOURCE --into FOLDER`` writes a folder that runs as it is: ``domain.toml``,
``prompts/``, ``documents.jsonl``, ``questions.jsonl``, and ``import.json`` with what was read, kept and
left out, and why.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from domains.errors import DataError
from domains.records import Document, Question
from pipeline.importers.reading import Draft, Options, Reading
from pipeline.importers.split import assign_split, drop_duplicates, hold_out, shorten_answers, take
from pipeline.new import check_new, domain_files, plain_name, to_lines, write_folder


@dataclass(frozen=True)
class Format:
    """A format: its module, one line about it, and the share of questions whose topic is held out."""

    module: str
    about: str
    hold_out: float = 0.0


FORMATS: dict[str, Format] = {
    "beir": Format("beir", "folder with corpus.jsonl, queries.jsonl and qrels/*.tsv"),
    "jsonl": Format(
        "plain", "JSONL, JSON, CSV or TSV rows with a field map; documents in the rows or beside them"
    ),
    "mcq": Format("mcq", "multiple choice as in MedQA, MedMCQA and MMLU"),
    "medquad": Format("medquad", "MedQuAD rows, or its original folder of XML files", hold_out=0.15),
    "pubmedqa": Format("pubmedqa", "PubMedQA rows, or the original ori_pqal.json"),
}


@dataclass(frozen=True)
class Imported:
    """What an import did; ``import.json`` holds the same.

    ``rows == questions + sum(skipped)`` and ``document_rows == documents + sum(skipped_documents)``.
    """

    format: str
    source: str
    seed: int
    rows: int
    questions: int
    skipped: dict[str, int]
    document_rows: int
    documents: int
    skipped_documents: dict[str, int]
    splits: dict[str, int]
    kinds: dict[str, int]
    changed: dict[str, int]
    notes: list[str]
    fields: dict[str, str] = field(default_factory=dict)


def available_formats() -> dict[str, str]:
    """The formats' names, each with a line about it."""
    return {name: item.about for name, item in FORMATS.items()}


def import_set(
    format_name: str,
    source: Path,
    *,
    into: Path,
    fields: Mapping[str, str] | None = None,
    documents: Path | None = None,
    questions: Path | None = None,
    option_base: int | None = None,
    limit: int = 0,
    hold_out_share: float | None = None,
    seed_share: float = 0.6,
    seed: int = 0,
    title: str = "",
) -> Imported:
    """Read a public set and write it to ``into`` as a domain; the folder appears whole or not at all.

    Args:
        format_name: one of `available_formats`.
        source: a file or folder, as the format wants it.
        into: the new domain's folder; its name becomes the domain's name.
        fields: our field → the source's key, for sources that name things otherwise.
        documents: documents apart from the questions (``jsonl``: relative to a source that is a folder;
            ``mcq``: a folder that the new domain points to).
        questions: the questions' file, where the source is a folder (``jsonl``).
        option_base: number of the first option where answers are numbers (``mcq``).
        limit: at most so many questions, of whole documents where possible; documents that none of them
            is about are left out too (0 = all).
        hold_out_share: share of questions to make unanswerable by leaving out their topic's documents;
            None = the format's own (MedQuAD 0.15, else 0).
        seed_share: share of documents whose questions are for training; the rest is the exam.
        seed: decides order and split.
        title: the domain's title; the folder's name where empty.

    Raises:
        DataError: the format is unknown, ``into`` exists, or the source is wrong (file, line, key).
    """
    _check_target(format_name, fields or {}, into)
    kind = FORMATS[format_name]
    module = importlib.import_module(f"pipeline.importers.{kind.module}")
    options = Options(dict(fields or {}), documents, questions, option_base)
    reading: Reading = module.read(source, options)
    skipped, changed = Counter(reading.skipped), Counter(reading.changed)
    rows = len(reading.drafts) + reading.skipped.total()
    drafts = drop_duplicates(shorten_answers(reading.drafts, skipped, changed), skipped)
    skipped_documents = Counter(reading.skipped_documents)
    kept_documents = reading.documents
    if limit:
        taken = take(drafts, limit=limit, seed=seed)
        skipped["over the limit"] += len(drafts) - len(taken)
        drafts = taken
        kept_documents = _about_only(drafts, reading.documents)
        skipped_documents["over the limit"] += len(reading.documents) - len(kept_documents)
    share = kind.hold_out if hold_out_share is None else hold_out_share
    notes = [*reading.notes]
    if share:
        before = len(kept_documents)
        drafts, kept_documents = hold_out(drafts, kept_documents, share=share, seed=seed)
        skipped_documents["held out: their questions are unanswerable"] += before - len(kept_documents)
        notes.append(
            "Unanswerable questions: all documents of their topic were left out, and no other names the topic."
        )
    _need_questions(drafts, skipped, source)
    made = assign_split(drafts, seed=seed, seed_share=seed_share)
    result = Imported(
        format=format_name,
        source=source.name,
        seed=seed,
        rows=rows,
        questions=len(made),
        skipped=dict(sorted((+skipped).items())),
        document_rows=len(reading.documents) + reading.skipped_documents.total(),
        documents=len(kept_documents),
        skipped_documents=dict(sorted((+skipped_documents).items())),
        splits=dict(sorted(Counter(question.split for question in made).items())),
        kinds=dict(sorted(Counter(question.kind for question in made).items())),
        changed=dict(sorted((+changed).items())),
        notes=notes,
        fields=dict(sorted((fields or {}).items())),
    )
    _write(result, kept_documents, made, into=into, title=title, folder=documents)
    return result


def _check_target(format_name: str, fields: Mapping[str, str], into: Path) -> None:
    if format_name not in FORMATS:
        close = difflib.get_close_matches(format_name, FORMATS, n=1)
        raise DataError(
            f"no format {format_name!r}",
            expected=(f"did you mean {close[0]!r}? " if close else "") + f"one of: {', '.join(FORMATS)}",
            next_step="for anything else, make it JSONL: preceptor import jsonl SOURCE --field question=KEY …",
        )
    known = importlib.import_module(f"pipeline.importers.{FORMATS[format_name].module}").FIELDS
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise DataError(
                f"--field {name}={fields[name]}: format {format_name!r} has no field {name!r}",
                expected=(f"did you mean {close[0]!r}? " if close else "") + f"one of: {', '.join(known)}",
                next_step="--field OUR_NAME=KEY_IN_THE_SOURCE",
            )
    check_new(into)


def _about_only(drafts: list[Draft], documents: list[Document]) -> list[Document]:
    wanted = {draft.about for draft in drafts}
    return [document for document in documents if document.doc_id in wanted]


def _need_questions(drafts: list[Draft], skipped: Counter[str], source: Path) -> None:
    if drafts:
        return
    worst = skipped.most_common(1)
    why = f"most common reason: {worst[0][0]} ({worst[0][1]})" if worst else "it has no rows"
    raise DataError(
        f"{source}: 0 of {skipped.total()} questions kept; {why}",
        expected="at least one usable question",
        next_step="check the format and the field names (--field OUR_NAME=KEY)",
    )


def _write(
    result: Imported,
    documents: list[Document],
    questions: list[Question],
    *,
    into: Path,
    title: str,
    folder: Path | None,
) -> None:
    name = plain_name(into.name)
    if documents:
        place = "documents.jsonl"
    else:
        place = folder.resolve().as_posix() if folder is not None else "documents"
    files = domain_files(
        name,
        documents=place,
        questions="questions.jsonl",
        title=title or into.name,
        path=str(into),
        note="`import.json` says where the questions come from, what was left out, and why.",
    )
    if documents:
        files["documents.jsonl"] = to_lines(documents)
    files["questions.jsonl"] = to_lines(questions)
    files["import.json"] = json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n"
    write_folder(into, files)
