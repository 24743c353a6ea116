"""The export stage's work: the trained network becomes files, and the files are held against the network."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domains.config import GgufType
from domains.jsonl import write_text_atomic
from domains.records import Example
from pipeline.bundle import is_meta_llama, mark_ready, open_bundle, student_file
from pipeline.gguf_writer import write_llama_gguf
from pipeline.imatrix import Imatrix, collect_imatrix, write_imatrix
from pipeline.merge import merge_adapter
from pipeline.parity import Logits, Parity, Replay, check_parity, replay_logits, require, torch_network
from pipeline.progress import Progress
from pipeline.quantize import BITS_PER_WEIGHT, QuantizeReport, quantize
from pipeline.replays import Turn, make_replay
from pipeline.run_folder import Run, check_space, disk_errors
from pipeline.student import Base, encode_completion, encode_prompt, load_trained, render_prompt
from serve.models import SMOLLM2, packaged_gguf


@dataclass(frozen=True)
class Student:
    """What is left of the trained network once it is written: enough for quantizing and for the gate."""

    base: Base
    replays: list[Replay]
    training: list[Logits]
    merged: list[Logits]
    imatrix: Imatrix | None
    weights: int


@dataclass
class Clock:
    """Announces steps and keeps their seconds."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str, what: str, total: int = 0) -> Iterator[None]:
        """A step under way: ``step`` names its seconds, ``what`` its bar of ``total`` units."""
        self.progress.start(what, total)
        start = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - start, 1)


def write_student(
    run: Run,
    clock: Clock,
    *,
    base: str,
    title: str,
    turns: Sequence[Turn],
    examples: Sequence[Example],
    imatrix_tokens: int,
    room_for: Sequence[GgufType],
) -> Student:
    """Merge the adapter and write the student in F16; torch holds one network at a time.

    Args:
        run: whose adapter is read and whose export folder is written.
        clock: told of the steps.
        base: ``[student] base``.
        title: of the domain, for the file's name field.
        turns: replayed through the trained and the merged network.
        examples: text for the importance matrix.
        imatrix_tokens: how much of it; 0 = no matrix.
        room_for: the formats that will be written later; the disk must hold them.
    """
    progress = clock.progress
    with clock("load", "loading the trained student"):
        model, loaded = load_trained(run.training, base=base)
    replays = [make_replay(loaded, turn) for turn in turns]
    with clock("replay_trained", "replaying prompts through the trained network", len(replays)):
        training = replay_logits(torch_network(model), replays, progress.advance)
    with clock("merge", "merging the adapter"):
        network = merge_adapter(model)
    del model
    weights = sum(parameter.numel() for parameter in network.parameters())
    check_space(
        run.folder, int(weights / 8 * sum(BITS_PER_WEIGHT[kind] for kind in ("F16", "F16", *room_for)))
    )
    with clock("replay_merged", "replaying prompts through the merged network", len(replays)):
        merged = replay_logits(torch_network(network), replays, progress.advance)
    with disk_errors(run.export):
        with clock("write", "writing the student in F16"):
            write_f16(run.export / "student-F16.gguf", network, loaded, title=title)
        imatrix = None
        if imatrix_tokens:
            with clock("imatrix", "measuring the importance matrix", imatrix_tokens):
                rows = _rows(loaded, examples)
                imatrix = collect_imatrix(
                    network, rows, max_tokens=imatrix_tokens, on_tokens=progress.advance
                )
                write_imatrix(run.export / "imatrix.npz", imatrix)
    del network
    gc.collect()
    return Student(loaded, replays, training, merged, imatrix, weights)


def write_formats(
    run: Run, clock: Clock, student: Student, *, kinds: Sequence[GgufType], served: GgufType
) -> dict[str, dict[str, Any]]:
    """Quantize into the bundle; facts per format. The bundle is without a manifest from here on."""
    names = {kind: student_file(kind, served=served) for kind in kinds}
    open_bundle(run.bundle, keep=list(names.values()))
    files: dict[str, dict[str, Any]] = {}
    with clock("quantize", "quantizing", len(kinds)):
        for kind, name in names.items():
            report = quantize(
                run.export / "student-F16.gguf", run.bundle / name, kind=kind, imatrix=student.imatrix
            )
            clock.progress.say(report.describe())
            clock.progress.advance()
            files[kind] = {"file": name, **_file_facts(report)}
    return files


def pass_gate(
    run: Run,
    clock: Clock,
    student: Student,
    *,
    served: GgufType,
    context: int,
    max_kl: float,
    min_top1: float,
) -> Parity:
    """The parity gate on the bundle's ``student.gguf``; writes ``parity.json`` and the manifest's verdict.

    Raises:
        ParityError: it failed; parity.json and a manifest with ``ready: false`` are there.
    """
    with clock("parity", "parity gate", 2 * len(student.replays)):
        parity = check_parity(
            student.replays,
            training=student.training,
            merged=student.merged,
            f16=run.export / "student-F16.gguf",
            served=run.bundle / "student.gguf",
            served_kind=served,
            context=context,
            max_kl=max_kl,
            min_top1=min_top1,
            on_done=clock.progress.advance,
        )
    write_text_atomic(run.bundle / "parity.json", parity.model_dump_json(indent=1) + "\n")
    mark_ready(run.bundle, ready=parity.ready)
    require(parity)
    clock.progress.say(
        f"parity: {parity.kl:.2g} nats per token from the trained network, same top token at "
        f"{parity.top1_agreement:.1%} of {parity.positions} positions"
    )
    return parity


def _rows(base: Base, examples: Iterable[Example]) -> Iterator[list[int]]:
    for row in examples:
        yield encode_prompt(base, render_prompt(base, row.messages)) + encode_completion(base, row.completion)


def write_f16(path: Path, network: Any, base: Base, *, title: str) -> None:
    """Write a merged network as GGUF in F16."""
    smollm2 = base.name == SMOLLM2
    write_llama_gguf(
        path,
        state=network.state_dict(),
        config=network.config,
        tokenizer=base.tokenizer,
        template=base.template,
        # The Llama Community License wants "Llama" at the beginning of a derived model's name (1.b i).
        name=f"Llama {title}" if is_meta_llama(base.licence) else title,
        licence=base.licence,
        end_of_turn=base.end_of_turn,
        copy_tokenizer_from=packaged_gguf() if smollm2 else None,
    )


def _file_facts(report: QuantizeReport) -> dict[str, Any]:
    return {
        "size_bytes": report.size_bytes,
        "bits_per_weight": report.bits_per_weight,
        "kinds": report.kinds,
        "fallbacks": len(report.fallbacks),
    }
