"""MedQuAD (Ben Abacha & Demner-Fushman 2019): JSONL rows, or the original folder of XML files."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from domains.errors import DataError
from domains.records import Document, Quote
from domains.words import squash
from pipeline.importers.quotes import lead, sections
from pipeline.importers.reading import Draft, Options, Reading
from pipeline.importers.rows import read_rows, the_file

FIELDS = (
    "id",
    "question",
    "answer",
    "qtype",
    "focus",
    "synonyms",
    "cui",
    "source",
    "url",
    "doc",
    "link_list",
)
NOTES = (
    "The reference answer is the first one or two sentences of the site's answer and stands in the document "
    "verbatim: overlap scores are inflated by copying.",
    "The questions were made from section headings by the set's authors; users ask differently.",
)
MAX_FOCI = 5
_LINK_LINE = re.compile(r"^\s*-\s*.{0,120}$|https?://\S+$")


@dataclass(frozen=True)
class _Pair:
    id: str
    question: str
    answer: str
    qtype: str
    focus: str
    names: tuple[str, ...]
    codes: tuple[str, ...]
    source: str
    url: str
    doc: str
    link_list: bool


def read(source: Path, options: Options) -> Reading:
    """One document per source page, its answers as ``## <question type>`` sections.

    Raises:
        DataError: a row lacks a key, or a file is no XML (names it).
    """
    pairs = [*(_xml_pairs(source) if _is_xml(source) else _row_pairs(source, options.fields))]
    topics = _topics(pairs)
    documents = _documents(pairs)
    drafts: list[Draft] = []
    skipped: Counter[str] = Counter()
    for pair in pairs:
        reason, cut = _usable(pair)
        if cut is None:
            skipped[reason] += 1
            continue
        answer, quote = cut
        doc_id = _doc_id(pair.doc)
        drafts.append(
            Draft(
                id=pair.id,
                kind="open",
                question=squash(pair.question),
                answer=answer,
                about=doc_id,
                group=topics[pair.focus],
                gold=(Quote(doc_id=doc_id, quote=quote),),
                terms=(pair.focus, *pair.names),
            )
        )
    return Reading(documents, drafts, skipped, notes=NOTES)


def _usable(pair: _Pair) -> tuple[str, tuple[str, str] | None]:
    if not pair.question:
        return "empty question", None
    if not pair.answer:
        return "empty answer", None
    if pair.link_list:
        return "answer is a list of links", None
    cut = lead(pair.answer)
    return ("", cut) if cut else ("no sentence that can be quoted", None)


def _is_xml(source: Path) -> bool:
    if not source.exists():
        raise DataError(
            f"{str(source)!r} does not exist", expected="a file or folder", next_step="check the path"
        )
    return source.suffix.lower() == ".xml" or (
        source.is_dir() and next(source.rglob("*.xml"), None) is not None
    )


def _row_pairs(source: Path, fields: Mapping[str, str]) -> Iterator[_Pair]:
    for row in read_rows(the_file(source), fields=fields):
        question, answer, doc = row.text("question"), row.text("answer"), row.text("doc")
        yield _Pair(
            id=row.content_id("medquad", question, answer, doc),
            question=question,
            answer=answer,
            qtype=row.text("qtype"),
            focus=squash(row.text("focus")),
            names=tuple(map(str, _listed(row.get("synonyms")))),
            codes=tuple(map(str, _listed(row.get("cui")))),
            source=row.optional_text("source"),
            url=row.optional_text("url"),
            doc=doc,
            link_list=row.get("link_list") is True,
        )


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _xml_pairs(source: Path) -> Iterator[_Pair]:
    from lxml import etree

    # Entities and network access off: the files are other people's.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)
    for path in [source] if source.is_file() else sorted(source.rglob("*.xml")):
        try:
            root = etree.parse(str(path), parser).getroot()
        except etree.XMLSyntaxError as error:
            raise DataError(
                f"{path}: not XML ({error})", expected="MedQuAD's <Document>", next_step=f"mend {path}"
            ) from None
        name = path.relative_to(source.parent if source.is_file() else source).as_posix()
        for number, pair in enumerate(root.iterfind(".//QAPair"), 1):
            question, answer = pair.find("Question"), pair.findtext("Answer") or ""
            if question is None:
                raise DataError(
                    f"{path}: QAPair {number} has no <Question>",
                    expected='<Question qtype="…">',
                    next_step=f"mend {path}",
                )
            yield _Pair(
                id=question.get("qid") or f"{Path(name).stem}-{pair.get('pid') or number}",
                question=squash(question.text or "").replace(" ?", "?"),
                answer=answer.strip(),
                qtype=question.get("qtype") or "information",
                focus=squash(root.findtext("Focus") or Path(name).stem),
                names=tuple(squash(item.text or "") for item in root.iterfind(".//Synonym") if item.text),
                codes=tuple(squash(item.text or "") for item in root.iterfind(".//CUI") if item.text),
                source=root.get("source") or "",
                url=root.get("url") or "",
                doc=name,
                link_list=_only_links(answer),
            )


def _only_links(answer: str) -> bool:
    lines = [line for line in answer.splitlines() if line.strip()]
    return bool(lines) and sum(bool(_LINK_LINE.search(line)) for line in lines) / len(lines) > 0.8


def _documents(pairs: list[_Pair]) -> list[Document]:
    by_doc: defaultdict[str, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.answer:
            by_doc[pair.doc].append(pair)
    return [
        Document(
            doc_id=_doc_id(doc),
            title=group[0].focus,
            text=sections((_heading(pair), pair.answer) for pair in group),
            source=group[0].url or doc,
            meta={"publisher": group[0].source} if group[0].source else {},
        )
        for doc, group in by_doc.items()
    ]


def _heading(pair: _Pair) -> str:
    return squash(pair.qtype).capitalize()


def _doc_id(doc: str) -> str:
    return doc.removesuffix(".xml").replace("/", "-")


def _topics(pairs: list[_Pair]) -> dict[str, str]:
    """Focus → topic: foci that share a name or a UMLS concept are one topic and stay on one side.

    Concepts of more than `MAX_FOCI` foci are left out: "Syndrome" and "Disease" would join everything.
    """
    topic: dict[str, str] = {}

    def root(name: str) -> str:
        while topic.setdefault(name, name) != name:
            name = topic[name]
        return name

    foci: defaultdict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        for code in pair.codes:
            foci[code].add(pair.focus.lower())
    for pair in pairs:
        codes = (f"cui {code}" for code in pair.codes if code and len(foci[code]) <= MAX_FOCI)
        for other in (pair.focus.lower(), *codes):
            first, second = sorted((root(pair.focus), root(other)))
            topic[second] = first
    return {pair.focus: root(pair.focus) for pair in pairs}
