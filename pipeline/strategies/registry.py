"""All strategies by the name that ``use`` has in ``domain.toml``."""

from __future__ import annotations

from pipeline.strategies import (
    critique_revise,
    explain_options,
    generate_questions,
    label,
    orca,
    rate,
)
from pipeline.strategies.strategy import Entry

# Every prompt that a domain may bring, but for messages of its own (``orca_*``).
PROMPT_NAMES = frozenset(
    {
        *(f"{orca.PREFIX}{name}" for name in orca.MESSAGES),
        *explain_options.PROMPTS,
        *generate_questions.PROMPTS,
        *critique_revise.PROMPTS,
        *rate.PROMPTS,
    }
)
STRATEGIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "label", label.label, needs="seed", gives="task", scope="row", version=1,
            estimate=label.estimate, pilot=False,
        ),
        Entry(
            "orca", orca.orca, needs="seed", gives="task", scope="row", version=1,
            estimate=orca.estimate, prompts=orca.prompts, choose=orca.choose,
        ),
        Entry(
            "explain_options", explain_options.explain_options, needs="seed", gives="task", scope="row", version=1,
            estimate=explain_options.estimate, prompts=lambda _: explain_options.PROMPTS,
            choose=explain_options.choose,
        ),
        Entry(
            "generate_questions", generate_questions.generate_questions, needs="doc", gives="seed", scope="pool",
            version=1, estimate=generate_questions.estimate, prompts=lambda _: generate_questions.PROMPTS,
            choose=generate_questions.choose,
        ),
        Entry(
            "critique_revise", critique_revise.critique_revise, needs="task", gives="task", scope="row", version=1,
            estimate=critique_revise.estimate, prompts=lambda _: critique_revise.PROMPTS,
        ),
        Entry(
            "rate", rate.rate, needs="task", gives="task", scope="pool", version=1,
            estimate=rate.estimate, prompts=lambda _: rate.PROMPTS,
        ),
    )
}  # fmt: skip
