"""From drafts to questions: duplicates out, answers shortened, a limit, topics held out, the split."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from domains.records import Document, Question, Split
from pipeline.importers.quotes import ANSWER_WORDS, shorten
from pipeline.importers.reading import Draft
from pipeline.near_duplicates import near_duplicates

NEAR_IDENTICAL = 0.9
_WORD = re.compile(r"\w+")


def seeded_order(names: Iterable[str], *, seed: int) -> list[str]:
    """The distinct names in an order that depends only on them and the seed."""
    return sorted(set(names), key=lambda name: (hashlib.sha256(f"{seed}\0{name}".encode()).digest(), name))


def drop_duplicates(drafts: Sequence[Draft], skipped: Counter[str]) -> list[Draft]:
    """Without questions that equal an earlier one, or nearly do within one document; ids made unique.

    Across documents only equal questions go: questionnaires ask the same of many documents in words that
    differ by a title only.
    """
    by_group: defaultdict[str, list[int]] = defaultdict(list)
    for index, draft in enumerate(drafts):
        by_group[draft.group].append(index)
    near: set[int] = set()
    for members in by_group.values():
        texts = [_with_options(drafts[index]) for index in members]
        near |= {members[late] for late in near_duplicates(texts, threshold=NEAR_IDENTICAL)}
    seen: set[str] = set()
    ids: set[str] = set()
    kept: list[Draft] = []
    for index, draft in enumerate(drafts):
        text = " ".join(_WORD.findall(_with_options(draft).lower()))
        if text in seen or index in near:
            skipped["question seen before" if text in seen else "near-identical question"] += 1
            continue
        seen.add(text)
        suffix = hashlib.sha256(text.encode()).hexdigest()[:8]
        draft = draft if draft.id not in ids else replace(draft, id=f"{draft.id}-{suffix}")
        ids.add(draft.id)
        kept.append(draft)
    return kept


def _with_options(draft: Draft) -> str:
    return " ".join([draft.question, *(draft.options or {}).values()])


def merge_copies(
    drafts: Sequence[Draft], documents: Sequence[Document], skipped: Counter[str]
) -> tuple[list[Draft], list[Document]]:
    """Documents of equal text become the first of them, and questions about the others are about it."""
    first: dict[str, str] = {}
    copy_of: dict[str, str] = {}
    kept = []
    for document in documents:
        text = document.text.strip()
        if text in first:
            copy_of[document.doc_id] = first[text]
            skipped["the same text as another document"] += 1
        else:
            first[text] = document.doc_id
            kept.append(document)
    group_of = {draft.about: draft.group for draft in drafts}
    joined = {group_of.get(copy, ""): group_of.get(kept_id, "") for copy, kept_id in copy_of.items()}
    moved = [
        replace(
            draft,
            about=copy_of.get(draft.about, draft.about),
            group=joined.get(draft.group) or draft.group,
            gold=tuple(
                gold.model_copy(update={"doc_id": copy_of.get(gold.doc_id, gold.doc_id)})
                for gold in draft.gold
            ),
        )
        for draft in drafts
    ]
    return moved, kept


def shorten_answers(drafts: Sequence[Draft], skipped: Counter[str], changed: Counter[str]) -> list[Draft]:
    """Open answers cut to whole sentences of `ANSWER_WORDS` words; without those that can't be."""
    kept = []
    for draft in drafts:
        if draft.kind != "open" or draft.answer is None:
            kept.append(draft)
            continue
        short = shorten(draft.answer)
        if short is None:
            skipped[f"answer begins with a sentence of more than {ANSWER_WORDS} words"] += 1
            continue
        if short != draft.answer:
            changed["answer shortened to whole sentences"] += 1
        kept.append(replace(draft, answer=short))
    return kept


def take(drafts: Sequence[Draft], *, limit: int, seed: int) -> list[Draft]:
    """Questions of whole groups, in a seeded order of the groups, until there are ``limit`` (0 = all)."""
    if not limit:
        return [*drafts]
    sizes = Counter(draft.group for draft in drafts)
    chosen: Counter[str] = Counter()
    room = limit
    for group in seeded_order(sizes, seed=seed):
        chosen[group] = min(sizes[group], room)
        room -= chosen[group]
    kept = []
    for draft in drafts:
        if chosen[draft.group] > 0:
            chosen[draft.group] -= 1
            kept.append(draft)
    return kept


def hold_out(
    drafts: Sequence[Draft], documents: Sequence[Document], *, share: float, seed: int
) -> tuple[list[Draft], list[Document]]:
    """Make unanswerable questions: whole topics lose their documents.

    Only topics whose names occur in no other document are taken, so that nothing else answers for them.
    Stops as soon as ``share`` of the questions is unanswerable.
    """
    wanted = share * len(drafts)
    topic_of = {draft.about: draft.group for draft in drafts}
    texts = {document.doc_id: f"{document.title}\n{document.text}".lower() for document in documents}
    titles = defaultdict(str, {document.doc_id: document.title for document in documents})
    members: defaultdict[str, list[Draft]] = defaultdict(list)
    for draft in drafts:
        members[draft.group].append(draft)
    done = sum(draft.kind == "unanswerable" for draft in drafts)
    held: set[str] = set()
    for group in seeded_order(members, seed=seed + 1):
        if done >= wanted:
            break
        terms = {term.lower() for draft in members[group] for term in draft.terms or (titles[draft.about],)}
        terms = {term for term in terms if len(term) > 3}
        others = (text for doc_id, text in texts.items() if topic_of.get(doc_id) != group)
        if not terms or any(term in text for text in others for term in terms):
            continue
        held.add(group)
        done += sum(draft.kind != "unanswerable" for draft in members[group])
    kept = [
        replace(draft, kind="unanswerable", answer=None, options=None, gold=())
        if draft.group in held
        else draft
        for draft in drafts
    ]
    return kept, [document for document in documents if topic_of.get(document.doc_id) not in held]


def assign_split(drafts: Sequence[Draft], *, seed: int, seed_share: float) -> list[Question]:
    """Questions with their side: groups in a seeded order, the first ``seed_share`` of them ``seed``.

    Two groups or more give both sides at least one.
    """
    order = seeded_order((draft.group for draft in drafts), seed=seed + 2)
    cut = round(seed_share * len(order))
    if len(order) > 1 and 0 < seed_share < 1:
        cut = min(max(cut, 1), len(order) - 1)
    side: dict[str, Split] = {group: "seed" if rank < cut else "exam" for rank, group in enumerate(order)}
    return [
        Question(
            id=draft.id,
            kind=draft.kind,
            question=draft.question,
            answer=draft.answer,
            options=draft.options,
            about=draft.about,
            gold=[*draft.gold],
            split=side[draft.group],
        )
        for draft in drafts
    ]
