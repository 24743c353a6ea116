"""The loop of every strategy with a critic: criticise, revise, criticise again, until content or out of rounds.

It stops, as SelFee does, where the critic has nothing more to say; unlike there, the verdict is a field of
its own (a phrase looked for in prose stops at "no need to shorten, but a revision is needed"), and a revision
must be scored higher than what it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.strategies.context import Ask, Ctx, Said
from pipeline.strategies.parse import Unparsed
from pipeline.strategies.row import Revision, Row, Status


@dataclass(frozen=True)
class End:
    """Why a chain can't go on. ``detail`` is for the row's checks."""

    status: Status
    reason: str
    detail: str = ""


@dataclass
class Chain:
    """A row with its answers so far; the last one is the best.

    ``end`` is None where the critic was content with the last answer; status ``kept`` where the loop ended
    without that (no better revision, no more rounds).
    """

    row: Row
    revisions: list[Revision]
    said: list[Said] = field(default_factory=list)
    end: End | None = None

    @property
    def answer(self) -> str:
        """The best answer so far."""
        return self.revisions[-1].answer


Criticise = Callable[[Row, str], Ask]
ReadCritique = Callable[[Row, str, Said], Revision | End]
Revise = Callable[[Row, Revision], Ask]
ReadRevision = Callable[[Row, Said], str | End]


@dataclass(frozen=True)
class Critic:
    """What a strategy brings: the two requests, and how their replies are read."""

    criticise: Criticise
    read_critique: ReadCritique
    revise: Revise
    read_revision: ReadRevision


def critic_loop(
    rows: Sequence[Row], answers: Sequence[str], ctx: Ctx, critic: Critic, *, max_rounds: int
) -> list[Chain]:
    """Chains of the rows, in order; the requests of a round run side by side.

    Args:
        rows: what is worked on.
        answers: their first answers.
        ctx: asks.
        critic: requests and readers.
        max_rounds: most revisions of one answer.
    """
    chains = [Chain(row, [Revision(answer=answer)]) for row, answer in zip(rows, answers, strict=True)]
    active = chains
    drafts = [chain.answer for chain in chains]
    for number in range(max_rounds + 1):
        _criticise(active, drafts, ctx, critic, first=number == 0)
        active = [chain for chain in active if chain.end is None and chain.revisions[-1].verdict == "revise"]
        if number == max_rounds:
            for chain in active:
                chain.end = End("kept", "out_of_rounds", f"{max_rounds} revisions")
            break
        drafts = [draft for draft in _revise(active, ctx, critic) if draft is not None]
        active = [chain for chain in active if chain.end is None]
    return chains


def _criticise(
    active: Sequence[Chain], drafts: Sequence[str], ctx: Ctx, critic: Critic, *, first: bool
) -> None:
    asks = [critic.criticise(chain.row, draft) for chain, draft in zip(active, drafts, strict=True)]
    for chain, draft, [said] in zip(active, drafts, ctx.ask(asks), strict=True):
        chain.said.append(said)
        found = critic.read_critique(chain.row, draft, said)
        if isinstance(found, End):
            chain.end = found
            continue
        best = chain.revisions[-1]
        if first:
            chain.revisions = [found]
        elif (found.score or 0.0) > (best.score or 0.0):
            chain.revisions.append(found)
        else:
            chain.end = End("kept", "not_better", f"scored {found.score:g} after {best.score:g}")


def _revise(active: Sequence[Chain], ctx: Ctx, critic: Critic) -> Iterator[str | None]:
    asks = [critic.revise(chain.row, chain.revisions[-1]) for chain in active]
    for chain, [said] in zip(active, ctx.ask(asks), strict=True):
        chain.said.append(said)
        found = critic.read_revision(chain.row, said)
        if isinstance(found, End):
            chain.end = found
            yield None
        elif found.split() == chain.answer.split():
            chain.end = End("kept", "no_change", "the revision is the same text")
            yield None
        else:
            yield found


def unreadable(why: Unparsed) -> End:
    """The end of a chain whose reply can't be read."""
    return End("unparsed", why.reason, why.detail)
