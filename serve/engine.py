"""llama.cpp with continuous batching: many conversations share each forward pass.

llama-cpp-python's high-level class runs one sequence at a time; this engine uses the C API directly. One
thread owns the context. Requests wait in a queue, take a free sequence, and every step decodes one token
of each running sequence together with the next piece of a waiting prompt. A sequence keeps its cache
after it is done: a new prompt that begins alike (the system prompt, a conversation) skips what is shared.
"""

from __future__ import annotations

import codecs
import ctypes
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from domains.errors import ContextOverflow, ModelError
from domains.records import Message
from rag.prompt import render_chat
from serve.gguf_check import check_gguf
from serve.llama_log import last_lines, quiet

BATCH_TOKENS = 512
_BREATH_S = 0.25  # a stream that waits gives control back this often, so that it can be closed


@dataclass(frozen=True)
class Completion:
    """What a model wrote. ``finish`` is ``length`` where ``max_tokens`` cut it.

    ``tokens`` are those of ``text``: the end token is not among them.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish: Literal["stop", "length", "cancelled"]


@dataclass
class _Job:
    """A request on its way through the engine. ``pieces`` gets text, then a Completion or an error."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    on_done: Callable[[Completion], None] | None
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


class Engine:
    """A GGUF model in memory.

    Args:
        gguf: the model file; its header is validated before llama.cpp sees it.
        context: tokens per sequence (prompt and reply together).
        parallel: sequences that run at the same time.
        threads: CPU threads; all cores when None.

    Raises:
        ModelError: the file is missing, damaged, or no Llama model.
    """

    def __init__(
        self, gguf: Path, *, context: int = 2048, parallel: int = 4, threads: int | None = None
    ) -> None:
        self.facts = check_gguf(gguf)
        # OpenMP threads that spin at barriers cost five times the speed as soon as anything else runs
        # on the machine (docs/log.md); read by libgomp when llama.cpp is loaded.
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
        import llama_cpp

        quiet()
        self._c = llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 999 if llama_cpp.llama_supports_gpu_offload() else 0
        self._model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
        if not self._model:
            raise ModelError(
                f"llama.cpp can't load {gguf}: {last_lines()}",
                expected="a complete GGUF file of a Llama model",
                next_step="preceptor doctor",
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.path = gguf
        self.context = min(context, llama_cpp.llama_model_n_ctx_train(self._model))
        self._ctx = self._new_context(parallel, threads or os.cpu_count() or 1)
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._slots = [_Slot(number) for number in range(parallel)]
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # held for a step; `logits` takes it between steps
        self._thread: threading.Thread | None = None
        self._closed = False

    def _new_context(self, parallel: int, threads: int) -> Any:
        params = self._c.llama_context_default_params()
        params.n_ctx = self.context * parallel
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = parallel
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False  # each sequence has its own cells: attention never scans the others'
        params.no_perf = True
        context = self._c.llama_init_from_model(self._model, params)
        if not context:
            self._c.llama_model_free(self._model)
            raise ModelError(
                f"llama.cpp can't make a context of {parallel} x {self.context} tokens: {last_lines()}",
                expected="enough memory for the key-value cache",
                next_step="lower [serve] parallel or [student] context in domain.toml",
            )
        return context

    # -- text and tokens ---------------------------------------------------------------------------

    @property
    def template(self) -> str:
        """The chat template of the file.

        Raises:
            ModelError: it has none.
        """
        value = self._c.llama_model_chat_template(self._model, None)
        if not value:
            raise ModelError(
                f"{self.path} has no chat template",
                expected="tokenizer.chat_template in its metadata",
                next_step="use an instruction-tuned model",
            )
        return bytes(value).decode("utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the width of `logits`."""
        return int(self._c.llama_vocab_n_tokens(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether the model wants a begin-of-sequence token before every prompt."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> str:
        """Text of the begin-of-sequence token, empty where there is none."""
        return self._token_text(self._c.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> str:
        """Text of the end-of-sequence token, empty where there is none."""
        return self._token_text(self._c.llama_vocab_eos(self._vocab))

    def _token_text(self, token: int) -> str:
        return bytes(self._c.llama_vocab_get_text(self._vocab, token)).decode("utf-8") if token >= 0 else ""

    def render(self, messages: Sequence[Message], *, continue_reply: bool = False) -> str:
        """The prompt for these messages by the file's own template, see `rag.prompt.render_chat`."""
        return render_chat(
            messages,
            template=self.template,
            bos=self.bos,
            eos=self.eos,
            adds_bos=self.adds_bos,
            continue_reply=continue_reply,
        )

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered prompt: control tokens are parsed, one BOS where the model wants it."""
        data = text.encode("utf-8")
        size = len(data) + 8
        tokens = (self._c.llama_token * size)()
        count = self._c.llama_tokenize(self._vocab, data, len(data), tokens, size, self.adds_bos, True)
        if count < 0:
            raise ModelError(f"llama.cpp can't tokenize {text[:60]!r} ({count})")
        return list(tokens[:count])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; control tokens come out empty."""
        return b"".join(self._piece(token) for token in tokens).decode("utf-8", errors="replace")

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = self._c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:size] if size > 0 else b""

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
    ) -> list[Completion]:
        """Complete all prompts, as many at a time as there are sequences; results in the given order.

        Args:
            prompts: token ids, see `tokenize`.
            max_tokens: most tokens of a completion.
            temperature: 0 is greedy.
            seed: prompt ``i`` samples with ``seed + i``.
            on_done: called with index and result as each is done, on the engine's thread.

        Raises:
            ContextOverflow: a prompt and ``max_tokens`` exceed the context (nothing was run).
        """
        jobs = []
        for index, prompt in enumerate(prompts):
            done = None if on_done is None else (lambda result, index=index: on_done(index, result))
            jobs.append(self._job(prompt, max_tokens, temperature, seed + index, done))
        self._submit(*jobs)  # all at once: which prompts share a batch must not depend on the clock
        try:
            return [_result(job) for job in jobs]
        except BaseException:  # also Ctrl-C: let the engine forget what is still queued
            for job in jobs:
                job.cancelled.set()
            raise

    def stream(
        self, prompt: Sequence[int], *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Generator[str, None, Completion]:
        """The completion's text in pieces as it is written; closing the generator stops the writing.

        A piece may be empty: one comes every quarter of a second while the request waits its turn. The
        generator's value (``yield from``) is the `Completion`. Nothing runs before the first ``next``.

        Raises:
            ContextOverflow: prompt and ``max_tokens`` exceed the context (at once).
        """
        return self._pieces(self._job(prompt, max_tokens, temperature, seed, None))

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
                    self._c.llama_memory_seq_rm(self._memory, slot.number, -1, -1)
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
        self._c.llama_memory_seq_rm(self._memory, slot.number, keep, -1)
        slot.cached = slot.cached[:keep]
        slot.pending = job.prompt[keep:]
        slot.job, slot.out, slot.text = job, [], []
        slot.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        slot.sampler = self._new_sampler(job)

    def _new_sampler(self, job: _Job) -> Any:
        c = self._c
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        if job.temperature <= 0:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_greedy())
        else:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_p(0.95, 1))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(job.temperature))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_dist(job.seed & 0xFFFFFFFF))
        return chain

    def _step(self) -> None:
        """One forward pass over a batch: every running sequence's next token, then prompt pieces."""
        self._batch.n_tokens = 0
        asks: list[tuple[_Slot, int]] = []
        for slot in self._slots:
            if slot.job is not None and slot.job.cancelled.is_set():
                self._end(slot, "cancelled")
        running = [slot for slot in self._slots if slot.job is not None]
        for slot in sorted(running, key=lambda slot: len(slot.pending)):
            room = BATCH_TOKENS - self._batch.n_tokens
            piece, slot.pending = slot.pending[:room], slot.pending[room:]
            for offset, token in enumerate(piece):
                last = not slot.pending and offset == len(piece) - 1
                if last:
                    asks.append((slot, self._batch.n_tokens))
                self._add(token, len(slot.cached) + offset, slot.number, last)
            slot.cached += piece
        if not self._batch.n_tokens:
            return
        self._decode()
        for slot, row in asks:
            self._take(slot, int(self._c.llama_sampler_sample(slot.sampler, self._ctx, row)))

    def _add(self, token: int, position: int, sequence: int, logits: bool) -> None:
        row = self._batch.n_tokens
        self._batch.token[row] = token
        self._batch.pos[row] = position
        self._batch.n_seq_id[row] = 1
        self._batch.seq_id[row][0] = sequence
        self._batch.logits[row] = logits
        self._batch.n_tokens = row + 1

    def _decode(self) -> None:
        code = self._c.llama_decode(self._ctx, self._batch)
        if code != 0:
            raise ModelError(
                f"llama.cpp can't decode a batch of {self._batch.n_tokens} tokens (code {code}): "
                f"{last_lines()}",
                expected="code 0",
                next_step="lower [serve] parallel or [student] context in domain.toml",
            )

    def _take(self, slot: _Slot, token: int) -> None:
        """Add a sampled token to a sequence's reply; ends it at an end token or its limit."""
        job = slot.job
        assert job is not None
        if self._c.llama_vocab_is_eog(self._vocab, token):
            self._end(slot, "stop")
            return
        slot.out.append(token)
        self._say(slot, slot.decoder.decode(self._piece(token)))
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
        self._c.llama_sampler_free(slot.sampler)
        slot.sampler = None
        assert job is not None
        result = Completion("".join(slot.text), slot.out, len(job.prompt), finish)
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
                self._c.llama_sampler_free(slot.sampler)
                slot.job, slot.sampler, slot.pending = None, None, []
            self._c.llama_memory_seq_rm(self._memory, slot.number, -1, -1)
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
        if len(tokens) > self.context:
            raise ContextOverflow(f"{len(tokens)} tokens", expected=f"at most {self.context}, the context")
        with self._lock:
            if self._closed:
                raise _closed_error()
            slot = next((slot for slot in self._slots if slot.job is None), None)
            if slot is None:
                raise ModelError("every sequence is busy", expected="an idle engine for scoring")
            slot.cached = []
            self._c.llama_memory_seq_rm(self._memory, slot.number, -1, -1)
            try:
                return self._score(tokens, first, slot.number)
            finally:
                self._c.llama_memory_seq_rm(self._memory, slot.number, -1, -1)

    def _score(self, tokens: Sequence[int], first: int, sequence: int) -> npt.NDArray[np.float32]:
        rows: list[npt.NDArray[np.float32]] = []
        for begin in range(0, len(tokens), BATCH_TOKENS):
            piece = tokens[begin : begin + BATCH_TOKENS]
            self._batch.n_tokens = 0
            for offset, token in enumerate(piece):
                self._add(token, begin + offset, sequence, begin + offset >= first)
            self._decode()
            for row in range(max(0, first - begin), len(piece)):
                pointer = self._c.llama_get_logits_ith(self._ctx, row)
                rows.append(np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).copy())
        return np.stack(rows)

    # -- end ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free model and context; does nothing the second time.

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
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._ctx)
        self._c.llama_model_free(self._model)

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
