"""``domain.toml`` as frozen records: unknown keys, wrong types and bad values are errors, all at once."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from domains.errors import ConfigError
from domains.records import Record
from domains.routes import LEAST_LABELS, Grid, Method, complete_export, complete_train, contradictions, idle
from domains.steps import STEPS, JudgeOptions, LabelStep, Step

GgufType = Literal["F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K_M"]
AnswersBy = Literal["student", "evidence"]
Rounding = Literal[
    "rtn", "mse", "gptq", "r2-gptq", "r1r2-gptq", "learned-gptq", "learned-kl-gptq", "learned-ce-gptq", "tuned-gptq"
]  # fmt: skip
KvCache = Literal["f16", "q8_0", "q4_0"]
Share = Annotated[float, Field(ge=0, le=1)]
OnUnsupported = Literal["withdraw", "drop", "mark", "keep"]
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
    """How many seed questions are put to the teacher (0 = all), how often each, and by which strategies.

    ``steps`` run in order, each on the rows of the one before it; ``judge`` is who grades and criticises, the teacher where
    it says nothing else. A step's budget is a number of calls.
    """

    questions: Annotated[int, Field(ge=0)] = 0
    samples: Count = 2
    seed: int = 0
    judge: JudgeOptions = JudgeOptions()
    steps: Annotated[list[Step], Field(min_length=1)] = [LabelStep()]


class CurateSection(Record):
    """What is kept for training.

    ``retrieved_share`` of the rows that come from rationales take their passages from the question's own retrieval
    instead, as far as these answer for certain or, where there are gold quotes, certainly don't, or may answer a closed question
    that nothing can be quoted for (the report counts the others);
    ``irrelevant_share`` of all rows show passages that do not answer, with the abstention as target (closing the gap
    between training and serving); ``abstention_share`` is the most that abstentions of all kinds may be of all rows.
    ``evidence`` says which passages the other rows show: ``gold`` those that the teacher saw, ``rationale``
    those that BM25 finds with the rationale (KARD, arXiv 2305.18395). The ``tokens`` and ``text`` back-ends of
    ``[reflect]`` draw passages of their own: there neither ``evidence`` nor ``retrieved_share`` may be set (what a profile
    inherits has no effect).
    ``keep_per_question``: more than one is kept only where they make different rows: with ``rationale_in_target``, with
    ``[reflect] drafts`` = ``explained``, with ``evidence`` = ``rationale`` where they find other passages, or where a question
    has no gold quote and they quote other words. ``verifier`` says who decides whether a
    rationale entails the answer: ``rules``, or also a ``model`` that has to find the answer of a closed question from the
    rationale alone (of open ones the rules decide). ``decontaminate_ngram`` is the length in words of an n-gram that no training question may share
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
    evidence: Literal["gold", "rationale"] = "gold"
    verifier: Literal["rules", "model"] = "rules"
    verifier_gguf: str = "smollm2-135m"
    seed: int = 0
    checks: list[str] = []


