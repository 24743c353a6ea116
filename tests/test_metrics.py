import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.records import Answer, Citation, Hit, Passage, Question, Quote, Statement
from pipeline.metrics import (
    contains,
    covers,
    exact_match,
    locate_gold,
    mark_answer,
    mark_retrieval,
    normalise,
    rouge_l,
    token_f1,
)

ABSTAIN = "I don't know: the documents do not say."
TEXT = (
    "Kettles are descaled every 40 days. Use two spoons of citric acid.\n\n"
    "The lid stays open while\nit boils. Never use a brush."
)


def _passage(start, end, doc_id="kettle", text=TEXT):
    return Passage(
        passage_id=f"{doc_id}#{start}-{end}",
        doc_id=doc_id,
        title=doc_id.title(),
        heading="",
        text=text[start:end],
        start=start,
        end=end,
    )


CUT = TEXT.index("\n\n")
PASSAGES = [_passage(0, CUT), _passage(CUT + 2, len(TEXT)), _passage(0, CUT, "old-kettle")]
FIRST = "Kettles are descaled every 40 days."


def _hits(*passages):
    return [Hit(passage=passage, score=1 / rank) for rank, passage in enumerate(passages, 1)]


def _question(kind="open", answer="every 40 days", quotes=(FIRST,), **more):
    return Question(
        id="q",
        kind=kind,
        question="How often?",
        answer=answer,
        about="kettle",
        gold=[Quote(doc_id="kettle", quote=quote) for quote in quotes],
        split="exam",
        **more,
    )


def _citation(passage, quote, *, start=None, by="model"):
    start = passage.start + passage.text.index(quote) if start is None else start
    return Citation(
        number=1,
        passage_id=passage.passage_id,
        doc_id=passage.doc_id,
        title=passage.title,
        quote=quote,
        start=start,
        end=start + len(quote),
        by=by,
    )


def _answer(text, *, raw="", citations=(), passages=()):
    return Answer(
        question="How often?",
        text=text,
        raw=raw or text,
        support="supported" if citations else "unsupported",
        citations=list(citations),
        passages=_hits(*passages),
        completion_tokens=20,
    )


def _marks(question, answer, passages=PASSAGES):
    gold, _ = locate_gold(question, passages)
    return mark_answer(question, answer, gold=gold, abstain=ABSTAIN, seconds=0.5)


# -- texts


def test_normal_form_is_squads():
    assert normalise("The  Cat, (a) dog – and AN owl.") == "cat dog and owl"
    assert exact_match("The answer!", "answer") == 1
    assert exact_match("another", "other") == 0


@pytest.mark.parametrize(
    ("said", "wanted", "f1"),
    [
        ("every 40 days", "Every 40 days.", 1),
        ("40 days", "every 40 days", 0.8),  # precision 1, recall 2/3
        ("days days days", "40 days", 2 * 1 / 5),  # repetition is not paid twice
        ("no idea", "40 days", 0),
        ("", "40 days", 0),
        ("the", "a", 1),  # both empty once articles are gone
    ],
)
def test_token_f1(said, wanted, f1):
    assert token_f1(said, wanted) == pytest.approx(f1)


def test_rouge_l_is_lins_example():
    assert rouge_l("Police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("The gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    assert rouge_l("", "police") == 0


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_rouge_l_agrees_with_trying_every_subsequence(one, other):
    def subsequences(words):
        return {pick for size in range(len(words) + 1) for pick in combinations(words, size)}

    longest = max(len(pick) for pick in subsequences(one) & subsequences(other))
    wanted = 2 * longest / (len(one) + len(other)) if one and other else float(one == other)
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(wanted)


# -- gold quotes


def test_gold_quotes_are_found_through_line_breaks_and_across_passages():
    halves = [_passage(0, 20), _passage(20, len(TEXT))]
    for passages in (PASSAGES[:2], halves):
        found, missing = locate_gold(
            _question(quotes=[FIRST, "The lid stays open while it boils."]), passages
        )
        assert not missing
        assert [TEXT[slice(*gold.spans[0])] for gold in found] == [
            FIRST,
            "The lid stays open while\nit boils.",
        ]


def test_a_gold_quote_that_stands_nowhere_is_named():
    found, missing = locate_gold(_question(quotes=["Kettles are red."]), PASSAGES)
    assert (found, missing) == ([], ["Kettles are red."])


def test_another_documents_equal_sentence_is_not_relevant():
    (gold,), _ = locate_gold(_question(), PASSAGES)
    assert contains(PASSAGES[0], gold)
    assert not contains(PASSAGES[2], gold)
    assert not contains(_passage(0, 20), gold)  # half a quote is not the quote


# -- retrieval


def _retrieval(quotes, *passages):
    gold, _ = locate_gold(_question(quotes=quotes), PASSAGES)
    return mark_retrieval(gold, _hits(*passages))


def test_recall_and_ndcg_of_a_single_quote():
    marks = _retrieval([FIRST], PASSAGES[2], PASSAGES[0], PASSAGES[1])
    assert [marks[f"recall@{k}"][0] for k in (1, 3, 10)] == [0, 1, 1]
    assert marks["ndcg@10"][0] == pytest.approx(1 / math.log2(3))
    assert _retrieval([FIRST], PASSAGES[1])["ndcg@10"] == (0, 1)


def test_each_of_several_quotes_is_one_relevant_item():
    both = [FIRST, "Never use a brush."]
    marks = _retrieval(both, PASSAGES[0], PASSAGES[2], PASSAGES[1])
    assert marks["recall@1"] == (0.5, 1)
    assert marks["recall@3"] == (1, 1)
    assert marks["ndcg@10"][0] == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))


