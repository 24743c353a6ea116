"""Cross-entropy plus a divergence from a teacher's whole distribution, on supervised tokens only.

Knowledge distillation (arXiv 1503.02531): KL(teacher || student) at a temperature T, times T², so that its gradients
keep their size. The teacher is the student itself before its weights were rounded (as in LLM-QAT, arXiv 2305.17888),
a student that an earlier run finished (distil first, then train the rounded network towards it), or any model with the
same vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from domains.errors import ModelError
from pipeline.kl_teacher import finished_student
from pipeline.layout import IGNORED
from pipeline.levers import Levers
from pipeline.merge import plain_network
from pipeline.packing import Pack, pack_hidden, use_packed_attention
from pipeline.qlora import to_training
from pipeline.student import Base, load_base, load_student

SELF = "base"  # the student before rounding
_CHUNK = 256  # tokens


@dataclass(frozen=True)
class Divergence:
    """``[train] objective = "ce+kl"``: how much the divergence counts, at which temperature, from whom."""

    weight: float
    temperature: float
    teacher: str


class DistilledLoss:
    """Callable on a pack's hidden states: the loss summed over its supervised tokens, in nats.

    Args:
        network: the student, a ``LlamaForCausalLM``.
        teacher: another network over the same vocabulary; never trained.
        divergence: see there.
        levers: how the teacher runs a pack: as the student does.
    """

    def __init__(self, network: Any, teacher: Any, divergence: Divergence, levers: Levers) -> None:
        self.network, self.teacher, self.divergence, self.levers = network, teacher, divergence, levers

    def __call__(self, packed: Pack, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of one pack; its gradient goes to the student alone.

        Args:
            packed: the rows, for the teacher.
            hidden: the student's, [predictions, width].
            targets: [predictions]; the supervised tokens, in the order of the rows, or `IGNORED`.
        """
        kept = targets != IGNORED
        hidden, targets = hidden[kept], targets[kept]
        with torch.no_grad():
            wanted, theirs = pack_hidden(self.teacher, packed, self.levers)
            wanted = wanted[theirs != IGNORED]
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in zip(*(torch.split(each, _CHUNK) for each in (hidden, wanted, targets)), strict=True):
            # Logits of all tokens at once would be the largest tensor of the whole step.
            total = total + checkpoint(self._of, *part, use_reentrant=False)
        return total

    def _of(self, hidden: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        temperature = self.divergence.temperature
        logits = self.network.lm_head(hidden).float()
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        goal = torch.log_softmax(self.teacher.lm_head(wanted).float() / temperature, dim=-1)
        given = torch.log_softmax(logits / temperature, dim=-1)
        gap = functional.kl_div(given, goal, reduction="sum", log_target=True)
        return loss + self.divergence.weight * temperature**2 * gap


def load_teacher(student: Base, divergence: Divergence, *, dtype: torch.dtype, base: str) -> Any:
    """The teacher's network, frozen, ready for packs. Called before the student's weights are rounded.

    Args:
        student: the loaded student.
        divergence: names the teacher.
        dtype: what training computes with.
        base: ``[student] base``, which a finished student was trained from, too.

    Raises:
        ModelError: the teacher can't be loaded, or has another vocabulary.
    """
    if divergence.teacher == SELF:
        network = copy.deepcopy(student.model)
    elif finished := finished_student(divergence.teacher):
        trained = load_student(finished, base=base)
        _check_vocabulary(student, trained.base)
        network = plain_network(trained)
    else:
        teacher = load_base(divergence.teacher, dtype=dtype)
        _check_vocabulary(student, teacher)
        network = teacher.model
    network = to_training(network, dtype).eval().requires_grad_(False)
    use_packed_attention(network)
    return network


def _check_vocabulary(student: Base, teacher: Base) -> None:
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    sizes = [base.model.config.vocab_size for base in (student, teacher)]
    if ours != theirs or sizes[0] != sizes[1]:
        raise ModelError(
            f"[train] kl_teacher {teacher.name!r} has another vocabulary ({sizes[1]} tokens) than the student "
            f"{student.name!r} ({sizes[0]})",
            expected="the same token under every id: the teacher's distribution is over its own tokens",
            next_step='name a larger model of the student\'s family, or kl_teacher = "base"',
        )
