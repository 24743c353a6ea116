"""A GGUF model's weights and vocabulary in llama.cpp: loaded once, however many contexts run on it.

Contexts (`serve.llama`) on one model share its memory, each with its own adapter: that is how several domains on
one base are served.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domains.errors import ModelError
from domains.records import Message
from rag.prompt import render_chat
from serve.gguf_check import check_gguf
from serve.llama_log import last_lines, quiet


def _has_amx(llama_cpp: Any) -> bool:
    """Whether this build multiplies with AMX tiles, which must not be used.

    GCC 12 drops the stores of the tiles' sizes before ``ldtilecfg``, as its header tells the compiler of the first eight
    bytes only; the first ``tilezero`` is then an illegal instruction and the process dies. The Makefile builds without
    AMX. A build that has it is run without extra buffers, where AMX lives: slower prompts in Q4_0, but answers.
    """
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


class LlamaModel:
    """A loaded model. Threads may share it: after loading it is only read.

    Args:
        gguf: the model file; its header is validated before llama.cpp sees it.

    Raises:
        ModelError: the file is missing, damaged, or no Llama model.
    """

    def __init__(self, gguf: Path) -> None:
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
        params.use_extra_bufts = not _has_amx(llama_cpp)
        self.handle = llama_cpp.llama_model_load_from_file(str(gguf).encode(), params)
        if not self.handle:
            raise ModelError(
                f"llama.cpp can't load {gguf}: {last_lines()}",
                expected="a complete GGUF file of a Llama model",
                next_step="preceptor doctor",
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self.path = gguf
        self.trained_context = int(llama_cpp.llama_model_n_ctx_train(self.handle))
        self.lock = threading.Lock()  # held while contexts and adapters come and go
        self._users = 0

    @property
    def head_width(self) -> int:
        """Numbers per key of one attention head."""
        facts = self.facts.metadata
        explicit = facts.get("llama.attention.key_length")
        if isinstance(explicit, int):
            return explicit
        return int(self._c.llama_model_n_embd(self.handle) // self._c.llama_model_n_head(self.handle))

    def retain(self) -> None:
        """One more context runs on it.

        Raises:
            ModelError: it was freed already.
        """
        with self.lock:
            if self.handle is None:
                raise ModelError(f"{self.path} is closed", expected="a model that is still in use")
            self._users += 1

    def release(self) -> None:
        """One context less; the last one frees the weights."""
        with self.lock:
            self._users -= 1
            if self._users == 0:
                self._c.llama_model_free(self.handle)
                self.handle = None

    @property
    def template(self) -> str:
        """The chat template of the file.

        Raises:
            ModelError: it has none.
        """
        value = self._c.llama_model_chat_template(self.handle, None)
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