class ReflectSection(Record):
    """Self-RAG (arXiv 2310.11511) and SAIL (arXiv 2305.15225): how the student judges passages and itself.

    ``backend``: ``tokens`` (reflection tokens), ``text`` (SAIL's plain verdicts), ``grader`` (an external
    judge) or ``none``. The shares are the augmentation's published sampling: how many rows without
    retrieval are kept, how often a partly supported passage is taken, and one without support. ``drafts``, what becomes
    segments of the ``tokens`` back-end: the reference ``answer``, or the answer ``explained``: behind it the teacher's rationale, sentence
    by sentence. Where answers have one sentence, the long form needs the second. ``critic`` labels
    the training rows: the ``teacher``; ``rules`` (word overlap and gold quotes, a stand-in); ``trained``, a
    small classifier that learns from the teacher's labels of ``critic_sample`` rows (a quarter of them ``instructions``,
    where there are any) and labels the others;
    ``auto`` is rules for a local teacher, else trained. ``instructions`` is a JSONL file (`Instruction`; from the domain's
    folder) of requests that need no document: rows of ``tokens`` that open with ``[No Retrieval]``. More than ``max_unparsed`` unreadable labels end the stage.
    At serving:
    retrieve where the normalised probability of ``[Retrieval]`` exceeds ``threshold``; the weights are of the
    segment score. ``distracting``: what is said when every passage is judged beside the point, by ``text`` and ``grader`` (``tokens``
    answers from the best one all the same, and the key may not be set there). ``judge`` is the
    grader's: word overlap (``rules``), an OpenAI-compatible endpoint, or a second GGUF; ``rewrites`` is how often it
    may look again with other words when no passage is relevant.
    ``fit``: the calibrate stage fits ``threshold`` and weights of the ``tokens`` back-end by grid search on seed questions
    and on general instructions that training left out, answered in short form. What it finds stands in for the values
    here (in long form too), but only where settings fitted to other documents are certainly better than these.
    """

    backend: Literal["none", "text", "tokens", "grader"] = "none"
    instructions: str = ""
    drafts: Literal["answer", "explained"] = "answer"
    passages: Count = 5
    no_retrieval_share: Share = 0.4
    partial_share: Share = 0.7
    unsupported_share: Share = 0.25
    critic: Literal["auto", "teacher", "rules", "trained"] = "auto"
    critic_sample: Annotated[int, Field(ge=LEAST_LABELS)] = 200
    max_unparsed: Share = 0.2
    threshold: Share = 0.2
    relevance_weight: Annotated[float, Field(ge=0)] = 1.0
    support_weight: Annotated[float, Field(ge=0)] = 1.0
    utility_weight: Annotated[float, Field(ge=0)] = 0.5
    sequence_weight: Annotated[float, Field(ge=0)] = 0.0
    fit: bool = True
    form: Literal["short", "long"] = "short"
    beam: Count = 2
    depth: Count = 6
    drop_unsupported: bool = True
    distracting: Literal["abstain", "answer"] = "abstain"
    judge: Literal["rules", "endpoint", "gguf"] = "rules"
    judge_base_url: str = "https://api.openai.com/v1"
    judge_model: str = "gpt-4o-mini"
    judge_api_key_env: str = "OPENAI_API_KEY"
    judge_gguf: str = "smollm2-135m"
    judge_timeout_s: Annotated[float, Field(gt=0)] = 20.0
    rewrites: Annotated[int, Field(ge=0, le=1)] = 1
    seed: int = 0


