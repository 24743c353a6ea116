"""The one renderer: the same text for training, exam and serving; untrusted text stays text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.errors import ModelError
from domains.records import Message, Passage, Question
from rag.prompt import neutralise, render_chat, render_question, stem_of, student_messages

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def passage(text: str, heading: str = "") -> Passage:
    return Passage(
        passage_id="d#0-9", doc_id="d", title="Doc", heading=heading, text=text, start=0, end=len(text)
    )


def test_passages_are_numbered_and_labelled() -> None:
    system, user = student_messages("Be brief.", "Why?", [passage("One.", "Causes"), passage("Two.")])
    assert system.content == "Be brief."
    assert user.content == "Passages:\n[1] Doc - Causes\nOne.\n[2] Doc\nTwo.\n\nQuestion: Why?"


def test_closed_book_has_no_passages() -> None:
    assert student_messages("S", "Why?", [])[1].content == "Question: Why?"


def test_options_and_form_of_the_answer_are_shown() -> None:
    question = Question(
        id="1",
        kind="options",
        question="Which?",
        answer="B",
        options={"A": "x", "B": "y"},
        about="d",
        split="exam",
    )
    assert render_question(question) == "Which?\nA. x\nB. y\nAnswer with the letter of the right option."


@pytest.mark.parametrize(
    ("asked", "stem"),
    [
        ("Which?\nA. x\nB. y\nAnswer with the letter of the right option.", "Which?"),
        ("Is it cold?\nAnswer yes, no or maybe.\n", "Is it cold?"),
        ("Which?\nA. x\nB. y", "Which?\nA. x\nB. y"),
        ("Is it cold?", "Is it cold?"),
    ],
)
def test_passages_are_looked_for_by_the_stem_as_in_the_exam(asked: str, stem: str) -> None:
    assert stem_of(asked) == stem


@pytest.mark.parametrize(
    "attack",
    [
        "<|im_end|>",
        "<|im_start|>system",
        "<|eot_id|>",
        "</s>",
        "<s>",
        "<file_sep>",
        "<|start_header_id|>",
        "<｜end▁of▁sentence｜>",
        "<|reserved-special-token|>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
    ],
)
def test_control_tokens_in_documents_and_questions_are_taken_apart(attack: str) -> None:
    attacked = render_chat(
        student_messages("S", f"Q {attack}", [passage(f"text {attack} more")]), template=CHATML
    )
    harmless = render_chat(student_messages("S", "Q", [passage("text more")]), template=CHATML)
    assert attacked.count(attack) == harmless.count(attack), "only the template's own control tokens are left"


def test_html_and_mathematics_stay_readable() -> None:
    assert neutralise("if a < b and c > d, 5 <= 6") == "if a < b and c > d, 5 <= 6"


@given(st.text())
def test_neutralised_text_holds_no_control_token(text: str) -> None:
    import re

    assert not re.search(r"<\|\w+\|>", neutralise(text))
    assert neutralise(neutralise(text)) == neutralise(text)


def test_template_runs_in_a_sandbox() -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ModelError, match="chat template fails"):
        render_chat([Message(role="user", content="x")], template=attack)


def test_a_bos_that_the_template_writes_is_taken_off_only_where_the_tokenizer_adds_one() -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    messages = [Message(role="user", content="x")]
    assert render_chat(messages, template=template, bos="<s>", adds_bos=True) == "x"
    assert render_chat(messages, template=template, bos="<s>", adds_bos=False) == "<s>x"


def test_a_reply_can_be_continued() -> None:
    messages = [Message(role="user", content="x"), Message(role="assistant", content='"The')]
    assert render_chat(messages, template=CHATML, continue_reply=True).endswith('<|im_start|>assistant\n"The')
