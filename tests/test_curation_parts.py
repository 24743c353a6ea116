from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.checks import Verdict, load_checks
from domains.errors import ConfigError
from domains.medical.checks import dose_in_passages, doses
from domains.product_requirements.checks import no_placeholders, numbers_in_passages
from domains.records import Passage, Question, Quote, Rationale
from domains.words import find_literal, numbers, squash
from pipeline.decontaminate import ExamGuard
from pipeline.near_duplicates import grams, jaccard, near_duplicates
from pipeline.rows import gold_quotes, speakable, target
from pipeline.verify import check_form, predicted, prose, quotes_stand, verify
from pipeline.wording import content_words, recall, sentences
from rag.answers import parse_reply


def passage(text: str, doc_id: str = "d1", start: int = 0) -> Passage:
    return Passage(
        passage_id=f"{doc_id}#{start}",
        doc_id=doc_id,
        title="T",
        heading="H",
        text=text,
        start=start,
        end=start + len(text),
    )


def question(
    kind: str = "open", text: str = "How long?", answer: str | None = "Two weeks.", **more
) -> Question:
    fields = {"id": "q", "about": "d1", "split": "seed", **more}
    return Question(kind=kind, question=text, answer=answer, **fields)


def rationale(text: str, answer: str = "", sample: int = 0) -> Rationale:
    return Rationale(
        question_id="q", sample=sample, text=text, answer=answer, passages=["d1#0"], teacher="t", request="r"
    )


# -- words ---------------------------------------------------------------------------------------------


def test_numbers_have_one_spelling():
    assert numbers("1,000 mg, 3.50 and 007") == {"1000", "3.5", "7"}
    assert numbers("two of them, v2, B12, one day") == {"2"}
    assert numbers("5-10 mg") == {"5", "10"}


def test_sentences_are_literal_and_leave_marks_out():
    text = "# T\n\nFirst one, e.g. this. Second\nline goes on.\n\n- [x] Item here.\n| a | b |\n## Head\nLast."
    found = [*sentences(text)]
    assert [sentence.text for sentence in found] == [
        "First one, e.g. this.",
        "Second\nline goes on.",
        "Item here.",
        "Last.",
    ]
    assert all(text[sentence.start : sentence.end] == sentence.text for sentence in found)


@given(st.text(), st.text(), st.text())
def test_find_literal_gives_a_piece_of_the_text(before, quote, after):
    found = find_literal(quote, before + quote.replace(" ", "\n") + after)
    assert (found is None) == (not quote.split())
    if found is not None:
        assert found in before + quote.replace(" ", "\n") + after
        assert squash(found) == squash(quote)


def test_recall_counts_stems_and_number_words():
    assert recall("It takes two weeks.", "after 2 weeks, taking") == 1.0
    assert recall("the of and", "anything") == 1.0
    assert recall("cats dogs", "a dog") == 0.5
    assert "the" not in content_words("the cat")


# -- near-duplicates -----------------------------------------------------------------------------------

TEXTS = st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=9).map(" ".join), max_size=12)


@given(TEXTS, st.sampled_from([0.3, 0.5, 0.85, 1.0]))
def test_near_duplicates_equal_the_plain_definition(texts, threshold):
    """Prefix filtering must lose nothing: compare with all pairs."""
    sets = [grams(text) for text in texts]
    kept: list[int] = []
    expected = set()
    for index, item in enumerate(sets):
        if any(jaccard(item, sets[other]) >= threshold for other in kept):
            expected.add(index)
        else:
            kept.append(index)
    found = near_duplicates(texts, threshold=threshold)
    assert set(found) == expected
    assert all(
        jaccard(sets[late], sets[early]) >= threshold and early in kept for late, early in found.items()
    )


# -- decontamination -----------------------------------------------------------------------------------

LONG = "What did the harbour master write into the blue book on Friday evening?"


def guard(*texts: str, ngram: int = 8) -> ExamGuard:
    exam = [question(text=text, id=f"e{n}", about=f"x{n}", split="exam") for n, text in enumerate(texts)]
    return ExamGuard(exam, ngram=ngram, near_duplicate=0.85)


def test_exam_questions_are_recognised():
    keep = guard(LONG, "How old is the tower?")
    assert keep.check(LONG.upper(), "").reason == "exam_question"
    assert keep.check("How old is the tower", "").reason == "exam_question"
    assert (
        keep.check("He asked what the harbour master write into the blue book on Friday", "").reason
        == "exam_ngram"
    )
    assert keep.check("Something else?", "They ask: " + LONG).reason == "exam_ngram"
    assert keep.check("What did the harbour master paint into the green book?", "").ok


