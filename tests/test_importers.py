from __future__ import annotations

import json
from pathlib import Path

import pytest

from domains.domain import load_domain
from domains.errors import DataError
from domains.jsonl import read_jsonl
from domains.records import Document, Question
from pipeline import importers
from pipeline.importers import FORMATS, Imported, available_formats
from pipeline.importers.quotes import best_sentence, lead, locate, shorten
from rag.load import load_documents


def import_set(*args, **options) -> Imported:
    return Imported(**importers.import_set(*args, **options))


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_back(folder: Path) -> tuple[dict[str, Document], list[Question]]:
    path = folder / "documents.jsonl"
    documents = read_jsonl(path, Document) if path.is_file() else []
    return {document.doc_id: document for document in documents}, read_jsonl(
        folder / "questions.jsonl", Question
    )


def check_invariants(folder: Path, result: Imported) -> tuple[dict[str, Document], list[Question]]:
    """What every import promises, whatever the format."""
    documents, questions = read_back(folder)
    assert result.rows == result.questions + sum(result.skipped.values())
    assert result.document_rows == result.documents + sum(result.skipped_documents.values())
    assert len(questions) == result.questions == len({question.id for question in questions})
    assert len(documents) == result.documents
    sides: dict[str, str] = {}
    for question in questions:
        assert sides.setdefault(question.about, question.split) == question.split
        for gold in question.gold:
            assert gold.quote in documents[gold.doc_id].text
        if question.kind == "open":
            assert question.answer is not None
            assert len(question.answer.split()) <= 60
        if question.kind == "unanswerable":
            assert result.format != "medquad" or question.about not in documents
    domain = load_domain(str(folder))
    assert domain.questions == (folder / "questions.jsonl").resolve()
    assert json.loads((folder / "import.json").read_text())["questions"] == result.questions
    return documents, questions


def medquad_rows(topics: int = 20) -> list[dict]:
    rows = []
    for n in range(topics):
        focus = f"Bolander{'abcdefghijklmnopqrstuvwxyz'[n]}itis"
        for qtype, verb in (
            ("information", "is a rare illness of the"),
            ("treatment", "is treated with rest of the"),
        ):
            rows.append(
                {
                    "id": f"m-{n}-{qtype}",
                    "question": f"What about the {qtype} of {focus}?",
                    "answer": f"What is it?\n{focus} {verb} part number {n}. It lasts {n + 2} weeks.\nMore text here.",
                    "qtype": qtype,
                    "focus": focus,
                    "cui": [f"C{n}"],
                    "synonyms": [],
                    "source": "Example Institute",
                    "url": f"https://example.org/{n}",
                    "doc": f"1_Example/{n}.xml",
                    "link_list": False,
                }
            )
    rows.append(
        {**rows[0], "id": "links", "question": "Where is help?", "answer": "- A\n- B", "link_list": True}
    )
    rows.append({**rows[1], "id": "again"})
    return rows


def test_medquad_rows(tmp_path):
    source = write_lines(tmp_path / "dev.jsonl", medquad_rows())
    result = import_set("medquad", source, into=tmp_path / "out")
    documents, questions = check_invariants(tmp_path / "out", result)
    assert result.skipped == {"answer is a list of links": 1, "question seen before": 1}
    assert result.kinds["unanswerable"] >= 0.15 * result.questions
    document = next(iter(documents.values()))
    assert "## Information" in document.text
    assert "## Treatment" in document.text
    first = next(question for question in questions if question.kind == "open")
    # The heading that asks is passed over; the first statement is quoted, and the next one is in the answer.
    assert first.gold[0].quote.endswith(".")
    assert "weeks" in first.answer
    assert any("inflated" in note for note in result.notes)


def test_medquad_topics_that_share_a_concept_stay_together(tmp_path):
    rows = medquad_rows()
    for row in rows:
        row["cui"] = ["C-one"] if row["focus"] < "Bolanderf" else row["cui"]
    source = write_lines(tmp_path / "dev.jsonl", rows)
    _, questions = check_invariants(tmp_path / "out", import_set("medquad", source, into=tmp_path / "out"))
    sides = {question.split for question in questions if question.question.split(" of ")[-1] < "Bolanderf"}
    assert len(sides) == 1


