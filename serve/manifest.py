"""``manifest.json``: what a bundle holds, where it came from, and whether it may be served."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from domains.errors import DataError
from domains.jsonl import write_text_atomic
from domains.records import Record

MANIFEST = "manifest.json"
CALIBRATION = "calibration.json"
FITTED_REFLECTION = "reflection.json"
FITTED_YES_NO = "yes_no.json"


class BundleFile(Record):
    """One file of a bundle."""

    sha256: str
    size_bytes: int = Field(ge=0)


class BaseModelFacts(Record):
    """The base model the student was trained from.

    ``version`` identifies its weights: ``sha256:…`` of files, or ``commit:…`` of a Hugging Face snapshot.
    """

    name: str
    licence: str
    version: str


class Manifest(Record):
    """Written last. ``ready`` is true only after the parity gate passed.

    ``files`` are the bundle's files but for ``index/``, whose database changes when it is opened.
    ``adapter`` names the GGUF LoRA that belongs to ``student.gguf``; empty where the student is one file.
    ``created`` is empty unless SOURCE_DATE_EPOCH was set: the same input gives the same bytes.
    """

    schema_version: Literal[1] = 1
    ready: bool = False
    domain: str
    title: str
    domain_licence: str
    base: BaseModelFacts
    teachers: list[str]
    template_sha256: str
    versions: dict[str, str]
    notices: list[str]
    files: dict[str, BundleFile]
    adapter: str = ""
    created: str = ""


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle.

    Raises:
        DataError: it is missing or damaged.
    """
    path = bundle / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"can't read {path}: {error.strerror}",
            expected="a bundle, as the export stage writes it",
            next_step="preceptor export DOMAIN",
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path}: {where}: {first['msg']}",
            expected="a manifest of schema version 1",
            next_step="preceptor export DOMAIN",
        ) from None


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write it; readers see the old one or the new one."""
    write_text_atomic(bundle / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
