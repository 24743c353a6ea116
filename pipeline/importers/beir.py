"""BEIR (arXiv 2104.08663): ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/*.tsv`` in one folder."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from domains.errors import DataError
from domains.records import Document, Quote
from domains.words import squash
from pipeline.importers.quotes import best_sentence
from pipeline.importers.reading import Draft, Options, Reading
from pipeline.importers.rows import read_rows

FIELDS = ("_id", "title", "text", "query-id", "corpus-id", "score")
NOTES = (
    "BEIR has relevance judgements but no answers: the reference answer is the sentence of the most relevant "
    "document that shares most words with the query, and so is the gold quote. Read retrieval numbers, not "
    "answer overlap, from this set.",
    "A query that is relevant to several documents belongs to the best of them (score, then id); the others "
    "stay in the corpus.",
)


def read(source: Path, options: Options) -> Reading:
    """Queries with their most relevant document.

    Raises:
        DataError: a file or key is missing (names it).
    """
    folder = source if source.is_dir() else source.parent
    skipped_documents: Counter[str] = Counter()
    documents = _documents(folder / "corpus.jsonl", options, skipped_documents)
    relevant = _relevant(folder, options)
    drafts: list[Draft] = []
    skipped: Counter[str] = Counter()
    for row in read_rows(folder / "queries.jsonl", fields=options.fields):
        query_id, text = row.text("_id"), squash(row.text("text"))
        known = [doc_id for doc_id in relevant.get(query_id, []) if doc_id in documents]
        if not known:
            skipped["no relevant document in the corpus"] += 1
            continue
        about = known[0]
        answer = best_sentence(documents[about].text, text)
        if answer is None:
            skipped["no sentence of the document shares a word with the query"] += 1
            continue
        drafts.append(
            Draft(
                id=query_id,
                kind="open",
                question=text,
                answer=squash(answer),
                about=about,
                group=about,
                gold=(Quote(doc_id=about, quote=answer),),
            )
        )
    return Reading([*documents.values()], drafts, skipped, skipped_documents, notes=NOTES)


def _documents(path: Path, options: Options, skipped: Counter[str]) -> dict[str, Document]:
    documents: dict[str, Document] = {}
    for row in read_rows(path, fields=options.fields):
        doc_id, title, text = row.text("_id"), row.optional_text("title"), row.text("text")
        if not text:
            skipped["empty text"] += 1
        elif doc_id in documents:
            skipped["id seen before"] += 1
        else:
            documents[doc_id] = Document(
                doc_id=doc_id, title=squash(title) or doc_id, text=text, source=path.name
            )
    return documents


def _relevant(folder: Path, options: Options) -> dict[str, list[str]]:
    files = sorted((folder / "qrels").glob("*.tsv"))
    if not files:
        raise DataError(
            f"{folder / 'qrels'} has no .tsv file",
            expected="qrels/test.tsv (query-id, corpus-id, score), as BEIR's folders have",
            next_step="give the folder that holds corpus.jsonl, queries.jsonl and qrels/",
        )
    scores: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
    for path in files:
        for row in read_rows(path, fields=options.fields):
            score = row.text("score")
            try:
                value = float(score)
            except ValueError:
                raise row.wrong("score", score, "a number") from None
            if value > 0:
                scores[row.text("query-id")].append((-value, row.text("corpus-id")))
    return {query: [doc_id for _, doc_id in sorted(found)] for query, found in scores.items()}
