"""Rows of JSONL, JSON, CSV and TSV files, with errors that name file, line, key and the likely typo."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from domains.errors import DataError
from domains.jsonl import iter_json_lines

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


class Row:
    """One object of a source file.

    Args:
        data: the object as read.
        where: file and line, for messages.
        fields: our field name → the source's key; names not in it stand for themselves.
    """

    def __init__(self, data: Mapping[str, object], *, where: str, fields: Mapping[str, str]) -> None:
        self.data = data
        self.where = where
        self._fields = fields

    def key(self, name: str) -> str:
        """The source's key for our field ``name``."""
        return self._fields.get(name, name)

    def get(self, name: str) -> object:
        """The value of our field ``name``, or None where the key is absent.

        Raises:
            DataError: the user mapped the field to a key that the row lacks.
        """
        if name in self._fields and self._fields[name] not in self.data:
            raise self._missing(self._fields[name], name)
        return self.data.get(self.key(name))

    def need(self, name: str) -> object:
        """The value of our field ``name``.

        Raises:
            DataError: the key is absent (names the file, the line and the key that was probably meant).
        """
        if self.key(name) not in self.data:
            raise self._missing(self.key(name), name)
        return self.data[self.key(name)]

    def text(self, name: str) -> str:
        """A needed field as stripped text; numbers are spelled out, null is an empty text.

        Raises:
            DataError: the key is absent, or its value is a list or an object.
        """
        return self._as_text(name, self.need(name))

    def optional_text(self, name: str) -> str:
        """`text`, or an empty text where the key is absent."""
        return self._as_text(name, self.get(name))

    def list_of_text(self, name: str) -> list[str]:
        """A needed field as a list of texts.

        Raises:
            DataError: absent, or no list of texts.
        """
        value = self.need(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, value, "a list of texts")
        return [item.strip() for item in value]

    def content_id(self, prefix: str, *parts: str) -> str:
        """The row's own id, or one made from ``parts``: the same content has the same id everywhere."""
        own = self.optional_text("id")
        return own or f"{prefix}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"

    def wrong(self, name: str, value: object, expected: str) -> DataError:
        """The error for a value that can't be used."""
        return DataError(
            f"{self.where}: {self.key(name)!r} is {str(value)[:80]!r}",
            expected=expected,
            next_step=f"mend the row, or name the right key: --field {name}=KEY",
        )

    def _as_text(self, name: str, value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, (list, dict)):
            raise self.wrong(name, value, "a text")
        return str(value).strip()

    def _missing(self, key: str, name: str) -> DataError:
        close = difflib.get_close_matches(key, [*self.data], n=1, cutoff=0.5)
        known = f"keys there: {', '.join(sorted(map(str, self.data)))}"
        return DataError(
            f"{self.where}: no key {key!r}",
            expected=f"did you mean {close[0]!r}? ({known})" if close else known,
            next_step=f"name the right key: --field {name}={close[0] if close else 'KEY'}",
        )


def read_rows(path: Path, *, fields: Mapping[str, str]) -> Iterator[Row]:
    """The rows of a file: JSONL; JSON (a list, or an object of objects, whose keys become ``id``); CSV; TSV.

    Raises:
        DataError: missing, of another kind, not UTF-8, or broken (names the line).
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for number, data in iter_json_lines(path):
            yield Row(data, where=f"{path}:{number}", fields=fields)
    elif suffix == ".json":
        yield from _json_rows(path, fields)
    elif suffix in {".csv", ".tsv"}:
        table = csv.DictReader(_text(path).splitlines(), delimiter="\t" if suffix == ".tsv" else ",")
        for data in table:
            if None in data or None in data.values():
                raise DataError(
                    f"{path}:{table.line_num}: another number of columns than the first line",
                    expected=f"{len(table.fieldnames or [])} columns",
                    next_step=f"mend line {table.line_num} of {path}",
                )
            yield Row(data, where=f"{path}:{table.line_num}", fields=fields)
    else:
        raise DataError(
            f"{path} is of an unknown kind ({suffix or 'no ending'})",
            expected=f"one of {', '.join(SUFFIXES)}",
            next_step="convert it to JSONL, one object per line",
        )


def the_file(source: Path, *, preferred: tuple[str, ...] = ()) -> Path:
    """``source`` itself, or the one data file in a folder.

    Raises:
        DataError: it does not exist, or the folder has none or several candidates (lists them).
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(
            f"{str(source)!r} does not exist", expected="a file or folder", next_step="check the path"
        )
    for name in preferred:
        if (source / name).is_file():
            return source / name
    found = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"{source} holds {len(found)} data files ({names})",
            expected=f"one of {', '.join(SUFFIXES)}",
            next_step="give the file itself instead of the folder",
        )
    return found[0]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{str(path)!r} does not exist", expected="a file", next_step="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start})",
            expected="UTF-8 text",
            next_step=f"re-encode it: iconv -f latin1 -t utf-8 {path}",
        ) from None


def _json_rows(path: Path, fields: Mapping[str, str]) -> Iterator[Row]:
    try:
        data = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON ({error.msg})",
            expected="a JSON list of objects (for one object per line, name the file .jsonl)",
            next_step=f"mend line {error.lineno} of {path}",
        ) from None
    if isinstance(data, dict):
        entries = [
            (f"{path}: {key!r}", {"id": key, **value}) for key, value in data.items() if _is_row(value)
        ]
        whole = len(entries) == len(data)
    else:
        values = data if isinstance(data, list) else [data]
        entries = [
            (f"{path}: item {number}", value) for number, value in enumerate(values, 1) if _is_row(value)
        ]
        whole = len(entries) == len(values)
    if not whole:
        raise DataError(
            f"{path} is neither a JSON list of objects nor an object of objects",
            expected='[{"question": …}, …] or {"id": {"question": …}, …}',
            next_step=f"convert {path} to JSONL, one object per line",
        )
    for where, value in entries:
        yield Row(value, where=where, fields=fields)


def _is_row(value: object) -> bool:
    return isinstance(value, dict)
