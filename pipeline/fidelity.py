"""How much of a network is left in a GGUF file: teacher-forced KL and perplexity, both measured through llama.cpp.

The full-precision network is run once (`Reference`); every candidate then sees the same texts. Texts are drawn
together in the intervals: positions of one text are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.bootstrap import Difference, Interval, paired_difference, ratio_interval
from pipeline.parity import Network, torch_network
from serve.engine import Engine

_RESAMPLES = 2000
_SEED = 0
_ROWS = 256  # positions whose log-probabilities are held at a time

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Text:
    """Token ids; what is predicted from position ``first`` on counts."""

    tokens: tuple[int, ...]
    first: int = 0


@dataclass(frozen=True)
class Fidelity:
    """Per text: summed KL(reference || file), summed negative log-likelihood, same top tokens, positions."""

    kl_sums: tuple[float, ...]
    nll_sums: tuple[float, ...]
    same_top: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def kl(self) -> Interval:
        """Nats per position, with its 95 % interval over texts."""
        found = ratio_interval(self.kl_sums, self.positions, resamples=_RESAMPLES, seed=_SEED)
        assert found is not None
        return found

    @property
    def perplexity(self) -> float:
        """Of the texts, under the file."""
        return self.perplexity_interval.mean

    @property
    def perplexity_interval(self) -> Interval:
        """The perplexity with its 95 % interval over texts: e to the limits of the mean negative log-likelihood."""
        found = ratio_interval(self.nll_sums, self.positions, resamples=_RESAMPLES, seed=_SEED)
        assert found is not None
        return Interval(*(float(np.exp(nats)) for nats in (found.mean, found.low, found.high)))

    @property
    def top1_agreement(self) -> float:
        """The share of positions at which the file's most likely token is the reference's."""
        return sum(self.same_top) / sum(self.positions)

    def part(self, texts: slice) -> Fidelity:
        """The same of some of the texts."""
        return Fidelity(
            self.kl_sums[texts], self.nll_sums[texts], self.same_top[texts], self.positions[texts]
        )

    def minus(self, other: Fidelity) -> Difference:
        """The KL of this file minus that of another on the same texts, paired."""
        found = paired_difference(
            (self.kl_sums, self.positions),
            (other.kl_sums, other.positions),
            resamples=_RESAMPLES,
            seed=_SEED,
        )
        assert found is not None
        return found


class Reference:
    """A network's logits over held-out texts, kept in memory: 4 bytes × positions × vocabulary.

    Args:
        texts: at least one, each with a position that counts.
        logits: per text [positions, vocabulary].
    """

    def __init__(self, texts: Sequence[Text], logits: Sequence[Logits]) -> None:
        self.texts, self.logits = list(texts), list(logits)
        self.context = max(len(text.tokens) for text in texts) + 1

    @classmethod
    def of_file(cls, gguf: Path, texts: Sequence[Text]) -> Reference:
        """Of a GGUF file, through llama.cpp."""
        context = max(len(text.tokens) for text in texts) + 1
        with Engine(gguf, context=context, parallel=1) as engine:
            return cls(texts, [_logits(engine.logits, text) for text in texts])

    @classmethod
    def of_network(cls, model: object, texts: Sequence[Text]) -> Reference:
        """Of a torch network, as it computes in training."""
        network = torch_network(model)
        return cls(texts, [_logits(network, text) for text in texts])

    def measure(
        self, gguf: Path, *, adapter: Path | None = None, on_done: Callable[[], None] | None = None
    ) -> Fidelity:
        """Run the same texts through another file."""
        rows = []
        with Engine(gguf, context=self.context, parallel=1, adapter=adapter) as engine:
            for text, before in zip(self.texts, self.logits, strict=True):
                rows.append(compare(before, _logits(engine.logits, text), text.tokens[text.first + 1 :]))
                if on_done:
                    on_done()
        return _fidelity(rows)

    def itself(self) -> Fidelity:
        """The network held against itself: its perplexity, without running it again."""
        return _fidelity(
            [
                compare(logits, logits, text.tokens[text.first + 1 :])
                for text, logits in zip(self.texts, self.logits, strict=True)
            ]
        )


def _fidelity(rows: Sequence[tuple[float, float, int, int]]) -> Fidelity:
    kl, nll, same, positions = zip(*rows, strict=True)
    return Fidelity(kl, nll, same, positions)


def compare(before: Logits, after: Logits, targets: Sequence[int]) -> tuple[float, float, int, int]:
    """Summed KL(before || after), summed NLL of ``targets`` under ``after``, same top tokens, positions.

    Args:
        before: [positions, vocabulary].
        after: the same of the other network.
        targets: [positions], the tokens that follow.
    """
    import torch

    kl = nll = 0.0
    for begin in range(0, len(targets), _ROWS):
        rows = slice(begin, begin + _ROWS)
        log_p, log_q = (torch.log_softmax(torch.from_numpy(each[rows]), dim=1) for each in (before, after))
        kl += float((log_p.exp() * (log_p - log_q)).sum(dim=1, dtype=torch.float64).sum())
        picked = torch.tensor(list(targets[rows]))[:, None]
        nll -= float(log_q.gather(1, picked).double().sum())
    same = int((before.argmax(axis=1) == after.argmax(axis=1)).sum())
    return kl, nll, same, len(targets)


def _logits(network: Network, text: Text) -> Logits:
    return network(list(text.tokens[:-1]), first=text.first)
