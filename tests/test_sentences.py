"""Quote or drop: every sentence of an answer stands in the documents, or is dropped or marked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.records import Citation
from domains.words import amounts
from rag.citations import check_quotes, find_support, supports
from rag.sentences import MARK, citation_quality, kept_text, link_sentences, split_units
from serve.checking import check_reply
from serve.judges import RuleJudge
from tests.small_serving import ABSTAIN, TEXTS, passage, scripted_assistant

BRENZAL, PELIDOR = passage("Brenzal"), passage("Pelidor")
DOSE = ("The adult dose of Brenzal is 40 mg once a day.", 1)
CHILDREN = ("Children under six years must not be given Pelidor.", 2)


def cited(*quotes: tuple[str, int]) -> list[Citation]:
    citations, rejected = check_quotes(quotes, [BRENZAL, PELIDOR])
    assert not rejected
    return citations


@pytest.mark.parametrize(
    ("text", "units"),
    [
        (
            "Take 2.5 mg, e.g. at night. Dr. Lee said so.",
            ["Take 2.5 mg, e.g. at night. ", "Dr. Lee said so."],
        ),
        ("Take these:\n- one tablet\n- two drops", ["Take these:\n- one tablet\n", "- two drops"]),
        ("## Dose\n40 mg a day.\n\nNot at night.", ["## Dose\n40 mg a day.\n\n", "Not at night."]),
        ("1. First.\n2. Second.", ["1. First.\n", "2. Second."]),
        ("Yes", ["Yes"]),
        ("To be taken with:", ["To be taken with:"]),
        ("", []),
    ],
)
def test_units_are_sentences_with_their_lead_in(text: str, units: list[str]) -> None:
    assert [text[unit.start : unit.stop] for unit in split_units(text)] == units


PIECES = st.lists(
    st.sampled_from(
        ["Take 2.5 mg. ", "e.g. ", "- item\n", "\n\n", "Note:\n", "## Head\n", "Dr. ", "It works", "! ", "a"]
    ),
    max_size=12,
).map(lambda pieces: "".join(pieces).strip())


@given(PIECES, st.integers(0, 200))
def test_units_lose_nothing_and_only_the_last_changes_when_text_is_added(text: str, cut: int) -> None:
    units = split_units(text)
    assert "".join(text[unit.start : unit.stop] for unit in units) == text
    early = split_units(text[:cut].rstrip())
    assert [unit.start for unit in early] == [unit.start for unit in units][: len(early)]


@pytest.mark.parametrize(
    ("claim", "question", "carried"),
    [
        ("Adults take 40 mg of Brenzal once a day.", "", True),
        ("Adults take 90 mg of Brenzal once a day.", "", False),  # another number
        ("Adults take 40 mg of Sanivar once a day.", "", False),  # another name
        ("The adult dose of Brenzal is not 40 mg once a day.", "", False),  # negated
        ("40 mg", "What is the adult dose of Brenzal?", True),
        ("Yes", "Is the dose 40 mg?", True),  # says nothing that the question did not
        ("B", "Which dose?", True),
        ("It cures headaches.", "What is the adult dose of Brenzal?", False),
    ],
)
def test_a_quote_carries_what_it_says(claim: str, question: str, *, carried: bool) -> None:
    citations, _ = check_quotes([DOSE], [BRENZAL])
    assert supports(claim, citations, [BRENZAL], question=question) == carried


def test_nothing_is_carried_by_nothing() -> None:
    assert not supports("Yes", [], [BRENZAL])
    assert not supports("Adults take 40 mg.", [], [BRENZAL])


def test_sentences_are_linked_to_their_own_quotes_or_to_what_is_found() -> None:
    answer = "Adults take 40 mg of Brenzal once a day. Pelidor must not be given to children under six. It is blue."
    linked = link_sentences(
        answer,
        question="Doses?",
        rationale="",
        citations=cited(DOSE),
        passages=[BRENZAL, PELIDOR],
        search=True,
    )
    assert [statement.citations for statement in linked.statements] == [[0], [1], []]
    assert [(item.number, item.by) for item in linked.citations] == [(1, "model"), (2, "overlap")]
    assert linked.supported == [True, True, False]
    assert kept_text(answer, linked, mark=False) == answer.removesuffix(" It is blue.")
    assert kept_text(answer, linked, mark=True) == f"{answer} {MARK}"


def test_two_quotes_can_carry_a_sentence_together() -> None:
    claim = "A tablet against hay fever whose adult dose is 40 mg."
    citations = cited(("Brenzal is a tablet against hay fever.", 1), DOSE)
    assert not supports(claim, citations[:1], [BRENZAL])
    linked = link_sentences(
        claim, question="", rationale="", citations=citations, passages=[BRENZAL], search=False
    )
    assert linked.statements[0].citations == [0, 1]


REPLY = (
    '"The adult dose of Brenzal is 40 mg once a day." [1]\n'
    "Answer: Adults take 40 mg of Brenzal once a day. It works within 2.5 days, e.g. at sea. "
    "Children under six years must not be given Pelidor."
)


def test_unsupported_sentences_are_dropped() -> None:
    assistant, _, _ = scripted_assistant(REPLY, "Brenzal", "Pelidor", unsupported="drop")
    answer = assistant.ask("What is the dose?")
    assert answer.text == (
        "Adults take 40 mg of Brenzal once a day. Children under six years must not be given Pelidor."
    )
    assert (answer.support, answer.withheld) == ("supported", "partly")
    assert [len(statement.citations) for statement in answer.statements] == [1, 0, 1]
    assert len(answer.citations) == 2


def test_unsupported_sentences_are_marked() -> None:
    assistant, _, _ = scripted_assistant(REPLY, "Brenzal", "Pelidor", unsupported="mark")
    answer = assistant.ask("What is the dose?")
    assert f"e.g. at sea. {MARK} Children" in answer.text
    assert answer.text.count(MARK) == 1
    assert answer.withheld is None


def test_an_answer_of_which_nothing_is_left_is_the_abstention() -> None:
    reply = "Answer: It cures gout. It tastes of mint."
    dropping, _, _ = scripted_assistant(reply, "Brenzal", unsupported="drop")
    marking, _, _ = scripted_assistant(reply, "Brenzal", unsupported="mark")
    gone, marked = dropping.ask("What for?"), marking.ask("What for?")
    assert (gone.text, gone.support, gone.withheld) == (ABSTAIN, "unsupported", "unsupported")
    assert marked.text == f"It cures gout. {MARK} It tastes of mint. {MARK}"
    assert marked.support == "unsupported"


def test_a_list_keeps_the_items_that_stand_in_the_documents() -> None:
    reply = (
        "Answer: Note:\n- Children under six years must not be given Pelidor.\n"
        "- It tastes of mint.\n- Pelidor is a cough syrup."
    )
    assistant, _, _ = scripted_assistant(reply, "Pelidor", unsupported="drop")
    assert assistant.ask("What is known?").text == (
        "Note:\n- Children under six years must not be given Pelidor.\n- Pelidor is a cough syrup."
    )


def test_whole_answers_are_kept_and_their_sentences_linked_to_what_was_cited() -> None:
    assistant, _, _ = scripted_assistant(REPLY, "Brenzal", "Pelidor", unsupported="withdraw")
    answer = assistant.ask("What is the dose?")
    assert answer.text.endswith("Pelidor.")
    assert [statement.citations for statement in answer.statements] == [[0], [], []]


def test_citation_quality_counts_as_alce_does() -> None:
    sentences = ["Adults take 40 mg of Brenzal once a day.", "It tastes of mint."]
    useless = ("Pelidor is a cough syrup.", 2)
    both = [BRENZAL, PELIDOR]
    assert citation_quality(sentences, cited(DOSE), both, question="") == (1, 1)
    assert citation_quality(sentences, cited(DOSE, useless), both, question="") == (1, 1)
    assert citation_quality(sentences[1:], cited(DOSE), both, question="") == (0, 0)
    halves = cited(("Brenzal is a tablet against hay fever.", 1), DOSE)
    claim = "A tablet against hay fever whose adult dose is 40 mg."
    assert citation_quality([claim], halves, both, question="") == (1, 2)  # neither carries it alone


# -- what the question said is no evidence -----------------------------------------------------------

COLCHICINE = passage("Colchicine", "Colchicine is a first-line treatment of gout flares in adults.")
CHILDREN_NOT = passage("Brenzal", "Brenzal is a tablet. Do not give Brenzal to children under 12 years.")
PREGNANT_NOT = passage("Brenzal", "Brenzal is not safe in pregnancy.")
WARNED = passage("Brenzal", "Giving Brenzal to children is not recommended.")
UNKNOWN = passage("Brenzal", "It has not been shown that Brenzal is safe in pregnancy.")
AGED = passage("Brenzal", "Use of Brenzal in children under 12 years of age is not recommended.")
DRIED = passage("Brenzal", "Wash Brenzal in soapy water and let it air-dry without wiping.")
FIRST_LINE = "Which drug is a first-line treatment of gout flares in adults?"
OPTIONS = f"{FIRST_LINE}\nA. colchicine\nB. aspirin\nAnswer with the letter of the right option."


@pytest.mark.parametrize("mode", ["drop", "withdraw", "mark"])
@pytest.mark.parametrize(
    ("question", "answer", "carried"),
    [
        (FIRST_LINE, "colchicine", True),
        (FIRST_LINE, "aspirin", False),
        (FIRST_LINE, "bananas", False),
        (FIRST_LINE, "aspirin for gout flares in adults", False),
        (FIRST_LINE, "Colchicine is a first-line treatment of gout flares in adults.", True),
        (OPTIONS, "A", True),
        (OPTIONS, "B", False),
        (OPTIONS, "B. aspirin", False),
    ],
)
def test_a_short_answer_must_stand_in_the_passage_itself(
    question: str, answer: str, mode: Any, *, carried: bool
) -> None:
    checked = check_reply(
        f"Answer: {answer}", question=question, passages=[COLCHICINE], abstain=ABSTAIN, unsupported=mode
    )
    assert (checked.support == "supported") == carried
    assert RuleJudge().support(question, answer, [COLCHICINE]) == ("full" if carried else "none")


@pytest.mark.parametrize(
    ("question", "answer", "carried"),
    [
        ("Is the maximum dose of Brenzal 500 mg a day?", "The adult dose of Brenzal is 500 mg a day.", False),
        ("What is the adult dose of Brenzal? Some say 500 mg.", "500 mg a day.", False),
        ("What is the adult dose of Brenzal? Some say 500 mg.", "40 mg a day.", True),
        ("Is the adult dose of Brenzal 500 mg a day?", "Yes", False),
        ("Is the adult dose of Brenzal 40 mg a day?", "Yes", True),
        ("What is the adult dose of Brenzal?", "The adult dose of Brenzal is 40 g once a day.", False),
        ("What is the adult dose of Brenzal?", "The adult dose of Brenzal is 40 mg once a week.", False),
        ("What is the adult dose of Sanivar?", "The adult dose of Sanivar is 40 mg once a day.", False),
        ("What is the adult dose of Brenzal?", "The adult dose of Brenzal is 40 mg twice a day.", False),
        ("What is the adult dose of Brenzal?", "40 mg weekly", False),
        ("How should I take Brenzal?", "Take 40 mg once a day.", True),
    ],
)
def test_numbers_and_names_of_the_question_are_no_evidence(
    question: str, answer: str, *, carried: bool
) -> None:
    checked = check_reply(
        f'"{DOSE[0]}" [1]\nAnswer: {answer}',
        question=question,
        passages=[BRENZAL],
        abstain=ABSTAIN,
        unsupported="drop",
    )
    assert (checked.support == "supported") == carried


@pytest.mark.parametrize(
    ("shown", "quote", "answer", "carried"),
    [
        (
            CHILDREN_NOT,
            "give Brenzal to children under 12 years",
            "Give Brenzal to children under 12 years.",
            False,
        ),
        (
            CHILDREN_NOT,
            "give Brenzal to children under 12 years",
            "Do not give Brenzal to children under 12.",
            True,
        ),
        (PREGNANT_NOT, "safe in pregnancy", "Brenzal is safe in pregnancy.", False),
        (PREGNANT_NOT, "safe in pregnancy", "Brenzal is not safe in pregnancy.", True),
        (WARNED, "Giving Brenzal to children", "Giving Brenzal to children is fine.", False),
        (WARNED, "Giving Brenzal to children is not recommended.", "Give Brenzal to children.", False),
        (UNKNOWN, "Brenzal is safe in pregnancy", "Brenzal is safe in pregnancy.", False),
        (AGED, "Use of Brenzal in children under 12 years", "Brenzal is for children under 12 years.", False),
        (
            DRIED,
            "Wash Brenzal in soapy water and let it air-dry",
            "Wash it in soapy water and let it air-dry.",
            True,
        ),
    ],
)
def test_a_quote_cut_from_behind_its_negation_does_not_carry_the_opposite(
    shown: Any, quote: str, answer: str, *, carried: bool
) -> None:
    citations, rejected = check_quotes([(quote, 1)], [shown])
    assert not rejected
    assert supports(answer, citations, [shown], question="What of Brenzal?") == carried
    checked = check_reply(
        f'"{quote}" [1]\nAnswer: {answer}',
        question="What of Brenzal?",
        passages=[shown],
        abstain=ABSTAIN,
        unsupported="drop",
    )
    assert (checked.support == "supported") == carried


def test_numbers_of_a_title_count_where_they_are_a_name() -> None:
    about = "The early phase is called the honeymoon period."
    shown, strength = passage("Type 1 diabetes", about), passage("Brenzal 500 mg", TEXTS["Brenzal"])
    claim = "The early phase in type 1 diabetes is called the honeymoon period."
    assert supports(claim, check_quotes([(about, 1)], [shown])[0], [shown])
    citations = check_quotes([DOSE], [strength])[0]
    assert not supports("The adult dose of Brenzal is 500 mg once a day.", citations, [strength])


def test_letters_that_fold_into_a_units_are_no_unit() -> None:
    odd = "The adult dose of Brenzal is 10 m\u0131nutes and 5 \u017fec da\u0131ly."
    assert amounts(odd) == {}
    assert find_support(odd, [passage("Brenzal", odd)]) is not None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("40 mg twice a day", {"40": {"mg"}, "times": {"2"}, "per": {"day"}}),
        ("three times daily, 1,000 mg/day", {"3": {"time"}, "1000": {"mg"}, "times": {"3"}, "per": {"day"}}),
        ("an hour before breakfast, for a week", {}),
        ("200 milliseconds, 50 nmol/l, 2.50 ml", {"200": {"ms"}, "50": {"nmol"}, "2.5": {"ml"}}),
        ("v2 days, 12 items, 5 mgs", {}),
    ],
)
def test_amounts(text: str, found: dict[str, set[str]]) -> None:
    assert amounts(text) == found


def test_a_negation_in_another_clause_changes_nothing() -> None:
    shown = passage("Brenzal", "Brenzal is a tablet against hay fever that does not cause drowsiness.")
    citations, _ = check_quotes([("Brenzal is a tablet against hay fever", 1)], [shown])
    assert supports("Brenzal is a tablet against hay fever.", citations, [shown])
