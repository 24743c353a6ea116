"""What a run will cost before it starts: minutes per stage, disk, memory.

Seconds per unit of work come from this machine's own earlier runs (kept in the cache folder), else from
a run on 2 cores of a server CPU (docs/results.md).
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from domains.domain import Domain
from domains.jsonl import iter_json_lines, write_text_atomic
from pipeline.run_folder import Finished
from serve.models import SMOLLM2, cache_folder

# Seconds per unit on 2 cores with the default model; the unit is what `_work` counts.
MEASURED = {
    "index": 6.5e-5,
    "elicit": 1.0,
    "curate": 0.01,
    "rerank": 0.3,
    "train": 1.1,
    "export": 47.0,
    "calibrate": 0.9,
    "exam": 0.7,
}
# Fewer units than these say little about the speed: a stage's start-up would count.
ENOUGH = {
    "index": 50_000,
    "elicit": 50,
    "curate": 50,
    "rerank": 50,
    "train": 50,
    "export": 1,
    "calibrate": 50,
    "exam": 100,
}
# Billions of parameters, for sizes; an unknown base counts as 1.
BILLIONS = {
    SMOLLM2: 0.135,
    "meta-llama/Llama-3.2-1B-Instruct": 1.24,
    "meta-llama/Llama-3.2-3B-Instruct": 3.21,
}
BYTES_PER_WEIGHT = {"F16": 2.0, "Q8_0": 1.07, "Q4_0": 0.68, "Q4_1": 0.74, "Q4_K_M": 0.79}


@dataclass(frozen=True)
class Estimate:
    """Minutes per stage, and bytes of disk and memory at the peak."""

    seconds: dict[str, float]
    disk_bytes: float
    memory_bytes: float
    own_rates: bool

    @property
    def minutes(self) -> float:
        """All stages together."""
        return sum(self.seconds.values()) / 60


def estimate(domain: Domain) -> Estimate:
    """Estimate a whole run from the sizes of its inputs and its config."""
    config = domain.config
    rates = {**MEASURED, **_own_rates()}
    work = _work(domain)
    scale = {
        stage: (
            _billions(config.student.base) / 0.135
            if stage in {"train", "export", "calibrate", "exam"}
            else 1.0
        )
        for stage in work
    }
    weights = _billions(config.student.base) * 1e9
    files = sum(BYTES_PER_WEIGHT[kind] for kind in (*config.export.formats, config.export.serve, "F16"))
    return Estimate(
        seconds={stage: rates[stage] * units * scale[stage] for stage, units in work.items()},
        disk_bytes=weights * (files + 4) + _corpus_bytes(domain) * 12 + 30e6,
        memory_bytes=2.2e9 + weights * 13,
        own_rates=bool(_own_rates()),
    )


def learn(domain: Domain, stage: str, entry: Finished) -> None:
    """Keep this machine's own speed of a stage for later estimates.

    Not where a part of the work was found done, or where a service did it: that says nothing about speed.
    """
    units = _work(domain)[stage]
    if domain.config.student.base != SMOLLM2 or units < ENOUGH[stage] or not _all_own(stage, entry):
        return
    rates = {**_own_rates(), stage: entry.seconds / units}
    # A run must not fail at its end because a cache can't be written.
    with suppress(OSError):
        write_text_atomic(_rates_file(), json.dumps(rates, indent=1) + "\n")


def _all_own(stage: str, entry: Finished) -> bool:
    """Whether this call of the stage did all the work itself."""
    counts, facts = entry.counts, entry.facts
    if stage == "index":
        return counts.get("embedded", 0) == counts.get("passages", 0)
    if stage == "elicit":
        return not counts.get("cached") and facts.get("teacher", SMOLLM2) == SMOLLM2
    if stage == "train":  # tokens and their speed are those of the whole training, seconds those of this call
        rate = facts.get("tokens_per_s")
        return not rate or facts.get("tokens", 0) / rate <= entry.seconds
    if stage == "exam":
        return bool(facts.get("answering_s", 0.0) <= entry.seconds)
    return True


def _work(domain: Domain) -> dict[str, float]:
    config = domain.config
    seeds, exams = _count_questions(domain)
    asked = min(config.elicit.questions or seeds, seeds)
    rows = (
        asked
        if not config.train.max_rows
        else min(config.train.max_rows, asked * config.curate.keep_per_question * 1.3)
    )
    return {
        "index": _corpus_bytes(domain),
        "elicit": asked * config.elicit.samples,
        "curate": asked * config.elicit.samples,
        "rerank": asked * config.rerank.epochs if config.rerank.enabled else 0.0,
        "train": rows * config.train.epochs,
        "export": 1.0,
        "calibrate": min(config.calibrate.questions or 2 * seeds, 2 * seeds) * config.calibrate.enabled,
        "exam": min(config.exam.questions or exams, exams) * 5,
    }


def _count_questions(domain: Domain) -> tuple[int, int]:
    if domain.questions is None or not domain.questions.is_file():
        return 0, 0
    splits = [row.get("split") for _number, row in iter_json_lines(domain.questions)]
    return splits.count("seed"), splits.count("exam")


def _corpus_bytes(domain: Domain) -> float:
    path = domain.documents
    files = path.rglob("*") if path.is_dir() else [path]
    return float(sum(file.stat().st_size for file in files if file.is_file()))


def _billions(base: str) -> float:
    return BILLIONS.get(base, 1.0)


def _rates_file() -> Path:
    return cache_folder() / "rates.json"


def _own_rates() -> dict[str, float]:
    try:
        rates = json.loads(_rates_file().read_text(encoding="utf-8"))
        return {stage: float(rates[stage]) for stage in MEASURED if stage in rates}
    except (OSError, ValueError, TypeError):
        return {}
