"""Prompt files of the strategies: named placeholders, filled once, with untrusted text inside fences."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from domains.errors import ConfigError
from domains.records import Passage
from rag.prompt import neutralise
from rag.untrusted import fenced

# A brace of JSON is never followed by a bare name and a closing brace.
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Template:
    """A prompt with placeholders like ``{question}``.

    Attributes:
        name: of the file in the domain's ``prompts``, without ``.md``.
        text: the prompt.
    """

    name: str
    text: str

    @property
    def placeholders(self) -> frozenset[str]:
        """The names that must be filled."""
        return frozenset(_PLACEHOLDER.findall(self.text))

    @property
    def sha(self) -> str:
        """Digest of the template, not of the values: provenance of a row."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()[:16]

    def fill(self, **values: str) -> str:
        """The prompt. Values are put in once: braces and placeholders inside them stay as they are."""
        return neutralise(_PLACEHOLDER.sub(lambda match: values[match[1]], self.text))


def own_or_default(defaults: Mapping[str, str | None], own: Mapping[str, str]) -> dict[str, Template]:
    """The domain's prompt files in the place of the built-in ones.

    Args:
        defaults: built-in text by name; its placeholders are those that the strategy fills. None where only
            the domain has the text, which has no placeholders then.
        own: all prompts of the domain by name.

    Raises:
        ConfigError: a file is missing, lacks a placeholder or has one that nothing fills (all of them named).
    """
    problems = []
    templates = {}
    for name, default in defaults.items():
        if default is None and name not in own:
            problems.append(f"prompts/{name}.md is missing, and no built-in prompt has that name")
            continue
        template = Template(name, own.get(name, default or ""))
        wanted = Template(name, default or "").placeholders
        for missing in sorted(wanted - template.placeholders):
            problems.append(f"prompts/{name}.md lacks {{{missing}}}")
        for unknown in sorted(template.placeholders - wanted):
            close = difflib.get_close_matches(unknown, sorted(wanted), n=1)
            hint = (
                f"did you mean {{{close[0]}}}?" if close else f"known: {', '.join(sorted(wanted)) or 'none'}"
            )
            problems.append(f"prompts/{name}.md has {{{unknown}}}; {hint}")
        templates[name] = template
    if problems:
        raise ConfigError(
            "; ".join(problems),
            expected="each placeholder of the built-in prompt, and no other",
            next_step="mend the prompt file and run the command again",
        )
    return templates


def numbered(passages: Sequence[Passage]) -> str:
    """Passages with their numbers from [1], fenced as a whole."""
    parts = [
        f"[{number}] {passage.title}\n{passage.text.strip()}" for number, passage in enumerate(passages, 1)
    ]
    return fenced("\n".join(parts))
