"""The index stage: documents → passages → the dense and the lexical index.

reads    the domain's documents
writes   bundle/index/
counts   documents + skipped = files (and rows of JSONL files) found;
         added + changed + unchanged = documents;
         embedded <= passages: passages whose vectors were there already are not embedded again;
         cut = passages longer than the embedder reads (the lexical index has all of them)
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.progress import Progress
from pipeline.run_folder import Report, Run, disk_errors
from rag.load import Loaded, load_documents

if TYPE_CHECKING:
    from domains.domain import Domain
    from rag.embed import MiniLMEmbedder

_NAMED = 20  # skipped files named one by one; the report has them all


def run(domain: Domain, run: Run, progress: Progress) -> Report:
    """Bring the run's index up to date with the domain's documents.

    Raises:
        DataError: there are no documents.
        ModelError: the embedder's weights are missing or damaged.
        RunLocked: another process writes the index.
    """
    from rag.embed import MiniLMEmbedder
    from rag.index import update_index

    progress.start("reading documents", 0)
    loaded = load_documents(domain.documents)
    _tell_skipped(loaded, progress)
    embedder = MiniLMEmbedder()
    with disk_errors(run.index):
        report = update_index(
            run.index,
            loaded.documents,
            embedder=embedder,
            max_chars=domain.config.index.passage_chars,
            overlap_chars=domain.config.index.overlap_chars,
            on_progress=_Bar(progress),
        )
    cut = _count_cut(run, embedder, progress)
    counts = {"documents": len(loaded.documents), "skipped": len(loaded.skipped), "cut": cut}
    names = ("passages", "embedded", "added", "changed", "removed", "unchanged")
    return Report(
        counts=counts | {name: getattr(report, name) for name in names},
        facts={
            "passages_per_s": round(report.embedded / report.seconds, 1),
            "size_bytes": report.size_bytes,
            "skipped": [asdict(entry) for entry in loaded.skipped],
        },
    )


class _Bar:
    """Turns (done, total) into a bar that appears when there is something to embed."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        if self._done == 0:
            self._progress.start("embedding passages", total)
        self._progress.advance(done - self._done)
        self._done = done


def _count_cut(run: Run, embedder: MiniLMEmbedder, progress: Progress) -> int:
    """Open what was written, which shows that it can be opened, and count what the embedder cuts off."""
    from rag.index import open_index
    from rag.lexical import passage_text

    index = open_index(run.index, embedder=embedder)
    try:
        cut = embedder.count_cut([passage_text(passage) for passage in index.passages])
    finally:
        index.close()
    if cut:
        progress.say(
            f"{cut} of {len(index.passages)} passages are longer than the embedder reads "
            f"({embedder.max_tokens} tokens): lower [index] passage_chars"
        )
    return cut


def _tell_skipped(loaded: Loaded, progress: Progress) -> None:
    for entry in loaded.skipped[:_NAMED]:
        progress.say(f"skipped {entry.source}: {entry.reason}")
    if len(loaded.skipped) > _NAMED:
        progress.say(f"… and {len(loaded.skipped) - _NAMED} more skipped, all named in run.json")
