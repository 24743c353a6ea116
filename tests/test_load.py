"""Files become documents; what can't be read is named and the rest goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from domains.errors import DataError
from rag.formats import split_front_matter
from rag.load import MAX_BYTES, load_documents

JATS = """<?xml version="1.0"?>
<!DOCTYPE article [<!ENTITY secret SYSTEM "file://{secret}">]>
<article xmlns:xlink="http://www.w3.org/1999/xlink"><front>
<journal-meta><journal-title-group><journal-title>Trials</journal-title></journal-title-group></journal-meta>
<article-meta><article-id pub-id-type="pmc">123</article-id><article-id pub-id-type="doi">10.1/x</article-id>
<title-group><article-title>Knees <italic>and</italic> braces</article-title></title-group>
<pub-date><day>3</day><month>2</month><year>2024</year></pub-date>
<permissions><license xlink:href="https://creativecommons.org/licenses/by/4.0/"><p>CC BY</p></license></permissions>
<abstract><sec><title>Background</title><p>A brace helps. &secret;</p></sec></abstract></article-meta></front>
<body><sec><title>Methods</title><p>We asked 40 people <xref>[1]</xref>:<list><list-item><p>who ran</p></list-item>
</list></p><sec><title>Setting</title><p>Two clinics.</p></sec></sec>
<sec><title>Results</title><table-wrap><label>Table 1</label><caption><p>Pain</p></caption><table>
<tr><th>Group</th><th>Score</th></tr><tr><td>Brace</td><td>2.5</td></tr></table></table-wrap></sec></body>
<back><ref-list><ref>Someone 1999</ref></ref-list></back></article>"""


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def only(folder: Path):
    (document,) = load_documents(folder).documents
    return document


def reasons(folder: Path) -> dict[str, str]:
    return {entry.source: entry.reason for entry in load_documents(folder).skipped}


def write_pdf(path: Path, text: str = "", *, password: str = "") -> None:
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    page = writer.add_blank_page(400, 400)
    if text:
        stream = DecodedStreamObject()
        shown = "".join(f"({line}) Tj 0 -20 Td " for line in text.split("\n"))
        stream.set_data(f"BT /F1 12 Tf 20 300 Td {shown} ET".encode())
        font = DictionaryObject({
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        })  # fmt: skip
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        page[NameObject("/Contents")] = writer._add_object(stream)
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    writer.write(path)


def test_markdown_keeps_its_body_and_gives_its_front_matter(tmp_path: Path) -> None:
    write(
        tmp_path,
        "prd/deposits.md",
        "---\r\ntitle: PRD: Deposits (v1)\r\nstatus: superseded\r\nowners:\r\n  - Ada\r\n  - Bo\r\n---\r\n"
        "# Deposits\r\n\r\n- R1.  Two  blanks stay. \r\n",
    )
    document = only(tmp_path)
    assert document.doc_id == "prd--deposits"
    assert document.source == "prd/deposits.md"
    assert document.title == "PRD: Deposits (v1)"
    assert document.meta == {"status": "superseded", "owners": "Ada, Bo"}
    assert document.text == "# Deposits\n\n- R1.  Two  blanks stay. \n"


def test_markdown_without_front_matter_takes_its_title_from_the_heading_or_the_name(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "# Gout #\n\nText one.")
    write(tmp_path, "blood-count.markdown", "Text two.\n---\nMore.")
    documents = load_documents(tmp_path).documents
    assert [document.title for document in documents] == ["Gout", "blood count"]
    assert documents[1].text == "Text two.\n---\nMore."


def test_front_matter_that_is_never_closed_is_text() -> None:
    assert split_front_matter("---\ntitle: x\nbody") == ({}, "---\ntitle: x\nbody")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_files_are_read(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, "a.txt", "Fièvre ≥ 38 °C\n".encode(encoding))
    assert only(tmp_path).text == "Fièvre ≥ 38 °C\n"


def test_html_becomes_headings_paragraphs_items_and_rows(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a.html",
        "<html><head><title>Ear &amp; nose</title><script>evil()</script></head><body><nav>Home</nav>"
        "<h1>Ears</h1><div>Loose <b>bold</b> text<p>A para&shy;graph.<br>Next</p></div>"
        "<ul><li><p>first</p></li><li>second</li></ul>"
        "<table><tr><th>Drug</th><th>Dose</th></tr><tr><td>A</td><td>5 mg</td></tr></table></body></html>",
    )
    document = only(tmp_path)
    assert document.title == "Ear & nose"
    assert document.text.split("\n\n") == [
        "## Ears",
        "Loose bold text",
        "A para\u00adgraph. Next",
        "- first",
        "- second",
        "Drug | Dose",
        "A | 5 mg",
    ]


def test_html_in_a_declared_encoding(tmp_path: Path) -> None:
    write(tmp_path, "a.htm", '<html><head><meta charset="latin1"></head><p>Fièvre'.encode("latin1"))
    assert only(tmp_path).text == "Fièvre"


def test_pdf_text_is_joined_over_line_ends(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", "Gout is a form of arth-\nritis in adults.")
    document = only(tmp_path)
    assert document.text == "Gout is a form of arthritis in adults."
    assert document.meta == {"pages": "1"}


def test_docx_becomes_headings_paragraphs_items_and_rows(tmp_path: Path) -> None:
    import docx

    file = docx.Document()
    file.core_properties.title = "Leave policy"
    file.add_heading("Scope", level=1)
    file.add_paragraph("All staff.")
    file.add_paragraph("nurses", style="List Bullet")
    table = file.add_table(rows=1, cols=3)
    table.rows[0].cells[0].merge(table.rows[0].cells[1]).text = "Days"
    table.rows[0].cells[2].text = "25"
    file.save(str(tmp_path / "a.docx"))
    document = only(tmp_path)
    assert document.title == "Leave policy"
    assert document.text.split("\n\n") == ["## Scope", "All staff.", "- nurses", "Days | 25"]


def test_jats_article_is_flattened_and_expands_no_entity(tmp_path: Path) -> None:
    secret = write(tmp_path, "secret.key", "TOP SECRET")
    write(tmp_path, "a.xml", JATS.replace("{secret}", str(secret)))
    document = only(tmp_path)
    assert document.title == "Knees and braces"
    assert document.meta == {
        "journal": "Trials",
        "pmcid": "PMC123",
        "doi": "10.1/x",
        "date": "2024-02-03",
        "licence": "https://creativecommons.org/licenses/by/4.0/",
    }
    assert document.text.split("\n\n") == [
        "## Abstract",
        "## Background",
        "A brace helps.",
        "## Methods",
        "We asked 40 people [1]:",
        "- who ran",
        "## Setting",
        "Two clinics.",
        "## Results",
        "Table 1 Pain",
        "Group | Score",
        "Brace | 2.5",
    ]


def test_jsonl_rows_are_documents_and_bad_rows_are_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        "rows.jsonl",
        '{"doc_id": "d1", "title": "One", "text": "First.", "pmid": "7", "year": 2020}\n'
        "\nnonsense\n"
        '{"id": "d2", "text": "Second."}\n{"id": "d3", "text": ""}\n{"title": "x"}\n',
    )
    loaded = load_documents(tmp_path)
    assert [(d.doc_id, d.title, d.source) for d in loaded.documents] == [
        ("d1", "One", "rows.jsonl:1"),
        ("d2", "d2", "rows.jsonl:4"),
    ]
    assert loaded.documents[0].meta == {"pmid": "7", "year": "2020"}
    assert [entry.source for entry in loaded.skipped] == ["rows.jsonl:3", "rows.jsonl:5", "rows.jsonl:6"]
    assert "not JSON" in loaded.skipped[0].reason


def test_what_cannot_be_read_is_skipped_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path, "good.md", "Good text.")
    write(tmp_path, "empty.md", " \n")
    write(tmp_path, "title-only.md", "---\ntitle: Nothing\n---\n")
    write(tmp_path, "latin.txt", "Fièvre".encode("latin1"))
    write(tmp_path, "binary.txt", b"a\0b")
    write(tmp_path, "data.csv", "a,b")
    write(tmp_path, "broken.pdf", "no pdf")
    write(tmp_path, "broken.docx", "no zip")
    write(tmp_path, "other.xml", "<svg><g/></svg>")
    write(tmp_path, "broken.xml", "<article><front>")
    write(tmp_path, ".hidden.md", "Hidden.")
    write(tmp_path, ".git/config.md", "Hidden.")
    write(tmp_path, "copy.md", "Good text.\n")
    write_pdf(tmp_path / "scan.pdf")
    write_pdf(tmp_path / "locked.pdf", "secret", password="x")
    os.mkfifo(tmp_path / "pipe.md")
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    found = reasons(tmp_path)
    expected = {
        "empty.md": "empty",
        "title-only.md": "empty",
        "latin.txt": "byte 0xe8 at position 2 is not UTF-8: re-encode it, e.g. iconv -f latin1 -t utf-8 latin.txt",
        "binary.txt": "NUL",
        "data.csv": "unknown suffix '.csv'",
        "broken.pdf": "damaged or no .pdf file",
        "broken.docx": "damaged or no .docx file",
        "other.xml": "not JATS (root element <svg>)",
        "broken.xml": "broken XML",
        ".hidden.md": "hidden file",
        ".git": "hidden folder",
        # Sorted by path, the copy comes first.
        "good.md": "the same text as copy.md",
        "scan.pdf": "no text layer: run OCR first, e.g. ocrmypdf",
        "locked.pdf": "encrypted",
        "pipe.md": "not a regular file",
        "big.txt": "50 MB",
    }
    assert found.keys() == expected.keys()
    for source, reason in expected.items():
        assert reason in found[source], source


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = write(tmp_path, "outside/secret.md", "Secret.")
    inside = tmp_path / "inside"
    write(inside, "own.md", "Own.")
    (inside / "leak.md").symlink_to(outside)
    (inside / "folder").symlink_to(outside.parent)
    (inside / "alias.md").symlink_to(inside / "own.md")
    loaded = load_documents(inside)
    assert [document.text for document in loaded.documents] == ["Own."]
    assert {entry.source: entry.reason for entry in loaded.skipped} == {
        "leak.md": "a link that leads out of the folder",
        "folder": "a link folder",
        "own.md": "the same text as alias.md",
    }


def test_of_two_documents_of_one_id_the_first_is_taken_and_the_other_named(tmp_path: Path) -> None:
    write(tmp_path, "gout.md", "One.")
    write(tmp_path, "gout.txt", "Two.")
    write(tmp_path, "rest.md", "Three.")
    loaded = load_documents(tmp_path)
    assert [document.source for document in loaded.documents] == ["gout.md", "rest.md"]
    ((source, reason),) = [(entry.source, entry.reason) for entry in loaded.skipped]
    assert source == "gout.txt"
    assert reason.startswith("the same id, 'gout', as gout.md")


def test_no_documents_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "x")
    with pytest.raises(DataError, match=r"a\.csv: unknown suffix"):
        load_documents(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        load_documents(tmp_path / "nowhere")


def test_one_file_and_the_order_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.md", "a.md"):
        write(tmp_path, name, f"Text of {name}.")
    assert [d.doc_id for d in load_documents(tmp_path).documents] == ["a", "a--z", "b"]
    assert [d.doc_id for d in load_documents(tmp_path / "b.md").documents] == ["b"]
