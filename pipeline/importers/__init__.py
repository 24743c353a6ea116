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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from domains.errors import DataError
from domains.records import Document, Question
from pipeline.importers.reading import Options, Reading
from pipeline.importers.split import (
    assign_split,
    drop_duplicates,
    hold_out,
    merge_copies,
    shorten_answers,
    take,
)
from pipeline.new import check_new, domain_files, plain_name, to_lines, write_folder


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        module: below this package.
        about: one line for the user.
        hold_out: share of questions whose topic is held out.
        ngram: ``curate.decontaminate_ngram`` of the new domain. Exam vignettes share stock phrases of
            8 words ("is brought to the physician for a"), hence GPT-3's 13 (arXiv 2005.14165) for them.
    """

    module: str
    about: str
    hold_out: float = 0.0
    ngram: int = 8


FORMATS: dict[str, Format] = {
    "beir": Format("beir", "folder with corpus.jsonl, queries.jsonl and qrels/*.tsv"),
    "jsonl": Format(
        "plain", "JSONL, JSON, CSV or TSV rows with a field map; documents in the rows or beside them"
    ),
    "mcq": Format("mcq", "multiple choice as in MedQA, MedMCQA and MMLU", ngram=13),
    "medquad": Format("medquad", "MedQuAD rows, or its original folder of XML files", hold_out=0.15),
    "pubmedqa": Format("pubmedqa", "PubMedQA rows, or the original ori_pqal.json"),
}


NOTE_HELD_OUT = "Unanswerable questions: all documents of their topic were left out, and no other document names the topic."


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
    fields: Mapping[str, str] | Sequence[str] = (),
    document_fields: Mapping[str, str] | Sequence[str] = (),
    documents: Path | None = None,
    questions: Path | None = None,
    cop_base: int | None = None,
    limit: int = 0,
    hold_out_share: float | None = None,
    seed_share: float = 0.6,
    seed: int = 0,
    title: str = "",
) -> dict[str, Any]:
    """Read a public set and write it to ``into`` as a domain; the folder appears whole or not at all.

    Args:
        format_name: one of `available_formats`.
        source: a file or folder, as the format wants it.
        into: the new domain's folder; its name becomes the domain's name.
        fields: our field → the source's key, for sources that name things otherwise; or ``OURS=THEIRS``.
        document_fields: the same for ``documents``, where the format has them apart (``jsonl``).
        documents: documents apart from the questions (``jsonl``: a file or folder, also one below a
            source that is a folder; ``mcq``: a folder that the new domain points to).
        questions: the questions' file, where the source is a folder (``jsonl``).
        cop_base: number of the first option where answers are numbers (``mcq``).
        limit: at most so many questions, of whole documents where possible; documents that none of them
            is about are left out too (0 = all).
        hold_out_share: share of questions to make unanswerable by leaving out their topic's documents;
            None = the format's own (MedQuAD 0.15, else 0).
        seed_share: share of documents whose questions are for training; the rest is the exam.
        seed: decides order and split.
        title: the domain's title; the folder's name where empty.

    Returns:
        What ``import.json`` holds, see `Imported`.

    Raises:
        DataError: the format is unknown, ``into`` exists, or the source is wrong (file, line, key).
    """
    module = _module(format_name)
    own_fields = _field_map(fields, module.FIELDS, "--field", format_name)
    known = getattr(module, "DOCUMENT_FIELDS", ())
    their_fields = _field_map(document_fields, known, "--document-field", format_name)
    check_new(into)
    kind = FORMATS[format_name]
    options = Options(own_fields, their_fields, documents, questions, cop_base)
    reading: Reading = module.read(source, options)
    share = kind.hold_out if hold_out_share is None else hold_out_share
    kept = _choose(reading, limit=limit, hold_out_share=share, seed=seed)
    _need_questions(kept, source)
    made = assign_split(kept.drafts, seed=seed, seed_share=seed_share)
    all_fields = {**own_fields, **{f"document.{ours}": theirs for ours, theirs in their_fields.items()}}
    result = _summary(format_name, source, seed, reading, kept, made, all_fields)
    _write(result, kept.documents, made, into=into, title=title, folder=documents)
    return asdict(result)


def _summary(
    format_name: str,
    source: Path,
    seed: int,
    reading: Reading,
    kept: Reading,
    made: Sequence[Question],
    fields: dict[str, str],
) -> Imported:
    return Imported(
        format=format_name,
        source=source.name,
        seed=seed,
        rows=len(reading.drafts) + reading.skipped.total(),
        questions=len(made),
        skipped=_sorted(kept.skipped),
        document_rows=len(reading.documents) + reading.skipped_documents.total(),
        documents=len(kept.documents),
        skipped_documents=_sorted(kept.skipped_documents),
        splits=_sorted(Counter(question.split for question in made)),
        kinds=_sorted(Counter(question.kind for question in made)),
        changed=_sorted(kept.changed),
        notes=[*kept.notes],
        fields=fields,
    )


def _choose(reading: Reading, *, limit: int, hold_out_share: float, seed: int) -> Reading:
    """The same set without duplicates, shortened, limited, and with topics held out."""
    skipped, skipped_documents = Counter(reading.skipped), Counter(reading.skipped_documents)
    changed, notes = Counter(reading.changed), reading.notes
    drafts, documents = merge_copies(reading.drafts, reading.documents, skipped_documents)
    drafts = drop_duplicates(shorten_answers(drafts, skipped, changed), skipped)
    if limit:
        taken = take(drafts, limit=limit, seed=seed)
        wanted = {draft.about for draft in taken}
        near = [document for document in documents if document.doc_id in wanted]
        skipped["over the limit"] += len(drafts) - len(taken)
        skipped_documents["over the limit"] += len(documents) - len(near)
        drafts, documents = taken, near
    if hold_out_share:
        before = len(documents)
        drafts, documents = hold_out(drafts, documents, share=hold_out_share, seed=seed)
        skipped_documents["held out: their questions are unanswerable"] += before - len(documents)
        notes += (NOTE_HELD_OUT,)
    return Reading(documents, drafts, skipped, skipped_documents, changed, notes)


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def _module(format_name: str) -> ModuleType:
    if format_name not in FORMATS:
        close = difflib.get_close_matches(format_name, FORMATS, n=1)
        raise DataError(
            f"no format {format_name!r}",
            expected=(f"did you mean {close[0]!r}? " if close else "") + f"one of: {', '.join(FORMATS)}",
            next_step="for anything else, make it JSONL: preceptor import jsonl SOURCE --field question=KEY …",
        )
    return importlib.import_module(f"pipeline.importers.{FORMATS[format_name].module}")


def _field_map(
    given: Mapping[str, str] | Sequence[str], known: Sequence[str], flag: str, format_name: str
) -> dict[str, str]:
    """The field map, with every name of ours known to the format."""
    if isinstance(given, Mapping):
        fields = dict(given)
    else:
        pairs = [item.partition("=") for item in given]
        fields = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    for ours, theirs in fields.items():
        if ours not in known or not theirs:
            close = difflib.get_close_matches(ours, known, n=1)
            raise DataError(
                f"{flag} {ours}={theirs}: format {format_name!r} has no field {ours!r}"
                if ours not in known
                else f"{flag} {ours}: no key of the source is named",
                expected=(f"did you mean {close[0]!r}? " if close else "")
                + f"one of: {', '.join(known) or 'none'}",
                next_step=f"{flag} OURS=THEIRS, the key in the source on the right",
            )
    return fields


def _need_questions(kept: Reading, source: Path) -> None:
    if kept.drafts:
        return
    worst = kept.skipped.most_common(1)
    why = f"most common reason: {worst[0][0]} ({worst[0][1]})" if worst else "it has no rows"
    raise DataError(
        f"{source}: 0 of {kept.skipped.total()} questions kept; {why}",
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
        ngram=FORMATS[result.format].ngram,
        note="`import.json` says where the questions come from, what was left out, and why.",
    )
    if documents:
        files["documents.jsonl"] = to_lines(documents)
    files["questions.jsonl"] = to_lines(questions)
    files["import.json"] = json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n"
    write_folder(into, files)
