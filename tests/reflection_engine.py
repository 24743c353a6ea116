"""A scripted student with reflection tokens: a token is one of the 15 or a character; a function says what it writes.

A script gets the prompt as text and gives the reply as text; probabilities can be written behind a token of a group as
``{[Relevant]=0.8,[Irrelevant]=0.1}``: they are what the watched ids have at the position of that token. A character may
stand in place of a token (nothing: a space).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from domains.errors import ContextOverflow
from domains.records import Message
from rag.reflection import TOKENS
from serve.engine import Completion, LogProbs

FIRST_ID = 2_000_000  # above every character
IDS = {text: FIRST_ID + at for at, text in enumerate(TOKENS)}
END = 3_000_000
_SPLIT = re.compile("|".join(re.escape(text) for text in TOKENS) + r"|\{[^}]*\}|.", re.DOTALL)
_TINY = -40.0  # what a watched id has where the script says nothing
_TAKEN = 0.9


class ReflectingEngine:
    """Stands in for `serve.engine.Engine`."""

    adds_bos = False
    path = "scripted.gguf"

    def __init__(self, script: Callable[[str], str], *, context: int = 100_000, lacks: str = "") -> None:
        self.script = script
        self.context = context
        self.lacks = lacks
        self.prompts: list[str] = []
        self.calls: list[list[str]] = []

    def token_id(self, text: str) -> int | None:
        return None if text == self.lacks else IDS.get(text)

    def render(self, messages: Sequence[Message]) -> str:
        return "".join(f"({message.role}) {message.content}\n" for message in messages)

    def tokenize(self, text: str, *, begin: bool = True) -> list[int]:
        return [IDS[piece] if piece in IDS else ord(piece) for piece in _pieces(text)]

    def detokenize(self, tokens: Sequence[int]) -> str:
        return "".join(TOKENS[token - FIRST_ID] if token >= FIRST_ID else chr(token) for token in tokens)

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens + max_tokens > self.context:
            raise ContextOverflow(f"{prompt_tokens + max_tokens} tokens", expected=f"at most {self.context}")

    def forget(self) -> None:
        pass

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        watch: Sequence[int] | None = None,
        stop: Sequence[int] = (),
        **_: Any,
    ) -> list[Completion]:
        for prompt in prompts:
            self.check_fits(len(prompt), max_tokens)
        asked = [self.detokenize(prompt) for prompt in prompts]
        self.prompts += asked
        self.calls.append(asked)
        return [
            self._complete(
                self.script(text), len(text), max_tokens, list(watch or ()), set(stop), watch is not None
            )
            for text in asked
        ]

    def _complete(
        self, reply: str, prompt: int, max_tokens: int, watch: list[int], stop: set[int], wanted: bool
    ) -> Completion:
        tokens: list[int] = []
        rows: list[list[float]] = []
        finish = "stop"
        for token, odds in [*_written(reply), (END, {})]:
            row = [odds.get(number, _TINY) for number in watch]
            taken = odds.get(token, float(np.log(_TAKEN)))
            if token in watch:
                row[watch.index(token)] = taken
            rows.append([taken, *row])
            if token == END or token in stop:
                break
            tokens.append(token)
            if len(tokens) >= max_tokens:
                finish = "length"
                break
        table = np.asarray(rows, dtype=np.float32)
        log_probs = LogProbs(table[:, 0], table[:, 1:]) if wanted else None
        return Completion(self.detokenize(tokens), tokens, prompt, finish, log_probs)  # type: ignore[arg-type]


def _pieces(text: str) -> list[str]:
    plain = re.compile("|".join(re.escape(token) for token in TOKENS) + "|.", re.DOTALL)
    return plain.findall(text)


def _written(reply: str) -> list[tuple[int, dict[int, float]]]:
    """Each token with the log-probabilities at its position."""
    out: list[tuple[int, dict[int, float]]] = []
    for piece in _SPLIT.findall(reply):
        if piece.startswith("{"):
            pairs = [item.rpartition("=") for item in piece[1:-1].split(",")]
            out[-1] = out[-1][0], {_id(name.strip()): float(np.log(float(p))) for name, _, p in pairs}
        else:
            out.append((IDS[piece] if piece in IDS else ord(piece), {}))
    return out


def _id(name: str) -> int:
    return IDS[name] if name in IDS else ord(name or " ")
