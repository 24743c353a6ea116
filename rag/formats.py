"""One reader per file format: each turns a file into drafts of documents, or says why it can't.

A reader never fetches anything: no network, no entities, no scripts, no linked files.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag.html import page_text
from rag.jats import JatsError, read_articles

_MAX_UNZIPPED = 500_000_000  # bytes that a .docx may unpack to
_BOMS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class Unreadable(Exception):
    """A file (or a row of one) can't be read; the message is the reason, and what to do about it."""


@dataclass(frozen=True)
class Draft:
    """What a file says: ``doc_id`` and ``row`` are set where a file holds several documents."""

    title: str
    text: str
    meta: dict[str, str] = field(default_factory=dict)
    doc_id: str = ""
    row: int = 0
    problem: str = ""


def read_text(path: Path) -> str:
    r"""UTF-8 (or UTF-16 with its mark) with ``\n`` line ends; nothing else is changed.

    Raises:
        Unreadable: another encoding, or no text at all.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"0x{data[error.start]:02x}" if error.start < len(data) else "the end"
        raise Unreadable(
            f"byte {byte} at position {error.start} is not {encoding.removesuffix('-sig').upper()}: "
            f"re-encode it, e.g. iconv -f latin1 -t utf-8 {path.name} > new && mv new {path.name}"
        ) from None
    if "\0" in text:
        raise Unreadable("it holds NUL characters: a binary file, not text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def name_title(path: Path) -> str:
    """A title made of the file's name."""
    return re.sub(r"[-_\s]+", " ", path.stem).strip() or path.stem


def read_plain(path: Path) -> list[Draft]:
    """A .txt file."""
    return [Draft(title=name_title(path), text=read_text(path))]


def read_markdown(path: Path) -> list[Draft]:
    """Markdown; the text after the front matter is kept as it is, so quotes of it stay literal."""
    meta, body = split_front_matter(read_text(path))
    heading = re.search(r"^# +(.+?)[ #]*$", body, re.MULTILINE)
    title = meta.pop("title", "") or (heading[1] if heading else "") or name_title(path)
    return [Draft(title=title, text=body, meta=meta)]


def split_front_matter(text: str) -> tuple[dict[str, str], str]:
    """``key: value`` lines between two ``---`` lines, and the rest of the text.

    A line without a key goes on with the value before it (YAML's lists are joined with commas).
    """
    lines = text.split("\n")
    if lines[0].rstrip() != "---" or "---" not in (line.rstrip() for line in lines[1:]):
        return {}, text
    end = next(i for i, line in enumerate(lines) if i and line.rstrip() == "---")
    meta: dict[str, str] = {}
    key = ""
    for line in lines[1:end]:
        match = re.match(r"([A-Za-z_][\w .-]*?)\s*:(?:\s+(.*))?$", line)
        if match:
            key = match[1].lower()
            meta[key] = (match[2] or "").strip().strip("\"'")
        elif line.strip() and key:
            more = line.strip().removeprefix("- ").strip("\"'")
            meta[key] = f"{meta[key]}, {more}" if meta[key] else more
    return {key: value for key, value in meta.items() if value}, "\n".join(lines[end + 1 :])


def read_html(path: Path) -> list[Draft]:
    """The text of a page, in UTF-8 or in the encoding that it declares."""
    data = path.read_bytes()
    if not data.strip():
        return []
    declared = b"charset" in data[:4096].lower() or data.startswith(tuple(mark for mark, _ in _BOMS))
    try:
        data.decode("utf-8-sig")
        encoding: str | None = "utf-8"
    except UnicodeDecodeError:
        if not declared:
            read_text(path)  # raises, naming the byte
        encoding = None
    title, text = page_text(data, encoding=encoding)
    return [Draft(title=title or name_title(path), text=text)]


def read_pdf(path: Path) -> list[Draft]:
    """The text layer of a PDF, page after page.

    Raises:
        Unreadable: it is encrypted, or has no text layer.
    """
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # oddities of a file that is read all the same
    reader = pypdf.PdfReader(path)
    if reader.is_encrypted:
        try:
            opened = bool(reader.decrypt(""))
        except Exception:  # an algorithm that needs a package which is not here
            opened = False
        if not opened:
            raise Unreadable("encrypted: take the password off first, e.g. qpdf --decrypt in.pdf out.pdf")
    pages = [_page_text(page.extract_text()) for page in reader.pages]
    bare = [str(number) for number, text in enumerate(pages, 1) if not text]
    if len(bare) == len(pages):
        raise Unreadable("no text layer: run OCR first, e.g. ocrmypdf")
    title = (reader.metadata.title or "").strip() if reader.metadata else ""
    meta = {"pages": str(len(pages))}
    if bare:
        meta["pages_without_text"] = ", ".join(bare)
    return [Draft(title=title or name_title(path), text="\n\n".join(filter(None, pages)), meta=meta)]


