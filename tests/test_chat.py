from __future__ import annotations

import io
from pathlib import Path

import pytest

from domains.records import Message
from serve.chat import chat_lines, chat_session, explain
from serve.turns import retrieval_query, source_lines, sources_text, without_sources
from tests.small_serving import ABSTAIN, scripted_assistant

DOSE = '"The adult dose of Brenzal is 40 mg once a day." [1]\nAnswer: 40 mg once a day.'


def test_an_answer_is_followed_by_its_literal_sources() -> None:
    assistant, _, _ = scripted_assistant(DOSE, "Brenzal", "Corvane")
    text = "".join(chat_lines(assistant, ["What is the dose of Brenzal?\n", "/quit\n", "never asked"]))
    assert text == (
        '40 mg once a day.\nSources\n  [1] Brenzal: "The adult dose of Brenzal is 40 mg once a day."\n'
    )


def test_what_was_withdrawn_or_unknown_is_said() -> None:
    invented = "Answer: It cures headaches at once."
    gone, _, _ = scripted_assistant(invented, "Brenzal")
    kept, _, _ = scripted_assistant(invented, "Brenzal", unsupported="keep")
    unknown, _, _ = scripted_assistant(f"Answer: {ABSTAIN}", "Brenzal")
    withdrawn = "".join(chat_lines(gone, ["What for?"]))
    assert "headaches" not in withdrawn
    assert "not shown" in withdrawn
    assert "".join(chat_lines(kept, ["What for?"])) == (
        "It cures headaches at once.\nNo passage supports this answer.\n"
    )
    assert "".join(chat_lines(unknown, ["What for?"])) == f"{ABSTAIN}\nNo sources.\n"


def test_a_follow_up_takes_the_conversation_along_and_looks_for_both_questions() -> None:
    assistant, engine, retriever = scripted_assistant(DOSE, "Brenzal")
    list(chat_lines(assistant, ["What is the adult dose of Brenzal?", "And at night?"]))
    assert retriever.queries[1] == "What is the adult dose of Brenzal?\nAnd at night?"
    assert "<user>What is the adult dose of Brenzal?\n<assistant>40 mg once a day.\n" in engine.prompts[1]
    assert engine.prompts[1].endswith("Question: And at night?\n")


@pytest.mark.parametrize(
    ("question", "leans"),
    [
        ("And at night?", True),
        ("What about children?", True),
        ("Is it safe?", True),
        ("How long?", True),
        ("Which drops are kept in the refrigerator?", False),
        ("What is the adult dose of Moltrex tablets?", False),
    ],
)
def test_only_a_question_that_leans_on_the_last_one_is_looked_up_with_it(question: str, leans: bool) -> None:
    history = [Message(role="user", content="Brenzal dose?"), Message(role="assistant", content="40 mg.")]
    expected = f"Brenzal dose?\n{question}" if leans else question
    assert retrieval_query(question, history) == expected
    assert retrieval_query(question, []) == question
    closed = f"{question}\nAnswer yes, no or maybe."
    assert retrieval_query(closed, history) == expected


def test_old_turns_are_dropped_with_a_word_and_a_question_is_never_cut() -> None:
    assistant, engine, _ = scripted_assistant(DOSE, "Brenzal", context=800, max_tokens=200)
    questions = [f"What is the dose of Brenzal on day {number}? {'Please. ' * 8}" for number in range(5)]
    shown = "".join(chat_lines(assistant, questions))
    assert "oldest turns no longer fit" in shown
    assert shown.count("Sources") == 5
    assert "on day 0" not in engine.prompts[-1]
    assert "on day 3" in engine.prompts[-1]
    refused = "".join(chat_lines(assistant, ["Why? " * 300, "What is the dose?"]))
    assert "at most 800" in refused
    assert "Why? Why?" not in engine.prompts[-1]
    assert refused.count("Sources") == 1


