"""Models that several bundles use at once: bundles whose student file has the same bytes share one in memory."""

from __future__ import annotations

from pathlib import Path

from serve.llama_model import LlamaModel
from serve.models import sha256_file


class SharedModels:
    """Loaded models by their file's sha256; each stays loaded until this is closed and no engine uses it."""

    def __init__(self) -> None:
        self._loaded: dict[str, LlamaModel] = {}

    def __len__(self) -> int:
        return len(self._loaded)

    def find(self, gguf: Path, *, sha256: str | None = None) -> LlamaModel:
        """The model of a file, loaded now or before.

        Args:
            gguf: the file.
            sha256: of its bytes, where they were checked already.

        Raises:
            ModelError: the file is missing, damaged, or no Llama model.
        """
        key = sha256 or sha256_file(gguf)
        if key not in self._loaded:
            model = LlamaModel(gguf)
            model.retain()
            self._loaded[key] = model
        return self._loaded[key]

    def close(self) -> None:
        """Give all models back; does nothing the second time."""
        while self._loaded:
            self._loaded.popitem()[1].release()

    def __enter__(self) -> SharedModels:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
