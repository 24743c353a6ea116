"""The importance matrix: how strongly each input of a linear layer is used on the domain's own text.

llama.cpp's quantizer weighs the rounding error of a column by the mean of its squared inputs. Taken from
the merged network on training rows, so that the served file is most exact where the domain needs it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from domains.errors import StageError
from pipeline.gguf_names import gguf_name

if TYPE_CHECKING:
    import torch

Imatrix = dict[str, NDArray[np.float32]]


def collect_imatrix(
    model: Any,
    rows: Iterable[Sequence[int]],
    *,
    max_tokens: int,
    on_tokens: Callable[[int], None] | None = None,
) -> Imatrix:
    """Mean squared input per in-feature of every linear layer, by GGUF tensor name, each float32 [in].

    Args:
        model: the merged ``LlamaForCausalLM``.
        rows: token ids of training rows, prompt and completion; taken in order.
        max_tokens: how many tokens are run in all; the last row is cut there.
        on_tokens: called with the tokens of each finished row.

    Raises:
        StageError: there are no tokens.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    seen = 0
    with torch.inference_mode(), _hooks(model, sums):
        for row in rows:
            piece = list(row)[: max_tokens - seen]
            if seen >= max_tokens:
                break
            if not piece:
                continue
            ids = torch.tensor([piece], device=model.device)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            _add(sums, _head_name(model), hidden)  # the output matrix reads this; no need to compute logits
            seen += len(piece)
            if on_tokens:
                on_tokens(len(piece))
    if not seen:
        raise _nothing()
    return {name: (total / seen).cpu().numpy().astype(np.float32) for name, total in sorted(sums.items())}


def _nothing() -> StageError:
    return StageError(
        "there are no tokens to measure the importance matrix on",
        expected="training rows, and [export] imatrix_tokens above 0",
        next_step="preceptor curate DOMAIN",
    )


def _head_name(model: Any) -> str:
    return "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"


def _add(sums: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
    squares = values.detach().double().square().flatten(0, -2).sum(0)
    sums[name] = sums[name] + squares if name in sums else squares


@contextmanager
def _hooks(model: Any, sums: dict[str, torch.Tensor]) -> Iterator[None]:
    import torch

    handles = []
    for path, module in model.named_modules():
        name = gguf_name(f"{path}.weight")
        if isinstance(module, torch.nn.Linear) and name and path != "lm_head":
            handles.append(
                module.register_forward_pre_hook(
                    lambda _module, inputs, name=name: _add(sums, name, inputs[0])
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_imatrix(path: Path, imatrix: Mapping[str, NDArray[np.float32]]) -> None:
    """Write a NumPy archive, one array per tensor; the file appears whole, and the same input gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, values in sorted(imatrix.items()):
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as entry:
                    np.lib.format.write_array(entry, np.asarray(values, np.float32), allow_pickle=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_imatrix(path: Path) -> Imatrix:
    """What `write_imatrix` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