def test_commands_before_and_after_a_question() -> None:
    assistant, engine, _ = scripted_assistant(DOSE, "Brenzal", "Corvane")
    shown = list(chat_lines(assistant, ["/why", "/help", "/nonsense", "", "  "]))
    assert shown[0] == "Nothing has been asked yet.\n"
    assert "/sources" in shown[1]
    assert "'/nonsense'" in shown[2]
    assert len(shown) == 3
    assert engine.prompts == []
    full = list(chat_lines(assistant, ["Dose of Brenzal tablets?", "/sources"]))[-1]
    assert "[2] Corvane\n    Corvane treats dry eyes." in full


def test_why_names_ranks_quotes_and_tokens() -> None:
    reply = '"Brenzal cures headaches." [2]\n' + DOSE
    assistant, _, _ = scripted_assistant(reply, "Brenzal", "Corvane")
    asked = assistant.prepare("What is the dose?", query="dose of Brenzal")
    lines = explain(asked, assistant.ask_many([asked])[0], context=2048)
    text = "\n".join(lines)
    assert "Looked for: 'dose of Brenzal'" in text
    assert "[1] Brenzal: fused score 0.0164, dense rank 1, lexical rank 2, quoted" in text
    assert "[2] Corvane: fused score 0.0161, dense rank 2, lexical rank 1" in text
    assert "stand in a passage: 1; that stand nowhere: 1" in text
    assert '"Brenzal cures headaches."' in text
    assert "Verdict: supported" in text
    assert f"Tokens: {len(asked.tokens)} in the prompt" in text
    assert "2048 in the context" in text


def test_why_shows_what_was_withdrawn_and_what_was_found_by_overlap() -> None:
    gone, _, _ = scripted_assistant("Answer: It cures headaches at once.", "Brenzal")
    asked = gone.prepare("What for?")
    assert "The model wrote: 'Answer: It cures headaches at once.'" in explain(
        asked, gone.ask_many([asked])[0], context=2048
    )
    found, _, _ = scripted_assistant("Answer: Brenzal is a tablet against hay fever.", "Brenzal")
    asked = found.prepare("What is it?")
    text = "\n".join(explain(asked, found.ask_many([asked])[0], context=2048))
    assert 'word overlap: [1] "Brenzal is a tablet against hay fever."' in text
    assert "supports the answer" in text


def test_sources_can_be_taken_off_an_earlier_answer() -> None:
    assistant, _, _ = scripted_assistant(DOSE, "Brenzal")
    answer = assistant.ask("What is the dose?")
    assert sources_text(answer).endswith(source_lines(answer)[0])
    assert without_sources(answer.text + sources_text(answer)) == answer.text
    assert without_sources("No sources: none.") == "No sources: none."


@pytest.mark.parametrize("ending", ["/quit\n", ""])
def test_a_session_with_the_real_model_lasts_until_quit_or_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    from rich.console import Console

    from serve.bundle import open_base
    from tests.small_serving import write_domain, write_index

    write_index(tmp_path / "index")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"What is the adult dose of Brenzal?\n/why\n{ending}"))
    console = Console(file=io.StringIO(), width=60)
    with open_base(write_domain(tmp_path / "domain"), tmp_path / "index", parallel=1) as opened:
        chat_session(opened, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.startswith("A small shelf\n")
    assert shown.count("dense rank") == 2
    assert "[1] Brenzal" in shown  # not taken for markup
    assert "1024 in the context" in shown


def test_how_many_sentences_were_dropped_is_said_and_why_shows_which() -> None:
    reply = "Answer: The adult dose of Brenzal is 40 mg once a day. It cures gout. It tastes of mint."
    assistant, _, _ = scripted_assistant(reply, "Brenzal", unsupported="drop")
    said = "".join(chat_lines(assistant, ["What is the dose?", "/why"]))
    before, _, why = said.partition("Sentence by sentence:")
    assert "gout" not in before
    assert "2 sentences that no passage supports are not shown." in before
    assert "[1]: The adult dose" in why
    assert "no passage: It cures gout." in why
