"""The one record that every strategy reads and writes."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from domains.records import Passage, Question, Record

Kind = Literal["seed", "doc", "task"]
Status = Literal["kept", "rejected", "unparsed", "error"]
# What says how a row came about or was judged is no part of what it is.
_NO_CONTENT = {"id", "status", "reason", "checks", "scores", "made"}


class Check(Record):
    """One filter that looked at a row."""

    name: str
    ok: bool
    detail: str = ""


class Revision(Record):
    """One answer in a chain of revisions, with what the critic said of it (``score`` of 10)."""

    answer: str
    feedback: str = ""
    verdict: Literal["stop", "revise", ""] = ""
    score: float | None = None


class Made(Record):
    """Where a row comes from.

    ``op`` is the variant that the strategy chose (a message's name), ``prompt`` the sha256 of the template
    (not of the values in it), ``calls`` the ledger keys of the step. ``teacher``, ``sample`` and ``call``
    are those of the reply that wrote the row's text, which may be an earlier step's.
    """

    strategy: str
    version: int
    op: str = ""
    sample: int = 0
    teacher: str = ""
    call: str = ""
    prompt: str = ""
    calls: list[str] = []


class Row(Record):
    """A question, a passage or an explained answer on its way to the training rows.

    ``kind`` is the shape: ``seed`` (a question with its reference answer), ``doc`` (a passage to work on),
    ``task`` (a question with ``rationale`` and ``output``). ``group`` is the root document: splits and
    de-duplication across splits go by it. ``passages`` are ids, in the order of their numbers in the
    prompt. ``notes`` are texts by name: a rating's reason, the explanation of each option, labels.
    ``chosen``/``rejected`` are a preference pair. What does not apply is empty.
    """

    id: str
    kind: Kind
    group: str
    parents: list[str] = []
    question: Question | None = None
    passages: list[str] = []
    system: str = ""
    rationale: str = ""
    output: str = ""
    chain: list[Revision] = []
    chosen: str = ""
    rejected: str = ""
    notes: dict[str, str] = {}
    scores: dict[str, float] = {}
    checks: list[Check] = []
    status: Status = "kept"
    reason: str = ""
    made: Made


def new_row(*, made: Made, **fields: Any) -> Row:
    """A row whose id is made from its content, its strategy and the strategy's version."""
    row = Row(id="", made=made, **fields)
    content = row.model_dump(mode="json", exclude=_NO_CONTENT)
    content["made"] = [made.strategy, made.version, made.op, made.sample]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]
    return row.model_copy(update={"id": digest})


def child(parent: Row, *, made: Made, **changes: Any) -> Row:
    """A row that follows from ``parent``: its content with ``changes``, its group, and it as the only parent.

    Scores and checks of the parent stay unless they are changed; status and reason start anew.
    """
    kept = {name: getattr(parent, name) for name in Row.model_fields}
    for name in ("id", "made", "status", "reason", "parents"):
        del kept[name]
    return new_row(made=made, parents=[parent.id], **(kept | changes))


def seed_row(question: Question) -> Row:
    """A question of the domain as a row; its group is the document that it is about."""
    return new_row(
        kind="seed", group=question.about, question=question, made=Made(strategy="domain", version=1)
    )


def passage_row(passage: Passage) -> Row:
    """A passage of the index as a row; its group is its document."""
    made = Made(strategy="domain", version=1)
    return new_row(kind="doc", group=passage.doc_id, passages=[passage.passage_id], made=made)