def _page_text(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\0", "")
    text = re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", text)  # a word cut at the end of a line
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def read_docx(path: Path) -> list[Draft]:
    """Headings, paragraphs, list items and table rows of a Word file.

    Raises:
        Unreadable: it unpacks to more than 500 MB.
    """
    import docx

    with zipfile.ZipFile(path) as archive:
        if (size := sum(entry.file_size for entry in archive.infolist())) > _MAX_UNZIPPED:
            raise Unreadable(f"it unpacks to {size / 1e6:,.0f} MB, over {_MAX_UNZIPPED / 1e6:.0f} MB")
    document = docx.Document(str(path))
    lines: list[str] = []
    title = (document.core_properties.title or "").strip()
    for item in document.iter_inner_content():
        if hasattr(item, "rows"):
            lines += [_row(row) for row in item.rows]
            continue
        text = " ".join(item.text.split())
        style = (item.style.name or "") if item.style is not None else ""
        if style == "Title":
            title = title or text
        elif text and style.startswith("Heading"):
            lines.append(f"## {text}")
        elif text:
            lines.append(f"- {text}" if style.startswith("List") else text)
    return [Draft(title=title or name_title(path), text="\n\n".join(filter(None, lines)))]


def _row(row: Any) -> str:
    cells: list[str] = []
    previous = None
    for cell in row.cells:  # a merged cell comes once for each column it spans
        if cell._tc is not previous:
            cells.append(" ".join(cell.text.split()))
        previous = cell._tc
    return " | ".join(filter(None, cells))


def read_jsonl_rows(path: Path) -> list[Draft]:
    """One document a line: ``doc_id`` or ``id``, ``title``, ``text``; whatever else it has becomes meta."""
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [_draft_of_row(path, number, line) for number, line in lines if line.strip()]


def _draft_of_row(path: Path, number: int, line: str) -> Draft:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Draft(title="", text="", row=number, problem=f"not JSON ({error})")
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return Draft(title="", text="", row=number, problem="no JSON object with a string 'text'")
    doc_id = str(row.pop("doc_id", "") or row.pop("id", "") or f"{path.stem}-{number}")
    title = str(row.pop("title", "") or doc_id)
    text = row.pop("text").replace("\r\n", "\n").replace("\r", "\n")
    nested = row.pop("meta", None)
    rest = {**row, **nested} if isinstance(nested, dict) else row
    meta = {str(key): _as_text(value) for key, value in rest.items() if value is not None}
    return Draft(title=title, text=text, meta=meta, doc_id=doc_id, row=number)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def read_xml(path: Path) -> list[Draft]:
    """Journal articles in JATS; other XML is refused.

    Raises:
        Unreadable: it is not JATS, or broken.
    """
    try:
        articles = read_articles(path.read_bytes())
    except JatsError as error:
        raise Unreadable(str(error)) from None
    return [
        Draft(
            title=article.title or name_title(path),
            text=article.text,
            meta=article.meta,
            doc_id=f"{path.stem}-{number}" if len(articles) > 1 else "",
        )
        for number, article in enumerate(articles, start=1)
    ]


READERS: dict[str, Callable[[Path], list[Draft]]] = {
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".txt": read_plain,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
    ".docx": read_docx,
    ".jsonl": read_jsonl_rows,
    ".xml": read_xml,
}


def read_drafts(path: Path) -> Iterator[Draft]:
    """The drafts in a file.

    Raises:
        Unreadable: with the reason; whatever a parser throws at a damaged file becomes one too.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise Unreadable(f"unknown suffix {path.suffix!r}: readable are {', '.join(sorted(READERS))}")
    try:
        yield from reader(path)
    except Unreadable:
        raise
    except PermissionError:
        raise Unreadable("no permission to read it") from None
    except Exception as error:  # parsers of binary formats raise anything on a damaged file
        first = (str(error).splitlines() or [""])[0]
        raise Unreadable(
            f"damaged or no {path.suffix} file ({type(error).__name__}: {first[:200]})"
        ) from None