def test_medquad_holds_no_topic_out_that_others_name(tmp_path):
    rows = medquad_rows(8)
    names = " ".join(sorted({row["focus"] for row in rows}))
    rows[-1] = {
        **rows[-1],
        "doc": "1_Example/list.xml",
        "focus": "Overview",
        "cui": [],
        "question": "Which are there?",
    }
    rows[-1]["answer"] = f"There are many illnesses. {names}"
    source = write_lines(tmp_path / "dev.jsonl", rows)
    _, questions = check_invariants(tmp_path / "out", import_set("medquad", source, into=tmp_path / "out"))
    assert {question.question for question in questions if question.kind == "unanswerable"} <= {
        "Which are there?"
    }


def test_medquad_xml_gives_the_same_domain_as_rows(tmp_path):
    folder = tmp_path / "xml" / "1_Example"
    folder.mkdir(parents=True)
    (folder / "7.xml").write_text(
        """<?xml version="1.0" encoding="UTF-8"?>
<Document id="7" source="Example" url="https://example.org/7"><Focus>Zarpox</Focus>
<FocusAnnotations><UMLS><CUIs><CUI>C7</CUI></CUIs></UMLS>
<Synonyms><Synonym>Zarp illness</Synonym></Synonyms></FocusAnnotations>
<QAPairs>
<QAPair pid="1"><Question qid="7-1" qtype="information">What is Zarpox ?</Question>
<Answer>Zarpox is an illness of the ear. It is mild.</Answer></QAPair>
<QAPair pid="2"><Question qid="7-2" qtype="treatment">How is Zarpox treated?</Question><Answer></Answer></QAPair>
</QAPairs></Document>"""
    )
    result = import_set("medquad", tmp_path / "xml", into=tmp_path / "out", hold_out_share=0)
    documents, questions = check_invariants(tmp_path / "out", result)
    assert result.skipped == {"empty answer": 1}
    assert documents["1_Example-7"].text == "## Information\n\nZarpox is an illness of the ear. It is mild."
    assert documents["1_Example-7"].source == "https://example.org/7"
    assert (questions[0].id, questions[0].question) == ("7-1", "What is Zarpox?")


