"""JSON lines, one record a line; files appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from domains.errors import DataError

R = TypeVar("R", bound=BaseModel)


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to a temporary name, then rename: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_jsonl(path: Path, records: Iterable[BaseModel]) -> int:
    """Write the records atomically; returns how many."""
    lines = [record.model_dump_json() for record in records]
    write_text_atomic(path, "".join(line + "\n" for line in lines))
    return len(lines)


def iter_json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a JSONL file with their line numbers (from 1); blank lines are passed over.

    Raises:
        DataError: the file is missing, not UTF-8, or a line is no JSON object (names file and line).
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not JSON ({error.msg} at column {error.colno}): {line[:80]!r}",
                        expected="one JSON object per line",
                        next_step=f"mend line {number} of {path}",
                    ) from None
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}:{number}: a JSON {type(row).__name__}, {line[:80]!r}",
                        expected="one JSON object per line",
                        next_step=f"mend line {number} of {path}",
                    )
                yield number, row
    except FileNotFoundError:
        raise DataError(
            f"file {str(path)!r} does not exist",
            expected="a JSONL file",
            next_step="check the path, or run the step that writes it (preceptor status)",
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start})",
            expected="UTF-8 text",
            next_step=f"re-encode it: iconv -f latin1 -t utf-8 {path}",
        ) from None


def read_jsonl(path: Path, model: type[R]) -> list[R]:
    """All records of a file, validated.

    Raises:
        DataError: see `iter_json_lines`; or a record does not fit ``model`` (names the line and field).
    """
    records = []
    for number, row in iter_json_lines(path):
        try:
            records.append(model.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the row"
            raise DataError(
                f"{path}:{number}: {where}: {first['msg']} (got {str(first['input'])[:80]!r})",
                expected=f"a {model.__name__}",
                next_step=f"mend line {number} of {path}",
            ) from None
    return records
