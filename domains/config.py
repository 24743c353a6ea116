"""``domain.toml`` as frozen records: unknown keys, wrong types and bad values are errors, all at once."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from domains.errors import ConfigError
from domains.records import Record

GgufType = Literal["F16", "Q8_0", "Q4_0", "Q4_K_M"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class DomainSection(Record):
    """Who the assistant is. ``abstain`` is the one sentence it says when the documents do not answer."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{1,48}$")
    title: str
    description: str = ""
    disclaimer: str = ""
    licence: str = "unspecified"
    abstain: str = "I don't know: the documents do not say."


class CorpusSection(Record):
    """Where the documents and the questions lie; relative paths start at the domain's folder."""

    documents: str
    questions: str = ""


class IndexSection(Record):
    """How documents become passages; lengths in characters."""

    passage_chars: Annotated[int, Field(ge=200, le=8000)] = 400
    overlap_chars: Annotated[int, Field(ge=0, le=2000)] = 0


class RetrieveSection(Record):
    """Hybrid retrieval: reciprocal rank fusion (Cormack et al. 2009, k=60) of dense and lexical lists."""

    top_k: Count = 3
    candidates: Count = 50
    rrf_k: Count = 60
    lexical_weight: Annotated[float, Field(ge=0)] = 1.0
    dense_weight: Annotated[float, Field(ge=0)] = 1.0


class TeacherSection(Record):
    """The teacher: an OpenAI-compatible endpoint (``base_url``/``model``) or a local GGUF.

    ``kind = "auto"`` takes the endpoint when the key's environment variable is set, else the local
    model, and says so. Prices are in ``currency`` per million tokens; ``max_cost`` is a hard cap.
    """

    kind: Literal["auto", "endpoint", "local"] = "local"
    base_url: str = "https://api.openai.com/v1"
    model: str = "gpt-4o-mini"
    api_key_env: str = "OPENAI_API_KEY"
    gguf: str = "smollm2-135m"
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    max_tokens: Count = 160
    concurrency: Count = 8
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_retries: Annotated[int, Field(ge=0, le=20)] = 5
    price_prompt: Annotated[float, Field(ge=0)] = 0.15
    price_completion: Annotated[float, Field(ge=0)] = 0.60
    currency: str = "USD"
    max_cost: Annotated[float, Field(ge=0)] = 5.0


class ElicitSection(Record):
    """How many seed questions are put to the teacher (0 = all) and how often each."""

    questions: Annotated[int, Field(ge=0)] = 0
    samples: Count = 2
    seed: int = 0


class CurateSection(Record):
    """What is kept for training.

    Shares are of all training rows: ``retrieved_share`` rows take their passages from the question's
    own retrieval instead of the teacher's, ``irrelevant_share`` rows get passages that do not answer
    and the abstention as target (closing the gap between training and serving); ``abstention_share`` is
    the most that abstentions of all kinds may be of all rows.
    ``decontaminate_ngram`` is the length in words of an n-gram that no training question may share
    with an exam question.
    """

    min_words: Annotated[int, Field(ge=0)] = 4
    max_words: Count = 160
    keep_per_question: Count = 1
    near_duplicate: Share = 0.85
    decontaminate_ngram: Count = 8
    retrieved_share: Share = 0.4
    irrelevant_share: Share = 0.05
    abstention_share: Annotated[float, Field(ge=0, le=0.5)] = 0.15
    rationale_in_target: bool = False
    seed: int = 0
    checks: list[str] = []


class StudentSection(Record):
    """The base model: ``smollm2-135m``, a Hugging Face id, or a folder; and its context in tokens."""

    base: str = "smollm2-135m"
    context: Annotated[int, Field(ge=256)] = 2048


class TrainSection(Record):
    """QLoRA (arXiv 2305.14314): NF4 base, LoRA on all linear layers, loss on completions only."""

    method: Literal["qlora"] = "qlora"
    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup_share: Share = 0.1
    epochs: Count = 2
    max_rows: Annotated[int, Field(ge=0)] = 0
    pack_tokens: Count = 1024
    packs_per_step: Count = 2
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    checkpoint_steps: Count = 10
    seed: int = 0


