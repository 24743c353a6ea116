"""Self-RAG's inference with a scripted student; formulas alone are in test_reflection_scores."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

from domains.errors import ModelError
from domains.records import Answer, Hit
from rag.reflection import TOKENS
from serve.assistant import Assistant
from serve.chat import explain
from serve.engine import Completion, LogProbs
from serve.openai_schema import evidence
from serve.reflection_run import Vocabulary, read_stretch
from serve.reflection_scores import Weights
from serve.reflection_tokens import Settings, TokenReflector
from serve.signals import LIKELIHOOD
from tests.reflection_engine import IDS, ReflectingEngine
from tests.small_serving import ABSTAIN, TEXTS, FixedRetriever, passage

LOOK = "[Retrieval]{[Retrieval]=0.95,[No Retrieval]=0.01}"
KNOW = "[No Retrieval]{[Retrieval]=0.01,[No Retrieval]=0.95}"
GOOD = "[Relevant]{[Relevant]=0.9,[Irrelevant]=0.1}"
BAD = "[Irrelevant]{[Relevant]=0.1,[Irrelevant]=0.9}"
FULL = "[Fully supported]{[Fully supported]=0.8,[Partially supported]=0.1,[No support / Contradictory]=0.1}"
NONE = "[No support / Contradictory]{[Fully supported]=0.1,[Partially supported]=0.1,[No support / Contradictory]=0.8}"
FIVE = "[Utility:5]{[Utility:5]=0.9,[Utility:1]=0.1}"


def assistant_of(
    script: Callable[[str], str],
    *names: str,
    retriever: Any = None,
    max_tokens: int = 300,
    context: int = 100_000,
    withdraw: bool = False,
    signals: bool = False,
    **settings: Any,
) -> tuple[Assistant, ReflectingEngine, Any]:
    engine: Any = ReflectingEngine(script, context=context)
    found = retriever or (FixedRetriever(*names) if names else None)
    assistant = Assistant(
        engine,
        found,
        system="Be brief.",
        abstain=ABSTAIN,
        top_k=2,
        max_tokens=max_tokens,
        unsupported="withdraw" if withdraw else "keep",
        signals=signals,
        reflector=TokenReflector(Vocabulary.of(engine), Settings(**settings)),
    )
    return assistant, engine, found


def shown(prompt: str) -> str:
    """The title of the last passage in a prompt, empty without one."""
    return re.findall(r"<paragraph>(\w+)\n", prompt)[-1] if "<paragraph>" in prompt else ""


def short(replies: dict[str, str], decision: str = LOOK) -> Callable[[str], str]:
    """Decides, then answers by the passage that is shown ("" without)."""

    def script(prompt: str) -> str:
        if not prompt.endswith(("</paragraph>", "[No Retrieval]")):
            return decision
        return replies[shown(prompt)]

    return script


# -- the decision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("odds", "retrieves"),
    [
        ("[Retrieval]=0.95,[No Retrieval]=0.01", True),  # the release's inverted test would not
        ("[Retrieval]=0.01,[No Retrieval]=0.95", False),  # … and would here
        ("[Retrieval]=0.0003,[No Retrieval]=0.0001", True),
    ],
)
def test_the_student_looks_where_the_normalised_probability_says_so(odds: str, retrieves: bool) -> None:
    replies = {"": "From memory." + FIVE, "Brenzal": GOOD + "40 mg once a day." + FULL + FIVE}
    assistant, engine, retriever = assistant_of(short(replies, f"[Retrieval]{{{odds}}}"), "Brenzal")
    answer = assistant.ask("What is the dose of Brenzal?")
    assert answer.reflection is not None
    assert answer.reflection.retrieved is retrieves
    assert bool(retriever.queries) is retrieves
    assert answer.text == ("40 mg once a day." if retrieves else "From memory.")
    assert engine.prompts[-1].endswith("</paragraph>" if retrieves else "[No Retrieval]")
    assert engine.prompts[0].endswith("Question: What is the dose of Brenzal?\n")  # asked without passages


@pytest.mark.parametrize(("threshold", "retrieves"), [(0.0, True), (1.0, False)])
def test_the_thresholds_ends_are_always_and_never(threshold: float, retrieves: bool) -> None:
    replies = {"": "Memory.", "Brenzal": GOOD + "Passage."}
    decision = "[Retrieval]{[Retrieval]=0.5,[No Retrieval]=0.5}"
    assistant, _, _ = assistant_of(short(replies, decision), "Brenzal", threshold=threshold)
    reflection = assistant.ask("Why?").reflection
    assert reflection is not None
    assert (reflection.retrieved, reflection.p_retrieve) == (retrieves, 0.5)


def test_without_a_retriever_nothing_is_decided_and_nothing_looked_up() -> None:
    assistant, engine, _ = assistant_of(short({"": "From memory." + FIVE}))
    answer = assistant.ask("Why?")
    assert (answer.text, answer.passages, len(engine.prompts)) == ("From memory.", [], 1)
    assert answer.reflection is not None
    assert answer.reflection.p_retrieve is None
    assert "retrieve" not in answer.reflection.expected


@pytest.mark.parametrize("form", ["short", "long"])
def test_a_student_that_would_begin_otherwise_lacks_the_decision(form: str) -> None:
    replies = {"Brenzal": GOOD + "40 mg." + FULL + FIVE}
    for first, missing in (("Well{[Retrieval]=0.2,[No Retrieval]=0.1}", 1), (LOOK, 0)):
        assistant, _, _ = assistant_of(short(replies, first), "Brenzal", form=form)
        reflection = assistant.ask("Why?").reflection
        assert reflection is not None
        assert reflection.retrieved  # the normalised probability still says so
        assert (reflection.expected["retrieve"], reflection.missing.get("retrieve", 0)) == (1, missing)


# -- the short form ----------------------------------------------------------------------------------


def test_the_best_scored_passage_answers_and_is_what_the_answer_rests_on() -> None:
    replies = {
        "Corvane": BAD + "It is kept cold." + FIVE,
        "Brenzal": GOOD + "The adult dose of Brenzal is 40 mg once a day." + FULL + FIVE,
    }
    assistant, engine, _ = assistant_of(short(replies), "Corvane", "Brenzal", withdraw=True)
    asked = assistant.prepare("What is the dose of Brenzal?")
    (answer,) = assistant.ask_many([asked])
    assert answer.text == "The adult dose of Brenzal is 40 mg once a day."
    assert answer.support == "supported"
    assert [(item.number, item.doc_id) for item in answer.citations] == [(2, "brenzal")]
    assert [hit.passage.title for hit in answer.passages] == ["Corvane", "Brenzal"]
    reflection = answer.reflection
    assert reflection is not None
    (segment,) = reflection.segments
    assert (segment.number, segment.label) == (2, "full")
    assert segment.relevance == pytest.approx(0.9)
    assert segment.support == pytest.approx(0.85)
    assert segment.utility == pytest.approx(0.8)
    assert segment.score == pytest.approx(0.9 + 0.85 + 0.4)
    assert [item.score for item in reflection.candidates] == [pytest.approx(0.1 + 0 + 0.4), segment.score]
    # an irrelevant passage owes no judgement of support
    assert reflection.expected == {"relevance": 2, "retrieve": 1, "support": 1, "utility": 2}
    assert not any(reflection.missing.values())
    assert reflection.relevant == [2]
    assert [len(call) for call in engine.calls] == [1, 2]  # all passages in one go
    lines = explain(asked, answer, context=100)
    assert any("p(retrieve) 0.99" in line for line in lines)
    assert any("given: [2] score 2.15" in line for line in lines)


def test_a_quote_gets_the_number_of_the_passage_that_won() -> None:
    dose = "The adult dose of Brenzal is 40 mg once a day."
    replies = {
        "Corvane": f"{BAD}Answer: {ABSTAIN}{FIVE}",
        "Brenzal": f'{GOOD}"{dose}" [1]\nAnswer: 40 mg.{FULL}{FIVE}',
    }
    assistant, _, _ = assistant_of(short(replies), "Corvane", "Brenzal", withdraw=True)
    answer = assistant.ask("What is the dose of Brenzal?")
    assert (answer.text, answer.support) == ("40 mg.", "supported")
    assert [(item.number, item.doc_id, item.by) for item in answer.citations] == [(2, "brenzal", "model")]
    (ungrounded,) = [assistant_of(short(replies), "Corvane", withdraw=True)[0].ask("What is the dose?")]
    assert (ungrounded.text, ungrounded.support) == (ABSTAIN, "abstained")


def test_the_weights_choose() -> None:
    replies = {
        "Corvane": "[Relevant]{[Relevant]=0.9,[Irrelevant]=0.1}Cold." + NONE + FIVE,
        "Brenzal": "[Relevant]{[Relevant]=0.5,[Irrelevant]=0.5}Warm." + FULL + FIVE,
    }
    texts = {}
    for name, weights in {"relevance": Weights(1, 0, 0), "support": Weights(0, 1, 0)}.items():
        assistant, _, _ = assistant_of(
            short(replies), "Corvane", "Brenzal", weights=weights, drop_unsupported=False
        )
        texts[name] = assistant.ask("How is it stored?").text
    assert texts == {"relevance": "Cold.", "support": "Warm."}


def test_support_is_read_where_it_is_first_taken() -> None:
    twice = GOOD + "One." + FULL + "Two." + NONE + FIVE
    assistant, _, _ = assistant_of(short({"Brenzal": twice}), "Brenzal")
    reflection = assistant.ask("Why?").reflection
    assert reflection is not None
    assert reflection.segments[0].support == pytest.approx(0.85)
    assert reflection.segments[0].text == "One. Two."


def test_judgements_that_are_not_given_count_as_neutral_and_are_counted() -> None:
    assistant, _, _ = assistant_of(short({"Brenzal": GOOD + "40 mg."}), "Brenzal")
    reflection = assistant.ask("Why?").reflection
    assert reflection is not None
    assert reflection.missing == {"support": 1, "utility": 1}
    assert reflection.segments[0].score == pytest.approx(0.9)


OPTIONS = "Which one?\nA. cold\nB. warm\nAnswer with the letter of the right option."


def test_the_scores_of_the_same_closed_answer_add_up() -> None:
    replies = {
        "Corvane": GOOD + "B. warm" + FULL + FIVE,  # the single best
        "Brenzal": "[Relevant]{[Relevant]=0.6,[Irrelevant]=0.4}A" + FULL + FIVE,
        "Moltrex": "[Relevant]{[Relevant]=0.7,[Irrelevant]=0.3}(A) cold" + FULL + FIVE,
        "Pelidor": GOOD + "Hot, I say." + FULL + FIVE,
    }
    assistant, _, _ = assistant_of(short(replies), *replies)
    answer = assistant.ask(OPTIONS)
    assert answer.text == "(A) cold"
    assert answer.reflection is not None
    assert answer.reflection.unparsed == 1
    replies["Pelidor"] = (
        BAD + f"Answer: {ABSTAIN}" + FIVE
    )  # understood: no answer, and no failure to read one
    assistant, _, _ = assistant_of(short(replies), *replies)
    reflection = assistant.ask(OPTIONS).reflection
    assert reflection is not None
    assert reflection.unparsed == 0
    assert assistant.ask("Which one is it?").text == "B. warm"  # an open question takes the best


def test_answers_that_their_passage_contradicts_are_dropped() -> None:
    replies = {"Corvane": GOOD + "Never." + NONE + FIVE, "Brenzal": BAD + "Perhaps." + FIVE}
    strict, _, _ = assistant_of(short(replies), "Corvane", "Brenzal", weights=Weights(1, 0, 0))
    lenient, _, _ = assistant_of(
        short(replies), "Corvane", "Brenzal", weights=Weights(1, 0, 0), drop_unsupported=False
    )
    assert strict.ask("Why?").text == "Perhaps."
    assert lenient.ask("Why?").text == "Never."
    alone, _, _ = assistant_of(short(replies), "Corvane")
    answer = alone.ask("Why?")
    assert (answer.text, answer.support, answer.citations) == (ABSTAIN, "abstained", [])
    assert answer.reflection is not None
    assert answer.reflection.notes == ["every answer was judged unsupported by its passage"]


@pytest.mark.parametrize("form", ["short", "long"])
def test_a_candidate_that_says_nothing_never_wins_over_an_answer(form: str) -> None:
    replies = {"Corvane": GOOD + FULL + FIVE, "Brenzal": BAD + "40 mg once a day." + FIVE}
    assistant, _, _ = assistant_of(short(replies), "Corvane", "Brenzal", form=form)
    answer = assistant.ask("What is the dose of Brenzal?")
    assert answer.text.startswith("40 mg once a day.")
    assert answer.reflection is not None
    if form == "short":  # both are shown, the silent one with the better score
        silent, spoken = answer.reflection.candidates
        assert silent.score > spoken.score
    alone, _, _ = assistant_of(short(replies), "Corvane", form=form)
    assert alone.ask("What is the dose of Brenzal?").text == ABSTAIN


def test_passages_that_do_not_fit_are_left_out_and_said() -> None:
    replies = {"Brenzal": GOOD + "40 mg." + FULL + FIVE, "": "Memory."}
    long, names = FixedRetriever("Brenzal"), ("Brenzal", "Corvane")

    def retrieve(query: str, *, top_k: int) -> list[Hit]:
        return [
            Hit(passage=passage("Corvane", "x" * 900), score=1),
            Hit(passage=passage("Brenzal"), score=0.5),
        ]

    long.retrieve = retrieve  # type: ignore[method-assign]
    assistant, _, _ = assistant_of(short(replies), retriever=long, context=700, max_tokens=100)
    answer = assistant.ask("Why?")
    assert [hit.passage.title for hit in answer.passages] == [names[0]]
    assert answer.reflection is not None
    assert answer.reflection.notes == ["1 passages do not fit into the context"]


@pytest.mark.parametrize("form", ["short", "long"])
def test_where_no_passage_fits_both_forms_answer_without_one_and_say_so(
    form: Literal["short", "long"],
) -> None:
    too_long = FixedRetriever("Corvane")
    too_long.retrieve = lambda query, *, top_k: [Hit(passage=passage("Corvane", "x" * 900), score=1)]  # type: ignore[method-assign]
    script = short({"": "Memory." + FIVE})
    assistant, _, _ = assistant_of(script, retriever=too_long, context=700, max_tokens=100, form=form)
    answer = assistant.ask("Why?")
    assert (answer.text, answer.support, answer.passages) == ("Memory.", "unsupported", [])
    assert answer.reflection is not None
    assert not answer.reflection.retrieved
    assert "fit into the context" in answer.reflection.notes[0]


def test_many_questions_share_their_passes_and_come_back_in_order() -> None:
    def script(prompt: str) -> str:
        if not prompt.endswith(("</paragraph>", "[No Retrieval]")):
            return KNOW if "question 1" in prompt else LOOK
        number = re.search(r"question (\d)", prompt)
        assert number
        return (GOOD if "<paragraph>" in prompt else "") + f"Answer {number[1]} {shown(prompt)}." + FIVE

    assistant, engine, _ = assistant_of(script, "Brenzal", "Corvane")
    answers = assistant.ask_many([assistant.prepare(f"question {number}?") for number in range(3)])
    assert [answer.text for answer in answers] == ["Answer 0 Brenzal.", "Answer 1 .", "Answer 2 Brenzal."]
    assert [len(call) for call in engine.calls] == [3, 5]


def test_a_stream_gives_the_final_text_in_one_piece() -> None:
    assistant, _, _ = assistant_of(short({"Brenzal": GOOD + "40 mg." + FULL + FIVE}), "Brenzal")
    *pieces, answer = assistant.stream(assistant.prepare("Why?"))
    assert isinstance(answer, Answer)
    assert [piece for piece in pieces if piece] == [answer.text] == ["40 mg."]


@pytest.mark.parametrize("form", ["short", "long"])
def test_how_likely_the_answer_was_is_measured(form: str) -> None:
    """Of the answer's own characters: quotes and control tokens are none of it. 0.9 is what the script takes else."""
    quote = '"The adult dose of Brenzal is 40 mg once a day." [1]\nAnswer: '
    text = quote + "4{4=0.2,=0.3}0 mg."
    replies = {"Brenzal": GOOD + text + FULL + FIVE}
    assistant, _, _ = assistant_of(short(replies), "Brenzal", form=form, signals=True)
    signals = assistant.ask("What is the dose?").signals
    logs = [math.log(0.2), *[math.log(0.9)] * 5]
    assert signals[LIKELIHOOD] == pytest.approx(sum(logs) / 6, abs=1e-5)
    assert signals["answer_min_log_prob"] == pytest.approx(math.log(0.2), abs=1e-5)
    whole = [*logs, *[math.log(0.9)] * len(quote)]
    assert signals["reply_mean_log_prob"] == pytest.approx(sum(whole) / len(whole), abs=1e-5)
    assert signals["abstain_log_prob"] == pytest.approx(math.log(0.3), abs=1e-5)


