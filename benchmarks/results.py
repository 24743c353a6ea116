"""Writes the exam tables of finished runs into docs/results.md.

    python benchmarks/results.py runs/medical/quick runs/product_requirements/quick

Each run's section is replaced, the rest of the page stays.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
ARMS = ("base", "base_rag", "tuned", "tuned_rag", "exported_rag")


def main() -> None:
    """Read the runs' reports and rewrite their sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, runs/<domain>/<name>")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    page = arguments.page.read_text(encoding="utf-8")
    for run in arguments.runs:
        page = put_section(page, name=f"{run.parent.name}/{run.name}", text=section(run))
    arguments.page.write_text(page, encoding="utf-8")
    print(f"wrote {arguments.page}")


def section(run: Path) -> str:
    """One run as Markdown: verdict, arms with intervals, retrieval, parity, seconds and sizes per stage."""
    report = json.loads((run / "bundle" / "report.json").read_text(encoding="utf-8"))
    stages = json.loads((run / "run.json").read_text(encoding="utf-8"))
    metrics = sorted({metric for arm in report["arms"].values() for metric in arm})
    lines = [f"{report['n_questions']} exam questions. **{report['verdict']}**", ""]
    lines += ["| metric | " + " | ".join(ARMS) + " |", "|---|" + "---|" * len(ARMS)]
    lines += [
        f"| {metric} | " + " | ".join(cell(report["arms"].get(arm, {}).get(metric)) for arm in ARMS) + " |"
        for metric in metrics
    ]
    lines += [
        "",
        "Retrieval: "
        + ", ".join(f"{name} {cell(value)}" for name, value in report.get("retrieval", {}).items())
        + ".",
    ]
    if parity := report.get("parity"):
        lines.append(
            f"Parity: ready {parity['ready']}, KL {parity['kl']}, top-1 agreement {parity['top1_agreement']}."
        )
    lines += ["", "| stage | seconds | counts |", "|---|---|---|"]
    lines += [
        f"| {name} | {row['seconds']} | {', '.join(f'{k} {v}' for k, v in row['counts'].items())} |"
        for name, row in stages.items()
    ]
    facts = stages["train"]["facts"]
    lines.append(
        f"\nTraining: {facts['tokens_per_s']} tokens/s, validation loss {facts['validation_before']:.3f} before and "
        f"{facts['validation_after']:.3f} after, {facts['peak_rss_mb']} MB at the peak."
    )
    sizes = sorted((run / "bundle").glob("*.gguf"))
    lines += [
        "",
        "Files: " + ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in sizes) + ".",
    ]
    return "\n".join(lines)


def cell(value: dict[str, float] | None) -> str:
    """``mean [low, high]``, or a dash where the arm has no such metric."""
    if value is None or value.get("mean") is None:
        return "-"
    if value.get("low") is None:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def put_section(page: str, *, name: str, text: str) -> str:
    """``page`` with the marked section of a run replaced, or added at the end."""
    begin, end = f"<!-- run {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n### {name}\n\n{text}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(page):
        return pattern.sub(lambda _match: block, page)
    return page.rstrip() + "\n\n" + block + "\n"


if __name__ == "__main__":
    main()
