"""PubMedQA (arXiv 1909.06146): rows, or the original ``ori_pqal.json``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from domains.records import Document, Quote
from domains.words import squash
from pipeline.importers.quotes import best_sentence, sections
from pipeline.importers.reading import Draft, Options, Reading
from pipeline.importers.rows import Row, read_rows, the_file

FIELDS = ("id", "pmid", "question", "contexts", "context_labels", "long_answer", "answer")
# The names of the original dictionary, whose keys are the PubMed ids.
ORIGINAL = {
    "question": "QUESTION",
    "contexts": "CONTEXTS",
    "context_labels": "LABELS",
    "long_answer": "LONG_ANSWER",
    "answer": "final_decision",
    "pmid": "id",
}
NOTES = (
    "Documents are abstracts without their conclusion. The gold quote is the sentence that shares most words "
    "with the conclusion: near the decision, not proof of it.",
    "The abstracts' titles are not in the set; the questions are mostly made from them, so the documents are "
    "titled by PubMed id.",
)


def read(source: Path, options: Options) -> Reading:
    """One document and one yes/no/maybe question per abstract.

    Raises:
        DataError: a key is missing, or labels and contexts do not match (names the row).
    """
    documents: dict[str, Document] = {}
    drafts: list[Draft] = []
    skipped: Counter[str] = Counter()
    skipped_documents: Counter[str] = Counter()
    for row in read_rows(the_file(source, preferred=("ori_pqal.json",)), fields=options.fields):
        item = _original(row, options) if "QUESTION" in row.data else row
        pmid = item.text("pmid")
        doc_id = f"pubmed-{pmid}"
        contexts, labels = item.list_of_text("contexts"), item.list_of_text("context_labels")
        if len(contexts) != len(labels):
            raise item.wrong("context_labels", labels, f"{len(contexts)} labels, one per context")
        if not any(contexts):
            skipped["no abstract"] += 1
            skipped_documents["empty text"] += 1
            continue
        if doc_id in documents:
            skipped["PubMed id seen before"] += 1
            skipped_documents["id seen before"] += 1
            continue
        text = sections(
            (label.capitalize(), part) for label, part in zip(labels, contexts, strict=True) if part
        )
        documents[doc_id] = Document(doc_id=doc_id, title=f"PubMed {pmid}", text=text, source=f"PMID {pmid}")
        draft_id = row.optional_text("id") or f"pubmedqa-{pmid}"
        drafts.append(_draft(item, draft_id, doc_id, "\n\n".join(contexts)))
    changed = Counter(
        {"without gold quote (no sentence near the conclusion)": sum(not d.gold for d in drafts)}
    )
    return Reading([*documents.values()], drafts, skipped, skipped_documents, +changed, NOTES)


def _draft(item: Row, draft_id: str, doc_id: str, text: str) -> Draft:
    answer = item.text("answer").lower()
    if answer not in {"yes", "no", "maybe"}:
        raise item.wrong("answer", answer, "yes, no or maybe")
    quote = best_sentence(text, item.text("long_answer"))
    return Draft(
        id=draft_id,
        kind="yes_no",
        question=squash(item.text("question")),
        answer=answer,
        about=doc_id,
        group=doc_id,
        gold=(Quote(doc_id=doc_id, quote=quote),) if quote else (),
    )


def _original(row: Row, options: Options) -> Row:
    return Row(row.data, where=row.where, fields={**ORIGINAL, **options.fields})
