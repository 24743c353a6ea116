"""Writes docs/configuration.md from the records: ``python -m domains.describe > docs/configuration.md``."""

from __future__ import annotations

import inspect
import json
import sys

from pydantic.fields import FieldInfo

from domains.config import DomainConfig, LeversSection
from domains.records import Record
from domains.steps import STEPS, Budget, JudgeOptions

_HEAD = """# Configuration: every key of domain.toml

Written from `domains/config.py` (a test compares). Unknown keys are errors. A table
`[profiles.NAME.SECTION]` overrides keys when that profile is chosen: `preceptor run DOMAIN --profile NAME`;
`full` is the file without a profile.
"""


def describe() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for section, field in DomainConfig.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, Record)
        parts.append(
            f"\n## [{section}]\n\n{inspect.cleandoc(kind.__doc__ or '')}\n\n| key | default | allowed |\n|---|---|---|\n"
        )
        parts += _rows(kind)
        if section == "elicit":
            parts += _steps()
        if section == "train":
            parts += [_table("[train.levers]", LeversSection), *_rows(LeversSection)]
    return "".join(parts)


def _steps() -> list[str]:
    """The tables below ``[elicit]``: the judge, and the options of every step."""
    parts = [_table("[elicit.judge]", JudgeOptions), *_rows(JudgeOptions)]
    parts += [_table("budget of [[elicit.steps]]", Budget), *_rows(Budget)]
    for use, kind in STEPS.items():
        parts += [_table(f'[[elicit.steps]] use = "{use}"', kind), *_rows(kind, without="use")]
    return parts


def _table(title: str, kind: type[Record]) -> str:
    return f"\n### {title}\n\n{inspect.cleandoc(kind.__doc__ or '')}\n\n| key | default | allowed |\n|---|---|---|\n"


def _rows(kind: type[Record], *, without: str = "") -> list[str]:
    return [
        f"| `{key}` | {_default(item)} | {_allowed(item)} |\n"
        for key, item in kind.model_fields.items()
        if key != without
    ]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.default, ensure_ascii=False, default=_brief)}`"


def _brief(record: Record) -> dict[str, object]:
    """A record without what is at its default."""
    return {
        key: value for key, value in record if key == "use" or value != type(record).model_fields[key].default
    }


def _allowed(field: FieldInfo) -> str:
    if field.annotation is LeversSection:
        return "a table, see below"
    if field.annotation is Budget:
        return "a table, see above: `{ calls = 400 }`"
    if "domains.steps" in str(field.annotation):
        return "a table, see below" if "list" not in str(field.annotation) else "a list of tables, see below"
    kind = str(field.annotation)
    kind = kind.replace("<class '", "").replace("'>", "").replace("typing.", "")
    limits = [str(item) for item in field.metadata]
    return " ".join(f"`{part}`" for part in [kind, *limits]).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(describe())