def test_medquad_xml_expands_no_entities(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("Do not read this sentence aloud.")
    path = tmp_path / "xml" / "1.xml"
    path.parent.mkdir()
    path.write_text(
        f'<!DOCTYPE d [<!ENTITY x SYSTEM "file://{secret}">]><Document><Focus>F</Focus><QAPairs><QAPair>'
        '<Question qtype="information">What is it?</Question><Answer>It is this here. &x;</Answer>'
        "</QAPair></QAPairs></Document>"
    )
    import_set("medquad", path.parent, into=tmp_path / "out", hold_out_share=0)
    assert "aloud" not in (tmp_path / "out" / "documents.jsonl").read_text()


PUBMED = {
    "id": "p1",
    "pmid": "11",
    "question": "Does tea help sleep?",
    "contexts": ["We studied sleep.", "Tea drinkers slept longer than others. Coffee did nothing."],
    "context_labels": ["AIM", "RESULTS"],
    "long_answer": "Tea makes people sleep longer.",
    "answer": "yes",
}


def test_pubmedqa_rows_and_original_agree(tmp_path):
    rows = [PUBMED, {**PUBMED, "id": "p2", "pmid": "12", "question": "Is it so?", "answer": "maybe"}]
    source = write_lines(tmp_path / "dev.jsonl", rows)
    result = import_set("pubmedqa", source, into=tmp_path / "a")
    documents, questions = check_invariants(tmp_path / "a", result)
    assert documents["pubmed-11"].text.startswith("## Aim\n\nWe studied sleep.\n\n## Results\n\n")
    assert "Tea makes people" not in documents["pubmed-11"].text
    assert questions[0].gold[0].quote == "Tea drinkers slept longer than others."
    original = {
        row["pmid"]: {
            "QUESTION": row["question"],
            "CONTEXTS": row["contexts"],
            "LABELS": row["context_labels"],
            "LONG_ANSWER": row["long_answer"],
            "final_decision": row["answer"],
        }
        for row in rows
    }
    (tmp_path / "ori_pqal.json").write_text(json.dumps(original))
    other = import_set("pubmedqa", tmp_path / "ori_pqal.json", into=tmp_path / "b")
    _, again = check_invariants(tmp_path / "b", other)
    strip = [question.model_dump(exclude={"id"}) for question in questions]
    assert [question.model_dump(exclude={"id"}) for question in again] == strip


def test_beir(tmp_path):
    write_lines(
        tmp_path / "set" / "corpus.jsonl",
        [
            {"_id": "d1", "title": "Wasps", "text": "Wasps build nests of paper. They eat fruit in autumn."},
            {"_id": "d2", "title": "Bees", "text": "Bees make honey. A hive has one queen."},
            {"_id": "d3", "title": "Empty", "text": ""},
        ],
    )
    write_lines(
        tmp_path / "set" / "queries.jsonl",
        [
            {"_id": "q1", "text": "what do wasps eat in autumn"},
            {"_id": "q2", "text": "how many queens has a hive"},
            {"_id": "q3", "text": "who is king"},
        ],
    )
    qrels = tmp_path / "set" / "qrels" / "test.tsv"
    qrels.parent.mkdir()
    qrels.write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td1\t2\nq2\td2\t1\nq3\td1\t0\n")
    result = import_set("beir", tmp_path / "set", into=tmp_path / "out")
    _, questions = check_invariants(tmp_path / "out", result)
    assert {q.id: (q.about, q.answer) for q in questions} == {
        "q1": ("d1", "They eat fruit in autumn."),
        "q2": ("d2", "A hive has one queen."),
    }
    assert result.skipped == {"no relevant document in the corpus": 1}
    assert result.skipped_documents == {"empty text": 1}
    assert any("no answers" in note for note in result.notes)


def test_beir_without_qrels_names_the_folder(tmp_path):
    write_lines(tmp_path / "corpus.jsonl", [{"_id": "d", "text": "One text."}])
    with pytest.raises(DataError, match="qrels"):
        import_set("beir", tmp_path, into=tmp_path / "out")


MCQ = {
    "question": "Which gas do plants take in?",
    "options": {"A": "Oxygen", "B": "Carbon dioxide"},
    "answer": "B",
    "explanation": "Plants take in carbon dioxide from the air.",
}


@pytest.mark.parametrize(
    ("row", "base"),
    [
        (MCQ, None),
        ({**MCQ, "answer": "carbon dioxide"}, None),
        (
            {
                "question": MCQ["question"],
                "opa": "Oxygen",
                "opb": "Carbon dioxide",
                "cop": 2,
                "exp": "Plants.",
            },
            1,
        ),
        ({"question": MCQ["question"], "choices": ["Oxygen", "Carbon dioxide"], "answer": 1}, 0),
        ({"sent1": MCQ["question"], "ending0": "Oxygen", "ending1": "Carbon dioxide", "label": 1}, 0),
        ({"question": MCQ["question"], "A": "Oxygen", "B": "Carbon dioxide", "answer": "(b)"}, None),
    ],
)
def test_mcq_shapes(tmp_path, row, base):
    source = write_lines(tmp_path / "rows.jsonl", [row])
    result = import_set("mcq", source, into=tmp_path / "out", cop_base=base)
    _, questions = check_invariants(tmp_path / "out", result)
    assert questions[0].options == MCQ["options"]
    assert questions[0].answer == "B"


def test_mcq_number_needs_its_base_and_its_range(tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", [{**MCQ, "answer": 2}])
    with pytest.raises(DataError, match="number 2") as caught:
        import_set("mcq", source, into=tmp_path / "out")
    assert "--cop-base" in caught.value.next_step
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'answer'"):
        import_set("mcq", source, into=tmp_path / "out", cop_base=0)
    assert not (tmp_path / "out").exists()


def test_mcq_without_documents_says_so(tmp_path):
    row = {key: value for key, value in MCQ.items() if key != "explanation"}
    source = write_lines(tmp_path / "rows.jsonl", [row])
    result = import_set("mcq", source, into=tmp_path / "out")
    assert result.documents == 0
    assert any("no documents" in note for note in result.notes)
    given = tmp_path / "texts"
    given.mkdir()
    import_set("mcq", source, into=tmp_path / "with", documents=given)
    assert load_domain(str(tmp_path / "with")).config.curate.decontaminate_ngram == 13
    assert load_domain(str(tmp_path / "with")).documents == given.resolve()


def prd_files(folder: Path) -> None:
    write_lines(
        folder / "docs" / "dev.jsonl",
        [
            {
                "id": "k1",
                "title": "Kettle",
                "text": "# Kettle\n\n## Safety\n\nThe kettle turns\nitself off. It beeps.",
            },
            {
                "id": "k2",
                "title": "Lamp",
                "text": "# Lamp\n\n## Light\n\nThe lamp has three levels of light.",
            },
        ],
    )
    rows = [
        ("a", "k1", "Kettle: Does it switch off?", "The kettle turns itself off. It beeps.", True),
        ("b", "k1", "Kettle: Is it safe?", "Yes.", True),
        ("c", "k2", "Lamp: Who made it?", None, False),
        (
            "d",
            "k2",
            "Lamp: How many levels?",
            "Levels of light: as many as three, says the maker. " + "Word " * 70,
            True,
        ),
        ("e", "k2", "Lamp: What else?", "Nothing that could be found in the text at all.", True),
    ]
    keys = ("id", "doc_id", "question_in_context", "answer", "answerable")
    write_lines(folder / "qa" / "dev.jsonl", [dict(zip(keys, row, strict=True)) for row in rows])


def test_jsonl_with_documents_beside(tmp_path):
    prd_files(tmp_path)
    result = import_set(
        "jsonl",
        tmp_path,
        into=tmp_path / "out",
        documents=Path("docs/dev.jsonl"),
        questions=Path("qa/dev.jsonl"),
        fields=["question=question_in_context", "about=doc_id"],
        document_fields=["doc_id=id"],
    )
    _, questions = check_invariants(tmp_path / "out", result)
    by_id = {question.id: question for question in questions}
    assert {key: question.kind for key, question in by_id.items()} == {
        "a": "open",
        "b": "yes_no",
        "c": "unanswerable",
        "d": "open",
        "e": "open",
    }
    # The quote is what stands in the document, line break and all; the answer is on one line.
    assert by_id["a"].gold[0].quote == "The kettle turns\nitself off."
    assert by_id["a"].answer == "The kettle turns itself off. It beeps."
    assert by_id["b"].answer == "yes"
    assert by_id["d"].answer == "Levels of light: as many as three, says the maker."
    assert by_id["e"].gold == []
    assert sum(count for reason, count in result.changed.items() if reason.startswith("without gold")) == 3
    assert result.changed["answer shortened to whole sentences"] == 1


def test_jsonl_with_the_document_in_the_row(tmp_path):
    text = "Moss grows in shade. It has no roots."
    rows = [
        {"q": "Where does moss grow?", "a": "Moss grows in shade.", "passage": text},
        {"q": "Has it roots?", "a": "No", "passage": text},
        {"q": "", "a": "x", "passage": text},
    ]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    fields = {"question": "q", "answer": "a", "document": "passage"}
    result = import_set("jsonl", source, into=tmp_path / "out", fields=fields)
    documents, questions = check_invariants(tmp_path / "out", result)
    assert len(documents) == 1
    assert [question.kind for question in questions] == ["open", "yes_no"]
    assert result.skipped == {"empty question": 1}


def test_errors_name_line_key_and_typo(tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", [{"qestion": "Why?", "answer": "So."}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: no key 'question'") as caught:
        import_set("jsonl", source, into=tmp_path / "out")
    assert "did you mean 'qestion'" in caught.value.expected
    with pytest.raises(DataError, match="no key 'questoin'"):
        import_set("jsonl", source, into=tmp_path / "out", fields={"question": "questoin"})
    with pytest.raises(DataError, match="no field 'queston'") as caught:
        import_set("jsonl", source, into=tmp_path / "out", fields={"queston": "qestion"})
    assert "did you mean 'question'" in caught.value.expected
    with pytest.raises(DataError, match="medqad") as caught:
        import_set("medqad", source, into=tmp_path / "out")
    assert "did you mean 'medquad'" in caught.value.expected
    with pytest.raises(DataError, match="does not exist"):
        import_set("medquad", tmp_path / "nowhere", into=tmp_path / "out")


def test_broken_line_and_unknown_document(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Why?", "answer": "So."}\n{"question": \n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not JSON"):
        import_set("jsonl", path, into=tmp_path / "out")
    docs = write_lines(tmp_path / "docs.jsonl", [{"doc_id": "a", "text": "Some text."}])
    source = write_lines(tmp_path / "q.jsonl", [{"question": "Why?", "answer": "So.", "about": "b"}])
    with pytest.raises(DataError, match=r"q.jsonl:1: 'about' is 'b'"):
        import_set("jsonl", source, into=tmp_path / "out", documents=docs)


def test_nothing_is_overwritten_and_zero_is_an_error(tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", [{"question": "Why?", "answer": ""}])
    with pytest.raises(DataError, match="0 of 1 questions kept; most common reason: no answer"):
        import_set("jsonl", source, into=tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists already"):
        import_set("jsonl", source, into=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_limit_takes_whole_topics_and_adds_up(tmp_path):
    source = write_lines(tmp_path / "dev.jsonl", medquad_rows())
    result = import_set("medquad", source, into=tmp_path / "out", limit=11)
    check_invariants(tmp_path / "out", result)
    assert result.questions == 11
    assert result.skipped["over the limit"] == 29


def test_same_input_same_bytes_and_the_seed_matters(tmp_path):
    source = write_lines(tmp_path / "dev.jsonl", medquad_rows())
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        import_set("medquad", source, into=tmp_path / name / "set", seed=seed)
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name / "set").glob("*.jsonl")}
        for name in "abc"
    }
    assert files["a"] == files["b"]
    assert files["a"] != files["c"]


def test_documents_of_equal_text_become_one(tmp_path):
    docs = [{"doc_id": name, "text": "The moon is round. It is far."} for name in "ab"]
    docs.append({"doc_id": "c", "text": "The sun is hot."})
    rows = [
        {"question": f"What shape is the {n} moon?", "answer": "The moon is round.", "about": n}
        for n in ("a", "b")
    ] + [{"question": "Is the sun hot?", "answer": "yes", "about": "c"}]
    write_lines(tmp_path / "docs.jsonl", docs)
    source = write_lines(tmp_path / "q.jsonl", rows)
    result = import_set("jsonl", source, into=tmp_path / "out", documents=tmp_path / "docs.jsonl")
    documents, questions = check_invariants(tmp_path / "out", result)
    assert set(documents) == {"a", "c"}
    assert result.skipped_documents == {"the same text as another document": 1}
    assert [question.about for question in questions] == ["a", "a", "c"]
    # Every document that was written is read again as it is.
    loaded = load_documents(tmp_path / "out" / "documents.jsonl")
    assert loaded.skipped == []
    assert {item.doc_id: item.text for item in loaded.documents} == {k: d.text for k, d in documents.items()}


def test_every_format_is_described_and_importable():
    assert set(available_formats()) == set(FORMATS) == {"beir", "jsonl", "mcq", "medquad", "pubmedqa"}


def test_csv_and_json_rows(tmp_path):
    (tmp_path / "rows.csv").write_text('question,answer,document\n"Why, then?",It rains.,It rains. Often.\n')
    _, questions = check_invariants(
        tmp_path / "a", import_set("jsonl", tmp_path / "rows.csv", into=tmp_path / "a")
    )
    assert questions[0].question == "Why, then?"
    (tmp_path / "rows.json").write_text(
        json.dumps([{"question": "Why?", "answer": "So it is.", "document": "Hm."}])
    )
    import_set("jsonl", tmp_path / "rows.json", into=tmp_path / "b")
    (tmp_path / "rows.csv").write_text("question,answer\nWhy?\n")
    with pytest.raises(DataError, match=r"rows.csv:2: another number of columns"):
        import_set("jsonl", tmp_path / "rows.csv", into=tmp_path / "c")


def test_lead_best_sentence_shorten_locate():
    assert lead('He said "no" to it. The rest is plain text.') == (
        "The rest is plain text.",
        "The rest is plain text.",
    )
    assert lead("Too few.") == ("Too few.", "Too few.")
    assert lead("Why?") is None
    assert best_sentence("Cats purr. Dogs bark at cats.", "barking dogs") == "Dogs bark at cats."
    assert best_sentence("Cats purr.", "barking dogs") is None
    assert shorten("One two three. Four five.", max_words=3) == "One two three."
    assert shorten("One two three four.", max_words=3) is None
    assert locate("Nope, not there. The sky is\nblue today.", "x\nThe sky\nis blue today. y") == (
        "The sky\nis blue today."
    )
