"""A context of a GGUF model in llama.cpp: its key-value cache, one batch at a time. The C API, nothing above it.

llama-cpp-python's high-level class runs one sequence at a time and keeps the logits of whole contexts;
`serve.engine` schedules many sequences, so it needs these calls themselves.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from domains.config import KvCache
from domains.cores import usable_cores
from domains.errors import ModelError
from serve.adapter_check import check_adapter
from serve.llama_log import last_lines
from serve.llama_model import LlamaModel

BATCH_TOKENS = 512
_KV_BLOCK = 32  # numbers that share a scale in a quantized cache


def check_head_width(width: int, kv_cache: KvCache, whose: str) -> None:
    """Pass if keys and values of heads ``width`` wide can be kept as ``kv_cache``.

    Raises:
        ModelError: they can't.
    """
    if kv_cache != "f16" and width % _KV_BLOCK:
        raise ModelError(
            f"a key-value cache of {kv_cache} for heads of width {width} ({whose})",
            expected=f"a width that is a multiple of {_KV_BLOCK}, the block that shares a scale",
            next_step='set [serve] kv_cache = "f16" in domain.toml',
        )


class Llama:
    """A context of ``parallel`` sequences on a model. Not for several threads at once.

    Args:
        model: shared with other contexts, or only this one's; freed with the last.
        context: tokens per sequence (prompt and reply together).
        parallel: sequences that the context holds.
        threads: CPU threads; all cores when None.
        adapter: a GGUF LoRA of this model that is added to every forward pass of this context.
        kv_cache: how keys and values are kept. Quantized ones are turned by a Hadamard matrix before rounding
            (SpinQuant's R3, arXiv 2405.16406; built into llama.cpp) where a head's width is a multiple of 64.

    Raises:
        ModelError: the adapter is none of this model's, the cache can't be kept so, or memory is short.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        context: int,
        parallel: int,
        threads: int | None,
        adapter: Path | None = None,
        kv_cache: KvCache = "f16",
    ) -> None:
        import llama_cpp

        self._c = llama_cpp
        self.model = model
        self.context = min(context, model.trained_context)
        model.retain()
        try:
            # Graphs are sized by what is loaded: the adapter comes before the context.
            self._adapter = None if adapter is None else self._load_adapter(adapter)
            try:
                self._ctx = self._new_context(parallel, threads or usable_cores(), kv_cache)
            except BaseException:
                self._free_adapter()
                raise
        except BaseException:
            model.release()
            raise
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def _load_adapter(self, path: Path) -> Any:
        check_adapter(path, self.model.facts)
        with self.model.lock:
            adapter = self._c.llama_adapter_lora_init(self.model.handle, str(path).encode())
        if not adapter:
            raise ModelError(
                f"llama.cpp can't load the adapter {path}: {last_lines()}",
                expected=f"a GGUF LoRA of {self.model.path.name}",
                next_step="copy the bundle again, or preceptor export DOMAIN",
            )
        return adapter

    def _free_adapter(self) -> None:
        if self._adapter is not None:
            with self.model.lock:
                self._c.llama_adapter_lora_free(self._adapter)
            self._adapter = None

    def _new_context(self, parallel: int, threads: int, kv_cache: KvCache) -> Any:
        c = self._c
        params = c.llama_context_default_params()
        params.n_ctx = self.context * parallel
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = parallel
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False  # each sequence has its own cells: attention never scans the others'
        params.no_perf = True
        if kv_cache != "f16":
            check_head_width(self.model.head_width, kv_cache, self.model.path.name)
            params.type_k = params.type_v = {"q8_0": c.GGML_TYPE_Q8_0, "q4_0": c.GGML_TYPE_Q4_0}[kv_cache]
            params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED  # quantized values need it
        with self.model.lock:
            context = c.llama_init_from_model(self.model.handle, params)
        if not context:
            raise ModelError(
                f"llama.cpp can't make a context of {parallel} x {self.context} tokens: {last_lines()}",
                expected="enough memory for the key-value cache",
                next_step="lower [serve] parallel or [student] context in domain.toml",
            )
        if self._adapter is not None:
            adapters = (c.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            if c.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)):
                c.llama_free(context)
                raise ModelError(f"llama.cpp can't use the adapter with {self.model.path}: {last_lines()}")
        return context

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
        return np.ctypeslib.as_array(pointer, shape=(self.model.vocab_size,))

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
        """Free context and adapter, and the model with its last context. To be called once."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._ctx)
        self._free_adapter()
        self.model.release()
