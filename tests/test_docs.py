"""docs/papers.md names every paper that the code cites, and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAPERS = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")


def test_every_cited_paper_is_listed() -> None:
    cited = set()
    for package in ("domains", "rag", "serve", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            cited |= set(re.findall(r"arXiv:? ?(\d{4}\.\d{5})", path.read_text(encoding="utf-8")))
    assert len(cited) >= 2
    assert sorted(number for number in cited if number not in PAPERS) == []


def test_every_named_file_exists() -> None:
    named = re.findall(r"`((?:domains|rag|serve|pipeline)/[\w./]*)`", PAPERS)
    assert len(named) >= 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_decisions_fit_a_page() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert pages
    assert all(len(page.read_text(encoding="utf-8").splitlines()) <= 60 for page in pages)
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