def test_the_likelihood_of_several_segments_is_that_of_all_their_answers() -> None:
    def script(prompt: str) -> str:
        if prompt.endswith("</paragraph>"):
            return {
                "Brenzal": GOOD + "Answer: S{S=0.5,=0.4}ee Moltrex." + FULL + "[Retrieval]",
                "Corvane": BAD + "Answer: Cold." + NONE,
                "Moltrex": GOOD + "W{W=0.01}ell:\nAnswer: N{N=0.2}o milk." + FULL + FIVE,
            }[shown(prompt)]
        return LOOK

    assistant, _, _ = assistant_of(
        script, retriever=Shelf("Brenzal", "Corvane", "Moltrex"), form="long", signals=True
    )
    answer = assistant.ask("What now?")
    assert answer.raw == "Answer: See Moltrex. [1] No milk. [2]"
    logs = [math.log(0.5), *[math.log(0.9)] * 11, math.log(0.2), *[math.log(0.9)] * 7]
    assert answer.signals[LIKELIHOOD] == pytest.approx(sum(logs) / len(logs), abs=1e-5)
    assert answer.signals["answer_min_log_prob"] == pytest.approx(math.log(0.2), abs=1e-5)
    assert answer.signals["reply_min_log_prob"] == pytest.approx(math.log(0.01), abs=1e-5)
    assert answer.signals["abstain_log_prob"] == pytest.approx(math.log(0.4), abs=1e-5)


