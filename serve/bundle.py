"""Opens what can be served: a bundle that the export stage wrote, or an untrained base with an index.

Everything is checked before a model is loaded: the manifest, every file's size, the model's header and
chat template. A bundle is data; nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from domains.config import DomainConfig, read_config
from domains.domain import Domain, find_domain
from domains.errors import ConfigError, DataError, ModelError
from rag.rerank import FOLDER as RERANKER
from rag.retrieve import Retriever, open_retriever
from serve.assistant import Assistant
from serve.confidence import Calibration, Choice, describe_choice, read_calibration
from serve.engine import Engine
from serve.gguf_check import check_gguf
from serve.manifest import CALIBRATION, FITTED_REFLECTION, FITTED_YES_NO, MANIFEST, Manifest, read_manifest
from serve.models import SMOLLM2, inference_gguf, sha256_file
from serve.reflection import open_reflector
from serve.reflection_fit import fitted
from serve.shared_models import SharedModels
from serve.vote import Votes
from serve.yes_no import read_yes_no

STUDENT = "student.gguf"
_NO_YES_NO = (
    'The student answers yes/no questions: [serve] yes_no = "evidence" needs weights that the calibrate stage fitted '
    "and kept, and there are none."
)


@dataclass(frozen=True)
class OpenBundle:
    """An assistant ready to answer, and where it came from. ``manifest`` is None for an untrained base.

    ``notes`` are what a user should be told before asking.
    """

    assistant: Assistant
    engine: Engine
    retriever: Retriever
    config: DomainConfig
    manifest: Manifest | None
    folder: Path
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the assistant is called on the wire: the domain's name."""
        return self.config.domain.name

    def close(self) -> None:
        """Free the model and give the index's files back."""
        self.assistant.close()
        self.engine.close()
        self.retriever.close()

    def __enter__(self) -> OpenBundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_bundle(target: str, runs: Path, *, base: bool = False) -> Path:
    """The bundle that is meant: a path, or the latest of a domain's runs.

    Args:
        target: the path of a bundle, or a domain (a name or a path).
        runs: the folder with all runs, ``<runs>/<domain>/<run>/bundle``.
        base: only the bundle's index is wanted, which is there long before the rest.

    Raises:
        DataError: there is none yet.
        ConfigError: ``target`` is neither a bundle nor a domain.
    """
    wanted = "index/index.json" if base else MANIFEST
    if (Path(target).expanduser() / wanted).is_file():
        return Path(target).expanduser()
    domain = _domain_name(target)
    latest = runs / domain / "latest" / "bundle"
    if not base and (latest / wanted).is_file():
        return latest
    found = [path for path in (runs / domain).glob(f"*/bundle/{wanted}") if path.parts[-4 - base] != "latest"]
    if found:
        newest = max(found, key=lambda path: (path.stat().st_mtime_ns, str(path)))
        return newest.parent.parent if base else newest.parent
    if runs.is_file():
        raise DataError(
            f"{str(runs)!r} is a file",
            expected="the folder where runs lie",
            next_step="choose another with --runs DIR",
        )
    if not (runs / domain).is_dir():
        find_domain(target)  # neither a run nor a domain: names the neighbours
    raise DataError(
        f"no {'index' if base else 'finished run'} of {domain!r} in {str(runs)!r}",
        expected="the path of a bundle, or a domain that was run",
        next_step=f"preceptor run {target}",
    )


def _domain_name(target: str) -> str:
    try:
        return read_config(find_domain(target) / "domain.toml").domain.name
    except ConfigError:
        if Path(target).name == target:
            return target  # its folder may be gone; its runs say whether it is known
        raise


def open_bundle(
    folder: Path, *, parallel: int | None = None, unready_ok: bool = False, shared: SharedModels | None = None
) -> OpenBundle:
    """Check a bundle and load it.

    Args:
        folder: with ``manifest.json``, ``student.gguf``, ``index/``, ``domain.toml`` and ``prompts/``.
        parallel: conversations at a time; as in ``domain.toml`` when None.
        unready_ok: also open a bundle that has not passed the parity gate.
        shared: models that are loaded already, by their file's sha256; bundles with the same student file share one.

    Raises:
        DataError: the manifest, a file it names, or the index is missing or damaged.
        ModelError: the student is damaged, not the one of the manifest, or not ready.
        IndexMismatch: the index was built with another embedder.
    """
    manifest = read_manifest(folder)
    if not manifest.ready and not unready_ok:
        raise ModelError(
            f"the bundle {str(folder)!r} is not ready: it has not passed the parity gate",
            expected='"ready": true in manifest.json; parity.json has the numbers',
            next_step=f"preceptor export {manifest.domain}",
        )
    _check_files(folder, manifest)
    _check_student(folder / STUDENT, manifest)
    config = read_config(folder / "domain.toml", idle_ok=True)
    system = _read_prompt(folder / "prompts" / "system.md", manifest.domain)
    return _open(
        config, folder, gguf=folder / STUDENT, index_folder=folder / "index", system=system,
        manifest=manifest, parallel=parallel, calibration=_read_calibration(folder, manifest), shared=shared,
    )  # fmt: skip


def open_base(
    domain: Domain, index_folder: Path, *, parallel: int | None = None, shared: SharedModels | None = None
) -> OpenBundle:
    """The domain's untrained base with the domain's index: cited answers before any training.

    Raises:
        ModelError: there is no GGUF file of the base.
        DataError: the index is missing or damaged.
        IndexMismatch: the index was built with another embedder.
    """
    base = domain.config.student.base
    if base != SMOLLM2 and not Path(base).expanduser().is_file():
        raise ModelError(
            f"the base {base!r} of {domain.name!r} can't answer before it is exported: it is no GGUF file",
            expected=f"{SMOLLM2!r} or the path of a GGUF file in [student] base",
            next_step=f"preceptor run {domain.name}   (trains and exports a student, which can be served)",
        )
    return _open(
        domain.config, domain.folder, gguf=inference_gguf(base), index_folder=index_folder,
        system=domain.prompts["system"], manifest=None, parallel=parallel, shared=shared,
    )  # fmt: skip


