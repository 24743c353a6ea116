"""Writes docs/configuration.md from the records: ``python -m domains.describe > docs/configuration.md``."""

from __future__ import annotations

import inspect
import json
import sys

from pydantic.fields import FieldInfo

from domains.config import DomainConfig
from domains.records import Record

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
        parts += [
            f"| `{key}` | {_default(item)} | {_allowed(item)} |\n" for key, item in kind.model_fields.items()
        ]
    return "".join(parts)


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{json.dumps(field.default, ensure_ascii=False)}`"


def _allowed(field: FieldInfo) -> str:
    kind = str(field.annotation)
    kind = kind.replace("<class '", "").replace("'>", "").replace("typing.", "")
    limits = [str(item) for item in field.metadata]
    return " ".join(f"`{part}`" for part in [kind, *limits]).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(describe())
