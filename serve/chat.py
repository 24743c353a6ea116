"""A conversation in a terminal, as text in and text out; and why an answer came out as it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console

from domains.errors import ContextOverflow
from domains.records import Answer, Hit, Message
from serve.assistant import Asked, Assistant
from serve.bundle import OpenBundle
from serve.reflection_lines import reflection_lines
from serve.turns import retrieval_query, source_lines

HELP = """\
Ask a question; a follow-up may lean on the one before.
/why      how the passages of the last answer were ranked, and which quotes were checked
/sources  the passages of the last answer in full
/help     this text
/quit     leave
"""


def chat_session(bundle: OpenBundle, console: Console) -> None:
    """Talk with the person at the console until ``/quit``, Ctrl-D or Ctrl-C."""
    about = bundle.config.domain
    for line in (about.title, about.disclaimer, *bundle.notes, "/help lists the commands, /quit leaves."):
        if line:
            console.print(line, markup=False, highlight=False)
    for text in chat_lines(bundle.assistant, _typed(console)):
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def _typed(console: Console) -> Iterator[str]:
    while True:
        try:
            yield console.input("\n> ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


def chat_lines(assistant: Assistant, lines: Iterable[str]) -> Iterator[str]:
    """Answer line after line until ``/quit`` or the end; yields text to be written as it is.

    The conversation so far goes along with each question. What no longer fits into the context is left
    out, oldest first, and said so; a question that does not fit alone is refused with its numbers.
    """
    talk = _Talk(assistant)
    for line in lines:
        said = line.strip()
        if said == "/quit":
            return
        if said.startswith("/"):
            yield talk.command(said)
        elif said:
            yield from talk.ask(said)


class _Talk:
    """What has been said so far, and the last answer."""

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant
        self._history: list[Message] = []
        self._last: tuple[Asked, Answer] | None = None

    def ask(self, question: str) -> Iterator[str]:
        query = retrieval_query(question, self._history)
        try:
            asked = self._assistant.prepare(question, query=query, history=self._history, drop_old_turns=True)
        except ContextOverflow as error:
            yield f"{error}\n"
            return
        if asked.dropped_turns:
            del self._history[: asked.dropped_turns]
            yield f"(The {asked.dropped_turns} oldest turns no longer fit into the context and are left out.)\n"
        for piece in self._assistant.stream(asked):
            if isinstance(piece, Answer):
                self._last = asked, piece
                self._history.append(Message(role="user", content=question))
                self._history.append(Message(role="assistant", content=piece.text))
                yield "\n" + verdict_text(piece)
            elif piece:
                yield piece

    def command(self, said: str) -> str:
        if said == "/help":
            return HELP
        if said not in {"/why", "/sources"}:
            return f"No command {said!r}.\n{HELP}"
        if self._last is None:
            return "Nothing has been asked yet.\n"
        asked, answer = self._last
        context = self._assistant.engine.context
        lines = explain(asked, answer, context=context) if said == "/why" else _passage_lines(answer)
        return "".join(f"{line}\n" for line in lines)


def verdict_text(answer: Answer) -> str:
    """What stands below an answer: its sources, or that there are none. Whole lines."""
    if answer.withheld == "unsure":
        return "Not sure enough of what the model wrote, so it is not shown.\n"
    if answer.support == "supported":
        lines = ["Sources", *(f"  {line}" for line in source_lines(answer)), *_left_out(answer)]
        return "".join(f"{line}\n" for line in lines)
    if answer.support == "abstained" or not answer.passages:
        return "No sources.\n"
    if answer.withheld == "unsupported":
        return "No passage supports what the model wrote, so it is not shown.\n"
    return "No passage supports this answer.\n"


def _left_out(answer: Answer) -> list[str]:
    if answer.withheld != "partly":
        return []
    count = sum(not statement.citations for statement in answer.statements)
    return [
        f"{count} sentence{'s' * (count > 1)} that no passage supports {'are' if count > 1 else 'is'} not shown."
    ]


def explain(asked: Asked, answer: Answer, *, context: int) -> list[str]:
    """Why an answer came out as it did: passages and their ranks, quotes and their check, tokens.

    Args:
        asked: the question as it was put to the model.
        answer: what came of it.
        context: tokens that prompt and reply must fit into.
    """
    lines = [f"Looked for: {' '.join(asked.query.split())!r}"]
    lines += [f"Passages shown to the model: {len(answer.passages)}"]
    lines += [_hit_line(number, hit, answer) for number, hit in enumerate(answer.passages, 1)]
    if answer.reflection is not None:
        lines += reflection_lines(answer.reflection)
    by_model = [citation for citation in answer.citations if citation.by == "model"]
    lines.append(
        f"Quotes that stand in a passage: {len(by_model)}; that stand nowhere: {len(answer.rejected_quotes)}"
    )
    lines += [f'  not in any passage: "{quote}"' for quote in answer.rejected_quotes]
    lines += [
        f'  found afterwards by word overlap: [{citation.number}] "{" ".join(citation.quote.split())}"'
        for citation in answer.citations
        if citation.by == "overlap"
    ]
    lines += _statement_lines(answer)
    if answer.confidence is not None:
        unsure = ", too unsure to be shown" if answer.withheld == "unsure" else ""
        lines.append(f"Confidence that it is right and supported: {100 * answer.confidence:.0f} %{unsure}")
    lines.append(f"Verdict: {answer.support}")
    if answer.text not in answer.raw:
        lines.append(f"The model wrote: {answer.raw.strip()!r}")
    if asked.dropped_turns:
        lines.append(f"Oldest turns left out: {asked.dropped_turns}")
    lines.append(
        f"Tokens: {len(asked.tokens)} in the prompt, {answer.completion_tokens} written (at most "
        f"{asked.max_tokens}), {context} in the context; nothing was cut"
    )
    return lines


def _statement_lines(answer: Answer) -> list[str]:
    """Which sentence rests on which source, where there is more than one sentence."""
    if len(answer.statements) < 2 or not answer.citations:
        return []
    lines = ["Sentence by sentence:"]
    for statement in answer.statements:
        numbers = sorted({answer.citations[i].number for i in statement.citations})
        rests = ", ".join(f"[{number}]" for number in numbers) or "no passage"
        lines.append(f"  {rests}: {' '.join(statement.text.split())}")
    return lines


def _hit_line(number: int, hit: Hit, answer: Answer) -> str:
    ranks = ", ".join(f"{name} rank {rank}" for name, rank in sorted(hit.ranks.items()))
    used = {citation.by for citation in answer.citations if citation.number == number}
    note = ", quoted" if "model" in used else ", supports the answer" if used else ""
    return f"  [{number}] {_label(hit)}: fused score {hit.score:.4f}, {ranks or 'no ranks'}{note}"


def _passage_lines(answer: Answer) -> list[str]:
    lines = []
    for number, hit in enumerate(answer.passages, 1):
        lines += [
            f"[{number}] {_label(hit)}",
            *(f"    {line}" for line in hit.passage.text.strip().splitlines()),
        ]
    return lines or ["The last question found no passages."]


def _label(hit: Hit) -> str:
    passage = hit.passage
    return f"{passage.title} - {passage.heading}" if passage.heading else passage.title