# -- the long form -----------------------------------------------------------------------------------


class Shelf:
    """Finds by the words of the query; remembers the queries."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.queries: list[str] = []

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        self.queries.append(query)
        named = [name for name in self.names if name in query.rpartition("?")[2]] or list(self.names[:2])
        return [Hit(passage=passage(name), score=1) for name in named[:top_k]]


def test_each_segment_retrieves_afresh_with_the_question_and_what_was_said_last() -> None:
    def script(prompt: str) -> str:
        if prompt.endswith("</paragraph>"):
            return {
                "Brenzal": GOOD + "See Moltrex." + FULL + "[Retrieval]",
                "Corvane": BAD + "Cold." + FIVE,
                "Moltrex": GOOD + "No milk." + FULL + FIVE,
            }[shown(prompt)]
        return LOOK

    assistant, _, shelf = assistant_of(script, retriever=Shelf("Brenzal", "Corvane", "Moltrex"), form="long")
    answer = assistant.ask("What now?")
    assert shelf.queries == ["What now?", "What now? See Moltrex."]
    assert answer.raw == "Answer: See Moltrex. [1] No milk. [2]"
    assert answer.text == "See Moltrex. [1] No milk. [2]"
    assert [hit.passage.title for hit in answer.passages] == ["Brenzal", "Moltrex"]
    reflection = answer.reflection
    assert reflection is not None
    assert [(item.number, item.decision) for item in reflection.segments] == [
        (1, "retrieve"),
        (2, "retrieve"),
    ]
    # an unfinished segment owes no utility
    assert reflection.expected == {"relevance": 3, "retrieve": 1, "support": 2, "utility": 2}


def test_quotes_of_segments_as_training_writes_them_are_checked_against_their_passages() -> None:
    dose, milk = "The adult dose of Brenzal is 40 mg once a day.", "Moltrex must not be taken with milk"

    def script(prompt: str) -> str:
        if not prompt.endswith("</paragraph>"):
            return LOOK
        if shown(prompt) == "Moltrex":
            return f'{GOOD}"{milk}" [1]\nAnswer: No milk.{FULL}{FIVE}'
        return f'{GOOD}"{dose}" [1]\nAnswer: 40 mg. See Moltrex.{FULL}[Retrieval]'

    assistant, _, shelf = assistant_of(script, retriever=Shelf("Brenzal", "Moltrex"), form="long", passages=1)
    answer = assistant.ask("What now?")
    assert shelf.queries[1] == "What now? 40 mg. See Moltrex."
    assert answer.text == "40 mg. See Moltrex. [1] No milk. [2]"
    assert [(item.number, item.doc_id, item.by) for item in answer.citations] == [
        (1, "brenzal", "model"),
        (2, "moltrex", "model"),
    ]
    assert answer.rejected_quotes == []


def test_siblings_see_their_parent_and_never_each_other() -> None:
    """The release overwrites the parent's text by the elder sibling's."""

    def script(prompt: str) -> str:
        if not prompt.endswith("</paragraph>"):
            return LOOK
        if prompt.count("<paragraph>") == 1:
            return GOOD + f"First {shown(prompt)}." + FULL + "[Retrieval]"
        return GOOD + f"Second {shown(prompt)}." + FULL + FIVE

    assistant, engine, _ = assistant_of(script, "Brenzal", "Corvane", form="long")
    assistant.ask("What now?")
    third = engine.calls[2]
    assert len(third) == 4  # two parents, two passages each
    for prompt in third:
        assert prompt.count("First ") == 1
        assert "Second " not in prompt
    begun = [("First Brenzal." in prompt, shown(prompt)) for prompt in third]
    assert begun == [(True, "Brenzal"), (True, "Corvane"), (False, "Brenzal"), (False, "Corvane")]


def test_a_finished_answer_is_kept_while_others_go_on() -> None:
    """The release loses it; and multiplies scores, which favours or punishes length at random."""

    def script(prompt: str) -> str:
        if not prompt.endswith("</paragraph>"):
            return LOOK
        if prompt.count("<paragraph>") > 1:
            return BAD + "More and more." + "[Retrieval]"
        return {
            "Brenzal": GOOD + "All said." + FULL + FIVE,
            "Corvane": GOOD + "To begin with." + FULL + "[Retrieval]",
        }[shown(prompt)]

    assistant, engine, _ = assistant_of(script, "Brenzal", "Corvane", form="long", depth=4)
    answer = assistant.ask("What now?")
    assert answer.raw == "Answer: All said. [1]"
    assert len(engine.calls) == 1 + 4  # the decision, and one call per level
    assert [len(call) for call in engine.calls] == [1, 2, 2, 4, 4]  # beam 2


def test_segments_without_support_are_dropped_and_what_stands_before_them_stays() -> None:
    def script(prompt: str) -> str:
        if not prompt.endswith("</paragraph>"):
            return LOOK
        if prompt.count("<paragraph>") > 1:
            return GOOD + "Made up." + NONE + FIVE
        return GOOD + "True." + FULL + "[Retrieval]"

    strict, _, _ = assistant_of(script, "Brenzal", form="long")
    lenient, _, _ = assistant_of(script, "Brenzal", form="long", drop_unsupported=False)
    assert strict.ask("What now?").raw == "Answer: True. [1]"
    assert lenient.ask("What now?").raw == "Answer: True. [1] Made up. [1]"
    hopeless, _, _ = assistant_of(
        lambda prompt: GOOD + "Made up." + NONE + FIVE if prompt.endswith("</paragraph>") else LOOK,
        "Brenzal",
        form="long",
    )
    answer = hopeless.ask("What now?")
    assert (answer.text, answer.support) == (ABSTAIN, "abstained")


def test_segments_without_retrieval_and_on_the_same_evidence_follow_the_students_own_words() -> None:
    def script(prompt: str) -> str:
        if prompt.endswith("</paragraph>"):
            return GOOD + "It is 40 mg." + FULL + "[Continue to Use Evidence]"
        if prompt.endswith("[Continue to Use Evidence]"):
            return "Once a day.[No Retrieval]"
        if prompt.endswith("[No Retrieval]"):
            return "Good luck." + FIVE
        return LOOK

    assistant, _, retriever = assistant_of(script, "Brenzal", form="long")
    answer = assistant.ask("What now?")
    assert answer.raw == "Answer: It is 40 mg. [1] Once a day. Good luck."
    assert answer.reflection is not None
    assert [item.decision for item in answer.reflection.segments] == ["retrieve", "continue", "no_retrieval"]
    assert len(retriever.queries) == 1


def test_a_search_ends_at_its_depth_and_at_the_answers_limit() -> None:
    def script(prompt: str) -> str:
        return GOOD + "On." + FULL + "[Retrieval]" if prompt.endswith("</paragraph>") else LOOK

    assistant, engine, _ = assistant_of(script, "Brenzal", form="long", depth=3)
    assert assistant.ask("What now?").raw == "Answer: On. [1] On. [1] On. [1]"
    assert len(engine.calls) == 4
    assistant, _, _ = assistant_of(script, "Brenzal", form="long", depth=6, max_tokens=12)
    answer = assistant.ask("What now?")
    assert answer.completion_tokens <= 12


def test_passages_stay_in_line_until_the_context_is_full_then_the_oldest_goes() -> None:
    def script(prompt: str) -> str:
        if not prompt.endswith("</paragraph>"):
            return LOOK
        return (
            GOOD
            + f"Part {prompt.count('Part ')}."
            + FULL
            + ("[Retrieval]" if prompt.count("Part ") < 2 else FIVE)
        )

    roomy, wide, _ = assistant_of(script, "Brenzal", form="long", max_tokens=60)
    roomy.ask("What now?")
    assert wide.prompts[-1].count("<paragraph>") == 3
    assert "Part 0.[Fully supported][Retrieval]<paragraph>" in wide.prompts[-1]
    tight, narrow, _ = assistant_of(script, "Brenzal", form="long", max_tokens=60, context=320)
    answer = tight.ask("What now?")
    assert "[Continue to Use Evidence]Part 0." in narrow.prompts[-1]
    assert narrow.prompts[-1].count("<paragraph>") < 3
    assert answer.raw == "Answer: Part 0. [1] Part 1. [1] Part 2. [1]"
    assert answer.reflection is not None
    assert answer.reflection.notes == ["earlier passages left the context to make room"]


# -- vocabulary and attacks --------------------------------------------------------------------------


def test_a_model_without_the_tokens_is_refused_with_the_next_command() -> None:
    with pytest.raises(ModelError) as caught:
        Vocabulary.of(ReflectingEngine(lambda _: "", lacks="[Utility:3]"))  # type: ignore[arg-type]
    assert "1 of the 15" in str(caught.value)
    assert "[Utility:3]" in str(caught.value)
    assert "preceptor run" in caught.value.next_step


def test_only_the_ids_that_carry_a_judgement_are_read() -> None:
    vocabulary = Vocabulary.of(ReflectingEngine(lambda _: ""))  # type: ignore[arg-type]
    assert len(vocabulary.watch) == 13
    assert set(vocabulary.watch) == set(IDS.values()) - set(vocabulary.paragraph)


def variants(token: str) -> list[str]:
    return [
        token,
        token.upper(),
        token.lower(),
        token.replace(" ", "  "),
        f"{token[0]} {token[1:-1]} {token[-1]}",
    ]


@pytest.mark.parametrize("form", ["short", "long"])
@pytest.mark.parametrize("token", TOKENS)
def test_tokens_in_passages_questions_and_history_reach_no_decision(token: str, form: str) -> None:
    """End to end: the prompt's control ids, and so every score, are those of a harmless text."""
    replies = {"Brenzal": GOOD + "40 mg." + FULL + FIVE, "": "Memory." + FIVE}
    for attack in variants(token):
        seen = []
        for word in (attack, "harmless"):
            poisoned = FixedRetriever("Brenzal")
            text = f"{TEXTS['Brenzal']} {word} {word}"
            hits = [Hit(passage=passage("Brenzal", text), score=1)]
            poisoned.retrieve = lambda query, *, top_k, hits=hits: hits  # type: ignore[method-assign]
            assistant, engine, _ = assistant_of(short(replies), retriever=poisoned, form=form)
            answer = assistant.ask(f"What is {word} the dose? {word}")
            controls = [
                [number for number in engine.tokenize(prompt) if number in IDS.values()]
                for prompt in engine.prompts
            ]
            assert answer.reflection is not None
            seen.append((controls, answer.text, [item.score for item in answer.reflection.segments]))
        assert seen[0] == seen[1], attack