class RerankSection(Record):
    """KARD's reranker (arXiv 2305.18395): learns from the question the order that BM25 gives with the rationale.

    ``pool`` passages each of rationale and question, of which ``draws`` are taken afresh each epoch; ``k1`` and ``b`` are
    BM25's there. ``loss`` is ``kl``, the paper's, or ``ce``, the default of its released code; ``tau1`` and ``tau2`` are
    the temperatures of targets and scores. ``rank`` 0 trains the whole question encoder. ``dimensions`` are numbers
    per token of a stored passage. ``development_share`` of the documents is held out: it decides the epoch and how
    much the fused score counts, and the reranker is kept only where it certainly helps there, or with ``keep`` = ``always``
    in any case. When answering, the first ``candidates`` of the hybrid list are ordered anew.
    """

    enabled: bool = False
    keep: Literal["proven", "always"] = "proven"
    loss: Literal["kl", "ce"] = "kl"
    tau1: Annotated[float, Field(gt=0)] = 1.0
    tau2: Annotated[float, Field(gt=0)] = 10.0
    k1: Annotated[float, Field(ge=0)] = 0.9
    b: Share = 0.4
    pool: Annotated[int, Field(ge=2)] = 32
    draws: Annotated[int, Field(ge=2)] = 8
    epochs: Count = 6
    batch: Count = 16
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    rank: Annotated[int, Field(ge=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    dimensions: Annotated[int, Field(ge=8, le=384)] = 128
    candidates: Count = 100
    development_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    seed: int = 0


class StudentSection(Record):
    """The base model: ``smollm2-135m``, a Hugging Face id, or a folder; and its context in tokens."""

    base: str = "smollm2-135m"
    context: Annotated[int, Field(ge=256)] = 2048


class LeversSection(Record):
    """What makes training fast; nothing here changes the result beyond rounding (`pipeline/levers.py` says what each is).

    ``checkpointing``: ``on`` computes the forward pass twice and keeps little of it, ``auto`` does so where memory
    is too small. ``parallel_packs``, ``shared_prefix``, ``last_layer``, ``fused_layers`` and ``matmul_attention`` act on CPUs.
    """

    parallel_packs: bool = True
    packing: bool = True
    even_lengths: bool = True
    supervised_head: bool = True
    chunked_loss: bool = True
    shared_prefix: bool = True
    last_layer: bool = True
    fused_layers: bool = True
    matmul_attention: bool = True
    cached_layers: bool = True
    bf16: bool = True
    checkpointing: Literal["auto", "on", "off"] = "auto"


class TrainSection(Record):
    """How the student learns: an adapter on all linear layers of the blocks, loss on completions only.

    ``method``: ``qlora`` (arXiv 2305.14314), beside NF4 weights; merged and rounded for serving, a gap that is
    measured. The others train the numbers that the served file holds, in blocks of 32 on the ``grid``:
    ``qalora`` (arXiv 2309.14717) moves each block's minimum (Q4_1) or scale (Q4_0); ``qat`` rounds base plus adapter
    anew in every step; ``grid-lora`` leaves the rounded base alone, and the adapter is served beside it.
    Where ``grid`` or ``learning_rate`` is left out, the method's own counts: Q4_1 and 3e-3 for qalora, Q4_0 and
    1e-3 for qat, Q8_0 and 1e-3 for grid-lora.
    ``base_rounding``: how qalora's and grid-lora's base gets onto the grid where its own file does not lie there:
    ``search`` looks for each block's scale, ``gptq`` rounds each layer for what the training rows make of the others
    (QA-LoRA's own way; about two minutes for the default model on 2 cores, growing with the weights; a base of this
    domain's own, which grid-lora then shares with no other domain).
    ``objective``: cross-entropy (``ce``), or also (``ce+kl``, without which these three keys may not be set)
    ``kl_weight`` times the divergence from a ``kl_teacher`` at ``kl_temperature``:
    the ``base`` before rounding, a student that another run finished from this base (the ``train`` folder
    of that run, relative to where the command is given), or a
    model with the same vocabulary.
    ``lora_layers``: the adapter is on so many layers only, the topmost (0: all); those below run once a row.
    """

    method: Method = "qlora"
    grid: Grid | None = None
    base_rounding: Literal["search", "gptq"] = "search"
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
    objective: Literal["ce", "ce+kl"] = "ce"
    kl_weight: Annotated[float, Field(gt=0)] = 1.0
    kl_temperature: Annotated[float, Field(gt=0)] = 1.0
    kl_teacher: str = "base"
    lora_layers: Annotated[int, Field(ge=0)] = 0
    levers: LeversSection = LeversSection()

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        return complete_train(values) if isinstance(values, dict) else values


class ExportSection(Record):
    """Formats of the student; ``serve`` is the one that the bundle opens with.

    With a ``grid`` in ``[train]``, ``serve`` and ``formats`` are that grid where they are left out, and ``serve`` can be
    no other: the file holds the blocks that were trained. Every other format is made by llama.cpp's quantizer.
    ``rounding`` says how the served file of another student gets onto its grid: by ``llama.cpp``'s quantizer; to the
    nearest (``rtn``), with searched scales (``mse``), by GPTQ, with R2 or R1 and R2 rotated first, with rotations
    learned (SpinQuant) on the error that GPTQ will leave (``learned-gptq``), on the KL (``learned-kl-gptq``) or the
    cross-entropy (``learned-ce-gptq``) of the rounded network, or with the first of these and scales tuned afterwards;
    ``search`` makes most of them and more, measures them and serves the smallest of the fast ones that are as near as ``[parity]`` asks. SpinQuant's R3 is llama.cpp's own where ``[serve] kv_cache``
    is quantized; R4 has no place in stock llama.cpp: SiLU does not commute with it.
    """

    formats: list[GgufType] = ["Q8_0", "Q4_0", "Q4_K_M"]
    serve: GgufType = "Q8_0"
    rounding: Rounding | Literal["llama.cpp", "search"] = "llama.cpp"
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


class CalibrateSection(Record):
    """How sure an answer is: a logistic model, fitted to the student's answers to seed questions.

    ``questions`` is how many are put to the student in all (0 = all): answerable ones twice, once without
    the passages that answer them. Those that training did not use are taken first. The fit is
    cross-validated over ``folds`` groups of documents.
    """

    enabled: bool = True
    questions: Annotated[int, Field(ge=0)] = 60
    folds: Annotated[int, Field(ge=2)] = 5
    seed: int = 0


class ServeSection(Record):
    """Serving.

    ``unsupported``, what becomes of text that no passage supports: ``withdraw`` a whole answer without
    support (it becomes the abstention), ``drop`` every sentence without, ``mark`` it, or ``keep`` it. An answer that a
    ``[reflect]`` back-end lets the student give without any passage is shown whatever this says, and told as unsupported.
    Where sentences are checked (``drop``, ``mark``), a bare yes or no is carried by any quote that stands (a yes only by one
    with the numbers asked about): whether it speaks for or against is left to the reader. Where whole answers are
    (``withdraw``, ``keep``), any quote that stands carries one.
    ``max_wrong`` is the share of given answers that may be wrong: the assistant abstains where it is not
    sure enough for that (0: as sure or unsure as it is).
    ``kv_cache``: how keys and values of the context are kept. The quantized ones take 0.53 and 0.28 of the memory; before
    they are rounded, llama.cpp turns them by a Hadamard matrix (SpinQuant's R3, arXiv 2405.16406) where a head is a multiple of 64 wide.
    ``votes`` replies are written to each question, all but the first drawn at ``vote_temperature``; the answer that
    most give is taken (KARD's n-sample inference, arXiv 2305.18395). It costs that many times the writing.
    ``options``: who answers questions with lettered options, the ``student``, or the ``evidence``: the option whose
    words, put into the question, find the best passage (the student where ``max_wrong`` sets a bound: what is picked has
    no confidence; and in the exam, which compares students).
    ``yes_no``: the same for questions that end in "Answer yes, no or maybe." on a line of its own; the ``evidence`` is what
    the document that is found first denies and affirms. The calibrate stage fits the weights of its cues to the seed
    questions of this kind (at least 50, about at least 10 documents) and keeps them only where they are certainly better
    than always giving the commonest answer; without them the student answers.
    """

    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    max_tokens: Count = 160
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    unsupported: OnUnsupported = "withdraw"
    max_wrong: Share = 0.0
    kv_cache: KvCache = "f16"
    votes: Annotated[int, Field(ge=1, le=64)] = 1
    options: AnswersBy = "student"
    yes_no: AnswersBy = "student"
    vote_temperature: Annotated[float, Field(gt=0, le=2)] = 0.7


class DomainConfig(Record):
    """A whole ``domain.toml``."""

    domain: DomainSection
    corpus: CorpusSection
    index: IndexSection = IndexSection()
    retrieve: RetrieveSection = RetrieveSection()
    teacher: TeacherSection = TeacherSection()
    elicit: ElicitSection = ElicitSection()
    curate: CurateSection = CurateSection()
    reflect: ReflectSection = ReflectSection()
    rerank: RerankSection = RerankSection()
    student: StudentSection = StudentSection()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    parity: ParitySection = ParitySection()
    calibrate: CalibrateSection = CalibrateSection()
    exam: ExamSection = ExamSection()
    serve: ServeSection = ServeSection()

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        return complete_export(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _agree(self) -> DomainConfig:
        if problems := contradictions(self):
            raise ValueError("; ".join(problems))
        return self


def parse_config(
    text: str, *, origin: str, profile: str | None = None, idle_ok: bool = False
) -> DomainConfig:
    """A validated config; ``[profiles.<profile>]`` tables override the rest when a profile is named.

    Every profile in the file is validated, not only the chosen one. Settings that nothing reads are refused where the
    file itself sets them, for a profile where that profile does; ``idle_ok`` lets them stand, as in a bundle.

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
    if configs["full"] is not None and not idle_ok:
        problems += idle(configs["full"]).values()
    for name, overrides in profiles.items():
        if not isinstance(overrides, dict):
            problems.append(f"profiles.{name}: {overrides!r}, expected tables like [profiles.{name}.train]")
            continue
        nested: list[str] = []
        configs[name] = made = _validate(_overlay(data, overrides), nested)
        if made is not None and not idle_ok:
            nested += [said for key, said in idle(made).items() if _sets(overrides, key)]
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


def _sets(overrides: dict[str, Any], name: str) -> bool:
    section, key = name.split(".")
    return isinstance(overrides.get(section), dict) and key in overrides[section]


def read_config(path: Path, *, profile: str | None = None, idle_ok: bool = False) -> DomainConfig:
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
    return parse_config(text, origin=str(path), profile=profile, idle_ok=idle_ok)


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
        return f"{where}: unknown key; {_hint(loc[-1], _known_keys(loc))}"
    if error["type"] == "missing":
        return f"{where}: missing"
    if not loc:
        return str(error["ctx"]["error"])
    if error["type"] == "union_tag_invalid":
        tag = str(error["ctx"]["tag"])
        return f"{where}.use = {tag!r}: unknown; {_hint(tag, list(STEPS))}"
    if error["type"] == "union_tag_not_found":
        return f"{where}.use: missing; known: {', '.join(sorted(STEPS))}"
    return f"{where} = {error['input']!r}: {error['msg'].lower()}"


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _known_keys(loc: list[str]) -> list[str]:
    """The keys beside the last one of ``loc``: of the file, a section, a table in it, or a step."""
    kind: Any = DomainConfig
    for part in loc[:-1]:
        if isinstance(kind, type) and issubclass(kind, Record) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        elif part in STEPS:
            kind = STEPS[part]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Record) else []