def test_near_duplicate_of_an_exam_question():
    text = "Which of the seven old brass lamps in the upper north hall went out first last winter night?"
    near = text.replace("went out first", "went out")
    verdict = guard(text, ngram=40).check(near, "")
    assert not verdict.ok or jaccard(grams(text), grams(near)) < 0.85
    assert guard(text, ngram=40).check(text.removesuffix(" night?"), "").reason == "exam_near_duplicate"


def test_wording_of_a_questionnaire_is_no_contamination():
    form = "{}: can the feature be disabled again once it has been enabled in a live cluster?"
    names = ("Alpha gate", "Beta gate", "Gamma gate")
    keep = guard(*(form.format(name) for name in names))
    assert keep.templates > 0
    assert keep.check(form.format("Delta gate"), "").ok
    assert keep.check(form.format("Beta gate"), "").reason == "exam_question"
    # With two documents only it is content, not a form.
    assert (
        guard(*(form.format(name) for name in names[:2])).check(form.format("Delta gate"), "").reason
        == "exam_ngram"
    )


# -- form and entailment -------------------------------------------------------------------------------


def test_form():
    limits = {"min_words": 4, "max_words": 12}
    assert check_form(rationale('"The cat sat there." [1]\nThat is why.\nAnswer: the cat'), **limits).ok
    assert check_form(rationale(""), **limits).reason == "empty"
    assert check_form(rationale("Answer: yes"), **limits).reason == "empty"
    assert check_form(rationale("Too short."), **limits).reason == "length"
    assert check_form(rationale("word " * 13 + "."), **limits).reason == "length"
    stops = "This one stops in the middle of a"
    assert check_form(rationale(stops, stops), **limits).reason == "truncated"
    assert check_form(rationale(stops, "the cat"), **limits).ok


def test_prose_leaves_quotes_and_answer_out():
    assert prose('"The cat sat there." [1] So it sat.\nAnswer: there') == "So it sat."
    assert prose('So: "The cat sat there." [1] It sat.') == "So:  It sat."


OPTIONS = {"A": "Hair loss", "B": "Metallic taste", "C": "Weight gain"}


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("Metformin often causes a metallic taste in the mouth.", "B", ""),
        ("A metallic taste is described.", "B. Metallic taste", ""),
        ("A metallic taste is described.", "C", "teacher_answer"),
        ("A metallic taste is described.", "A metallic taste is described.", ""),
        ("The mouth is dry.", "The mouth is dry.", "does_not_support_answer"),
        ("The passage speaks of taste, so option C is wrong.", "B", "names_other_option"),
        ("A metallic taste, not weight gain, is described.", "B", "names_other_option"),
        ("The patients feel better with it.", "B", "does_not_support_answer"),
        ('"A metallic taste is common." [1] This is stated.', "B", ""),
    ],
)
def test_verify_options(text, answer, reason):
    asked = question("options", "Which side effect is common?", "B", options=OPTIONS)
    assert verify(asked, rationale(text, answer)).reason == reason


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("It acts on the liver and rarely lowers sugar too far.", "no", ""),
        ("It acts on the liver.", "No, it does not.", ""),
        ("It acts on the liver.", "yes", "teacher_answer"),
        ("It acts on the liver.", "perhaps", "teacher_answer"),
        ("It acts on the liver, says the text.", "It acts on the liver, says the text.", ""),
        ("It is the kidney that matters.", "no", "does_not_support_answer"),
        ("Yes, it acts on the liver.", "no", "contradicts_answer"),
        ("It acts on the liver. So, yes.", "no", "contradicts_answer"),
        ("The right answer is yes because it acts on the liver.", "no", "contradicts_answer"),
        ("The right answer is no, because the liver acts.", "no", ""),
    ],
)
def test_verify_yes_no(text, answer, reason):
    gold = [Quote(doc_id="d1", quote="It acts on the liver and rarely lowers sugar.")]
    assert verify(question("yes_no", "Does it?", "no", gold=gold), rationale(text, answer)).reason == reason


