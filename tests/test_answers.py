"""The form of a completion: written and read back; letters, yes/no and abstentions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.answers import format_reply, is_abstention, parse_option, parse_reply, parse_yes_no, without_letter

ABSTAIN = "I don't know: the documents do not say."
plain = (
    st.text(
        st.characters(codec="ascii", exclude_characters='"\n[]*:', categories=("L", "N", "Zs")), min_size=9
    )
    .map(lambda text: " ".join(text.split()))
    .filter(lambda text: len(text) >= 8 and "answer" not in text.lower())
)


@given(quote=plain, number=st.integers(1, 9), rationale=st.just("") | plain, answer=plain)
def test_a_reply_is_read_back_as_it_was_written(quote: str, number: int, rationale: str, answer: str) -> None:
    reply = parse_reply(format_reply(quotes=[(quote, number)], rationale=rationale, answer=answer))
    assert reply.quotes == ((quote, number),)
    assert reply.rationale == rationale
    assert reply.answer == answer
    assert reply.has_answer_line


def test_text_without_an_answer_line_is_the_answer() -> None:
    reply = parse_reply("  Metformin lowers glucose. ")
    assert reply.answer == "Metformin lowers glucose."
    assert not reply.has_answer_line


def test_the_last_answer_line_counts() -> None:
    assert parse_reply("Answer: no\nbut then\n**Answer:** yes").answer == "yes"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b.", "B"), ("(C) warfarin", "C"), ("Option D", "D"), ("The correct answer is A", "A"),
        ("The answer is: B", "B"), ("A patient with gout", None), ("I think so", None), ("", None), ("E", None),
        ("it is warfarin", "C"), ("metformin or warfarin", None), ("B) warfarin", "B"),
    ],
)  # fmt: skip
def test_option_letters(answer: str, letter: str | None) -> None:
    options = {"A": "aspirin", "B": "metformin", "C": "warfarin", "D": "insulin"}
    assert parse_option(answer, options) == letter


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        ({"A": "Male", "B": "Female"}, "Female", "B"),
        ({"A": "Male", "B": "Female"}, "It is female.", "B"),
        ({"A": "Male", "B": "Female"}, "male or female", None),
        ({"A": "Iron", "B": "Zinc"}, "The environment", None),
        ({"A": "Iron", "B": "Iron deficiency"}, "It is iron deficiency.", "B"),
        ({"A": "Deficiency", "B": "Iron  deficiency."}, "It is Iron\ndeficiency", "B"),
        ({"A": "Iron", "B": "Iron deficiency"}, "Iron, from which comes iron deficiency", None),
        ({"A": "Iron", "B": "Iron deficiency"}, "It is iron.", "A"),
        ({"A": "5 mg", "B": "10 mg"}, "It is 2.5 mg", None),
        ({"A": "5 mg", "B": "2.5 mg"}, "It is 2.5 mg", "B"),
        ({"A": "in 5", "B": "in 6"}, "It is one in 5.5", None),
        ({"A": "Same", "B": "same"}, "The same", None),
        ({"A": "C. difficile", "B": "Norovirus", "C": "Rotavirus"}, "C. difficile", "A"),
        ({"A": "C. difficile", "B": "Norovirus", "C": "Rotavirus"}, "A. C. difficile", "A"),
        ({"A": "C. difficile", "B": "Norovirus", "C": "Rotavirus"}, "The answer is C. difficile.", "A"),
        ({"A": "C. difficile", "B": "Norovirus", "C": "Rotavirus"}, "C. Rotavirus", "C"),
        ({"A": "C. difficile", "B": "Norovirus", "C": "Rotavirus"}, "C.", "C"),
        ({"A": "E. coli", "B": "H. pylori"}, "H. pylori", "B"),
        ({"A": "B. pertussis", "B": "pertussis"}, "B. pertussis", "B"),
        ({"A": "O", "B": "A", "C": "B", "D": "AB"}, "B. A", "B"),
        ({"A": "O", "B": "A", "C": "B", "D": "AB"}, "B, A", "B"),
        ({"A": "E. coli", "B": "H. pylori"}, "A, E. coli", "A"),
        ({"A": "E. coli", "B": "H. pylori"}, "The answer is B, H. pylori.", "B"),
        ({"A": "one", "B": "two", "C": "three", "D": "A and B"}, "D, A and B", "D"),
        ({"A": " .", "B": "C++ (a language)"}, "It is c++ (a language).", "B"),
        ({"A": "."}, "Nothing.", None),
    ],
)  # fmt: skip
def test_an_options_text_is_repeated_in_whole_words(
    options: dict[str, str], answer: str, letter: str | None
) -> None:
    assert parse_option(answer, options) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is a blood test.", "B"), ("the correct answer is a biopsy", "C"), ("a biopsy", "C"),
        ("The answer is A blood test", "B"), ("The answer is D: a sentence follows", "D"), ("The best answer is D", "D"),
        ("the answer is b.", "B"), ("option c", "C"), ("Option C says so", "C"), ("The answer is B-cells", None),
        ("A, B, C, D", None), ("A, B", None), ("A or B", None), ("(A) and (B)", None), ("The answer is A or B.", None),
        ("a/b", None), ("A: An X-ray", "A"), ("**C**", "C"), ("The answer is **C**.", "C"), ("**Option B**", "B"), ("Option: d", "D"),
        ("the answer is b because it shows it", "B"), ("option c is right", "C"), ("B, e.g. after NSAIDs", "B"),
        ("A, b.i.d. dosing", "A"), ("The answer is A; B. cereus is wrong", "A"), ("A and B. Both hold", None),
        ("The answer is A or B. Both hold", None), ("A, H. pylori", "A"),
        ("The answer is B and C is wrong", "B"), ("the answer is b and a blood test confirms it", "B"), ("a, B", None),
        ("A, b", None), ("the answer is C, d", None), ("B, B", "B"), ("C, d/t shellfish", "C"), ("A, a blood test is wrong", "A"), ("A. B is wrong", "A"),
    ],
)  # fmt: skip
def test_an_article_is_no_letter_and_an_enumeration_no_choice(answer: str, letter: str | None) -> None:
    options = {"A": "An X-ray", "B": "A blood test", "C": "A biopsy", "D": "No test"}
    assert parse_option(answer, options) == letter


def test_a_letter_is_taken_off_and_a_text_is_not() -> None:
    options = {"A": "C. difficile", "B": "A blood test"}
    assert without_letter("**B.** A blood test", options) == "A blood test"
    assert without_letter("A, C. difficile", options) == "C. difficile"
    assert without_letter("C. difficile", options) == "C. difficile"


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes.", "yes"), ("no, never", "no"), ("Maybe", "maybe"), ("Not really", None), ("", None)],
)
def test_yes_no(answer: str, said: str | None) -> None:
    assert parse_yes_no(answer) == said


@pytest.mark.parametrize(
    "answer",
    [ABSTAIN, "I don't know", "I cannot answer that.", "The passages do not mention a price.",
     "This is not stated in the documents.", "The text does not specify the dose."],
)  # fmt: skip
def test_abstentions(answer: str) -> None:
    assert is_abstention(answer, abstain=ABSTAIN)


@pytest.mark.parametrize("answer", ["Metformin", "", "It is not given to people with kidney failure.", "No."])
def test_answers_are_no_abstentions(answer: str) -> None:
    assert not is_abstention(answer, abstain=ABSTAIN)
