"""A domain on disk: a folder with ``domain.toml`` and ``prompts/``; a path works wherever a name does."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from domains.config import DomainConfig, read_config
from domains.errors import ConfigError, DataError
from domains.jsonl import read_jsonl
from domains.records import Instruction, Question

SHIPPED = Path(__file__).parent
PROMPTS = ("system", "teacher")


@dataclass(frozen=True)
class Domain:
    """A validated domain. ``prompts`` maps ``system``, ``teacher`` and whatever else it brings to their texts."""

    folder: Path
    config: DomainConfig
    prompts: dict[str, str]

    @property
    def name(self) -> str:
        """The domain's short name, as in ``runs/<name>/``."""
        return self.config.domain.name

    @property
    def documents(self) -> Path:
        """The folder or file with the documents."""
        return self._resolve(self.config.corpus.documents)

    @property
    def questions(self) -> Path | None:
        """The questions' JSONL file, or None where the domain has none."""
        return self._resolve(self.config.corpus.questions) if self.config.corpus.questions else None

    @property
    def instructions(self) -> Path | None:
        """The general instructions' JSONL file, or None where the domain has none or nothing learns from them."""
        reflect = self.config.reflect
        if not reflect.instructions or reflect.backend != "tokens":
            return None
        return self._resolve(reflect.instructions)

    @property
    def argument(self) -> str:
        """How a command line names the domain from here: its name where that finds it, else its path."""
        try:
            found: Path | None = find_domain(self.name)
        except ConfigError:
            found = None
        return self.name if found == self.folder else str(self.folder)

    def read_questions(self) -> list[Question]:
        """All seed and exam questions, in the file's order.

        Raises:
            ConfigError: ``[corpus] questions`` names no file.
            DataError: the file is wrong (names the line), or two questions share an id.
        """
        path = self.questions
        if path is None:
            raise ConfigError(
                f"the domain {self.name!r} has no questions",
                expected="[corpus] questions in domain.toml, a JSONL file of seed and exam questions",
                next_step="preceptor new NAME --docs DIR makes starter questions; see README, Add a domain",
            )
        questions = read_jsonl(path, Question)
        twice = [name for name, times in Counter(item.id for item in questions).items() if times > 1]
        if twice:
            raise DataError(
                f"{path}: {len(twice)} question ids occur twice, the first is {twice[0]!r}",
                expected="a different id for every question",
                next_step=f"mend {path}",
            )
        return questions

    def read_instructions(self) -> list[Instruction]:
        """The general instructions; none where nothing learns from them.

        Raises:
            DataError: the file is missing or wrong (names the line).
        """
        return read_jsonl(self.instructions, Instruction) if self.instructions is not None else []

    def _resolve(self, value: str) -> Path:
        return (self.folder / Path(value).expanduser()).resolve()


def find_domain(name_or_path: str) -> Path:
    """The folder of a domain: a path, a folder below ``./domains``, or one that ships.

    Raises:
        ConfigError: there is none; names the neighbours.
    """
    places = [Path(name_or_path).expanduser(), Path("domains") / name_or_path, SHIPPED / name_or_path]
    for folder in places:
        if (folder / "domain.toml").is_file():
            return folder.resolve()
    known = available_domains()
    close = difflib.get_close_matches(name_or_path, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise ConfigError(
        f"no domain {name_or_path!r}",
        expected=f"{hint}a folder with a domain.toml, or one of: {', '.join(known) or 'none yet'}",
        next_step="preceptor new NAME --docs DIR",
    )


def available_domains() -> list[str]:
    """Names that `find_domain` knows from here."""
    roots = {SHIPPED.resolve(), Path("domains").resolve()}
    return sorted({path.parent.name for root in roots for path in root.glob("*/domain.toml")})


def load_domain(name_or_path: str, *, profile: str | None = None) -> Domain:
    """Read and validate a domain with its prompts.

    Raises:
        ConfigError: the folder, a key or a prompt is wrong.
    """
    folder = find_domain(name_or_path)
    config = read_config(folder / "domain.toml", profile=profile)
    return Domain(folder=folder, config=config, prompts=read_prompts(folder / "prompts"))


def with_search(domain: Domain) -> Domain:
    """The domain with ``[export] rounding = "search"``.

    Raises:
        ConfigError: its method trains the very blocks that are served.
    """
    config = domain.config
    if config.train.grid is not None:
        raise ConfigError(
            f"there is nothing to search for: [train] method = {config.train.method!r} trains the blocks that are served",
            expected='method = "qlora", whose student is rounded for serving',
            next_step=f"preceptor export {domain.argument}",
        )
    export = config.export.model_copy(update={"rounding": "search"})
    return replace(domain, config=config.model_copy(update={"export": export}))


def read_prompts(folder: Path) -> dict[str, str]:
    """The prompts that every domain brings, and its own for strategies; stripped of outer white space.

    Raises:
        ConfigError: one is missing or empty.
    """
    prompts = {}
    others = sorted({path.stem for path in folder.glob("*.md")} - {*PROMPTS, "README"})
    for name in (*PROMPTS, *others):
        path = folder / f"{name}.md"
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        if not text:
            raise ConfigError(
                f"prompt {str(path)!r} is missing or empty",
                expected=f"the {name} prompt as text",
                next_step=f"copy {SHIPPED / 'medical' / 'prompts' / f'{name}.md'} there and edit it"
                if name in PROMPTS
                else f"write it, or delete {path}: the built-in prompt serves then",
            )
        prompts[name] = text
    return prompts
