"""The export stage's work: the trained network becomes files, and the files are held against the network."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domains.config import GgufType, KvCache
from domains.jsonl import write_text_atomic
from domains.records import Example
from pipeline.bundle import ADAPTER, adapter_of, is_meta_llama, mark_ready, open_bundle, student_file
from pipeline.exact_files import find_strangers, share_base, write_adapter, write_exact
from pipeline.gguf_writer import write_llama_gguf
from pipeline.imatrix import Imatrix, collect_imatrix, write_imatrix
from pipeline.merge import plain_network
from pipeline.methods.method import Trained
from pipeline.parity import Logits, Parity, Replay, check_parity, replay_logits, require, torch_network
from pipeline.progress import Progress
from pipeline.quantize import BITS_PER_WEIGHT, QuantizeReport, describe_file, quantize
from pipeline.replays import Turn, make_replay
from pipeline.run_folder import Run, check_space, disk_errors
from pipeline.student import Base, encode_completion, encode_prompt, load_student, render_prompt


@dataclass(frozen=True)
class Exact:
    """The files of a student whose blocks were trained, not yet in the bundle.

    ``strangers`` are the matrices of ``student`` that, read back, are not those that were trained: none, or the gate
    does not open. ``adapter`` is None where the student is one file.
    """

    kind: GgufType
    student: Path
    adapter: Path | None
    matrices: int
    strangers: list[str]


@dataclass(frozen=True)
class Student:
    """What is left of the trained network once it is written: enough for quantizing and for the gate."""

    base: Base
    replays: list[Replay]
    training: list[Logits]
    merged: list[Logits] | None
    imatrix: Imatrix | None
    weights: int
    exact: Exact | None = None


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
    """Write the student: in F16, and exactly where its very blocks were trained.

    The adapter is merged first, unless it lies in the blocks already. Torch holds one network at a time.

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
        trained = load_student(run.training, base=base)
    loaded = trained.base
    replays = [make_replay(loaded, turn) for turn in turns]
    with clock("replay_trained", "replaying prompts through the trained network", len(replays)):
        training = replay_logits(torch_network(trained.network), replays, progress.advance)
    with clock("merge", "merging the adapter"):
        network = plain_network(trained)
    weights = sum(parameter.numel() for parameter in network.parameters())
    check_space(
        run.folder, int(weights / 8 * sum(BITS_PER_WEIGHT[kind] for kind in ("F16", "F16", *room_for)))
    )
    merged = None
    if not trained.packed:
        with clock("replay_merged", "replaying prompts through the merged network", len(replays)):
            merged = replay_logits(torch_network(network), replays, progress.advance)
    with disk_errors(run.export):
        with clock("write", "writing the student in F16"):
            write_f16(run.export / "student-F16.gguf", network, loaded, title=title)
        exact = None
        if trained.packed:
            with clock("write_exact", "writing the trained blocks"):
                exact = _write_exact(run.export, network, trained, title=title)
        # Eight bits want no importance matrix: llama.cpp does not look at it there.
        rounds = {*room_for} - {exact.kind if exact else None, "Q8_0", "F16"}
        imatrix = _measure(run.export, clock, network, _rows(loaded, examples), imatrix_tokens * bool(rounds))
    del network, trained
    gc.collect()
    return Student(loaded, replays, training, merged, imatrix, weights, exact)


def _measure(
    folder: Path, clock: Clock, network: Any, rows: Iterator[list[int]], tokens: int
) -> Imatrix | None:
    """The importance matrix for what will be rounded, kept in ``folder``; none where ``tokens`` is 0."""
    path = folder / "imatrix.npz"
    path.unlink(missing_ok=True)
    if not tokens:
        return None
    with clock("imatrix", "measuring the importance matrix", tokens):
        imatrix = collect_imatrix(network, rows, max_tokens=tokens, on_tokens=clock.progress.advance)
        write_imatrix(path, imatrix)
    return imatrix


def _write_exact(folder: Path, network: Any, trained: Trained, *, title: str) -> Exact:
    """The served files, in ``folder`` until the bundle is opened."""
    assert trained.grid is not None  # wherever something is packed
    student, adapter = folder / "exact.gguf", None
    name = named(title, trained.base)
    if trained.low_rank:
        # The base's own name: domains that share it get the same bytes.
        adapter, name = folder / ADAPTER, trained.base.name
        write_adapter(adapter, network, trained, name=named(title, trained.base))
    write_exact(student, network, trained, grid=trained.grid, name=name)
    strangers = find_strangers(student, trained.packed, network.config)
    return Exact(trained.grid, student, adapter, len(trained.packed), strangers)


