"""HTML pages as plain text with ``## `` headings; nothing is fetched and nothing is run."""

from __future__ import annotations

from typing import Any

_LEFT_OUT = "//script|//style|//noscript|//template|//nav|//svg|//iframe|//form"
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_BLOCKS = _HEADINGS | {
    *("p", "li", "dt", "dd", "blockquote", "figcaption", "caption", "pre", "tr", "hr", "ul", "ol", "dl"),
    *("div", "section", "article", "main", "header", "footer", "aside", "table", "thead", "tbody", "figure"),
}


def page_text(data: bytes, *, encoding: str | None) -> tuple[str, str]:
    """The title of a page (or "") and its text: a line for each heading, paragraph, list item or table row.

    Args:
        data: the file.
        encoding: how to decode it; None means as the page declares.
    """
    from lxml import html

    parser = html.HTMLParser(
        encoding=encoding, no_network=True, huge_tree=False, remove_comments=True, remove_pis=True
    )
    root = html.document_fromstring(data, parser=parser)
    for element in root.xpath(_LEFT_OUT):
        element.drop_tree()
    body = root.find("body")
    page = _Page()
    page.read(root if body is None else body)
    page.end_line()
    title = " ".join(root.findtext(".//title", "").split())
    return title, "\n\n".join(page.lines)


class _Page:
    """Collects the lines of a page while walking over it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._prefix = ""
        self._pieces: list[str] = []

    def end_line(self) -> None:
        """What was read since the last line is one."""
        if text := " ".join("".join(self._pieces).split()):
            self.lines.append(self._prefix + text)
            self._prefix = ""
        self._pieces.clear()

    def read(self, element: Any) -> None:
        """Read an element's content, but not what follows it."""
        if element.tag == "tr":
            cells = [" ".join(cell.text_content().split()) for cell in element]
            self._pieces.append(" | ".join(filter(None, cells)))
            return
        self._pieces.append(element.text or "")
        for child in element:
            self._read_child(child)
            self._pieces.append(child.tail or "")

    def _read_child(self, child: Any) -> None:
        if child.tag not in _BLOCKS:
            self._pieces.append(" " if child.tag == "br" else "")
            self.read(child)
            return
        self.end_line()
        self._prefix = "## " if child.tag in _HEADINGS else "- " if child.tag == "li" else self._prefix
        self.read(child)
        self.end_line()
        self._prefix = ""