def test_two_quotes_in_one_passage_at_the_top_are_a_perfect_list():
    marks = _retrieval([FIRST, "Use two spoons of citric acid."], PASSAGES[0], PASSAGES[1])
    assert marks["ndcg@10"] == (1, 1)
    assert marks["recall@1"] == (1, 1)


def test_ndcg_looks_at_ten_passages_only():
    filler = [PASSAGES[2]] * 10
    assert _retrieval([FIRST], *filler, PASSAGES[0])["ndcg@10"] == (0, 1)


def test_no_gold_no_marks():
    assert mark_retrieval([], _hits(*PASSAGES)) == {}


# -- answers


def test_an_open_answer_scores_its_f1():
    marks = _marks(_question(), _answer("40 days"))
    assert marks["score"] == marks["token_f1"] == marks["score_answerable"] == (pytest.approx(0.8), 1)
    assert marks["false_abstention"] == (0, 1)
    assert marks["tokens_per_s"] == (20, 0.5)
    assert "option_accuracy" not in marks
    assert "abstention_recall" not in marks


def test_abstaining_from_an_answerable_question_scores_nothing():
    question = _question(answer="I don't know: the documents do not say.")  # even if the words agree
    marks = _marks(question, _answer(ABSTAIN))
    assert marks["score"] == marks["rouge_l"] == marks["exact_match"] == (0, 1)
    assert marks["false_abstention"] == (1, 1)
    assert marks["abstention_f1"] == (0, 1)


@pytest.mark.parametrize(
    ("text", "right", "unparsable"),
    [("B", 1, 0), ("B. acid", 1, 0), ("A", 0, 0), ("hard to say", 0, 1), (ABSTAIN, 0, 0), ("brush", 0, 0)],
)
def test_options(text, right, unparsable):
    question = _question("options", "B", options={"A": "brush", "B": "acid"})
    marks = _marks(question, _answer(text))
    assert marks["score"] == marks["option_accuracy"] == (right, 1)
    assert marks["unparsable"] == (unparsable, 1)


@pytest.mark.parametrize(("text", "right", "unparsable"), [("No, never.", 1, 0), ("Yes", 0, 0), ("Hm", 0, 1)])
def test_yes_no(text, right, unparsable):
    marks = _marks(_question("yes_no", "no"), _answer(text))
    assert marks["score"] == marks["yes_no_accuracy"] == (right, 1)
    assert marks["unparsable"] == (unparsable, 1)


def test_unanswerable_questions_pay_for_abstaining():
    question = _question("unanswerable", None, quotes=())
    silent, loud = _marks(question, _answer(ABSTAIN)), _marks(question, _answer("Every 40 days."))
    assert silent["score"] == silent["abstention_recall"] == (1, 1)
    assert loud["score"] == loud["abstention_recall"] == (0, 1)
    assert (silent["abstention_f1"], loud["abstention_f1"]) == ((2, 2), (0, 1))
    assert "score_answerable" not in silent


def test_abstention_f1_over_an_exam_is_the_usual_one():
    none, some = _question("unanswerable", None, quotes=()), _question()
    answers = [(none, ABSTAIN), (none, ABSTAIN), (none, "40"), (some, ABSTAIN), (some, "40"), (some, "40")]
    marks = [_marks(question, _answer(text))["abstention_f1"] for question, text in answers]
    precision = recall = 2 / 3
    assert sum(mark[0] for mark in marks) / sum(mark[1] for mark in marks) == pytest.approx(
        2 * precision * recall / (precision + recall)
    )


def test_a_prompt_that_does_not_fit_is_wrong_even_where_silence_is_right():
    for question in (_question(), _question("unanswerable", None, quotes=())):
        marks = _marks(question, None)
        assert marks["score"] == (0, 1)
        assert marks["too_long"] == (1, 1)
        assert "tokens_per_s" not in marks


