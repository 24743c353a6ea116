"""The files that one student could be served as, and what each is worth, all measured through llama.cpp.

Every candidate starts from the same full-precision student and has its embedding and output matrix in Q8_0, so that
their files differ in the linear layers of the blocks alone (and in the bytes that untying adds, which are shown).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from domains.config import GgufType, Rounding
from pipeline.bootstrap import Interval, ratio_interval
from pipeline.fidelity import Fidelity, Reference
from pipeline.gguf_writer import write_llama_gguf
from pipeline.grids import GridName, Packed
from pipeline.imatrix import Imatrix
from pipeline.packing import Row
from pipeline.progress import Progress
from pipeline.retrain import RetrainMethod, retrain
from pipeline.roundings import LOSSES, Learning, round_student
from pipeline.speed import Speed, measure_speed
from pipeline.student import Base
from pipeline.training_loop import Settings
from serve.gguf_check import check_gguf
from serve.quantizer import requantize

if TYPE_CHECKING:
    import torch

_RESAMPLES = 2000
How = Rounding | RetrainMethod | Literal["llamacpp"]


@dataclass(frozen=True)
class Candidate:
    """One way to a file. ``kind`` is the type of the blocks' layers."""

    name: str
    how: How
    kind: GgufType


def _plan(*rows: tuple[How, GgufType]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(
            f"llamacpp-{kind.lower()}" + ("" if kind == "Q8_0" else "-imatrix")
            if how == "llamacpp"
            else f"{how}-{kind.lower()}",
            how,
            kind,
        )
        for how, kind in rows
    )


CANDIDATES = _plan(
    ("llamacpp", "Q8_0"),
    ("llamacpp", "Q4_0"),
    ("llamacpp", "Q4_K_M"),
    ("rtn", "Q4_0"),
    ("mse", "Q4_0"),
    ("gptq", "Q4_0"),
    ("gptq", "Q4_1"),
    ("r2-gptq", "Q4_0"),
    ("r1r2-gptq", "Q4_0"),
    ("learned-gptq", "Q4_0"),
    ("learned-kl-gptq", "Q4_0"),
    ("tuned-gptq", "Q4_0"),
    ("qat", "Q4_0"),
    ("qalora", "Q4_1"),
    ("qalora", "Q4_0"),
)
ON_REQUEST = _plan(("learned-ce-gptq", "Q4_0"))
"""Made where they are named; a search leaves them out, for its time."""


@dataclass(frozen=True)
class Materials:
    """What candidates are made of.

    ``network`` is the merged student in float32 and ``f16`` its file; ``batches`` are calibration texts
    [rows, length]; ``rows`` what is trained on (no retraining without any); ``imatrix`` is llama.cpp's.
    """

    network: Any
    base: Base
    f16: Path
    batches: Sequence[torch.Tensor]
    rows: Sequence[Row]
    imatrix: Imatrix | None
    settings: Settings
    kl_weight: float = 1.0
    learning: Learning = Learning()  # noqa: RUF009  frozen
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """A candidate's numbers. ``exam`` are scores per question; ``untied_bytes`` an output matrix of its own takes."""

    candidate: Candidate
    path: Path
    seconds: float
    bytes: int
    block_bits_per_weight: float
    untied_bytes: int
    fidelity: Fidelity
    exam: tuple[float, ...]
    speed: Speed | None

    def row(self) -> dict[str, Any]:
        """As plain data; KL in nats per position, 95 % intervals over texts and over questions."""
        kl, perplexity, exam = self.fidelity.kl, self.fidelity.perplexity_interval, mean_score(self.exam)
        return {
            "name": self.candidate.name,
            "rotation_loss": LOSSES.get(self.candidate.how),
            "bytes": self.bytes,
            "untied_bytes": self.untied_bytes,
            "block_bits_per_weight": round(self.block_bits_per_weight, 3),
            "kl": round(kl.mean, 6),
            "kl_interval": [round(kl.low, 6), round(kl.high, 6)],
            "top1_agreement": round(self.fidelity.top1_agreement, 4),
            "perplexity": round(perplexity.mean, 3),
            "perplexity_interval": [round(perplexity.low, 3), round(perplexity.high, 3)],
            "exam": round(exam.mean, 4) if exam else None,
            "exam_interval": [round(exam.low, 4), round(exam.high, 4)] if exam else None,
            "prompt_tokens_per_s": self.speed.prompt_tokens_per_s if self.speed else None,
            "decode_tokens_per_s": self.speed.decode_tokens_per_s if self.speed else None,
            "seconds": round(self.seconds, 1),
        }


