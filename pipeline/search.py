"""``[export] rounding``: the served file made by one of them, or searched for: every candidate is made and measured, and the one to serve is chosen.

The reference is the merged student in full precision. Its KL is measured on text of documents that no training row is
about, where there are any (else that is said), the exam's score on seed questions that training did not use (never on the exam's own: what is examined must not
choose the format).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domains.config import GgufType, Rounding
from domains.records import Example, Passage, Question
from pipeline.calibration_text import calibration_batches
from pipeline.candidates import CANDIDATES, Candidate, Materials, Measured, build, measure, possible, weigh
from pipeline.choose_format import Choice, choose
from pipeline.fidelity import Reference, Text
from pipeline.imatrix import collect_imatrix
from pipeline.metrics import mark_answer
from pipeline.packing import encode_examples
from pipeline.progress import Progress
from pipeline.quantize import BITS_PER_WEIGHT
from pipeline.roundings import ROTATING, Learning
from pipeline.run_folder import check_space
from pipeline.student import Base
from pipeline.training_loop import Settings

_WINDOW = 512
_TEXTS = 12
_CALIBRATION = 48  # windows


@dataclass(frozen=True)
class Work:
    """What files are made of.

    ``network`` is the merged student in float32, ``f16`` its file; ``examples`` are the training rows, whose text
    calibrates and which retraining repeats with ``settings``. Files are written into ``folder``.
    """

    network: Any
    base: Base
    f16: Path
    folder: Path
    examples: Sequence[Example]
    context: int
    settings: Settings

    def materials(self) -> Materials:
        """The same with the texts tokenized."""
        rows, _ = encode_examples(
            self.examples, self.base, max_tokens=min(self.context, self.settings.pack_tokens)
        )
        batches = calibration_batches((row.ids for row in rows), length=_WINDOW, pieces=_CALIBRATION)
        texts = [ids for batch in batches for ids in batch.tolist()]
        return Materials(
            network=self.network,
            base=self.base,
            f16=self.f16,
            batches=batches,
            rows=rows,
            imatrix=collect_imatrix(self.network, texts, max_tokens=sum(map(len, texts))),
            settings=self.settings,
            learning=Learning(bf16=self.settings.levers.bf16),
        )


@dataclass(frozen=True)
class HeldOut:
    """What files are measured on, and the bounds that they must keep.

    ``score`` gives a file's scores per development question, of which there are ``asked``; None where there are none.
    ``caveat`` says what of the passages training rows show, and where there are no questions; empty where all is well.
    """

    passages: Sequence[Passage]
    caveat: str
    asked: int
    score: Callable[[Path], Sequence[float]] | None
    max_kl: float
    min_top1: float


def round_one(work: Work, rounding: Rounding, kind: GgufType, progress: Progress) -> Path:
    """The student on the grid ``kind``, by one rounding; the file."""
    work.folder.mkdir(parents=True, exist_ok=True)
    candidate = Candidate(f"{rounding}-{kind.lower()}", rounding, kind)
    path = build(candidate, work.materials(), work.folder, progress)
    size, _, untied = weigh(path)
    more = f", {untied / 1e6:.0f} MB of them for an output matrix of its own" if untied else ""
    progress.say(f"{candidate.name}: {size / 1e6:.0f} MB{more}")
    return path


def search(work: Work, held_out: HeldOut, progress: Progress) -> tuple[Choice, list[Measured]]:
    """Make, measure, choose. Only the chosen file stays; until then the disk holds them all.

    Memory beside the student: one more copy of it in float32 while a candidate is made, and what GPTQ keeps
    (`pipeline.gptq`); rotations learned on the KL also keep a rounded copy of every matrix and one step's activations. The
    student's logits on the held-out texts are kept throughout: 25 kB per token of the vocabulary, 1.2 GB for the default
    model's 49,152 and 3.1 GB for Llama 3.2's 128,256.

    Raises:
        DataError: the disk can't hold the candidates.
    """
    weights = sum(weight.numel() for weight in work.network.parameters())
    output = work.network.get_output_embeddings().weight.numel()  # once more where the stream is turned
    untied = sum(each.how in ROTATING for each in CANDIDATES) * output * BITS_PER_WEIGHT["Q8_0"]
    bits = weights * sum(BITS_PER_WEIGHT[each.kind] for each in CANDIDATES) + untied
    check_space(work.folder, int(bits / 8))
    materials = work.materials()
    if held_out.caveat:
        progress.say(held_out.caveat)
    reference = Reference.of_file(work.f16, held_out_texts(work.base, held_out.passages))
    candidates = possible(CANDIDATES, materials)
    found = list(measure(candidates, materials, work.folder, reference, progress, exam=held_out.score))
    choice = choose(found, max_kl=held_out.max_kl, min_top1=held_out.min_top1)
    for each in found:
        if each is not choice.winner:
            each.path.unlink()
    progress.say(f"served as {choice.winner.candidate.name}")
    for reason in choice.reasons:
        progress.say(f"not {reason}")
    if choice.rotation:
        progress.say(choice.rotation)
    return choice, found


def held_out_texts(base: Base, passages: Sequence[Passage]) -> list[Text]:
    """Windows of the passages put end to end."""
    ids: list[int] = []
    for passage in passages:
        ids += base.tokenizer(passage.text + "\n", add_special_tokens=False)["input_ids"]
    length = min(_WINDOW, len(ids))
    return [Text(tuple(ids[begin : begin + length])) for begin in range(0, len(ids) - length + 1, length)][
        :_TEXTS
    ]


def unseen_passages(
    passages: Sequence[Passage], questions: Sequence[Question], examples: Sequence[Example]
) -> tuple[list[Passage], str]:
    """Passages of the exam's documents that no training row shows, the nearest thing where there are none, and what it is."""
    shown = {name for example in examples for name in example.passages}
    rest = [passage for passage in passages if passage.passage_id not in shown]
    about = {question.about for question in questions if question.split == "exam"}
    if unseen := [passage for passage in rest if passage.doc_id in about]:
        return unseen, ""
    if rest:
        return (
            rest,
            "files are compared on passages that no training row shows, of documents that rows may be about",
        )
    return list(passages), "files are compared on passages that training rows show: there are no others"


def scores(questions: Sequence[Question], answers: Sequence[Any], *, abstain: str) -> list[float]:
    """The exam's headline score of each answer; 0 where the prompt did not fit."""
    return [
        mark_answer(question, answer, gold=[], abstain=abstain, seconds=0)["score"][0]
        for question, answer in zip(questions, answers, strict=True)
    ]
