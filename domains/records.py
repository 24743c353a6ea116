"""The nouns that cross a file or the wire. One noun, one definition."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

QuestionKind = Literal["open", "yes_no", "options", "unanswerable"]
Split = Literal["seed", "exam"]
Support = Literal["supported", "unsupported", "abstained"]
Withheld = Literal["unsupported", "partly", "unsure"]


class Record(BaseModel):
    """Frozen, and an unknown key is an error: a typo in a file never passes unnoticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Document(Record):
    """One source document: plain text with ``## `` headings, and where it came from.

    ``meta`` holds what the file says of itself (kind, date, status, supersedes, licence, …).
    """

    doc_id: str = Field(min_length=1)
    title: str
    text: str = Field(min_length=1)
    source: str
    meta: dict[str, str] = {}


class Passage(Record):
    """A piece of a document; ``text == document.text[start:end]`` (offsets in characters)."""

    passage_id: str
    doc_id: str
    title: str
    heading: str
    text: str
    start: int = Field(ge=0)
    end: int = Field(gt=0)


class Hit(Record):
    """A retrieved passage with its fused score and its rank (from 1) in each list it was found by.

    ``scores`` are the lists' own: ``dense`` a cosine, ``lexical`` BM25.
    """

    passage: Passage
    score: float
    ranks: dict[str, int] = {}
    scores: dict[str, float] = {}


class Quote(Record):
    """A literal piece of a document that decides an answer."""

    doc_id: str
    quote: str = Field(min_length=1)


class Question(Record):
    """One seed or exam question with its reference answer.

    ``answer`` is free text for ``open``; ``yes``, ``no`` or ``maybe`` for ``yes_no``; the letter
    for ``options``; None for ``unanswerable``. ``about`` is the document that decides the split.
    """

    id: str = Field(min_length=1)
    kind: QuestionKind
    question: str = Field(min_length=1)
    answer: str | None
    options: dict[str, str] | None = None
    about: str
    gold: list[Quote] = []
    split: Split

    @model_validator(mode="after")
    def _answer_fits_kind(self) -> Self:
        if self.kind == "unanswerable":
            if self.answer is not None or self.gold:
                raise ValueError("an unanswerable question has answer null and no gold quotes")
        elif not self.answer:
            raise ValueError(f"a question of kind {self.kind!r} needs an answer")
        if self.kind == "yes_no" and self.answer not in {"yes", "no", "maybe"}:
            raise ValueError(f"answer {self.answer!r} of a yes_no question: expected yes, no or maybe")
        if (self.kind == "options") != (self.options is not None):
            raise ValueError("options go with kind 'options', and only with it")
        if self.options is not None and self.answer not in self.options:
            raise ValueError(f"answer {self.answer!r} is none of the options {sorted(self.options)}")
        return self


class Instruction(Record):
    """A request that no document is needed for (arithmetic, wording, order), and its answer.

    Self-RAG's general instructions (arXiv 2310.11511 §3.2.2): from them a student learns when not to retrieve.
    """

    id: str = Field(min_length=1)
    instruction: str = Field(min_length=1)
    answer: str = Field(min_length=1)

    def as_question(self) -> Question:
        """As a seed question: ``about`` no document."""
        return Question(
            id=self.id, kind="open", question=self.instruction, answer=self.answer, about="", split="seed"
        )


class Message(Record):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Rationale(Record):
    """What a teacher wrote for one question: KARD's labelling (arXiv 2305.18395 §3.1).

    ``passages`` are the ids the teacher saw, in the order of their numbers [1], [2], …
    ``request`` is the ledger key: the provenance of every training row.
    """

    question_id: str
    sample: int = Field(ge=0)
    text: str
    answer: str
    passages: list[str]
    teacher: str
    request: str


class Verification(Record):
    """What the verifier found a kept rationale to speak for (KARD, arXiv 2305.18395 §3.1).

    ``pred`` is the answer that it read there: a letter, yes, no or maybe, or words. It is empty where rules found enough
    of the gold answer's words and nothing against them, but no answer. ``method`` is who decided last.
    """

    pred: str
    ok: bool
    method: Literal["rules", "model"]


class KeptRationale(Rationale):
    """A rationale that passed every check, with the verifier's finding, as a `Rejection` has its reason."""

    verifier: Verification


class Segment(Record):
    """One sentence of a reflected answer with Self-RAG's judgements (arXiv 2310.11511 §3).

    ``decision`` is the Retrieve token that opens it. A passage goes with ``retrieve``, and only with it;
    ``relevant`` with a passage; ``support`` with a relevant one.
    """

    decision: Literal["retrieve", "no_retrieval", "continue"]
    passage: Passage | None = None
    relevant: bool | None = None
    text: str
    support: Literal["full", "partial", "none"] | None = None

    @model_validator(mode="after")
    def _judgements_fit(self) -> Self:
        if (self.passage is not None) != (self.decision == "retrieve"):
            raise ValueError("a passage goes with decision 'retrieve', and only with it")
        if (self.relevant is not None) != (self.passage is not None):
            raise ValueError("'relevant' goes with a passage, and only with it")
        if (self.support is not None) != bool(self.relevant):
            raise ValueError("'support' goes with a relevant passage, and only with it")
        return self