def write_formats(
    run: Run,
    clock: Clock,
    student: Student,
    *,
    kinds: Sequence[GgufType],
    served: GgufType,
    made: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Quantize into the bundle; facts per format. The bundle is without a manifest from here on.

    ``made`` is the file to serve where it was made already; it is moved.
    """
    names = {kind: student_file(kind, served=served) for kind in kinds}
    exact = student.exact
    open_bundle(run.bundle, keep=[*names.values(), *([ADAPTER] if exact and exact.adapter else [])])
    files: dict[str, dict[str, Any]] = {}
    with clock("quantize", "quantizing", len(kinds)):
        for kind, name in names.items():
            target = run.bundle / name
            if exact and kind == exact.kind:
                report = _place_exact(run, exact, target)
            elif made and kind == served:
                made.replace(target)
                # On a grid the embedding is Q8_0 on purpose; in a K-quant file it may be a fallback.
                report = describe_file(target, kind, outer=None if kind == "Q4_K_M" else "Q8_0")
            else:
                source = run.export / "student-F16.gguf"
                report = quantize(source, target, kind=kind, imatrix=student.imatrix)
            rounded = "; rounded from the trained blocks, so no longer exactly these"
            clock.progress.say(report.describe() + (rounded if exact and kind != exact.kind else ""))
            clock.progress.advance()
            files[kind] = {"file": name, **_file_facts(report)}
    return files


def _place_exact(run: Run, exact: Exact, target: Path) -> QuantizeReport:
    if exact.adapter:
        exact.adapter.replace(run.bundle / ADAPTER)
        share_base(exact.student, target, runs=run.folder.parent.parent)
    else:
        exact.student.replace(target)
    return describe_file(target, exact.kind, outer="Q8_0")


def pass_gate(
    run: Run,
    clock: Clock,
    student: Student,
    *,
    served: GgufType,
    context: int,
    max_kl: float,
    min_top1: float,
    kv_cache: KvCache = "f16",
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
            f16=None if student.exact else run.export / "student-F16.gguf",
            served=run.bundle / "student.gguf",
            adapter=adapter_of(run.bundle / "student.gguf"),
            kv_cache=kv_cache,
            strangers=student.exact.strangers if student.exact else None,
            served_kind=served,
            context=context,
            max_kl=max_kl,
            min_top1=min_top1,
            on_done=clock.progress.advance,
        )
    write_text_atomic(run.bundle / "parity.json", parity.model_dump_json(indent=1) + "\n")
    mark_ready(run.bundle, ready=parity.ready)
    require(parity)
    exactly = "; every block bit for bit the trained one" if parity.bits_equal else ""
    clock.progress.say(
        f"parity: {parity.kl:.2g} nats per token from the trained network, same top token at "
        f"{parity.top1_agreement:.1%} of {parity.positions} positions{exactly}"
    )
    return parity


def _rows(base: Base, examples: Iterable[Example]) -> Iterator[list[int]]:
    for row in examples:
        yield encode_prompt(base, render_prompt(base, row.messages)) + encode_completion(base, row.completion)


def write_f16(path: Path, network: Any, base: Base, *, title: str) -> None:
    """Write a merged network as GGUF in F16."""
    write_llama_gguf(
        path,
        state=network.state_dict(),
        config=network.config,
        tokenizer=base.tokenizer,
        template=base.template,
        name=named(title, base),
        licence=base.licence,
        end_of_turn=base.end_of_turn,
        copy_tokenizer_from=base.gguf,
    )


def named(title: str, base: Base) -> str:
    """A student's name: the Llama Community License wants "Llama" at the beginning of a derived model's (1.b i)."""
    return f"Llama {title}" if is_meta_llama(base.licence) else title


def _file_facts(report: QuantizeReport) -> dict[str, Any]:
    return {
        "size_bytes": report.size_bytes,
        "bits_per_weight": report.bits_per_weight,
        "kinds": report.kinds,
        "fallbacks": len(report.fallbacks),
    }
