"""A base model on a GGUF grid: the blocks that are trained on, and those that are only carried along.

What is served is rounded; so the training network uses the rounded numbers from its first step. Matrices of the
blocks lie on the method's grid. Embedding and head keep the format of the base's own GGUF file, or take Q8_0.
Norms are never rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from domains.errors import ModelError, ParityError
from domains.routes import Grid
from pipeline.gptq import collect_and_round
from pipeline.grids.blocks import BLOCK, Blocks, Packed
from pipeline.grids.layout import BLOCK_BYTES, pack, unpack
from pipeline.grids.library import ggml_decode
from pipeline.grids.rounding import decode, encode
from pipeline.grids.search import fit
from pipeline.methods.adapter_files import keep_blocks
from pipeline.progress import Progress, Silent
from pipeline.run_folder import check_space
from pipeline.student import Base

_GRIDS = {"Q4_0", "Q4_1", "Q8_0"}
_OUTER = ("model.embed_tokens.weight", "lm_head.weight")
_OUTER_GRID: Grid = "Q8_0"  # relative error 0.005; its kernels are the fast ones for a large output matrix


@dataclass(frozen=True)
class Calibration:
    """Text that the base is rounded on by GPTQ.

    Attributes:
        batches: token ids, each [rows, length], without padding.
        kept: where the rounded base is kept for a training that is taken up again; None: nowhere.
        key: of what is kept: a base that was rounded from something else is not taken up.
        progress: told what happens, where anybody wants to know.
    """

    batches: Sequence[torch.Tensor]
    kept: Path | None = None
    key: str = ""
    progress: Progress = field(default_factory=Silent)


def block_linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks by their names in ``model``."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.startswith("model.layers."):
            yield path, module


def base_blocks(base: Base, grid: Grid, calibration: Calibration | None = None) -> dict[str, Blocks]:
    """The blocks of every linear layer by parameter name.

    A base that comes as GGUF and lies on the grid gives its file's own bytes. Everything else is rounded by GPTQ on
    ``calibration`` (with the norms and the order of channels as they are: the network around the blocks stays the
    base's), or fitted matrix by matrix without one.

    Raises:
        ModelError: a matrix has rows that blocks of 32 do not divide, or a bias.
    """
    own = _own_file(base)
    linears = {}
    for path, linear in block_linears(base.model):
        check_linear(path, linear)
        linears[f"{path}.weight"] = linear
    found = {name: unpack(own[name].rows, grid) for name in linears if name in own and own[name].kind == grid}
    if calibration is not None:
        if len(found) < len(linears):
            return _by_gptq(base.model, grid, calibration)
        calibration.progress.say(f"the base's own file lies on the {grid} grid: GPTQ has nothing to round")
    for name, linear in linears.items():
        if name not in found:
            found[name] = fit(linear.weight.detach().float(), grid)
    return found


def _by_gptq(model: Any, grid: Grid, calibration: Calibration) -> dict[str, Blocks]:
    progress = calibration.progress

    def rounded() -> dict[str, Packed]:
        if calibration.kept is not None:
            weights = sum(linear.weight.numel() for _, linear in block_linears(model))
            check_space(calibration.kept.parent, weights // BLOCK * BLOCK_BYTES[grid])
        progress.start("rounding the base by GPTQ", model.config.num_hidden_layers)
        blocks = collect_and_round(
            model, calibration.batches, grid=grid, permute_intermediate=False,
            on_layer=lambda _done, _all: progress.advance(),
        )  # fmt: skip
        return pack_blocks(blocks)

    if calibration.kept is None:
        packed = rounded()
    else:
        packed = keep_blocks(calibration.kept, calibration.key, rounded)
    return {name: unpack(matrix.rows, grid) for name, matrix in packed.items()}


def outer_packed(base: Base) -> dict[str, Packed]:
    """Embedding and head (where it is another matrix) as the served file will hold them.

    A width that blocks do not divide is left out: such a matrix is written in F16 and rounded so by `set_outer`.
    """
    own = _own_file(base)
    found = {}
    for name, weight in _outer(base.model):
        if name in own and own[name].kind not in {"F32", "F16", "BF16"}:
            found[name] = own[name]
        elif weight.shape[1] % BLOCK == 0:
            found[name] = Packed(_OUTER_GRID, pack(encode(weight.detach().float(), _OUTER_GRID)))
    return found


def set_outer(model: Any, packed: Mapping[str, Packed]) -> None:
    """Give embedding and head the numbers that the served file will hold, in place."""
    with torch.no_grad():
        for name, weight in _outer(model):
            rounded = read_back(packed[name], weight.shape[1]) if name in packed else weight.half().float()
            weight.copy_(rounded.to(weight.dtype))


def set_linears(model: Any, packed: Mapping[str, Packed]) -> None:
    """Give the blocks' linear layers the numbers of their packed matrices, in place; others stay."""
    with torch.no_grad():
        for path, linear in block_linears(model):
            if f"{path}.weight" in packed:
                linear.weight.copy_(read_back(packed[f"{path}.weight"], linear.in_features))


def read_back(matrix: Packed, width: int) -> torch.Tensor:
    """The numbers of a packed matrix, float32 [rows, width], exactly as ggml reads them."""
    if matrix.kind in _GRIDS:
        return decode(unpack(matrix.rows, matrix.kind))  # type: ignore[arg-type]
    return torch.from_numpy(ggml_decode(matrix.rows, matrix.kind, width))


def check_trained(packed: Mapping[str, Packed], weight_of: Callable[[str], torch.Tensor]) -> None:
    """Pass if the training network multiplies with the very numbers that will be served.

    Args:
        packed: the matrices as bytes of the file.
        weight_of: the training network's own matrix by its parameter name, in the type of its arithmetic.

    Raises:
        ParityError: one differs from what its bytes decode to.
    """
    for name, matrix in packed.items():
        weight = weight_of(name).detach()
        other = int((read_back(matrix, weight.shape[1]).to(weight) != weight).sum())
        if other:
            raise ParityError(
                f"{name}: training multiplied with other numbers than its blocks decode to, {other:,} of {weight.numel():,}",
                expected="equal bits: the blocks are what is served",
                next_step="nothing new was kept; report it, and train by another [train] method",
            )


def pack_blocks(blocks: Mapping[str, Blocks]) -> dict[str, Packed]:
    """Blocks as bytes."""
    return {name: Packed(value.grid, pack(value)) for name, value in blocks.items()}


def _outer(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    parameters = dict(model.named_parameters())  # a tied head is listed once, as the embedding
    for name in _OUTER:
        if name in parameters:
            yield name, parameters[name]


def _own_file(base: Base) -> Mapping[str, Packed]:
    """The matrices of the base's GGUF file; nothing for a base of another form."""
    if base.gguf is None:
        return {}
    from pipeline.gguf_tensors import read_packed

    return read_packed(base.gguf, base.model.config)


def check_linear(path: str, linear: nn.Linear) -> None:
    """Pass if blocks have a place for a layer.

    Raises:
        ModelError: they have not.
    """
    if linear.bias is not None:
        raise no_place(repr(path), "a bias", qlora=False)
    if linear.in_features % BLOCK:
        raise no_place(repr(path), f"rows of {linear.in_features} weights")


def no_place(whose: str, what: str, *, qlora: bool = True) -> ModelError:
    """Of something for which blocks have no place; ``qlora``: that method would have one."""
    return ModelError(
        f"{whose} has {what}",
        expected=f"rows that blocks of {BLOCK} weights divide, and no biases",
        next_step="name another base in [student] of domain.toml"
        + (', or choose [train] method = "qlora"' if qlora else ""),
    )
