"""A teacher in a GGUF file on this machine: free, private, and as good as the file."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from domains.errors import ContextOverflow, ModelError
from pipeline.teacher import Failure, Hear, Outcome, Reply, Request
from serve.models import sha256_file

if TYPE_CHECKING:
    from serve.engine import Engine


class LocalTeacher:
    """A GGUF model run by llama.cpp; it is loaded with the first request and freed after the last.

    Args:
        gguf: the model file.
        name: for people; the file's name when empty.
        context: tokens of a prompt and its reply together.
        parallel: requests that run at the same time; memory grows with ``context * parallel``.
    """

    price_prompt = 0.0
    price_completion = 0.0

    def __init__(self, gguf: Path, *, name: str = "", context: int = 2048, parallel: int = 8) -> None:
        self.name = name or gguf.name
        self._gguf = gguf
        self._context = context
        self._parallel = parallel

    @cached_property
    def identity(self) -> str:
        """The digest of the file: another file is another teacher, a renamed one is not."""
        return f"sha256:{sha256_file(self._gguf)}"

    def ask_many(self, requests: Iterable[Request], hear: Hear) -> None:
        """`Teacher.ask_many`, ``parallel`` requests at a time.

        Raises:
            ModelError: the file can't be loaded, or llama.cpp fails.
        """
        waiting = iter(requests)
        first = next(waiting, None)
        if first is None:
            return
        from serve.engine import Engine

        waiting = itertools.chain([first], waiting)
        running: dict[Future[Outcome], Request] = {}
        with Engine(self._gguf, context=self._context, parallel=self._parallel) as engine:
            pool = ThreadPoolExecutor(self._parallel, thread_name_prefix="teacher")
            try:
                while True:
                    while len(running) < self._parallel and (request := next(waiting, None)) is not None:
                        running[pool.submit(_answer, engine, request)] = request
                    if not running:
                        return
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        hear(running.pop(done), done.result())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _answer(engine: Engine, request: Request) -> Outcome:
    """One reply. The seed comes from the request, so the order of asking does not matter to it."""
    try:
        prompt = engine.tokenize(engine.render(request.messages))
        [completion] = engine.generate(
            [prompt],
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=int.from_bytes(hashlib.sha256(request.key.encode()).digest()[:4], "big"),
        )
    except ContextOverflow as error:
        return Failure(error.what)
    if not completion.text.strip():
        return Failure("an empty answer")
    if completion.finish == "cancelled":
        raise ModelError("the engine was stopped in the middle of a reply")
    return Reply(
        text=completion.text,
        finish=completion.finish,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=len(completion.tokens),
    )