def _open(
    config: DomainConfig,
    folder: Path,
    *,
    gguf: Path,
    index_folder: Path,
    system: str,
    manifest: Manifest | None,
    parallel: int | None,
    calibration: Calibration | None = None,
    shared: SharedModels | None = None,
) -> OpenBundle:
    choice, notes = _choose(calibration, config.serve.max_wrong)
    yes_no = None
    if config.serve.yes_no == "evidence":
        if manifest is not None and FITTED_YES_NO in manifest.files:
            yes_no = read_yes_no(folder / FITTED_YES_NO)
        else:
            notes.append(_NO_YES_NO)
    reflect = config.reflect
    if manifest is not None and FITTED_REFLECTION in manifest.files:
        reflect = fitted(reflect, folder)
    if manifest is None and reflect.backend in {"tokens", "text"}:
        reflect = reflect.model_copy(update={"backend": "none"})
        notes.append(f"The untrained student has not learnt [reflect] backend = {config.reflect.backend!r}.")
    retriever = open_retriever(index_folder, config.retrieve, config.rerank)
    try:
        known = manifest.files[STUDENT].sha256 if manifest else None
        engine = Engine(
            gguf if shared is None else shared.find(gguf, sha256=known),
            context=config.student.context,
            parallel=parallel or config.serve.parallel,
            adapter=folder / manifest.adapter if manifest and manifest.adapter else None,
            kv_cache=config.serve.kv_cache,
        )
        try:
            reflector = open_reflector(reflect, engine)
        except BaseException:
            engine.close()
            raise
    except BaseException:
        retriever.close()
        raise
    assistant = Assistant(
        engine,
        retriever,
        system=system,
        abstain=config.domain.abstain,
        top_k=config.retrieve.top_k,
        max_tokens=config.serve.max_tokens,
        unsupported=config.serve.unsupported,
        calibration=calibration,
        threshold=choice.level.threshold if choice else 0.0,
        reflector=reflector,
        options=config.serve.options,
        yes_no=yes_no,
        votes=Votes(config.serve.votes, config.serve.vote_temperature),
    )
    return OpenBundle(assistant, engine, retriever, config, manifest, folder, notes)


def _choose(calibration: Calibration | None, max_wrong: float) -> tuple[Choice | None, list[str]]:
    """The threshold for ``[serve] max_wrong``, and what a user must know about it."""
    if not max_wrong:
        return None, []
    choice = calibration.choose(max_wrong) if calibration else None
    if choice is None:
        reason = calibration.reason if calibration else "there is no calibration"
        return None, [
            f"[serve] max_wrong = {max_wrong:g} can't be kept: {reason}. Answers are given however unsure they are."
        ]
    return choice, [describe_choice(choice, max_wrong)]


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there in its size; what is opened of them byte for byte.

    The other formats are not opened, so their bytes are not read.
    """
    problems = []
    for name in (STUDENT, manifest.adapter):
        if name and name not in manifest.files:
            problems.append(f"{name}: not in the manifest")
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{name}: not a path inside the bundle")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry.size_bytes:
            problems.append(f"{name}: {path.stat().st_size} bytes instead of {entry.size_bytes}")
        elif _read_whole(name, manifest) and sha256_file(path) != entry.sha256:
            problems.append(f"{name}: its bytes changed (sha256)")
    if problems:
        raise DataError(
            f"the bundle {str(folder)!r} is damaged: {'; '.join(problems)}",
            expected=f"the files that {MANIFEST} names",
            next_step=f"copy the bundle again, or preceptor export {manifest.domain}",
        )


def _read_whole(name: str, manifest: Manifest) -> bool:
    whole = {STUDENT, manifest.adapter, CALIBRATION, FITTED_YES_NO, FITTED_REFLECTION}
    return name in whole or name.startswith(f"{RERANKER}/")


def _read_calibration(folder: Path, manifest: Manifest) -> Calibration | None:
    """None where the manifest knows of none: a bundle that was exported and not calibrated."""
    if CALIBRATION not in manifest.files:
        return None
    calibration = read_calibration(folder / CALIBRATION)
    for name in filter(None, (STUDENT, manifest.adapter)):
        if calibration.sources.get(name) != manifest.files[name].sha256:
            raise DataError(
                f"{str(folder / CALIBRATION)!r} was fitted to another student",
                expected=f"sha256 {manifest.files[name].sha256[:12]}… of {name}",
                next_step=f"preceptor calibrate {manifest.domain}",
            )
    return calibration


def _check_student(gguf: Path, manifest: Manifest) -> None:
    template = check_gguf(gguf).metadata.get("tokenizer.chat_template", "")
    found = hashlib.sha256(str(template).encode()).hexdigest()
    if found != manifest.template_sha256:
        raise ModelError(
            f"the chat template in {str(gguf)!r} has sha256 {found[:12]}…",
            expected=f"{manifest.template_sha256[:12]}…, the one the student was trained with",
            next_step=f"copy the bundle again, or preceptor export {manifest.domain}",
        )


def _read_prompt(path: Path, domain: str) -> str:
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not text:
        raise DataError(
            f"{str(path)!r} is missing or empty",
            expected="the domain's system prompt",
            next_step=f"copy the bundle again, or preceptor export {domain}",
        )
    return text
