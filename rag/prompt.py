"""The one renderer of student prompts: training, exam and serving all call it.

Text from documents and users is untrusted: strings that a tokenizer would read as control tokens
(``<|im_end|>``, ``<|eot_id|>`` …, Self-RAG's tokens) are broken up before they enter a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from domains.errors import ModelError
from domains.records import Message, Passage, Question, QuestionKind
from rag.untrusted import neutralise as neutralise

_OPTION = re.compile(r"^([A-H])\. (.+)$", re.MULTILINE)
_INSTRUCTION: dict[QuestionKind, str] = {
    "open": "",
    "yes_no": "Answer yes, no or maybe.",
    "options": "Answer with the letter of the right option.",
    "unanswerable": "",
}


def render_question(question: Question) -> str:
    """The question as a user would put it: the stem, its options if any, and the form of the answer."""
    lines = [question.question]
    lines += [f"{key}. {text}" for key, text in (question.options or {}).items()]
    if instruction := _INSTRUCTION[question.kind]:
        lines.append(instruction)
    return "\n".join(lines)


def closed_form(question: str) -> dict[str, str] | Literal["yes_no"] | None:
    """The closed form that a question's own text asks for: its options, yes or no, or None (open).

    The inverse of `render_question`, so that a person who types an options question is served as the exam is.
    """
    last = question.rstrip().rpartition("\n")[2].strip()
    if last == _INSTRUCTION["yes_no"]:
        return "yes_no"
    options = {match[1]: match[2].strip() for match in _OPTION.finditer(question)}
    return options if len(options) >= 2 and last == _INSTRUCTION["options"] else None


def stem_of(question: str) -> str:
    """What passages are looked for: a closed question's text without its options and the form of its answer.

    An open question is its own stem.
    """
    form = closed_form(question)
    if form is None:
        return question
    if form == "yes_no":
        return question.rstrip().rpartition("\n")[0].strip()
    letter, text = next(iter(form.items()))
    return question.partition(f"\n{letter}. {text}")[0].strip()


def student_messages(system: str, question: str, passages: Sequence[Passage]) -> list[Message]:
    """The chat that the student sees. Passages are numbered from [1] in the order given.

    Args:
        system: the domain's system prompt (trusted).
        question: the user's words, see `render_question` (untrusted).
        passages: the evidence (untrusted); none for a closed-book question.
    """
    parts = []
    if passages:
        parts.append("Passages:")
        parts += [
            f"[{number}] {_label(passage)}\n{passage.text.strip()}"
            for number, passage in enumerate(passages, 1)
        ]
        parts.append("")
    parts.append(f"Question: {question}")
    return [
        Message(role="system", content=system),
        Message(role="user", content=neutralise("\n".join(parts))),
    ]


def _label(passage: Passage) -> str:
    return f"{passage.title} - {passage.heading}" if passage.heading else passage.title


@lru_cache(maxsize=8)
def _compiled(template: str):  # type: ignore[no-untyped-def]  # jinja2's Template
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda _format: ""  # the clock never enters a prompt
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def render_chat(
    messages: Sequence[Message],
    *,
    template: str,
    bos: str = "",
    eos: str = "",
    adds_bos: bool = False,
    continue_reply: bool = False,
) -> str:
    """The prompt as one string, by the model's own chat template, ending where the reply begins.

    The template comes from a model file, so it runs in jinja2's immutable sandbox.

    Args:
        messages: the chat so far.
        template: jinja2 source, as in GGUF's ``tokenizer.chat_template``.
        bos: text of the begin-of-sequence token, empty where there is none.
        eos: text of the end-of-sequence token.
        adds_bos: the tokenizer puts a BOS in front; one that the template writes is taken off, so that
            the model sees exactly one.
        continue_reply: the last message is the beginning of the assistant's reply, left open.

    Raises:
        ModelError: the template is broken or refuses these messages.
    """
    chat = [message.model_dump() for message in messages]
    opening = chat.pop()["content"] if continue_reply else ""
    try:
        text: str = _compiled(template).render(
            messages=chat,
            add_generation_prompt=True,
            bos_token=bos,
            eos_token=eos,
            tools=None,
            date_string="",
        )
    except TemplateError as error:
        raise ModelError(
            f"the model's chat template fails: {error}",
            expected="a jinja2 template that takes messages and add_generation_prompt",
            next_step="use a model with a working tokenizer.chat_template",
        ) from None
    return (text.removeprefix(bos) if adds_bos and bos else text) + opening