def mean_score(scores: Sequence[float]) -> Interval | None:
    """The mean of scores per question with its 95 % interval; None of none."""
    if not scores:
        return None
    return ratio_interval(scores, [1.0] * len(scores), resamples=_RESAMPLES, seed=0)


def possible(candidates: Sequence[Candidate], materials: Materials) -> list[Candidate]:
    """Those that can be made: retraining wants rows."""
    return [each for each in candidates if materials.rows or each.how not in {"qat", "qalora"}]


def build(candidate: Candidate, materials: Materials, folder: Path, progress: Progress) -> Path:
    """Write a candidate's file into ``folder``.

    Raises:
        ModelError: the student has widths for which the format has no place.
    """
    path = folder / f"{candidate.name}.gguf"
    if candidate.how == "llamacpp":
        imatrix = None if candidate.kind == "Q8_0" else materials.imatrix
        requantize(materials.f16, path, candidate.kind, imatrix=imatrix, outer="Q8_0")
        return path
    grid = _grid(candidate.kind)
    network, packed = materials.network, {}
    if candidate.how == "qat" or candidate.how == "qalora":
        packed = retrain(
            network, materials.base, materials.rows, folder / candidate.name, progress,
            method=candidate.how, grid=grid, settings=_settings(materials, candidate.how), kl_weight=materials.kl_weight,
            batches=materials.batches,
        )  # fmt: skip
    else:
        progress.start(candidate.name, network.config.num_hidden_layers)
        rounded = round_student(
            network, candidate.how, grid, materials.batches, seed=materials.seed, learning=materials.learning,
            on_layer=lambda _done, _all: progress.advance(),
        )  # fmt: skip
        network, packed = rounded.network, rounded.packed
    _write(path, network, packed, materials.base, kind=candidate.kind)
    del network, packed
    gc.collect()
    return path


def _grid(kind: GgufType) -> GridName:
    assert kind == "Q4_0" or kind == "Q4_1" or kind == "Q8_0", kind
    return kind


def _settings(materials: Materials, method: str) -> Settings:
    """An adapter on 32-pooled inputs wants a several times higher learning rate (docs/results.md, Training methods)."""
    rate = materials.settings.learning_rate * (3 if method == "qalora" else 1)
    return replace(materials.settings, learning_rate=rate)


def _write(path: Path, network: Any, packed: Mapping[str, Packed], base: Base, *, kind: str) -> None:
    write_llama_gguf(
        path,
        state=network.state_dict(),
        config=network.config,
        tokenizer=base.tokenizer,
        template=base.template,
        name=base.name,
        licence=base.licence,
        end_of_turn=base.end_of_turn,
        copy_tokenizer_from=base.gguf,
        packed=packed,
        file_kind=kind,
    )


def measure(
    candidates: Sequence[Candidate],
    materials: Materials,
    folder: Path,
    reference: Reference,
    progress: Progress,
    *,
    exam: Callable[[Path], Sequence[float]] | None = None,
    speed: bool = True,
) -> Iterator[Measured]:
    """Make and measure one candidate after the other; their files stay in ``folder``.

    Args:
        candidates: see `possible`.
        materials: what they are made of.
        folder: made when missing.
        reference: the full-precision student's logits over held-out texts.
        progress: told what happens.
        exam: the scores of a file per question, each in [0, 1].
        speed: also time llama.cpp; wants an idle machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for candidate in candidates:
        begin = time.monotonic()
        path = build(candidate, materials, folder, progress)
        seconds = time.monotonic() - begin
        fidelity = reference.measure(path)
        size, block_bits, untied = weigh(path)
        found = Measured(
            candidate=candidate,
            path=path,
            seconds=seconds,
            bytes=size,
            block_bits_per_weight=block_bits,
            untied_bytes=untied,
            fidelity=fidelity,
            exam=tuple(exam(path)) if exam else (),
            speed=measure_speed(path) if speed else None,
        )
        kl = fidelity.kl
        progress.say(
            f"{candidate.name}: {size / 1e6:.0f} MB, {block_bits:.2f} bits in the blocks, KL {kl.mean:.4f} "
            f"[{kl.low:.4f}, {kl.high:.4f}], {seconds:.0f} s to make"
        )
        yield found


def weigh(path: Path) -> tuple[int, float, int]:
    """Bytes of a file, bits per weight of the matrices inside the blocks, and bytes of an output matrix of its own."""
    facts = check_gguf(path)
    inside = [each for each in facts.tensors if each.name.startswith("blk.") and len(each.shape) > 1]
    bits = 8 * sum(each.size_bytes for each in inside) / sum(prod(each.shape) for each in inside)
    untied = sum(each.size_bytes for each in facts.tensors if each.name == "output.weight")
    return facts.size_bytes, bits, untied
