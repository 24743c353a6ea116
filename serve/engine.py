"""Continuous batching over llama.cpp: many conversations share each forward pass.

One thread owns the context. Requests wait in a queue, take a free sequence, and every step decodes one token
of each running sequence together with the next piece of a waiting prompt. A sequence keeps its cache
after it is done: a new prompt that begins alike (the system prompt, a conversation) skips what is shared.
"""

from __future__ import annotations

import codecs
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from domains.config import KvCache
from domains.errors import ContextOverflow, ModelError
from domains.records import Message
from serve.llama import BATCH_TOKENS, Llama
from serve.llama_model import LlamaModel

_BREATH_S = 0.25  # a stream that waits gives control back this often, so that it can be closed


@dataclass(frozen=True)
class Completion:
    """What a model wrote. ``finish`` is ``length`` where ``max_tokens`` cut it.

    ``tokens`` are those of ``text``: the end token is not among them. ``log_probs`` is asked for by
    ``watch``, see `Engine.generate`; else None.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish: Literal["stop", "length", "cancelled"]
    log_probs: LogProbs | None = field(default=None, compare=False)


@dataclass(frozen=True)
class LogProbs:
    """Natural-log probabilities (softmax over the whole vocabulary, temperature 1) at each decoded position.

    The last position is that of the end token where the reply ended by one.

    Attributes:
        taken: float32 [positions], of the token that was taken there.
        watched: float32 [positions, ids], of each watched id there.
    """

    taken: npt.NDArray[np.float32]
    watched: npt.NDArray[np.float32]


@dataclass
class _Job:
    """A request on its way through the engine. ``pieces`` gets text, then a Completion or an error."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    on_done: Callable[[Completion], None] | None
    watch: tuple[int, ...] | None = None
    stop: frozenset[int] = frozenset()
    pieces: queue.SimpleQueue[str | Completion | BaseException] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Slot:
    """One sequence of the context: ``cached`` are the tokens whose keys and values it holds."""

    number: int
    cached: list[int] = field(default_factory=list)
    job: _Job | None = None
    pending: list[int] = field(default_factory=list)
    out: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    decoder: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"))
    sampler: Any = None
    log_probs: list[npt.NDArray[np.float32]] = field(default_factory=list)