CritiqueTask = Literal["retrieve", "isrel", "issup", "isuse"]


class Critique(Record):
    """One judgement for the reflection tokens, and who gave it (arXiv 2310.11511 §3.2.1).

    ``retrieve`` with a passage is the decision in the middle of an answer, without one that at its beginning.
    ``output`` is the sentence that is judged, or the whole answer for ``isuse``. Labels: ``retrieve``,
    ``no_retrieval``, ``continue``; ``relevant``, ``irrelevant``; ``full``, ``partial``, ``none``; ``1`` to ``5``.
    """

    task: CritiqueTask
    question_id: str
    instruction: str
    preceding: str = ""
    output: str = ""
    passage_id: str = ""
    evidence: str = ""
    label: str
    explanation: str
    teacher: str


class Example(Record):
    """One training row: a prompt (chat messages) and the completion that is supervised.

    ``unsupervised`` are character ranges [start, end) of the completion that stay out of the loss: the
    passages inside a reflected answer.
    """

    id: str
    question_id: str
    messages: list[Message]
    completion: str = Field(min_length=1)
    unsupervised: list[tuple[int, int]] = []
    passages: list[str]
    origin: Literal["gold", "rationale", "retrieved", "irrelevant", "unanswerable", "general"]
    request: str


class Rejection(Record):
    """A row that curation did not keep, with the reason; nothing is dropped silently."""

    question_id: str
    sample: int
    reason: str
    detail: str
    text: str


class Citation(Record):
    """A literal quote that an answer rests on. ``start``/``end`` are offsets into the document.

    ``by`` says who chose it: the model quoted it itself, or it was found afterwards by overlap.
    """

    number: int
    passage_id: str
    doc_id: str
    title: str
    quote: str
    start: int
    end: int
    by: Literal["model", "overlap"]


class Statement(Record):
    """One sentence of an answer, and the citations that it rests on: their places in ``Answer.citations``."""

    text: str
    citations: list[int] = []


class JudgedSegment(Record):
    """One segment of an answer as a reflection back-end judged it; see `serve.reflection_scores`.

    ``number`` is its passage's place (from 1) in ``Answer.passages``. ``relevance`` and ``support`` are in [0, 1],
    ``utility`` in [-1, 1], ``sequence`` is the geometric mean of the token probabilities; None where nothing was
    judged.
    """

    decision: Literal["retrieve", "no_retrieval", "continue"]
    text: str
    number: int | None = None
    relevance: float | None = None
    support: float | None = None
    label: Literal["full", "partial", "none"] | None = None
    utility: float | None = None
    sequence: float | None = None
    score: float | None = None


class Reflection(Record):
    """How an answer was reflected upon.

    ``p_retrieve`` is the normalised probability of retrieving where the model decides that itself. ``relevant`` are
    the numbers of the passages judged relevant. ``segments`` are those of the answer, ``candidates`` what was weighed
    against each other in the short form. ``missing`` counts, of ``expected`` judgements of each group, those
    that the model did not give; ``unparsed`` counts replies whose verdict or closed answer could not be read.
    ``passes`` is the number of completions that the answer took, ``tokens`` what was written in them. ``notes`` say
    in words what went otherwise than planned.
    """

    backend: str
    retrieved: bool
    p_retrieve: float | None = None
    relevant: list[int] = []
    segments: list[JudgedSegment] = []
    candidates: list[JudgedSegment] = []
    expected: dict[str, int] = {}
    missing: dict[str, int] = {}
    unparsed: int = 0
    passes: int = 1
    tokens: int = 0
    notes: list[str] = []


class Answer(Record):
    """What a user gets: the final text, what the model wrote, the evidence, and the verdict.

    ``rejected_quotes`` are quotes of the model that stand in no passage. ``statements`` say which sentence
    rests on which citation; those without one are not in ``text`` where the domain drops them. ``withheld``
    says why something that the model wrote is not shown. ``signals`` are what ``confidence``, the calibrated
    probability that the answer is right and supported, is computed from. ``evidence`` are the numbers of the passages
    that a reflecting back-end lets it rest on; None: all.
    """

    question: str
    text: str
    raw: str
    support: Support
    citations: list[Citation]
    rejected_quotes: list[str] = []
    passages: list[Hit] = []
    evidence: list[int] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reflection: Reflection | None = None
    statements: list[Statement] = []
    withheld: Withheld | None = None
    confidence: float | None = None
    signals: dict[str, float] = {}