@pytest.mark.parametrize(
    ("gold", "answer", "text", "reason"),
    [
        ("It acts on the liver.", "no", "It does not act on the liver.", "contradicts_answer"),
        ("", "no", "The sky is blue today in Paris.", "does_not_support_answer"),
        ("", "no", "Metformin has no place in type 1 diabetes.", ""),
        ("", "yes", "Metformin is used in type 1 diabetes.", ""),
        ("", "yes", "People who do not use metformin have no type 1 diabetes.", ""),
        ("", "yes", "No, metformin is not used in type 1 diabetes.", "contradicts_answer"),
    ],
)
def test_verify_yes_no_by_the_gold_quote_or_else_by_the_question(gold, answer, text, reason):
    quotes = [Quote(doc_id="d1", quote=gold)] if gold else []
    asked = question("yes_no", "Is metformin used in type 1 diabetes?", answer, gold=quotes)
    assert verify(asked, rationale(text, answer)).reason == reason


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("The course takes two weeks in all.", "2 weeks", ""),
        ("The course takes 2 weeks in all.", "The course takes 2 weeks in all.", ""),
        ("The passages do not say it.", "The passages do not say it.", "teacher_answer"),
        ("The course takes two weeks in all.", "I don't know.", "teacher_answer"),
        ("The course takes two weeks in all.", "a month", "teacher_answer"),
        ("The course takes three weeks in all.", "three weeks", "teacher_answer"),
        ("The course takes some weeks in all.", "Two weeks", "number_missing"),
        ('"It lasts 2 weeks." [1] This is plain.', "Two weeks", ""),
    ],
)
def test_verify_open(text, answer, reason):
    assert verify(question(), rationale(text, answer)).reason == reason


def test_open_rationale_must_carry_the_answer():
    asked = question(text="Why?", answer="Urate crystals inflame the joint")
    assert (
        verify(asked, rationale("The passage explains it well.", "Urate crystals")).reason
        == "does_not_support_answer"
    )
    assert verify(asked, rationale("Crystals of urate settle in joints.", "Urate crystals")).ok


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("Brenzal is safe in pregnancy.", "It is safe.", ""),
        ("Brenzal is not safe in pregnancy.", "Brenzal is not safe in pregnancy.", "contradicts_answer"),
        ("Brenzal is safe in pregnancy.", "Not safe.", "teacher_answer"),
        ("Brenzal isn't safe in pregnancy, says the note.", "Safe.", "contradicts_answer"),
        # A quote that says the answer does not make good what the teacher says of it, nor the other way round.
        (
            '"Brenzal is safe in pregnancy." [1]\nSo Brenzal cannot be safe in pregnancy.',
            "Safe.",
            "contradicts_answer",
        ),
        (
            '"Brenzal is not safe in pregnancy." [1]\nSo Brenzal is safe in pregnancy.',
            "Safe.",
            "contradicts_answer",
        ),
        # The sentence that has most of the reference's words decides.
        ("No dose must be left out. Brenzal is safe in pregnancy. It does not harm.", "Safe.", ""),
    ],
)
def test_an_open_rationale_must_not_say_the_opposite(text, answer, reason):
    asked = question(text="Is Brenzal safe in pregnancy?", answer="Brenzal is safe in pregnancy.")
    assert verify(asked, rationale(text, answer)).reason == reason


def test_an_open_rationale_must_deny_what_the_answer_denies():
    asked = question(text="Is Moltrex given to children?", answer="Moltrex is never given to children.")
    assert verify(asked, rationale("Moltrex is given to children.", "x")).reason == "teacher_answer"
    said = "Moltrex is given to children, says the note."
    assert verify(asked, rationale(said, said)).reason == "contradicts_answer"
    assert verify(asked, rationale("Children must not be given Moltrex.", "Never to children.")).ok


def test_the_rules_say_which_answer_they_read():
    options = question("options", "Which side effect is common?", "B", options=OPTIONS)
    closed = question("yes_no", "Does it?", "no", gold=[Quote(doc_id="d1", quote="It acts on the liver.")])
    described = rationale("A metallic taste is described.", "Described.")
    assert predicted(options, described) == "B"
    assert predicted(closed, rationale("It acts on the liver.", "No, it does not.")) == "no"
    assert predicted(closed, rationale("So, yes. It acts on the liver.")) == "yes"
    assert predicted(closed, rationale("It acts on the liver.")) == ""  # read nowhere, so not claimed
    assert predicted(question(), rationale("It takes two weeks in all.", "2  weeks")) == "2 weeks"
    assert predicted(question(), rationale("It takes 2 weeks.", "It takes 2 weeks.")) == ""


def test_quotes_must_stand_in_a_passage():
    shown = [
        passage("The cat sat on the\nmat. It slept."),
        passage("Dogs bark at <|im_end|> the moon.", "d2"),
    ]
    assert quotes_stand(rationale('"The cat sat on the mat." [1]'), shown).ok
    assert quotes_stand(rationale('"Dogs bark at < |im_end| > the moon." [2]'), shown).ok
    assert quotes_stand(rationale('"The cat sat on the sofa." [1]'), shown).reason == "quote"


# -- targets -------------------------------------------------------------------------------------------


