"""Writes a bundle: everything that serving needs, with its provenance, in one folder.

student.gguf             the student in the format it is served in
adapter.gguf             the part of the student that is added to it, where it was trained so (grid-lora)
student-<TYPE>.gguf      the other formats
index/                   passages (written by the index stage)
domain.toml prompts/     who the assistant is; the profile that was run, resolved
NOTICE                   licences and attributions that must travel with the model
parity.json              the parity gate's numbers
calibration.json         how sure an answer is (written by the calibrate stage)
reflection.json          fitted threshold and weights of the tokens back-end (written by the calibrate stage)
yes_no.json              fitted weights of the cues that answer yes/no questions (written by the calibrate stage)
manifest.json            hashes, versions, provenance, ready or not; written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from domains.config import DomainConfig, GgufType
from domains.jsonl import write_text_atomic
from serve.manifest import (
    CALIBRATION,
    FITTED_REFLECTION,
    FITTED_YES_NO,
    MANIFEST,
    BaseModelFacts,
    BundleFile,
    Manifest,
    read_manifest,
    write_manifest,
)
from serve.models import sha256_file

ADAPTER = "adapter.gguf"
_PACKAGES = (
    "preceptor",
    "llama-cpp-python",
    "gguf",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "chromadb",
)


def student_file(kind: GgufType, *, served: GgufType) -> str:
    """The name of a format's file in a bundle; the served one is ``student.gguf``."""
    return "student.gguf" if kind == served else f"student-{kind}.gguf"


def open_bundle(bundle: Path, *, keep: Sequence[str]) -> None:
    """Begin to (re)write a bundle: without a manifest nobody takes a half-written one for whole.

    Reports on the students before, and students in formats that are no longer wanted, go.

    Args:
        bundle: the folder; made when missing.
        keep: the students' file names that are about to be written; the old ones stay until then.
    """
    bundle.mkdir(parents=True, exist_ok=True)
    fitted = (CALIBRATION, FITTED_REFLECTION, FITTED_YES_NO)
    for name in (MANIFEST, "parity.json", *fitted, "report.json", "report.html"):
        (bundle / name).unlink(missing_ok=True)
    for path in [*bundle.glob("student*.gguf"), bundle / ADAPTER]:
        if path.name not in keep:
            path.unlink(missing_ok=True)


def adapter_of(student: Path) -> Path | None:
    """The adapter that belongs to a bundle's ``student.gguf``; None where the student is one file, or another file."""
    path = student.with_name(ADAPTER)
    return path if student.name == "student.gguf" and path.is_file() else None


def close_bundle(
    bundle: Path,
    *,
    config: DomainConfig,
    prompts: dict[str, str],
    base: BaseModelFacts,
    teachers: Sequence[str],
    template: str,
) -> Manifest:
    """Write ``domain.toml``, prompts and NOTICE beside the students, then the manifest (not yet ready).

    Args:
        bundle: the folder with the GGUF files.
        config: the resolved configuration.
        prompts: the domain's prompts by name.
        base: what the student was trained from.
        teachers: who wrote the rationales; an API's terms may bind what is made of them.
        template: the chat template of the GGUF files.
    """
    write_text_atomic(bundle / "domain.toml", dump_toml(config.model_dump()))
    for name, text in prompts.items():
        write_text_atomic(bundle / "prompts" / f"{name}.md", text + "\n")
    notices = licence_notices(base, domain_licence=config.domain.licence)
    write_text_atomic(bundle / "NOTICE", "\n".join(notices) + "\n")
    manifest = Manifest(
        domain=config.domain.name,
        title=config.domain.title,
        domain_licence=config.domain.licence,
        base=base,
        teachers=sorted(set(teachers)),
        template_sha256=hashlib.sha256(template.encode()).hexdigest(),
        versions=package_versions(),
        notices=notices,
        files=_hash_files(bundle),
        adapter=ADAPTER if (bundle / ADAPTER).is_file() else "",
        created=_created(),
    )
    write_manifest(bundle, manifest)
    return manifest