class ExportSection(Record):
    """Formats written by llama.cpp's quantizer; ``serve`` is the one that the bundle opens with."""

    formats: list[GgufType] = ["Q8_0", "Q4_0", "Q4_K_M"]
    serve: GgufType = "Q8_0"
    imatrix_tokens: Annotated[int, Field(ge=0)] = 4096


class ParitySection(Record):
    """Bounds of the parity gate; KL in nats per token, mean over teacher-forced positions."""

    prompts: Count = 8
    max_kl: Annotated[float, Field(gt=0)] = 0.02
    min_top1: Share = 0.9


class ExamSection(Record):
    """How many exam questions are asked (0 = all) and how the intervals are drawn."""

    questions: Annotated[int, Field(ge=0)] = 0
    max_tokens: Count = 120
    resamples: Count = 2000
    seed: int = 0


class ServeSection(Record):
    """Serving. ``withdraw_unsupported``: an answer that no passage supports becomes the abstention."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    max_tokens: Count = 160
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    withdraw_unsupported: bool = True


class DomainConfig(Record):
    """A whole ``domain.toml``."""

    domain: DomainSection
    corpus: CorpusSection
    index: IndexSection = IndexSection()
    retrieve: RetrieveSection = RetrieveSection()
    teacher: TeacherSection = TeacherSection()
    elicit: ElicitSection = ElicitSection()
    curate: CurateSection = CurateSection()
    student: StudentSection = StudentSection()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    parity: ParitySection = ParitySection()
    exam: ExamSection = ExamSection()
    serve: ServeSection = ServeSection()


def parse_config(text: str, *, origin: str, profile: str | None = None) -> DomainConfig:
    """A validated config; ``[profiles.<profile>]`` tables override the rest when a profile is named.

    Every profile in the file is validated, not only the chosen one.

    Raises:
        ConfigError: not TOML, unknown profile, or any number of wrong keys and values (all listed).
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{origin} is not valid TOML: {error}",
            expected="TOML, see domains/medical/domain.toml",
            next_step=f"mend {origin}",
        ) from None
    profiles = data.pop("profiles", {})
    if not isinstance(profiles, dict):
        raise ConfigError(
            f"{origin}: profiles is a {type(profiles).__name__}", expected="tables [profiles.NAME.SECTION]"
        )
    if profile is not None and profile not in profiles and profile != "full":
        raise ConfigError(
            f"profile {profile!r} is not in {origin}",
            expected=f"one of {sorted({*profiles, 'full'})}",
            next_step="preceptor run NAME --profile full",
        )
    problems: list[str] = []
    configs = {"full": _validate(data, problems)}
    for name, overrides in profiles.items():
        if not isinstance(overrides, dict):
            problems.append(f"profiles.{name}: {overrides!r}, expected tables like [profiles.{name}.train]")
            continue
        nested: list[str] = []
        configs[name] = _validate(_overlay(data, overrides), nested)
        problems += [f"profile {name!r}: {problem}" for problem in nested if problem not in problems]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(
            f"{origin}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems),
            expected="the keys described in docs/configuration.md",
            next_step=f"mend {origin} and run the command again",
        )
    config = configs[profile or "full"]
    assert config is not None  # no problems means every config validated
    return config


def read_config(path: Path, *, profile: str | None = None) -> DomainConfig:
    """`parse_config` of a file.

    Raises:
        ConfigError: as `parse_config`, or the file is missing or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(
            f"{str(path)!r} does not exist",
            expected="a domain.toml",
            next_step="preceptor new NAME --docs DIR",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start})", expected="UTF-8 text") from None
    return parse_config(text, origin=str(path), profile=profile)


def _overlay(data: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(data)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _validate(data: dict[str, Any], problems: list[str]) -> DomainConfig | None:
    try:
        return DomainConfig.model_validate(data)
    except ValidationError as error:
        problems += [_explain(item) for item in error.errors()]
        return None


def _explain(error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    where = ".".join(loc)
    if error["type"] == "extra_forbidden":
        known = list(DomainConfig.model_fields) if len(loc) == 1 else _section_keys(loc[0])
        close = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing"
    return f"{where} = {error['input']!r}: {error['msg'].lower()}"


def _section_keys(section: str) -> list[str]:
    field = DomainConfig.model_fields.get(section)
    kind = field.annotation if field else None
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Record) else []