# -- citations


def test_a_citation_of_the_gold_quote_is_right():
    answer = _answer("40 days", citations=[_citation(PASSAGES[0], FIRST)], passages=PASSAGES)
    marks = _marks(_question(), answer)
    assert marks["citation_precision"] == marks["citation_document"] == marks["citation_recall"] == (1, 1)


def test_precision_counts_citations_and_recall_gold_quotes():
    citations = [
        _citation(PASSAGES[0], FIRST),
        _citation(PASSAGES[1], "Never use a brush."),  # right document, wrong place
        _citation(PASSAGES[2], FIRST),  # right words, wrong document
    ]
    question = _question(quotes=[FIRST, "Use two spoons of citric acid."])
    marks = _marks(question, _answer("40 days", citations=citations, passages=PASSAGES))
    assert marks["citation_precision"] == (1, 3)
    assert marks["citation_document"] == (2, 3)
    assert marks["citation_recall"] == (1, 2)


def test_a_citation_must_stand_in_a_passage_that_was_shown():
    invented = _citation(PASSAGES[0], "Kettles are descaled every 90 days.", start=0)
    hidden = _citation(PASSAGES[0], FIRST)
    for citation, shown in ((invented, PASSAGES), (hidden, PASSAGES[1:])):
        marks = _marks(_question(), _answer("90", citations=[citation], passages=shown))
        assert marks["citation_precision"] == (0, 1)
        assert marks["citation_recall"] == (0, 1)


@pytest.mark.parametrize(
    ("quote", "enough"),
    [
        ("Kettles are descaled every 40 days. Use two spoons of citric acid.", True),  # holds all of it
        ("every 40 days", True),  # lies within it
        ("days. Use two spoons of citric acid.", False),  # touches it
    ],
)
def test_a_citation_covers_a_quote_when_they_share_half_of_the_shorter(quote, enough):
    (gold,), _ = locate_gold(_question(), PASSAGES)
    assert covers(_citation(PASSAGES[0], quote), gold) is enough


def test_no_citation_lowers_recall_and_leaves_precision_alone():
    marks = _marks(_question(), _answer("40 days", passages=PASSAGES))
    assert marks["citation_recall"] == (0, 1)
    assert "citation_precision" not in marks


def test_citing_for_an_unanswerable_question_is_always_wrong():
    answer = _answer("40 days", citations=[_citation(PASSAGES[0], FIRST)], passages=PASSAGES)
    marks = _marks(_question("unanswerable", None, quotes=()), answer)
    assert marks["citation_precision"] == (0, 1)
    assert "citation_recall" not in marks


@pytest.mark.parametrize("quotes", [(), ("Kettles are red.",)])
def test_without_a_located_gold_quote_citations_are_not_judged(quotes):
    answer = _answer("40 days", citations=[_citation(PASSAGES[0], FIRST)], passages=PASSAGES)
    marks = _marks(_question(quotes=quotes), answer)
    assert not [name for name in marks if name.startswith("citation")]


def test_closed_book_answers_have_no_marks_for_evidence():
    marks = _marks(_question(), _answer("40 days"))
    assert not [name for name in marks if name.startswith(("citation", "quote"))]


def test_quotes_of_the_model_are_checked_against_all_passages_even_when_it_abstains():
    raw = f'"{FIRST}" [1]\n"Kettles love lemon juice." [2]\nAnswer: {ABSTAIN}'
    marks = _marks(_question(), _answer(ABSTAIN, raw=raw, passages=PASSAGES))
    assert marks["quote_validity"] == (1, 2)


def test_the_score_as_served_is_that_of_what_is_left():
    question = _question()
    carried = _citation(PASSAGES[0], FIRST)
    answer = _answer("It is changed every 40 days. Cats purr.", citations=[carried], passages=PASSAGES)
    answer = answer.model_copy(
        update={
            "statements": [
                Statement(text="It is changed every 40 days.", citations=[0]),
                Statement(text="Cats purr."),
            ]
        }
    )

    def marks(answer, unsupported):
        return mark_answer(question, answer, gold=[], abstain=ABSTAIN, seconds=1, unsupported=unsupported)

    dropped, kept = marks(answer, "drop"), marks(answer, "keep")
    assert dropped["score_served"][0] > kept["score_served"][0] == kept["score"][0]
    assert dropped["withdrawn"] == (0, 1)
    bare = answer.model_copy(update={"statements": [Statement(text="Cats purr.")]})
    assert marks(bare, "drop")["withdrawn"] == (1, 1)
    assert marks(bare, "drop")["score_served"] == (0, 1)
    assert marks(bare, "withdraw")["withdrawn"] == (0, 1)  # the whole answer has a citation