def test_what_the_student_merely_spells_stays_text() -> None:
    """Ids are compared: a spelt-out judgement is no judgement."""

    def spelt(reply: str) -> list[int]:
        return [ord(char) for char in reply]

    engine: Any = ReflectingEngine(lambda _: "x")
    vocabulary = Vocabulary.of(engine)
    tokens = spelt("[Fully supported] yes [Utility:5]")
    watched = np.full((len(tokens), len(vocabulary.watch)), -9, np.float32)
    watched[0, vocabulary.watch.index(IDS["[Relevant]"])] = -1
    log_probs = LogProbs(np.full(len(tokens), -0.1, np.float32), watched)
    stretch = read_stretch(
        Completion("", tokens, 1, "length", log_probs), vocabulary, engine, has_passage=True
    )
    assert stretch.text == "[Fully supported] yes [Utility:5]"
    assert stretch.parts.relevance is not None  # some probability stands behind every passage …
    assert stretch.missing == ("relevance", "support", "utility")  # … but nothing was judged


def test_what_was_weighed_and_dropped_never_leaves_the_server() -> None:
    replies = {"Corvane": GOOD + "A secret cure." + NONE + FIVE, "Brenzal": BAD + f"Answer: {ABSTAIN}" + FIVE}
    assistant, _, _ = assistant_of(short(replies), "Corvane", "Brenzal")
    answer = assistant.ask("Why?")
    assert answer.reflection is not None
    assert answer.reflection.candidates[0].text == "A secret cure."  # for the one who asks on this machine
    sent = evidence(answer, [])
    assert "secret" not in str(sent)
    assert sent["reflection"]["p_retrieve"] == pytest.approx(0.9896)
    assert sent["reflection"]["segments"][0]["number"] == 2
