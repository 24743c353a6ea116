"""SAIL at serving (arXiv 2305.15225): the student says which passages are informative, then answers.

One pass, today's prompt. Only the passages that it calls informative count as evidence for the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from domains.records import Reflection
from rag.answers import one_reply
from rag.verdicts import split_verdict
from serve.engine import Completion
from serve.reflection import Ground, Reflected, abstained

if TYPE_CHECKING:
    from serve.assistant import Asked


class TextReflector:
    """Answers with SAIL's plain verdict in front.

    Args:
        distracting: what happens when no passage is informative: ``abstain``, or ``answer`` without evidence.
    """

    name = "text"
    retrieves_first = True

    def __init__(self, *, distracting: Literal["abstain", "answer"]) -> None:
        self._distracting = distracting

    def close(self) -> None:
        """Nothing was opened."""

    def reflect(self, asked: Sequence[Asked], ground: Ground) -> list[Reflected]:
        """`serve.reflection.Reflector.reflect`."""
        if not asked:
            return []
        limit = max(item.max_tokens for item in asked)
        completions = ground.engine.generate(
            [item.tokens for item in asked], max_tokens=limit, watch=ground.watch
        )
        return [self._read(item, written, ground) for item, written in zip(asked, completions, strict=True)]

    def _read(self, item: Asked, written: Completion, ground: Ground) -> Reflected:
        verdict, rest = split_verdict(one_reply(written.text), len(item.hits))
        completion = replace(written, text=rest)
        evidence = [at for at in range(1, len(item.hits) + 1) if verdict is None or verdict[at - 1]]
        notes = [] if verdict is not None else ["no verdict could be read: every passage counts"]
        if item.hits and not evidence:
            notes.append("every passage was called distracting")
            if self._distracting == "abstain":
                completion = replace(written, text=abstained(ground, written.prompt_tokens).text)
        reflection = Reflection(
            backend=self.name,
            retrieved=bool(item.hits),
            relevant=evidence if verdict is not None else [],
            unparsed=int(verdict is None),
            passes=1,
            tokens=len(written.tokens),
            notes=notes,
        )
        return Reflected(list(item.hits), evidence, completion, written.text, reflection)
