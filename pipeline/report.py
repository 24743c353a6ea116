"""``report.json`` for people: one self-contained HTML page, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.plots import plot_arms, plot_curation, plot_losses, plot_reliability, plot_risk
from pipeline.verdict import points

if TYPE_CHECKING:
    from rich.table import Table

TEMPLATE = Path(__file__).with_name("report.html.j2")

ARM_LABELS = {
    "base": "untrained",
    "base_rag": "untrained + passages",
    "tuned": "trained",
    "tuned_rag": "trained + passages",
    "exported_rag": "served + passages",
}
PAIR_LABELS = {
    "tuned_rag-base_rag": "training, with passages",
    "base_rag-base": "retrieval, untrained",
    "tuned_rag-tuned": "retrieval, trained",
    "exported_rag-tuned_rag": "export",
}
# (metric, name, what it is, unit); shares are shown in points of 100.
METRICS = (
    ("score", "Score", "all questions; the verdict rests on it", "share"),
    ("score_answerable", "Score, answerable", "questions that the documents answer", "share"),
    ("score_served", "Score as served", "answers without support withdrawn, as serving does", "share"),
    ("withdrawn", "Withdrawn", "answers that no shown passage supports", "share"),
    ("token_f1", "Open: token F1", "words shared with the reference answer", "share"),
    ("rouge_l", "Open: ROUGE-L", "longest common word sequence", "share"),
    ("exact_match", "Open: exact match", "same words as the reference", "share"),
    ("option_accuracy", "Options right", "the letter is right", "share"),
    ("yes_no_accuracy", "Yes / no right", "yes, no or maybe is right", "share"),
    ("unparsable", "Unreadable", "no option could be read; counted as wrong", "share"),
    ("abstention_recall", "Abstains when due", "of the unanswerable questions", "share"),
    ("false_abstention", "Abstains wrongly", "of the answerable questions", "share"),
    ("abstention_f1", "Abstention F1", "both together", "share"),
    ("citation_precision", "Citations right", "literal, and at the gold quote", "share"),
    ("citation_document", "Right document", "literal, from the gold document", "share"),
    ("citation_recall", "Gold quotes cited", "covered by a citation", "share"),
    ("alce_recall", "Sentences carried", "by the citations of their answer (ALCE recall, literal)", "share"),
    ("alce_precision", "Citations needed", "by some sentence (ALCE precision, literal)", "share"),
    ("quote_validity", "Quotes literal", "model's quotes that stand in a passage", "share"),
    ("retrieval_rate", "Looks it up", "questions for which the student wanted passages", "share"),
    ("group_missing", "Judgements missing", "that the student should have given", "share"),
    ("judgement_unparsed", "Judgements unreadable", "replies with a verdict that could not be read", "share"),
    ("passes_per_question", "Passes per question", "completions that one answer takes", "number"),
    ("too_long", "Too long", "prompt does not fit; counted as wrong", "share"),
    ("tokens_per_s", "Tokens per second", "written, prompts included, 8 questions at a time", "number"),
    ("seconds_per_question", "Seconds per question", "8 questions at a time", "number"),
)
_KINDS = {"open": "open", "options": "with options", "yes_no": "yes/no", "unanswerable": "unanswerable"}
_SUPPORT = {
    "supported": "supported by a quote",
    "unsupported": "not supported",
    "abstained": "says that it does not know",
    "too_long": "prompt too long",
}
_TABLE = (
    ("score", "score"),
    ("score_served", "score as served"),
    ("token_f1", "open: token F1"),
    ("option_accuracy", "options right"),
    ("yes_no_accuracy", "yes/no right"),
    ("abstention_recall", "abstains when due"),
    ("false_abstention", "abstains wrongly"),
    ("citation_precision", "citations right"),
    ("citation_recall", "gold quotes cited"),
    ("tokens_per_s", "tokens/s"),
)


def render_report(report: Mapping[str, Any]) -> str:
    """The page. Everything is inside it: it opens offline and can be sent as one file.

    Args:
        report: what `pipeline.summary.summarise` makes; texts in it are untrusted and are escaped.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "points": points,
        "share": lambda value: f"{100 * value:.0f}",
        "figure": _figure,
        "size": _size,
        "tied": lambda text: text.replace(" %", "\u00a0%"),
        "duration": _duration,
        "words": lambda name: name.replace("_", " ").replace(".", ": "),
    }
    curated = (report.get("curate") or {}).get("counts", {})
    plots = {
        "arms": plot_arms({arm: metrics["score"] for arm, metrics in report["arms"].items()}, ARM_LABELS),
        "losses": plot_losses(report["losses"]),
        "curation": plot_curation(curated),
        **_reflection_plots(report.get("reflection")),
        **_selective_plots(report.get("selective")),
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        plots={name: Markup(svg) for name, svg in plots.items()},  # noqa: S704  our own SVG
        arm_labels=ARM_LABELS,
        pair_labels=PAIR_LABELS,
        metrics=[row for row in METRICS if any(row[0] in arm for arm in report["arms"].values())],
        kinds=_KINDS,
        verdict=report["verdict"].split(". ", 1),
        support=_SUPPORT,
        curated=curated,
    )


def _selective_plots(selective: Mapping[str, Any] | None) -> dict[str, str]:
    """Risk by coverage of every arm, and how honest the served student's confidence is."""
    if selective is None:
        return {}
    arms = selective["arms"]
    served = arms.get("exported_rag", {})
    return {
        "risk": plot_risk({arm: found["curve"] for arm, found in arms.items()}, ARM_LABELS),
        "confidence": plot_reliability(served.get("reliability", []), event="the answer is right"),
    }


def _reflection_plots(reflection: Mapping[str, Any] | None) -> dict[str, str]:
    """The reliability of the served student's own judgement of support."""
    arms = reflection["arms"] if reflection else {}
    served = arms.get("exported_rag") or next(iter(arms.values()), None)
    bins = served["support_reliability"] if served else []
    fit = reflection.get("fit", {}) if reflection else {}
    return {
        "support": plot_reliability(bins, event="a passage supports the answer"),
        "retrieval": plot_reliability(fit.get("retrieval_reliability", []), event="passages helped"),
    }


def exam_table(report: Mapping[str, Any]) -> Table:
    """The arms for an 80-column terminal: shares in points of 100, the score with its interval."""
    from rich import box
    from rich.table import Table

    arms: Mapping[str, Mapping[str, Any]] = report["arms"]
    kinds = ", ".join(f"{count} {kind.replace('_', '/')}" for kind, count in report["kinds"].items())
    table = Table(
        title=f"Exam: {report['n_questions']} questions ({kinds})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("")
    for arm in arms:
        table.add_column(ARM_LABELS.get(arm, arm).replace(" + ", "\n+ "), justify="right")
    for metric, name in _TABLE:
        values = [arm.get(metric) for arm in arms.values()]
        if any(values):
            table.add_row(name, *(_cell(metric, value) for value in values))
        if metric == "score":
            table.add_row(
                "  95 % interval",
                *(
                    f"{100 * value['low']:.0f}–{100 * value['high']:.0f}" if value else "–"
                    for value in values
                ),
            )
    return table


def _cell(metric: str, value: Mapping[str, float] | None) -> str:
    if value is None:
        return "–"
    return _figure(value["mean"]) if metric == "tokens_per_s" else f"{100 * value['mean']:.0f}"


def _figure(value: Any) -> str:
    """A number of any size with about three digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