class Engine:
    """A GGUF model that answers many requests at once.

    Args:
        gguf: the model file (its header is validated before llama.cpp sees it), or another engine's ``model``,
            whose weights both then use.
        context: tokens per sequence (prompt and reply together).
        parallel: sequences that run at the same time.
        threads: CPU threads; all cores when None.
        adapter: a GGUF LoRA that is added to the model, for this engine alone.
        kv_cache: how keys and values are kept, see `serve.llama.Llama`.

    Raises:
        ModelError: a file is missing, damaged, no Llama model, or an adapter of another model.
    """

    def __init__(
        self,
        gguf: Path | LlamaModel,
        *,
        context: int = 2048,
        parallel: int = 4,
        threads: int | None = None,
        adapter: Path | None = None,
        kv_cache: KvCache = "f16",
    ) -> None:
        self.model = model = gguf if isinstance(gguf, LlamaModel) else LlamaModel(gguf)
        self._llama = Llama(
            model, context=context, parallel=parallel, threads=threads, adapter=adapter, kv_cache=kv_cache
        )
        self.facts, self.path, self.context = model.facts, model.path, self._llama.context
        self._slots = [_Slot(number) for number in range(parallel)]
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # held for a step; `logits` takes it between steps
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- text and tokens: reading the vocabulary needs no lock ----------------------------------------

    @property
    def template(self) -> str:
        """See `LlamaModel.template`."""
        return self.model.template

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the width of `logits`."""
        return self.model.vocab_size

    @property
    def adds_bos(self) -> bool:
        """See `LlamaModel.adds_bos`."""
        return self.model.adds_bos

    @property
    def bos(self) -> str:
        """See `LlamaModel.bos`."""
        return self.model.bos

    @property
    def eos(self) -> str:
        """See `LlamaModel.eos`."""
        return self.model.eos

    def render(self, messages: Sequence[Message], *, continue_reply: bool = False) -> str:
        """See `LlamaModel.render`."""
        return self.model.render(messages, continue_reply=continue_reply)

    def tokenize(self, text: str, *, begin: bool = True) -> list[int]:
        """See `LlamaModel.tokenize`."""
        return self.model.tokenize(text, begin=begin)

    def token_id(self, text: str) -> int | None:
        """See `LlamaModel.token_id`."""
        return self.model.token_id(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """See `LlamaModel.detokenize`."""
        return self.model.detokenize(tokens)

    # -- generation --------------------------------------------------------------------------------

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        """Pass if prompt and reply fit into the context.

        Raises:
            ContextOverflow: they do not; says how many tokens there are and may be.
        """
        if prompt_tokens + max_tokens > self.context:
            raise ContextOverflow(
                f"the prompt has {prompt_tokens} tokens and the reply may have {max_tokens}: "
                f"{prompt_tokens + max_tokens} in all",
                expected=f"at most {self.context}, the context",
                next_step="ask a shorter question, or raise [student] context in domain.toml",
            )

    @property
    def running(self) -> int:
        """Sequences that are being completed at this moment."""
        return sum(slot.job is not None for slot in self._slots)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        on_done: Callable[[int, Completion], None] | None = None,
        watch: Sequence[int] | None = None,
        stop: Sequence[int] = (),
    ) -> list[Completion]:
        """Complete all prompts, as many at a time as there are sequences; results in the given order.

        Args:
            prompts: token ids, see `tokenize`.
            max_tokens: most tokens of a completion.
            temperature: 0 is greedy.
            seed: prompt ``i`` samples with ``seed + i``.
            on_done: called with index and result as each is done, on the engine's thread.
            watch: token ids whose log-probabilities are recorded at every position, beside that of the
                token taken; an empty sequence records the latter alone. Costs one pass over the logits.
            stop: token ids that end a reply as the end token does (and are not part of it).

        Raises:
            ContextOverflow: a prompt and ``max_tokens`` exceed the context (nothing was run).
        """
        jobs = []
        for index, prompt in enumerate(prompts):
            done = None if on_done is None else (lambda result, index=index: on_done(index, result))
            job = self._job(prompt, max_tokens, temperature, seed + index, done)
            job.watch = None if watch is None else tuple(watch)
            job.stop = frozenset(stop)
            jobs.append(job)
        self._submit(*jobs)  # all at once: which prompts share a batch must not depend on the clock
        try:
            return [_result(job) for job in jobs]
        except BaseException:  # also Ctrl-C: let the engine forget what is still queued
            for job in jobs:
                job.cancelled.set()
            raise

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        watch: Sequence[int] | None = None,
    ) -> Generator[str, None, Completion]:
        """The completion's text in pieces as it is written; closing the generator stops the writing.

        ``watch`` is that of `generate`.

        A piece may be empty: one comes every quarter of a second while the request waits its turn. The
        generator's value (``yield from``) is the `Completion`. Nothing runs before the first ``next``.

        Raises:
            ContextOverflow: prompt and ``max_tokens`` exceed the context (at once).
        """
        job = self._job(prompt, max_tokens, temperature, seed, None)
        job.watch = None if watch is None else tuple(watch)
        return self._pieces(job)

    def _pieces(self, job: _Job) -> Generator[str, None, Completion]:
        try:
            self._submit(job)
            while True:
                try:
                    piece = job.pieces.get(timeout=_BREATH_S)
                except queue.Empty:
                    piece = ""
                if isinstance(piece, BaseException):
                    raise piece
                if isinstance(piece, Completion):
                    return piece
                yield piece
        finally:
            job.cancelled.set()

    def forget(self) -> None:
        """Drop the caches of idle sequences: what an idle engine writes next depends on its prompts alone.

        A prompt whose beginning is cached is decoded in other batches than a fresh one, and the rounding of
        another batch can turn a near-tie between two tokens.
        """
        with self._lock:
            for slot in self._slots:
                if slot.job is None:
                    self._llama.forget_from(slot.number)
                    slot.cached = []

    def _job(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        temperature: float,
        seed: int,
        on_done: Callable[[Completion], None] | None,
    ) -> _Job:
        if not prompt or max_tokens < 1:
            raise ModelError(
                f"a prompt of {len(prompt)} tokens, a reply of {max_tokens}", expected="at least one each"
            )
        self.check_fits(len(prompt), max_tokens)
        return _Job(list(prompt), max_tokens, temperature, seed, on_done)

    def _submit(self, *jobs: _Job) -> None:
        with self._lock:
            if self._closed:
                raise _closed_error()
            for job in jobs:
                self._waiting.put(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="llama.cpp", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while self._admit():
            with self._lock:
                try:
                    self._step()
                except BaseException as error:
                    self._fail_all(error)

    def _admit(self) -> bool:
        """Give waiting jobs to free sequences; sleeps when there is nothing to do. False: closed."""
        while not self._closed and any(slot.job is None for slot in self._slots):
            try:
                job = self._waiting.get(block=not self.running)
            except queue.Empty:
                break
            if job is None:
                return False
            if job.cancelled.is_set():
                job.pieces.put(Completion("", [], len(job.prompt), "cancelled"))
                continue
            with self._lock:
                self._start(job)
        return not self._closed

    def _start(self, job: _Job) -> None:
        free = [slot for slot in self._slots if slot.job is None]
        slot = max(free, key=lambda slot: _common(slot.cached, job.prompt))
        # The last prompt token is always decoded again: its logits start the reply.
        keep = min(_common(slot.cached, job.prompt), len(job.prompt) - 1)
        self._llama.forget_from(slot.number, keep)
        slot.cached = slot.cached[:keep]
        slot.pending = job.prompt[keep:]
        slot.job, slot.out, slot.text, slot.log_probs = job, [], [], []
        slot.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        slot.sampler = self._llama.new_sampler(job.temperature, job.seed)

    def _step(self) -> None:
        """One forward pass over a batch: every running sequence's next token, then prompt pieces."""
        llama = self._llama
        llama.clear_batch()
        asks: list[tuple[_Slot, int]] = []
        for slot in self._slots:
            if slot.job is not None and slot.job.cancelled.is_set():
                self._end(slot, "cancelled")
        running = [slot for slot in self._slots if slot.job is not None]
        for slot in sorted(running, key=lambda slot: len(slot.pending)):
            room = BATCH_TOKENS - llama.batch_size
            piece, slot.pending = slot.pending[:room], slot.pending[room:]
            for offset, token in enumerate(piece):
                last = not slot.pending and offset == len(piece) - 1
                position = len(slot.cached) + offset
                row = llama.add(token, position=position, sequence=slot.number, wants_logits=last)
                if last:
                    asks.append((slot, row))
            slot.cached += piece
        if not llama.batch_size:
            return
        llama.decode()
        for slot, row in asks:
            token = llama.sample(slot.sampler, row)
            if slot.job is not None and slot.job.watch is not None:
                slot.log_probs.append(_log_softmax(llama.row(row), (token, *slot.job.watch)))
            self._take(slot, token)

    def _take(self, slot: _Slot, token: int) -> None:
        """Add a sampled token to a sequence's reply; ends it at an end token or its limit."""
        job = slot.job
        assert job is not None
        if token in job.stop or self.model.is_end(token):
            self._end(slot, "stop")
            return
        slot.out.append(token)
        self._say(slot, slot.decoder.decode(self.model.piece(token)))
        if len(slot.out) >= job.max_tokens:
            self._end(slot, "length")
        else:
            slot.pending = [token]

    @staticmethod
    def _say(slot: _Slot, text: str) -> None:
        if text and slot.job is not None:
            slot.text.append(text)
            slot.job.pieces.put(text)

    def _end(self, slot: _Slot, finish: Literal["stop", "length", "cancelled"]) -> None:
        self._say(slot, slot.decoder.decode(b"", final=True))
        job, slot.job, slot.pending = slot.job, None, []
        self._llama.free_sampler(slot.sampler)
        slot.sampler = None
        assert job is not None
        log_probs = None if job.watch is None else _stacked(slot.log_probs, len(job.watch))
        result = Completion("".join(slot.text), slot.out, len(job.prompt), finish, log_probs)
        if job.on_done is not None:
            try:
                job.on_done(result)
            except BaseException as error:
                job.pieces.put(error)
                return
        job.pieces.put(result)

    def _fail_all(self, error: BaseException) -> None:
        """A failed step: every running request gets the error, and their caches start afresh."""
        for slot in self._slots:
            if slot.job is not None:
                slot.job.pieces.put(error)
                self._llama.free_sampler(slot.sampler)
                slot.job, slot.sampler, slot.pending = None, None, []
            self._llama.forget_from(slot.number)
            slot.cached = []

    # -- scoring -----------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int], *, first: int) -> npt.NDArray[np.float32]:
        """Teacher-forced logits.

        Args:
            tokens: a whole sequence.
            first: the first position of interest.

        Returns:
            float32 [len(tokens) - first, vocab_size]; row ``i`` predicts the token after
            ``tokens[first + i]``.

        Raises:
            ContextOverflow: more tokens than the context holds.
        """
        if not 0 <= first < len(tokens):
            raise ModelError(f"first = {first} for {len(tokens)} tokens", expected="0 <= first < tokens")
        with self._idle_sequence(len(tokens)) as sequence:
            return self._score(tokens, first, sequence)

    def log_likelihoods(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> npt.NDArray[np.float64]:
        """Natural-log probability of each continuation of one prompt, float64 [continuations].

        The prompt is decoded once. An empty continuation has 0.

        Raises:
            ContextOverflow: prompt and a continuation are more than the context holds.
        """
        longest = max(map(len, continuations), default=0)
        with self._idle_sequence(len(prompt) + longest) as sequence:
            after = self._score(prompt, len(prompt) - 1, sequence)
            found = []
            for tokens in continuations:
                rows = after
                if len(tokens) > 1:
                    more = self._score(tokens[:-1], 0, sequence, start=len(prompt))
                    rows = np.concatenate([after, more])
                    self._llama.forget_from(sequence, len(prompt))
                found.append(
                    sum(
                        float(_log_softmax(row, [token])[0]) for row, token in zip(rows, tokens, strict=False)
                    )
                )
            return np.asarray(found, dtype=np.float64)

    @contextmanager
    def _idle_sequence(self, tokens: int) -> Iterator[int]:
        """A free sequence for scoring, under the lock, its cache empty before and after."""
        if tokens > self.context:
            raise ContextOverflow(f"{tokens} tokens", expected=f"at most {self.context}, the context")
        with self._lock:
            if self._closed:
                raise _closed_error()
            slot = next((slot for slot in self._slots if slot.job is None), None)
            if slot is None:
                raise ModelError("every sequence is busy", expected="an idle engine for scoring")
            slot.cached = []
            self._llama.forget_from(slot.number)
            try:
                yield slot.number
            finally:
                self._llama.forget_from(slot.number)

    def _score(
        self, tokens: Sequence[int], first: int, sequence: int, *, start: int = 0
    ) -> npt.NDArray[np.float32]:
        rows: list[npt.NDArray[np.float32]] = []
        for begin in range(0, len(tokens), BATCH_TOKENS):
            piece = tokens[begin : begin + BATCH_TOKENS]
            self._llama.clear_batch()
            for at, token in enumerate(piece, begin):
                self._llama.add(token, position=start + at, sequence=sequence, wants_logits=at >= first)
            self._llama.decode()
            rows += [self._llama.row(row).copy() for row in range(max(0, first - begin), len(piece))]
        return np.stack(rows)

    # -- end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the context, and the model unless other engines use it; does nothing the second time.

        Requests that run or wait end with a `ModelError`. Not to be called from ``on_done``.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()
        error = _closed_error()
        self._fail_all(error)
        while not self._waiting.empty():
            job = self._waiting.get()
            if job is not None:
                job.pieces.put(error)
        self._llama.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _closed_error() -> ModelError:
    return ModelError("the engine is closed", expected="an open one", next_step="start the command again")


def _result(job: _Job) -> Completion:
    while True:
        piece = job.pieces.get()
        if isinstance(piece, BaseException):
            raise piece
        if isinstance(piece, Completion):
            return piece


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _log_softmax(logits: npt.NDArray[np.float32], ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Log-probabilities of ``ids``, float32 [ids]."""
    top = logits.max()
    total = top + np.log(np.exp(logits - top).sum(dtype=np.float64))
    return np.asarray(logits[list(ids)] - total, dtype=np.float32)


def _stacked(positions: Sequence[npt.NDArray[np.float32]], ids: int) -> LogProbs:
    table = np.stack(positions) if positions else np.zeros((0, 1 + ids), dtype=np.float32)
    return LogProbs(taken=table[:, 0], watched=table[:, 1:])