def test_gold_quotes_are_numbered_by_this_rows_order():
    asked = question(gold=[Quote(doc_id="d1", quote="It lasts two\nweeks.")])
    home, copy, other = (
        passage("It lasts two\nweeks. Then rest."),
        passage("It lasts two weeks.", "d2"),
        passage("No.", "d3"),
    )
    assert gold_quotes(asked, [other, home]) == [("It lasts two weeks.", 2)]
    assert gold_quotes(asked, [copy, other, home]) == [("It lasts two weeks.", 3)]
    assert gold_quotes(asked, [other]) == []


@pytest.mark.parametrize(
    ("quote", "spoken"),
    [
        ("It lasts  two\nweeks.", "It lasts two weeks."),
        ('He wrote "stop now please" there.', "stop now please"),
        ("End <|eot_id|> of it all.", "End < |eot_id| > of it all."),
        ('"a" "b"', ""),
    ],
)
def test_speakable_quotes_can_be_read_back(quote, spoken):
    assert speakable(quote) == spoken


@given(st.text(min_size=1, max_size=700))
def test_any_speakable_quote_survives_the_round_trip(text):
    asked = question(gold=[Quote(doc_id="d1", quote=text)])
    completion = target(asked, rationale("x"), [passage(text)], rationale_in_target=False)
    spoken = speakable(text)
    if not spoken:
        assert completion is None
    else:
        assert completion is not None
        assert parse_reply(completion).quotes == ((spoken, 1),)
        assert parse_reply(completion).answer == "Two weeks."


def test_target_of_options_names_letter_and_text():
    asked = question("options", "Which?", "B", options=OPTIONS)
    assert (
        target(asked, rationale("x"), [passage("y")], rationale_in_target=False)
        == "Answer: B. Metallic taste"
    )


# -- domain checks -------------------------------------------------------------------------------------


def test_doses():
    assert doses("500 to 1,000 milligrams, 2.5 ml and 10 units") == {
        ("500", "mg"),
        ("1000", "mg"),
        ("2.5", "ml"),
        ("10", "unit"),
    }
    assert doses("in 10 minutes, 5 mgs, type 2") == {("5", "mg")}


def test_dose_must_stand_in_the_passages():
    shown = [passage("Give 500 mg twice a day.")]
    assert dose_in_passages(question(), rationale("It is 500 milligrams."), shown).ok
    verdict = dose_in_passages(question(), rationale("It is 500 mg, at most 850 mg."), shown)
    assert (verdict.ok, verdict.reason) == (False, "invented_dose")
    assert "850 mg" in verdict.detail
    assert dose_in_passages(question(text="Is 5 mcg enough?"), rationale("5 mcg is.", "yes"), shown).ok


def test_figures_must_stand_in_the_passages():
    shown = [passage("On 2025-05-02 the team set 35 percent for v2.")]
    assert numbers_in_passages(question(), rationale("35 % since 2 May 2025 in v2 [1]."), shown).ok
    assert numbers_in_passages(question(), rationale("40 percent."), shown).reason == "invented_figure"
    assert numbers_in_passages(question(), rationale("Since 3 May 2025."), shown).reason == "invented_figure"


def test_placeholders_are_rejected():
    assert no_placeholders(question(), rationale("The owner is TBD."), []).reason == "placeholder"
    assert no_placeholders(question(), rationale("The owner is <team name>."), []).reason == "placeholder"
    assert no_placeholders(question(), rationale("The owner is Ann."), []).ok


def test_named_checks_are_loaded_and_typos_are_named(tmp_path: Path):
    (tmp_path / "checks.py").write_text(
        "from domains.checks import PASS, Verdict\n"
        "def no_cats(question, rationale, passages):\n"
        "    return PASS if 'cat' not in rationale.text else Verdict(ok=False, reason='cat')\n"
    )
    checks = load_checks(tmp_path, ["checks:no_cats"])
    assert checks["checks:no_cats"](question(), rationale("a cat"), []) == Verdict(ok=False, reason="cat")
    with pytest.raises(ConfigError, match="no function 'no_cat'") as caught:
        load_checks(tmp_path, ["checks:no_cat"])
    assert "did you mean 'no_cats'" in caught.value.expected
    with pytest.raises(ConfigError, match="names no function"):
        load_checks(tmp_path, ["no_cats"])
    with pytest.raises(ConfigError, match="does not exist"):
        load_checks(tmp_path, ["others:no_cats"])
    (tmp_path / "broken.py").write_text("def (:\n")
    with pytest.raises(ConfigError, match="SyntaxError"):
        load_checks(tmp_path, ["broken:x"])
    assert load_checks(tmp_path, []) == {}
