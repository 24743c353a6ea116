"""Multiple choice in the shapes of MedQA, MedMCQA and MMLU.

Options: ``options`` as an object or a list, ``choices`` as a list, ``opa`` … ``opd``, ``ending0`` …, or
columns ``A`` … ``D``. Answer: a letter, an option's text, or a number (``answer``, ``cop``, ``label``),
for which the user says whether counting starts at 0 or 1.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from domains.errors import DataError
from domains.records import Document, Quote
from domains.words import squash
from pipeline.importers.quotes import best_sentence
from pipeline.importers.reading import Draft, Options, Reading
from pipeline.importers.rows import Row, read_rows, the_file

FIELDS = ("id", "question", "options", "answer", "explanation", "context", "title", "about")
LETTERS = "ABCDEFGH"
_STEMS = ("question", "sent1")
_ANSWERS = ("answer", "answer_idx", "cop", "label")
_TEXTS = {"explanation": ("explanation", "exp"), "context": ("context", "passage")}
_SPREAD = (("opa", "opb", "opc", "opd", "ope"), tuple(f"ending{n}" for n in range(5)), tuple(LETTERS))
NOTE_DOCUMENTS = (
    "The documents are the questions' own explanations or contexts: an exam with retrieval is open-book, and "
    "not comparable with published closed-book numbers."
)
NOTE_GIVEN = "The documents were given apart from the set: no question has a gold quote."
NOTE_NONE = (
    "The set brings no documents: only questions were written. Give a folder of documents with --documents to "
    "make a domain that can run."
)


def read(source: Path, options: Options) -> Reading:
    """Questions of kind ``options``; explanations or contexts become documents.

    Raises:
        DataError: options or answer can't be made out (names the row, and --cop-base where it decides).
    """
    documents: dict[str, Document] = {}
    drafts: list[Draft] = []
    skipped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for row in read_rows(the_file(source), fields=options.fields):
        stem = squash(_first_text(row, "question", _STEMS))
        choices = _choices(row)
        if not stem or len(choices) < 2 or not all(choices.values()):
            skipped["empty question or option"] += 1
            continue
        letter = _letter(row, choices, options.cop_base)
        if letter is None:
            skipped["no answer given"] += 1
            continue
        question_id = row.content_id("mcq", stem, *choices.values())
        document = _document(row, question_id) if options.documents is None else None
        gold: tuple[Quote, ...] = ()
        if document is not None:
            documents.setdefault(document.doc_id, document)
            quote = best_sentence(document.text, choices[letter])
            gold = (Quote(doc_id=document.doc_id, quote=quote),) if quote else ()
            changed["without gold quote (no sentence shares a word with the answer)"] += not gold
        elif options.documents is None:
            changed["without document (no explanation or context)"] += 1
        about = document.doc_id if document else row.optional_text("about") or question_id
        drafts.append(Draft(question_id, "options", stem, letter, about, about, options=choices, gold=gold))
    note = NOTE_DOCUMENTS if documents else NOTE_GIVEN if options.documents else NOTE_NONE
    return Reading([*documents.values()], drafts, skipped, changed=+changed, notes=(note,))


def _first(row: Row, name: str, keys: tuple[str, ...]) -> object:
    """The value of a field by the user's key, else by the first known key that the row has."""
    if row.key(name) != name:
        return row.need(name)
    return next((row.data[key] for key in keys if row.data.get(key) is not None), None)


def _first_text(row: Row, name: str, keys: tuple[str, ...]) -> str:
    value = _first(row, name, keys)
    if value is None and not any(key in row.data for key in keys):
        row.need(name)  # raises, naming the likely typo
    return str(value or "").strip()


def _choices(row: Row) -> dict[str, str]:
    value = _first(row, "options", ("options", "choices"))
    if isinstance(value, dict):
        if set(value) == {"text", "label"}:  # ARC and OpenBookQA
            value = value["text"]
        else:
            return {str(key).strip().upper(): squash(str(text)) for key, text in value.items()}
    if value is None:
        for keys in _SPREAD:
            if keys[0] in row.data:
                value = [row.data[key] for key in keys if row.data.get(key) is not None]
                break
    if not isinstance(value, list) or len(value) > len(LETTERS):
        if value is None:
            row.need("options")  # raises, naming the likely typo
        raise row.wrong(
            "options", value, "an object {A: …, B: …}, a list of up to 8 texts, or keys opa … opd"
        )
    return {letter: squash(str(text)) for letter, text in zip(LETTERS, value, strict=False)}


def _letter(row: Row, choices: dict[str, str], base: int | None) -> str | None:
    value = _first(row, "answer", _ANSWERS)
    if value is None or value == "":
        if not any(key in row.data for key in _ANSWERS):
            row.need("answer")  # raises
        return None
    said = str(value).strip().strip("().").strip()
    if said.upper() in choices:
        return said.upper()
    named = [key for key, text in choices.items() if text.lower() == said.lower()]
    if named:
        return named[0]
    if not said.lstrip("-").isdigit():
        raise row.wrong("answer", value, f"one of {', '.join(choices)}, an option's text, or a number")
    if base is None:
        raise DataError(
            f"{row.where}: the answer is the number {said}",
            expected="to know whether the first option is 0 or 1 (MedMCQA's cop: 1 in its files, 0 on some hubs)",
            next_step="add --cop-base 0 or --cop-base 1",
        )
    index = int(said) - base
    if not 0 <= index < len(choices):
        raise row.wrong(
            "answer", value, f"a number from {base} to {len(choices) - 1 + base} (--cop-base {base})"
        )
    return [*choices][index]


def _document(row: Row, question_id: str) -> Document | None:
    context = str(_first(row, "context", _TEXTS["context"]) or "").strip()
    text = context or str(_first(row, "explanation", _TEXTS["explanation"]) or "").strip()
    if not text:
        return None
    doc_id = row.optional_text("about") or f"doc-{question_id}"
    return Document(doc_id=doc_id, title=row.optional_text("title") or doc_id, text=text, source=row.where)
