"""A GGUF model in llama.cpp: loading, vocabulary, one batch at a time. The C API and nothing above it.

llama-cpp-python's high-level class runs one sequence at a time and keeps the logits of whole contexts;
`serve.engine` schedules many sequences, so it needs these calls themselves.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from domains.errors import ModelError
from domains.records import Message
from rag.prompt import render_chat
from serve.gguf_check import check_gguf
from serve.llama_log import last_lines, quiet

BATCH_TOKENS = 512


class Llama:
    """A model and a context of ``parallel`` sequences. Not for several threads at once.

    Args:
        gguf: the model file; its header is validated before llama.cpp sees it.
        context: tokens per sequence (prompt and reply together).
        parallel: sequences that the context holds.
        threads: CPU threads; all cores when None.

    Raises:
        ModelError: the file is missing, damaged, or no Llama model.
    """

    def __init__(self, gguf: Path, *, context: int, parallel: int, threads: int | None) -> None:
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
        """Number of tokens, the width of the logits."""
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

    def tokenize(self, text: str, *, begin: bool = True) -> list[int]:
        """Token ids of a rendered prompt: control tokens are parsed, one BOS where the model wants it.

        Args:
            text: rendered; untrusted parts are neutralised already.
            begin: False for a piece that continues a sequence: no BOS then.
        """
        data = text.encode("utf-8")
        size = len(data) + 8
        tokens = (self._c.llama_token * size)()
        bos = begin and self.adds_bos
        count = self._c.llama_tokenize(self._vocab, data, len(data), tokens, size, bos, True)
        if count < 0:
            raise ModelError(f"llama.cpp can't tokenize {text[:60]!r} ({count})")
        return list(tokens[:count])

    def token_id(self, text: str) -> int | None:
        """The id of a token with exactly this text, or None where the vocabulary has no such token."""
        found = self.tokenize(text, begin=False)
        return found[0] if len(found) == 1 and self._token_text(found[0]) == text else None

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; control tokens come out empty."""
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", errors="replace")

    def piece(self, token: int) -> bytes:
        """UTF-8 bytes of one token, possibly a part of a character; empty for a control token."""
        buffer = ctypes.create_string_buffer(256)
        size = self._c.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:size] if size > 0 else b""

    def is_end(self, token: int) -> bool:
        """Whether the token ends a reply."""
        return bool(self._c.llama_vocab_is_eog(self._vocab, token))

    # -- one batch ---------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Tokens in the batch that is being put together."""
        return int(self._batch.n_tokens)

    def clear_batch(self) -> None:
        """Begin a batch."""
        self._batch.n_tokens = 0

    def add(self, token: int, *, position: int, sequence: int, wants_logits: bool) -> int:
        """Append a token to the batch; returns its row."""
        row = int(self._batch.n_tokens)
        self._batch.token[row] = token
        self._batch.pos[row] = position
        self._batch.n_seq_id[row] = 1
        self._batch.seq_id[row][0] = sequence
        self._batch.logits[row] = wants_logits
        self._batch.n_tokens = row + 1
        return row

    def decode(self) -> None:
        """Run the batch.

        Raises:
            ModelError: llama.cpp refuses it; names the code and its last words.
        """
        code = self._c.llama_decode(self._ctx, self._batch)
        if code != 0:
            raise ModelError(
                f"llama.cpp can't decode a batch of {self.batch_size} tokens (code {code}): {last_lines()}",
                expected="code 0",
                next_step="lower [serve] parallel or [student] context in domain.toml",
            )

    def row(self, row: int) -> npt.NDArray[np.float32]:
        """The logits of a row, float32 [vocab_size]: a view that the next `decode` overwrites."""
        pointer = self._c.llama_get_logits_ith(self._ctx, row)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))

    def forget_from(self, sequence: int, position: int = 0) -> None:
        """Drop a sequence's keys and values from ``position`` on."""
        self._c.llama_memory_seq_rm(self._memory, sequence, position, -1)

    # -- sampling ----------------------------------------------------------------------------------

    def new_sampler(self, temperature: float, seed: int) -> Any:
        """Greedy at temperature 0, else top-p 0.95; to be given back by `free_sampler`."""
        c = self._c
        chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        if temperature <= 0:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_greedy())
        else:
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_p(0.95, 1))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(temperature))
            c.llama_sampler_chain_add(chain, c.llama_sampler_init_dist(seed & 0xFFFFFFFF))
        return chain

    def sample(self, sampler: Any, row: int) -> int:
        """The token that the sampler takes from a row's logits."""
        return int(self._c.llama_sampler_sample(sampler, self._ctx, row))

    def free_sampler(self, sampler: Any) -> None:
        """Give a sampler back."""
        self._c.llama_sampler_free(sampler)

    def close(self) -> None:
        """Free context and model. To be called once."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._ctx)
        self._c.llama_model_free(self._model)
