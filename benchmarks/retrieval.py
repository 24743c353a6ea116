"""Measures the index and the retriever on text made up here: passages/s, bytes, query latency.

    python benchmarks/retrieval.py              10,000 passages
    python benchmarks/retrieval.py --quick       1,000 passages
    python benchmarks/retrieval.py --json        the last line is one JSON object

Every figure is of this machine as it is: close what else is running.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# The names `rag`, `domains` are found beside this folder, installed or not.
sys.path.insert(0, str(Path(__file__).parent.parent))

from domains.records import Document
from rag.embed import MiniLMEmbedder
from rag.index import Index, open_index, update_index
from rag.retrieve import Retriever

PER_DOCUMENT = 5
QUERIES = 200
SYLLABLES = "ba cor dal fen gri hul jas kem lor mep nir osk pra quil rud san tov ulm vek wys xan yor zin"
NOUNS = "dose valve clinic refund booking ward sensor invoice joint airway shift audit label sample form"
VERBS = "lowers raises delays replaces confirms prevents requires records follows limits"
PLACES = "in adults;at night;before surgery;after a complaint;during the pilot;on weekdays;in children"
SECTIONS = ("Purpose", "Dose", "Warnings", "Storage", "Review")


def main() -> None:
    """Build an index in a temporary folder, ask it, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1,000 passages in place of 10,000")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    result = measure(1_000 if arguments.quick else 10_000)
    for name, value in result.items():
        print(f"{name:26} {value:>14,}")
    if arguments.json:
        print(json.dumps(result))


def measure(passages: int) -> dict[str, float]:
    """All figures for an index of so many passages."""
    documents = list(made_up_documents(passages // PER_DOCUMENT))
    embedder = MiniLMEmbedder()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "index"
        report = update_index(folder, documents, embedder=embedder, max_chars=700, overlap_chars=0)
        again = update_index(folder, documents, embedder=embedder, max_chars=700, overlap_chars=0)
        began = time.perf_counter()
        index = open_index(folder, embedder=embedder)
        opened = time.perf_counter() - began
        result: dict[str, float] = {
            "passages": report.passages,
            "build_s": round(report.seconds, 1),
            "passages_per_s": round(report.passages / report.seconds, 1),
            "unchanged_update_s": round(again.seconds, 2),
            "open_s": round(opened, 2),
            "size_bytes": report.size_bytes,
        }
        result |= latencies(index, documents)
        index.close()
    return result


def latencies(index: Index, documents: list[Document]) -> dict[str, float]:
    """Milliseconds a query takes, one at a time, and how often the hybrid list begins with the document asked for."""
    chosen = random.Random(1).sample(documents, min(QUERIES, len(documents)))
    queries = [f"What does {document.title} do {phrase(random.Random(2))}?" for document in chosen]
    result = {}
    for name, dense, lexical in (("dense", 1.0, 0.0), ("lexical", 0.0, 1.0), ("hybrid", 1.0, 1.0)):
        retriever = Retriever(index, candidates=50, rrf_k=60, dense_weight=dense, lexical_weight=lexical)
        retriever.retrieve(queries[0], top_k=3)  # loads what is loaded once
        times = [timed(retriever, query) for query in queries]
        result[f"{name}_p50_ms"] = round(statistics.median(times), 2)
        result[f"{name}_p95_ms"] = round(statistics.quantiles(times, n=20)[-1], 2)
    hits = retriever.retrieve_many(queries, top_k=1)
    right = sum(hit[0].passage.doc_id == document.doc_id for hit, document in zip(hits, chosen, strict=True))
    result["hybrid_first_right"] = round(right / len(queries), 3)
    return result


def timed(retriever: Retriever, query: str) -> float:
    """Milliseconds that a query takes."""
    began = time.perf_counter()
    retriever.retrieve(query, top_k=3)
    return (time.perf_counter() - began) * 1000


def made_up_documents(count: int) -> Iterator[Document]:
    """Documents of five sections about a thing with a name of its own; same count, same text."""
    for number in range(count):
        chance = random.Random(number)
        name = made_up_name(number)
        sections = [f"## {title}\n{paragraph(name, chance)}" for title in SECTIONS]
        yield Document(
            doc_id=f"{name}-{number}", title=name.title(), text="\n\n".join(sections), source=f"{name}.md"
        )


def made_up_name(number: int) -> str:
    """A word of syllables, another for each number."""
    syllables, word = SYLLABLES.split(), ""
    for _ in range(4):
        number, syllable = divmod(number, len(syllables))
        word = syllables[syllable] + word
    return word


def paragraph(name: str, chance: random.Random) -> str:
    """Some 350 characters in five sentences."""
    return " ".join(
        f"{name.title()} {chance.choice(VERBS.split())} the {chance.choice(NOUNS.split())} {phrase(chance)} by "
        f"{chance.randrange(2, 400)} {chance.choice(('percent', 'mg', 'minutes', 'euros'))}."
        for _ in range(5)
    )


def phrase(chance: random.Random) -> str:
    """A circumstance."""
    return chance.choice(PLACES.split(";"))


if __name__ == "__main__":
    main()
