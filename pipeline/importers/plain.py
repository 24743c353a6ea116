"""Plain rows with a field map: one file of questions, and their documents in it or beside it."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from domains.errors import DataError
from domains.records import Document, QuestionKind, Quote
from domains.words import squash
from pipeline.importers.quotes import locate
from pipeline.importers.reading import Draft, Options, Reading
from pipeline.importers.rows import Row, read_rows, the_file

FIELDS = ("id", "question", "answer", "about", "answerable", "options", "document", "title")
DOCUMENT_FIELDS = ("doc_id", "title", "text", "url")
_YES_NO = {"yes": "yes", "no": "no", "maybe": "maybe", "true": "yes", "false": "no"}


def read(source: Path, options: Options) -> Reading:
    """Questions with the documents they name (``about``) or carry (``document``).

    Raises:
        DataError: a key is missing, or ``about`` names an unknown document (names the row).
    """
    questions_file, documents_file = _places(source, options)
    documents: dict[str, Document] = {}
    skipped_documents: Counter[str] = Counter()
    if documents_file is not None:
        documents = _documents(documents_file, options, skipped_documents)
    drafts: list[Draft] = []
    skipped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for row in read_rows(questions_file, fields=options.fields):
        about = _about(row, documents, documents_file)
        if about is None:
            skipped["document is empty"] += 1
            continue
        draft = _draft(row, documents.get(about), about, changed)
        if isinstance(draft, str):
            skipped[draft] += 1
        else:
            drafts.append(draft)
    notes = () if documents else ("The set brings no documents: only questions were written.",)
    return Reading([*documents.values()], drafts, skipped, skipped_documents, changed, notes)


def _places(source: Path, options: Options) -> tuple[Path, Path | None]:
    """The questions' and the documents' file; relative paths start at a source that is a folder."""
    documents = _below(source, options.documents) if options.documents else None
    if options.questions is not None:
        questions = _below(source, options.questions)
    elif source.is_dir() and documents is None and (source / "documents.jsonl").is_file():
        return the_file(source / "questions.jsonl"), source / "documents.jsonl"
    else:
        questions = the_file(source, preferred=("questions.jsonl",))
    return questions, documents


def _below(source: Path, path: Path) -> Path:
    return source / path if source.is_dir() and not path.exists() else path


def _documents(path: Path, options: Options, skipped: Counter[str]) -> dict[str, Document]:
    if not path.exists():
        raise DataError(
            f"{str(path)!r} does not exist", expected="a file or folder", next_step="check the path"
        )
    if path.is_dir():
        from rag.load import load_documents

        return {document.doc_id: document for document in load_documents(path).documents}
    documents: dict[str, Document] = {}
    for row in read_rows(path, fields=options.document_fields):
        doc_id, text = row.text("doc_id"), row.text("text")
        if not text:
            skipped["empty text"] += 1
        elif doc_id in documents:
            skipped["id seen before"] += 1
        else:
            title = squash(row.optional_text("title")) or doc_id
            url = row.optional_text("url")
            documents[doc_id] = Document(doc_id=doc_id, title=title, text=text, source=url or path.name)
    return documents


def _about(row: Row, documents: dict[str, Document], documents_file: Path | None) -> str | None:
    """The document a question belongs to; a document in the row itself is added to ``documents``."""
    if documents_file is None and row.key("document") in row.data:
        text = row.text("document")
        if not text:
            return None
        about = row.optional_text("about") or f"doc-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        title = squash(row.optional_text("title")) or about
        documents.setdefault(about, Document(doc_id=about, title=title, text=text, source=row.where))
        return about
    if documents_file is None:
        return row.optional_text("about") or row.content_id("q", row.text("question"))
    about = row.text("about")
    if about not in documents:
        raise row.wrong("about", about, f"the id of a document in {documents_file}")
    return about


def _draft(row: Row, document: Document | None, about: str, changed: Counter[str]) -> Draft | str:
    """The question, or the reason why there is none."""
    question = squash(row.text("question"))
    if not question:
        return "empty question"
    question_id = row.content_id("q", about, question)
    answer = row.optional_text("answer")
    options = row.get("options")
    if row.key("answerable") in row.data and _is_false(row, row.get("answerable")):
        return Draft(question_id, "unanswerable", question, None, about, group=about)
    if not answer:
        if row.key("answerable") not in row.data and row.key("answer") not in row.data:
            row.need("answer")  # raises, naming the likely typo
        return "no answer"
    if isinstance(options, dict) and options:
        letters = {str(key): squash(str(text)) for key, text in options.items()}
        if answer not in letters:
            raise row.wrong("answer", answer, f"one of {sorted(letters)}")
        return Draft(question_id, "options", question, answer, about, group=about, options=letters)
    kind: QuestionKind = "open"
    if (plain := answer.strip(" .!").lower()) in _YES_NO:
        kind, answer = "yes_no", _YES_NO[plain]
    quote = locate(answer, document.text) if document is not None and kind == "open" else None
    if quote is None:
        changed["without gold quote (answer is only yes or no)" if kind == "yes_no" else _NO_QUOTE] += 1
    gold = (Quote(doc_id=about, quote=quote),) if quote else ()
    return Draft(question_id, kind, question, squash(answer), about, group=about, gold=gold)


_NO_QUOTE = "without gold quote (no sentence of the answer stands in the document)"


def _is_false(row: Row, value: object) -> bool:
    if isinstance(value, bool):
        return not value
    said = str(value).strip().lower()
    if said not in {"true", "false", "yes", "no", "1", "0"}:
        raise row.wrong("answerable", value, "true or false")
    return said in {"false", "no", "0"}