def mark_ready(bundle: Path, *, ready: bool) -> Manifest:
    """Note the parity gate's verdict in the manifest, and its file's hash."""
    path = bundle / "parity.json"
    entry = BundleFile(sha256=sha256_file(path), size_bytes=path.stat().st_size)
    old = read_manifest(bundle)
    files = dict(sorted({**old.files, path.name: entry}.items()))
    manifest = old.model_copy(update={"ready": ready, "files": files})
    write_manifest(bundle, manifest)
    return manifest


def note_files(bundle: Path, names: Sequence[str]) -> None:
    """Files that a later stage adds to a bundle: their hashes stand in the manifest like those of the others.

    Does nothing where there is no manifest yet.
    """
    if not (bundle / MANIFEST).is_file():
        return
    entries = {
        name: BundleFile(sha256=sha256_file(bundle / name), size_bytes=(bundle / name).stat().st_size)
        for name in names
    }
    manifest = read_manifest(bundle)
    files = dict(sorted({**manifest.files, **entries}.items()))
    write_manifest(bundle, manifest.model_copy(update={"files": files}))


def drop_file(bundle: Path, name: str) -> None:
    """Take a file that a later stage added out of a bundle, first out of its manifest."""
    if (bundle / MANIFEST).is_file():
        manifest = read_manifest(bundle)
        files = {each: entry for each, entry in manifest.files.items() if each != name}
        write_manifest(bundle, manifest.model_copy(update={"files": files}))
    (bundle / name).unlink(missing_ok=True)


def licence_notices(base: BaseModelFacts, *, domain_licence: str) -> list[str]:
    """What must be said of the licences of base model and documents, one line each."""
    notices = [f"Base model: {base.name}, licence {base.licence or 'unspecified'}."]
    if is_meta_llama(base.licence):
        # Llama 3.2 Community License Agreement, 1.b (i) and (iii)
        edition = f"Llama {base.licence.lower().removeprefix('llama').strip('-_ ')}".strip()
        notices += [
            "Built with Llama",
            f"{edition} is licensed under the {edition} Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        ]
    notices.append(f"Documents of the domain: licence {domain_licence}.")
    return notices


def is_meta_llama(licence: str) -> bool:
    """Whether a base's licence is the Llama Community License, as Hugging Face names it (``llama3.2``)."""
    return licence.lower().startswith("llama")


def package_versions() -> dict[str, str]:
    """Versions of what made the bundle; packages that are not installed are left out."""
    import llama_cpp

    versions = {"llama.cpp": llama_cpp.llama_version().decode()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return dict(sorted(versions.items()))


def dump_toml(data: dict[str, dict[str, object]]) -> str:
    """Tables of scalars, lists and further tables as TOML, readable back by ``tomllib``; None is left out."""
    return "\n".join(line for section, values in data.items() for line in _toml_table(f"[{section}]", values))


def _toml_table(head: str, values: dict[str, Any]) -> list[str]:
    """A table, and those inside it behind it: ``[head.key]``, or ``[[head.key]]`` for each of a list."""
    own, below = [head], []
    for key, value in values.items():
        name = f"{head.strip('[]')}.{key}"
        if isinstance(value, dict):
            below += _toml_table(f"[{name}]", value)
        elif isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
            below += [line for item in value for line in _toml_table(f"[[{name}]]", item)]
        elif value is not None:
            own.append(f"{key} = {_toml_value(value)}")
    return [*own, "", *below]


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    raise TypeError(f"no TOML for {type(value).__name__} {value!r}")


def _hash_files(bundle: Path) -> dict[str, BundleFile]:
    files = {}
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle)
        whole = path.is_file() and not path.name.startswith(".") and path.name != MANIFEST
        if whole and name.parts[0] != "index":
            files[name.as_posix()] = BundleFile(sha256=sha256_file(path), size_bytes=path.stat().st_size)
    return files


def _created() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(epoch), UTC).isoformat() if epoch.isdigit() else ""
