from __future__ import annotations

import copy
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from exam_example import ActorEngine, make_run, take_exam
from rich.console import Console

from pipeline.plots import plot_arms, plot_curation, plot_losses
from pipeline.report import METRICS, TEMPLATE, exam_table, render_report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    ActorEngine.opened, ActorEngine.asked = [], 0
    return take_exam(*make_run(tmp_path_factory.mktemp("exam")))[0]


@pytest.fixture(scope="module")
def page(report):
    return render_report(report)


class _Page(HTMLParser):
    """Collects links to the outside, texts by tag, and checks that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "action", "data"} and not value.startswith("#"):
                self.links.append(value)
        if tag not in {"meta", "br", "link", "img"}:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_well_formed_and_needs_nothing_from_outside(page):
    parsed = _Page(page)
    assert parsed.links == []
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert parsed.tags.count("svg") == 4
    assert not re.search(r"url\((?!#)|@import|<!DOCTYPE svg|<\?xml", page)


def test_verdict_comes_before_everything_else(page, report):
    text = " ".join(_Page(page).text.split())
    verdict = text.index(report["verdict"])
    assert verdict < text.index("Score of every arm") < text.index("Example answers")


def test_page_shows_arms_metrics_and_what_was_left_out(page, report):
    text = " ".join(_Page(page).text.split())
    for needle in (
        "untrained + passages",
        "served + passages",
        "Abstains when due",
        "2 exam questions were not drawn",
        "200 rationales came from the teacher, 120 were kept, 80 rejected",
        "Parity gate: passed",
        "preceptor run clubs",
        "All of it is made up.",
        "recall@3",
        "student-F16.gguf",
    ):
        assert needle in text
    assert f"{100 * report['arms']['tuned_rag']['score']['mean']:.0f}" in text


def test_texts_of_documents_and_models_are_escaped(report):
    nasty = copy.deepcopy(report)
    attack = "<script>alert('x')</script>"
    nasty["domain"]["title"] = nasty["examples"][0]["question"] = attack
    for said in nasty["examples"][0]["answers"].values():
        said["text"] = attack
        said["citations"] = [{"quote": attack, "title": attack, "by": "model"}]
    page = render_report(nasty)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_page_can_be_made_when_other_stages_left_nothing(report):
    bare = copy.deepcopy(report)
    bare |= {
        "parity": None,
        "elicit": None,
        "curate": None,
        "train": None,
        "export": None,
        "losses": [],
        "sizes_bytes": {},
        "versions": {},
        "teachers": [],
        "stage_seconds": {},
        "retrieval": {},
        "examples": [],
    }
    text = " ".join(_Page(render_report(bare)).text.split())
    assert "Nothing was curated in this run." in text
    assert "No loss curve was found." in text
    assert "retrieval can't be measured" in text


def test_failed_parity_is_said(report):
    failed = copy.deepcopy(report)
    failed["parity"] = {"ready": False, "kl": None, "top1_agreement": None, "bits_equal": None}
    assert "Parity gate: failed." in " ".join(_Page(render_report(failed)).text.split())


def test_exactly_what_was_trained_is_said_only_where_it_is_so(report):
    for equal, said in ((True, "bit for bit, the one that was trained"), (None, "near the trained network")):
        exact = copy.deepcopy(report)
        exact["parity"] = {"ready": True, "kl": 0.001, "top1_agreement": 0.99, "bits_equal": equal}
        text = " ".join(_Page(render_report(exact)).text.split())
        assert said in text
        assert ("bit for bit" in text) == bool(equal)


def test_a_search_says_what_rotating_was_worth(report):
    searched = copy.deepcopy(report)
    row = {
        "name": "gptq-q4_0", "bytes": 122 * 10**6, "untied_bytes": 30 * 10**6, "block_bits_per_weight": 4.5, "kl": 0.3, "top1_agreement": 0.8,
        "exam": None, "prompt_tokens_per_s": 800.0, "decode_tokens_per_s": 90.0,
    }  # fmt: skip
    facts = {
        "candidates": [row],
        "winner": "gptq-q4_0",
        "reasons": ["x: slower"],
        "rotation": "no rotation beats it",
        "caveat": "compared on what rows show",
    }
    searched["export"] = {"facts": {"search": facts}}
    text = " ".join(_Page(render_report(searched)).text.split())
    assert "no rotation beats it" in text
    assert "compared on what rows show" in text
    assert "122.0 MBof it 30.0 MB for an output matrix of its own" in text
    searched["export"]["facts"]["search"] |= {"rotation": "", "caveat": ""}
    assert "<li></li>" not in render_report(searched)


def test_same_report_same_bytes(report, page):
    assert render_report(report) == page


def test_every_metric_of_the_report_has_a_name_for_people(report):
    named = {row[0] for row in METRICS}
    assert {metric for arm in report["arms"].values() for metric in arm} <= named


def test_template_lies_in_the_package():
    assert TEMPLATE.parent.name == "pipeline"
    assert TEMPLATE.is_file()


# -- plots


def test_plots_are_plain_svg_in_the_pages_colour():
    svg = plot_arms({"base": {"mean": 0.2, "low": 0.1, "high": 0.3}}, {"base": "un<trained"})
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "un&lt;trained" in svg
    assert "<metadata" not in svg


def test_losses_with_and_without_validation():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert "validation" not in plot_losses(rows)
    assert "validation" in plot_losses([*rows, {"step": 2, "validation_loss": 1.7}])
    assert plot_losses([]) == ""
    assert plot_losses([{"step": 1, "loss": 2.0}])


def test_curation_is_drawn_most_frequent_reason_first():
    svg = plot_curation({"in": 10, "kept": 4, "rejected": 6, "reasons.quote": 1, "reasons.too_long": 5})
    labels = re.findall(r">(kept|quote|too long)<", svg)
    assert labels == ["kept", "too long", "quote"]
    assert plot_curation({}) == ""


# -- terminal


def test_table_fits_a_terminal_and_shows_the_interval(report):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(exam_table(report))
    text = console.export_text()
    score = report["arms"]["tuned_rag"]["score"]
    assert f"{100 * score['low']:.0f}–{100 * score['high']:.0f}" in text
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["score"][-2] == f"{100 * score['mean']:.0f}"
    assert lines["gold quotes cited"][-5:-2] == ["–", lines["gold quotes cited"][-4], "–"]
    assert "Exam: 48 questions (12 open, 12 options, 12 unanswerable, 12 yes/no)" in text
    assert "…" not in text
