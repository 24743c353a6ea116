"""Plots of the exam report as inline SVG: no scripts, no fonts, no files, the same bytes every time.

Texts and axes take the page's colour (``currentColor``), so that a plot can be read in light and dark.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # stands for the page's text colour until the SVG is written
_WIDTH = 4.9  # inches; 72 points each, so that a point is about a CSS pixel on a phone
_ACCENT, _MUTED, _BAD = "#2a7f8e", "#8a8f98", "#c8553d"
_LINES = ((_MUTED, "-"), (_BAD, "--"), (_ACCENT, "-"))
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "preceptor",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_OUTER = re.compile(r"<\?xml.*?(?=<svg)|<metadata>.*?</metadata>", re.DOTALL)


def plot_arms(arms: Mapping[str, Mapping[str, float]], labels: Mapping[str, str]) -> str:
    """The headline score of every arm with its interval, one row per arm.

    Args:
        arms: ``{arm: {mean, low, high}}`` in [0, 1].
        labels: the arms' names for people.
    """
    with _figure(height=0.42 * len(arms) + 0.75, label="Score of every arm with its 95 % interval") as (
        figure,
        out,
    ):
        axes = figure.add_subplot()
        for row, (arm, value) in enumerate(arms.items()):
            colour = _ACCENT if arm.startswith(("tuned", "exported")) else _MUTED
            axes.plot([value["low"], value["high"]], [row, row], color=colour, linewidth=3, alpha=0.45)
            axes.plot(value["mean"], row, "o", color=colour, markersize=8)
            axes.annotate(
                f"{100 * value['mean']:.0f}",
                (value["mean"], row),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.set_yticks(range(len(arms)), [labels.get(arm, arm) for arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.7)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        axes.set_xlabel("score, points")
        axes.grid(axis="x", alpha=0.2)
        axes.tick_params(axis="y", length=0)
    return out[0]


def plot_losses(rows: Sequence[Mapping[str, Any]]) -> str:
    """Training loss per step, and the validation loss where it was measured; empty for no rows.

    Args:
        rows: ``step``, ``loss`` (nats per supervised token) and perhaps ``validation_loss``.
    """
    curves = {
        "training": [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None],
        "validation": [
            (row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None
        ],
    }
    if not any(curves.values()):
        return ""
    from matplotlib.ticker import MaxNLocator

    with _figure(height=2.6, label="Loss by training step") as (figure, out):
        axes = figure.add_subplot()
        for (name, points), colour in zip(curves.items(), (_ACCENT, _BAD), strict=True):
            if points:
                steps, losses = zip(*points, strict=True)
                marker = "o" if name == "validation" or len(points) == 1 else ""
                axes.plot(steps, losses, color=colour, linewidth=1.8, marker=marker, markersize=5, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.grid(alpha=0.2)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if all(curves.values()):
            axes.legend()
    return out[0]


def plot_curation(counts: Mapping[str, int]) -> str:
    """Rationales kept, and rejected by reason, most frequent first; empty where nothing was counted.

    Args:
        counts: the curate stage's, with keys ``kept`` and ``reasons.<reason>``.
    """
    reasons = {key.removeprefix("reasons."): n for key, n in counts.items() if key.startswith("reasons.")}
    bars = {
        "kept": counts.get("kept", 0),
        **dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    }
    if not any(bars.values()):
        return ""
    from matplotlib.ticker import MaxNLocator

    with _figure(height=0.3 * len(bars) + 0.7, label="Rationales kept, and rejected by reason") as (
        figure,
        out,
    ):
        axes = figure.add_subplot()
        colours = [_ACCENT, *[_MUTED] * len(reasons)]
        drawn = axes.barh(range(len(bars)), list(bars.values()), color=colours, height=0.62)
        axes.bar_label(drawn, padding=3, fontsize=9, color=_INK)
        axes.set_yticks(range(len(bars)), [name.replace("_", " ") for name in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 1.12 * max(bars.values()))
        axes.set_xlabel("rationales")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.tick_params(axis="y", length=0)
    return out[0]


def plot_risk(curves: Mapping[str, Sequence[Sequence[float]]], labels: Mapping[str, str]) -> str:
    """The share of wrong answers against the share of answers given, the surest first; one line per arm.

    Args:
        curves: ``{arm: [[coverage, risk], …]}``, both in [0, 1].
        labels: the arms' names for people.
    """
    with _figure(height=3.0, label="Share of wrong answers by share of answers given") as (figure, out):
        axes = figure.add_subplot()
        for (arm, points), style in zip(curves.items(), itertools.cycle(_LINES), strict=False):
            coverage, risk = zip(*points, strict=True)
            colour, line = style
            axes.plot(coverage, risk, color=colour, linestyle=line, linewidth=1.8, label=labels.get(arm, arm))
        axes.set_xlim(0, 1.02)
        axes.set_ylim(-0.02, 1.02)
        shares = [0, 0.25, 0.5, 0.75, 1]
        axes.set_xticks(shares, [f"{100 * share:.0f}" for share in shares])
        axes.set_yticks(shares, [f"{100 * share:.0f}" for share in shares])
        axes.set_xlabel("answers given, the surest first, %")
        axes.set_ylabel("of these wrong, %")
        axes.grid(alpha=0.2)
        axes.legend(fontsize=9)
    return out[0]


def plot_reliability(bins: Sequence[Mapping[str, float]], *, event: str) -> str:
    """Predicted against observed shares; the diagonal is honest. Empty for no bins.

    Args:
        bins: ``confidence``, ``right`` (in [0, 1]) and ``answers`` of each, see `pipeline.selective.reliability`.
        event: what was predicted, in words.
    """
    if not bins:
        return ""
    with _figure(height=3.2, label=f"Reliability: {event}") as (figure, out):
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle="--")
        predicted, happened = [each["confidence"] for each in bins], [each["right"] for each in bins]
        axes.plot(predicted, happened, color=_ACCENT, linewidth=1.8, marker="o", markersize=6)
        for each in bins:
            axes.annotate(
                f"{each['answers']:.0f}",
                (each["confidence"], each["right"]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.04, 1.12)
        axes.set_xlabel("predicted share")
        axes.set_ylabel(f"share where {event}", fontsize=9)
        axes.grid(alpha=0.2)
    return out[0]


@contextmanager
def _figure(*, height: float, label: str) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on; its SVG is in the list when the block is left."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out: list[str] = []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, out
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None}
        )
    out.append(_inline(buffer.getvalue(), label))


def _inline(svg: str, label: str) -> str:
    """The ``<svg>`` element alone, as wide as its place, with a name for screen readers."""
    bare = _OUTER.sub("", svg).replace(_INK, "currentColor").strip()
    head, _, rest = bare.partition(">")
    width = re.search(r' width="([\d.]+)pt"', head)
    head = re.sub(r' (?:width|height)="[\d.]+pt"', "", head)
    size = f' style="width:100%;max-width:{1.35 * float(width[1]) if width else 480:.0f}px"'
    return f'{head} role="img" aria-label="{escape(label)}"{size}>{rest}'
