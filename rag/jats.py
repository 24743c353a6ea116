"""JATS, the XML of journal articles (NISO Z39.96), as plain text with ``## `` headings.

The parser expands no entities, loads no DTD and opens no connection (no XXE, no billion laughs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Not prose: references, formulas' markup, figures' files, supplements.
_SKIPPED = frozenset({"ref-list", "tex-math", "graphic", "media", "supplementary-material", "object-id"})
_INSIDE = frozenset({"list", "table-wrap", "fig", "boxed-text", "disp-quote"})  # may stand in a paragraph
_SECTIONS = frozenset({
    *("sec", "ack", "notes", "boxed-text", "disp-quote", "app", "app-group", "fig-group"),
    *("table-wrap-group", "fn-group", "fn", "def-list", "glossary"),
})  # fmt: skip


class JatsError(ValueError):
    """Not JATS, or not well-formed; the message is the reason."""


@dataclass(frozen=True)
class Article:
    """One article: its title, its text, and what the front matter says of it."""

    title: str
    text: str
    meta: dict[str, str]


def read_articles(data: bytes) -> list[Article]:
    """The article of a file, or all of a set of them.

    Raises:
        JatsError: broken XML, or XML of another kind.
    """
    from lxml import etree

    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        huge_tree=False,
        load_dtd=False,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise JatsError(f"broken XML: {error.msg}") from None
    for element in root.iter(etree.Element):
        element.tag = etree.QName(element).localname  # with and without a namespace are read alike
    articles = [root] if root.tag == "article" else root.findall(".//article")
    articles = [article for article in articles if article.find("front") is not None]
    if not articles:
        raise JatsError(f"XML, but not JATS (root element <{root.tag}>): convert it to .html or .md")
    return [_article(element) for element in articles]


def _article(root: Any) -> Article:
    meta = root.find("front/article-meta")
    blocks: list[str] = []
    if meta is not None:
        for abstract in meta.findall("abstract"):
            blocks.append(f"## {_text(abstract.find('title')) or 'Abstract'}")
            blocks += _blocks(abstract)
    for part in ("body", "back"):
        element = root.find(part)
        if element is not None:
            blocks += _blocks(element)
    title = _text(meta.find("title-group/article-title")) if meta is not None else ""
    return Article(title=title, text="\n\n".join(blocks), meta=_front_matter(root))


def _front_matter(root: Any) -> dict[str, str]:
    found = {"journal": _text(root.find("front/journal-meta//journal-title"))}
    for element in root.findall("front/article-meta/article-id"):
        kind = element.get("pub-id-type", "")
        if kind in {"pmc", "pmcid"}:
            found["pmcid"] = "PMC" + _text(element).upper().removeprefix("PMC")
        elif kind in {"doi", "pmid"}:
            found[kind] = _text(element)
    dates = root.findall("front/article-meta/pub-date")
    found["date"] = next(filter(None, map(_date, dates)), "")
    found["licence"] = _licence(root.find("front/article-meta/permissions/license"))
    return {key: value for key, value in found.items() if value}


def _licence(element: Any) -> str:
    """The licence's address where there is one, else its wording."""
    if element is None:
        return ""
    for node in element.iter():
        address = node.get("{http://www.w3.org/1999/xlink}href") or ""
        if "://" in address or node.tag == "license_ref":
            return address or _text(node)
    return element.get("license-type") or _text(element)[:200]


def _date(element: Any) -> str:
    parts = [_text(element.find(name)) for name in ("year", "month", "day")]
    return "-".join(part.zfill(2) for part in parts if part.isdigit()) if parts[0].isdigit() else ""


def _blocks(element: Any) -> Iterator[str]:
    """Paragraphs, list items, table rows and headings below ``element``, in order."""
    for child in element:
        if isinstance(child.tag, str) and child.tag not in _SKIPPED:
            yield from _block(child)


def _block(element: Any) -> Iterator[str]:
    tag = element.tag
    if tag in _SECTIONS:
        yield from _section(element)
    elif tag == "table-wrap":
        yield from _table(element)
    elif tag == "list":
        for item in element.findall("list-item"):
            yield from (f"- {text}" for text in _blocks(item))
    elif tag == "def-item":
        yield f"- {_text(element.find('term'))}: {_text(element.find('def'))}"
    elif tag == "fig":
        yield from filter(None, [_caption(element)])
    elif tag not in {"title", "label"}:
        yield from _paragraph(element)


def _section(element: Any) -> Iterator[str]:
    blocks = list(_blocks(element))
    title = _text(element.find("title"))
    if title and blocks:
        yield f"## {title}"
    yield from blocks


def _paragraph(element: Any) -> Iterator[str]:
    """A paragraph's own text, then the lists and tables that stand inside it."""
    inner = [child for child in element if child.tag in _INSIDE]
    if text := _text(element, without=inner):
        yield text
    for child in inner:
        yield from _block(child)


def _table(element: Any) -> Iterator[str]:
    if caption := _caption(element):
        yield caption
    for row in element.iter("tr"):
        if cells := [cell for cell in map(_text, row) if cell]:
            yield " | ".join(cells)


def _caption(element: Any) -> str:
    return " ".join(filter(None, [_text(element.find("label")), _text(element.find("caption"))]))


def _text(element: Any, *, without: list[Any] | None = None) -> str:
    """All text below an element on one line, without what `_SKIPPED` names."""
    if element is None:
        return ""
    pieces: list[str] = []

    def walk(node: Any) -> None:
        pieces.append(node.text or "")
        for child in node:
            # Entities are nodes whose tag is no string: they stay unexpanded.
            if isinstance(child.tag, str) and child.tag not in _SKIPPED and child not in (without or []):
                gap = " " if child.tag in {"p", "title", "break", "td", "th", "sec"} else ""
                pieces.append(gap)
                walk(child)
                pieces.append(gap)
            pieces.append(child.tail or "")

    walk(element)
    return " ".join("".join(pieces).split())
