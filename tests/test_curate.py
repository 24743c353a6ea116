from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.domain import Domain, load_domain
from domains.errors import ConfigError, StageError
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Document, Example, KeptRationale, Passage, Question, Quote, Rationale, Rejection
from pipeline import curate
from pipeline.decontaminate import ExamGuard
from pipeline.judge import Judge, keep_clear, select
from pipeline.new import new_domain
from pipeline.progress import Silent
from pipeline.rows import Kept, RowBuilder, gold_quotes
from pipeline.run_folder import Run
from rag.answers import is_abstention, parse_reply
from rag.embed import MiniLMEmbedder
from rag.index import update_index

ABSTAIN = "I don't know: the documents do not say."
NAMES = ["alder", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo", "hazel", "ivy", "juniper"]
FACTS = ["copper", "silver", "velvet", "marble", "amber", "linen", "cobalt", "willow", "pepper", "saffron"]


def documents() -> list[Document]:
    """Ten documents with two facts each; every fact is one sentence with a word of its own."""
    return [
        Document(
            doc_id=name,
            title=f"The {name} club",
            text=f"## Colour\nThe {name} club wears {fact} coats on Monday.\n\n"
            f"## Price\nEach member of the {name} club pays {number + 11} euros.",
            source="test",
        )
        for number, (name, fact) in enumerate(zip(NAMES, FACTS, strict=True))
    ]


def passages() -> list[Passage]:
    made = []
    for document in documents():
        for piece in document.text.split("\n\n"):
            heading, text = piece.removeprefix("## ").split("\n")
            start = document.text.index(text)
            made.append(
                Passage(
                    passage_id=f"{document.doc_id}#{start}-{start + len(text)}",
                    doc_id=document.doc_id,
                    title=document.title,
                    heading=heading,
                    text=text,
                    start=start,
                    end=start + len(text),
                )
            )
    return made


def questions() -> list[Question]:
    made = []
    for number, (name, fact) in enumerate(zip(NAMES, FACTS, strict=True)):
        split = "seed" if number < 7 else "exam"
        colour = f"The {name} club wears {fact} coats on Monday."
        price = f"Each member of the {name} club pays {number + 11} euros."
        common = {"about": name, "split": split}
        made += [
            Question(
                id=f"{name}-open",
                kind="open",
                question=f"What do they put on at the {name} club?",
                answer=f"They wear {fact} coats.",
                gold=[Quote(doc_id=name, quote=colour)],
                **common,
            ),
            Question(
                id=f"{name}-options",
                kind="options",
                question=f"How much is a year at the {name} club?",
                answer="B",
                options={"A": "3 euros", "B": f"{number + 11} euros", "C": "99 euros"},
                gold=[Quote(doc_id=name, quote=price)],
                **common,
            ),
            Question(
                id=f"{name}-none",
                kind="unanswerable",
                question=f"Who runs the {name} club?",
                answer=None,
                **common,
            ),
        ]
    return made


def rationale(question: Question, *, good: bool = True, sample: int = 0, words: str = "") -> Rationale:
    home = [passage for passage in passages() if passage.doc_id == question.about]
    other = [passage for passage in passages() if passage.doc_id != question.about]
    gold = question.gold[0].quote if question.gold else home[0].text
    shown = [other[sample], *home]
    number = 1 + next(n for n, passage in enumerate(shown) if passage.text == gold)
    said = question.options["B"] if question.options else question.answer or ""
    text = f'"{gold}" [{number}]\nSo the passage {words}says: {said}\nAnswer: {said}'
    answer = said if good else "Nobody can tell."
    return Rationale(
        question_id=question.id,
        sample=sample,
        text=text if good else f"The moon is made of cheese {words}.",
        answer=("B" if question.options else answer) if good else answer,
        passages=[passage.passage_id for passage in shown],
        teacher="test",
        request=f"r-{question.id}-{sample}",
    )


def seeds() -> list[Question]:
    return [question for question in questions() if question.split == "seed" and question.gold]


def judge(**more) -> Judge:
    fields = {
        "questions": {question.id: question for question in questions()},
        "passages": {passage.passage_id: passage for passage in passages()},
        "guard": ExamGuard([q for q in questions() if q.split == "exam"], ngram=8, near_duplicate=0.9),
        "checks": {},
        "min_words": 4,
        "max_words": 60,
        "rationale_trained": False,
    }
    return Judge(**{**fields, **more})


def builder(retrieve, **more) -> RowBuilder:
    fields = {"system": "S", "abstain": ABSTAIN, "top_k": 2, "rationale_in_target": False, "seed": 0}
    return RowBuilder(retrieve=retrieve, **{**fields, **more})


def by_text(item: Kept) -> str:
    """What a row is made of where it has the rationale's own words."""
    return item.rationale.text


def finds_home(query: str, top_k: int) -> list[Passage]:
    """A retriever that finds the club named in the query, then the others."""
    return sorted(passages(), key=lambda passage: passage.doc_id not in query)[:top_k]


def finds_words(query: str, top_k: int) -> list[Passage]:
    """A retriever that counts shared words."""
    wanted = set(re.findall(r"\w+", query))
    return sorted(passages(), key=lambda passage: -len(wanted & set(re.findall(r"\w+", passage.text))))[
        :top_k
    ]


def misses(query: str, top_k: int) -> list[Passage]:
    """A retriever that finds the wrong section of other clubs only."""
    heading = "Price" if "put on" in query else "Colour"
    return [item for item in passages() if item.doc_id not in query and item.heading == heading][:top_k]


# -- judging -------------------------------------------------------------------------------------------


def test_good_rationales_pass_and_each_fault_has_its_reason():
    asked = {question.id: question for question in questions()}
    good = rationale(asked["alder-open"])
    assert isinstance(judge().judge(good), Kept)

    def reason(changed: dict, **more) -> str:
        found = judge(**more).judge(good.model_copy(update=changed))
        assert not isinstance(found, Kept)
        return found.reason

    assert reason({"question_id": "gone"}) == "unknown_question"
    assert reason({"question_id": "juniper-open"}) == "exam_question"
    assert reason({"question_id": "alder-none"}) == "unanswerable_question"
    assert reason({"passages": ["gone#0-1"]}) == "unknown_passage"
    assert reason({"text": ""}) == "empty"
    assert reason({"text": "Short."}) == "length"
    assert reason({"answer": "Nothing at all"}) == "teacher_answer"
    assert reason({"text": good.text.replace("wears", "bears")}) == "quote"
    # The teacher saw passages without the gold sentence, and quotes nothing itself.
    elsewhere = [passage.passage_id for passage in passages() if passage.doc_id == "elm"]
    assert reason({"passages": elsewhere, "text": "They wear copper coats, says the text."}) == "no_quote"


def test_a_domain_check_rejects_with_its_own_reason():
    from domains.checks import PASS, Verdict

    def no_copper(question, rationale, passages):
        return Verdict(ok=False, detail="copper") if "copper" in rationale.text else PASS

    asked = {question.id: question for question in questions()}
    found = judge(checks={"checks:no_copper": no_copper}).judge(rationale(asked["alder-open"]))
    assert found.reason == "checks:no_copper"
    assert isinstance(
        judge(checks={"checks:no_copper": no_copper}).judge(rationale(asked["birch-open"])), Kept
    )


def test_a_seed_question_that_equals_an_exam_question_is_refused():
    asked = seeds()[0]
    leaked = asked.model_copy(update={"id": "x", "split": "exam", "about": "juniper"})
    guard = ExamGuard([leaked], ngram=8, near_duplicate=0.9)
    assert judge(guard=guard).judge(rationale(asked)).reason == "exam_question"
    clear, contaminated = keep_clear([asked], guard)
    assert clear == []
    assert contaminated[0].reason == "exam_question"


def test_the_best_rationale_of_a_question_is_kept():
    asked = seeds()[0]
    unquoted = Rationale(**{**rationale(asked).model_dump(), "sample": 3, "text": "They wear copper coats."})
    longer = rationale(asked, sample=1, words="of that club which we were shown here quite plainly ")
    twin = rationale(asked, sample=2)
    best = rationale(asked, sample=0)
    passed, rejected = judge().sort([unquoted, longer, twin, best], Silent())
    assert rejected == []
    kept, surplus = select(passed, keep_per_question=1, near_duplicate=0.8, row_of=by_text)
    assert [item.rationale.sample for item in kept] == [0]
    assert {item.sample: item.reason for item in surplus} == {1: "surplus", 2: "near_duplicate", 3: "surplus"}
    kept, surplus = select(passed, keep_per_question=3, near_duplicate=1.1, row_of=builder(misses).row_of)
    assert len(kept) == 3
    # The same passages make the same row, when the rationale is not part of it.
    same = [
        Kept(item.question, best.model_copy(update={"sample": n}), item.passages)
        for n, item in enumerate(passed)
    ]
    same = [Kept(asked, item.rationale, same[0].passages) for item in same]
    kept, surplus = select(same, keep_per_question=3, near_duplicate=1.1, row_of=builder(misses).row_of)
    assert (len(kept), {item.reason for item in surplus}) == (1, {"same_row"})


def test_a_whole_exam_question_in_a_rationale_is_refused_where_it_is_trained_on():
    leaks = rationale(seeds()[0], words=LEAK)
    assert judge(rationale_trained=True).judge(leaks).reason == "exam_ngram"
    assert isinstance(judge(rationale_trained=False).judge(leaks), Kept)


def test_rationales_that_find_other_passages_make_rows_of_their_own():
    asked = seeds()[0]
    said = [
        "unlike silver birch ",
        "unlike velvet cedar, which is another one altogether ",
        "as anybody can see quite plainly here, unlike silver birch ",
    ]
    given = [rationale(asked, words=words).model_copy(update={"sample": n}) for n, words in enumerate(said)]
    passed, _ = judge().sort(given, Silent())
    own = {"keep_per_question": 3, "near_duplicate": 1.0}
    maker = builder(misses, by_rationale=finds_words)
    kept, surplus = select(passed, row_of=maker.row_of, **own)
    assert [item.rationale.sample for item in kept] == [0, 1]
    assert [(item.sample, item.reason) for item in surplus] == [(2, "same_row")]
    rows, _ = maker.build(kept, [], retrieved_share=0, irrelevant_share=0, abstention_share=0.3)
    assert [row.origin for row in rows] == ["rationale", "rationale"]
    assert rows[0].passages != rows[1].passages
    assert rows[0].id != rows[1].id
    # Shown what the teacher saw, they make one row; written out, each its own.
    assert len(select(passed, row_of=builder(misses).row_of, **own)[0]) == 1
    written = builder(misses, by_rationale=finds_words, rationale_in_target=True)
    assert len(select(passed, row_of=written.row_of, **own)[0]) == 3


def test_without_gold_quotes_other_own_quotes_make_another_row():
    asked = seeds()[0].model_copy(update={"gold": []})
    colour, price = (passage.text for passage in passages() if passage.doc_id == "alder")
    said = "So we read that they wear copper coats.\nAnswer: They wear copper coats."
    given = [
        rationale(asked).model_copy(update={"sample": n, "text": f"{quotes}\n{said}"})
        for n, quotes in enumerate([f'"{colour}" [2]', f'"{colour}" [2]\n"{price}" [3]'])
    ]
    both = [Kept(asked, each, [p for p in passages() if p.doc_id == "alder"]) for each in given]
    kept, _ = select(both, keep_per_question=2, near_duplicate=1.1, row_of=builder(misses).row_of)
    assert len(kept) == 2


LEAK = 'asks "What do they put on at the hazel club?" and '
ABSTENTIONS = 0.3

# -- rows ----------------------------------------------------------------------------------------------


def test_passages_found_by_the_rationale_are_shown_where_they_carry_a_quote():
    """KARD (arXiv 2305.18395 section 3.2): the query is the rationale with its answer, not the question."""
    kept = [judge().judge(rationale(question)) for question in seeds()[:4]]
    queries: list[str] = []

    def by_rationale(query: str, top_k: int) -> list[Passage]:
        queries.append(query)
        return [] if "silver" in query or "12" in query else finds_words(query, top_k)

    rows, counts = builder(misses, by_rationale=by_rationale, rationale_in_target=True).build(
        kept, [], retrieved_share=0, irrelevant_share=0, abstention_share=0.3
    )
    assert [row.origin for row in rows] == ["rationale", "rationale", "gold", "gold"]
    assert counts["rationale_missed"] == 2
    assert queries[0] == "So the passage says: They wear copper coats.\nAnswer: They wear copper coats."
    for item, row in zip(kept, rows, strict=True):
        assert "So the passage says" in row.completion
        taught = [passage.passage_id for passage in item.passages]
        assert (row.passages == taught) is (row.origin == "gold")


def all_kept() -> list[Kept]:
    return judge().sort([rationale(question) for question in seeds()], Silent())[0]


def nobody() -> list[Question]:
    return [
        question for question in questions() if question.kind == "unanswerable" and question.split == "seed"
    ]


def check_rows(rows: list[Example], counts: Counter[str], kept: list[Kept]) -> None:
    """What every set of rows promises."""
    asked = {question.id: question for question in questions()}
    texts = {passage.passage_id: passage for passage in passages()}
    assert len(rows) == len(kept) + counts["irrelevant_extra"] + counts["unanswerable_rows"]
    origins = Counter(row.origin for row in rows)
    assert all(counts[f"{origin}_rows"] == number for origin, number in origins.items())
    assert len({row.id for row in rows}) == len(rows)
    abstentions = [row for row in rows if is_abstention(parse_reply(row.completion).answer, abstain=ABSTAIN)]
    assert {row.id for row in abstentions} == {
        row.id for row in rows if row.origin in {"irrelevant", "unanswerable"}
    }
    assert len(abstentions) <= ABSTENTIONS * len(rows) + 1e-9
    for row in rows:
        question, shown = asked[row.question_id], [texts[passage_id] for passage_id in row.passages]
        assert question.split == "seed"
        assert row.messages[0].role == "system"
        assert question.question in row.messages[1].content
        reply = parse_reply(row.completion)
        if row in abstentions:
            assert reply.quotes == ()
            assert gold_quotes(question, shown) == []
            continue
        # The quote stands in the passage whose number it gives, in this row's order.
        assert reply.quotes
        for quote, number in reply.quotes:
            assert quote in shown[number - 1].text
            assert f"[{number}] " in row.messages[1].content
        assert quote == question.gold[0].quote
        assert reply.answer == (f"B. {question.options['B']}" if question.options else question.answer)


def test_rows_of_every_origin():
    kept = all_kept()
    rows, counts = builder(finds_home).build(
        kept, nobody(), retrieved_share=0.5, irrelevant_share=0.1, abstention_share=ABSTENTIONS
    )
    check_rows(rows, counts, kept)
    assert counts["retrieved_rows"] == 7
    assert counts["gold_rows"] == 7
    assert counts["retrieved_missed"] == 0
    assert counts["irrelevant_extra"] == 2
    assert counts["unanswerable_rows"] == 4
    assert counts["unanswerable_left_out"] == 3


def test_a_missed_retrieval_becomes_an_abstention_up_to_the_cap():
    kept = all_kept()
    rows, counts = builder(misses).build(
        kept, nobody(), retrieved_share=1.0, irrelevant_share=0.0, abstention_share=ABSTENTIONS
    )
    check_rows(rows, counts, kept)
    assert counts["retrieved_missed"] == counts["irrelevant_rows"] == 4
    assert counts["retrieved_missed_left_out"] == 10
    assert counts["gold_rows"] == 10
    assert counts["unanswerable_rows"] == 0


def test_a_passage_that_may_answer_otherwise_is_no_abstention():
    def paraphrase(query: str, top_k: int) -> list[Passage]:
        texts = [f"{fact} coats they wear." for fact in FACTS]
        return [passages()[-1].model_copy(update={"text": text}) for text in texts]

    kept = [item for item in all_kept() if item.question.kind == "open"]
    rows, counts = builder(paraphrase).build(
        kept, [], retrieved_share=1.0, irrelevant_share=0.0, abstention_share=ABSTENTIONS
    )
    assert counts["retrieved_unclear"] == len(kept) == counts["gold_rows"]
    assert {row.origin for row in rows} == {"gold"}


def test_questions_without_gold_quotes_are_drawn_too():
    kept = [replace(item, question=item.question.model_copy(update={"gold": []})) for item in all_kept()]
    rows, counts = builder(finds_home).build(
        kept, [], retrieved_share=1.0, irrelevant_share=0.0, abstention_share=ABSTENTIONS
    )
    assert counts["retrieved_rows"] == len(rows) == len(kept)
    rows, counts = builder(misses).build(
        kept, [], retrieved_share=1.0, irrelevant_share=0.0, abstention_share=ABSTENTIONS
    )
    assert counts["retrieved_unclear"] == counts["gold_rows"] == len(kept)  # nobody knows that they miss


def test_a_closed_question_that_nothing_can_be_quoted_for_takes_the_passages_as_they_come():
    """KARD's own case, multiple choice without gold quotes (arXiv 2305.18395 section 3.2)."""
    kept = [
        replace(
            item,
            question=item.question.model_copy(update={"gold": []}),
            rationale=item.rationale.model_copy(update={"text": "They are the dearest.\nAnswer: B"}),
        )
        for item in all_kept()
        if item.question.kind == "options"
    ]
    maker = builder(finds_home, by_rationale=lambda query, top_k: misses("", top_k))
    for share, origin in ((0.0, "rationale"), (1.0, "retrieved")):
        rows, counts = maker.build(
            kept, [], retrieved_share=share, irrelevant_share=0.0, abstention_share=ABSTENTIONS
        )
        assert {row.origin for row in rows} == {origin}
        assert not counts["rationale_missed"]
        assert not counts["retrieved_unclear"]
        assert all(row.completion.startswith("Answer: B") for row in rows)
    # Where its own retrieval misses, it teaches no answer from it; and no prompt is answered and refused.
    for maker in (builder(misses), builder(misses, by_rationale=misses)):
        rows, counts = maker.build(
            kept, [], retrieved_share=1.0, irrelevant_share=ABSTENTIONS, abstention_share=ABSTENTIONS
        )
        assert counts["retrieved_unclear"] == len(kept)
        prompts = [tuple(message.content for message in row.messages) for row in rows]
        assert len(set(prompts)) == len(prompts)


def test_what_one_rationale_is_refused_from_another_does_not_answer_from():
    asked = next(question for question in seeds() if question.kind == "options")
    shown = misses(asked.question, 2)
    home = [passage for passage in passages() if passage.doc_id == asked.about]
    texts = [f'"{shown[0].text}" [1]\nSo {words} pay.\nAnswer: B' for words in ("they", "all of them")]
    kept = [
        Kept(asked, rationale(asked, sample=n).model_copy(update={"text": text}), home)
        for n, text in enumerate(texts)
    ]
    maker = builder(misses, by_rationale=lambda query, top_k: misses(asked.question, top_k))
    rows, counts = maker.build(kept, [], retrieved_share=0.5, irrelevant_share=0.0, abstention_share=0.5)
    assert counts["retrieved_missed"] == counts["rationale_missed"] == 1
    assert sorted(row.origin for row in rows) == ["gold", "irrelevant"]
    assert rows[0].messages != rows[1].messages


@pytest.mark.parametrize("in_target", [True, False])
def test_the_share_is_of_all_rationales_where_their_rows_differ(in_target):
    rationales = [rationale(asked, sample=n, words=f"number {n} " * n) for asked in seeds() for n in (0, 1)]
    kept, _ = judge(rationale_trained=in_target).sort(rationales, Silent())
    rows, counts = builder(finds_home, rationale_in_target=in_target).build(
        kept, [], retrieved_share=1.0, irrelevant_share=0.0, abstention_share=ABSTENTIONS
    )
    questions = len({item.question.id for item in kept})
    assert len(kept) == len(rows) == 2 * questions
    assert counts["retrieved_rows"] == (len(kept) if in_target else questions)
    assert counts["retrieved_repeated"] == (0 if in_target else questions)


def test_rationale_in_target():
    rows, _ = builder(finds_home, rationale_in_target=True).build(
        all_kept(), [], retrieved_share=0.0, irrelevant_share=0.0, abstention_share=ABSTENTIONS
    )
    assert all("So the passage says" in parse_reply(row.completion).rationale for row in rows)


def test_same_seed_same_rows_another_seed_others():
    def made(seed: int) -> list[str]:
        rows, _ = builder(finds_home, seed=seed).build(
            all_kept(), nobody(), retrieved_share=0.5, irrelevant_share=0.2, abstention_share=ABSTENTIONS
        )
        return [row.id for row in rows]

    assert made(1) == made(1)
    assert made(1) != made(2)


MIX = st.lists(
    st.tuples(st.integers(0, 13), st.booleans(), st.integers(0, 3)),
    max_size=40,
    unique_by=lambda x: (x[0], x[2]),
)


@settings(max_examples=60, deadline=None)
@given(
    MIX,
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 3),
    st.integers(0, 7),
    st.sampled_from([finds_home, misses]),
    st.booleans(),
)
def test_counts_add_up_for_any_mix(mix, retrieved, irrelevant, per_question, spare, retrieve, in_target):
    seed_questions = seeds()
    rationales = [
        rationale(seed_questions[which], good=good, sample=sample, words=f"number {sample} " * sample)
        for which, good, sample in mix
    ]
    passed, rejected = judge(rationale_trained=in_target).sort(rationales, Silent())
    maker = builder(retrieve, rationale_in_target=in_target)
    kept, surplus = select(passed, keep_per_question=per_question, near_duplicate=0.85, row_of=maker.row_of)
    assert len(kept) + len(rejected) + len(surplus) == len(rationales)
    assert all(rejection.reason and rejection.detail for rejection in [*rejected, *surplus])
    assert max(Counter(item.question.id for item in kept).values(), default=0) <= per_question
    rows, counts = maker.build(
        kept,
        nobody()[:spare],
        retrieved_share=retrieved,
        irrelevant_share=irrelevant,
        abstention_share=ABSTENTIONS,
    )
    check_rows(rows, counts, kept)
    assert counts["unanswerable_rows"] + counts["unanswerable_left_out"] == spare


# -- the stage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A domain with questions, and a run folder with its index and rationales."""
    folder = tmp_path_factory.mktemp("curate")
    write_jsonl(folder / "docs.jsonl", documents())
    write_jsonl(folder / "questions.jsonl", questions())
    domain = new_domain(
        "clubs", folder / "docs.jsonl", into=folder / "clubs", questions=folder / "questions.jsonl"
    )
    run = folder / "runs" / "clubs" / "one"
    update_index(
        run / "bundle" / "index", documents(), embedder=MiniLMEmbedder(), max_chars=700, overlap_chars=0
    )
    return domain, run


def indexed(question: Question, run: Path, **more) -> Rationale:
    """A rationale whose passages are those of the index."""
    made = rationale(question, **more)
    lines = next((run / "bundle" / "index").glob("*/passages.jsonl"))
    by_text = {passage.text: passage.passage_id for passage in read_jsonl(lines, Passage)}
    own = {passage.passage_id: passage.text for passage in passages()}
    return made.model_copy(update={"passages": [by_text[own[passage_id]] for passage_id in made.passages]})


def test_the_stage_writes_rows_and_rejections_that_add_up(made):
    folder, run_folder = made
    given = [indexed(question, run_folder) for question in seeds()]
    given += [indexed(question, run_folder, good=False, sample=1) for question in seeds()[:5]]
    run = Run(run_folder)
    write_jsonl(run.rationales, given)
    report = curate.run(load_domain(str(folder)), run, Silent())
    counts = report.counts
    rows, rejected = read_jsonl(run.examples, Example), read_jsonl(run.rejections, Rejection)
    assert counts["in"] == 19 == counts["kept"] + counts["rejected"]
    assert counts["kept"] == 14
    kept = read_jsonl(run.kept, KeptRationale)
    assert len(kept) == 14
    assert all(item.verifier.ok and item.verifier.method == "rules" for item in kept)
    by_id = {item.question_id: item for item in kept}
    assert by_id["alder-options"].verifier.pred == "B"
    assert by_id["alder-open"].verifier.pred == "They wear copper coats."
    assert {item.request for item in kept} == {row.request for row in rows if row.request}
    # What the teacher said stays as it was written: the verifier's finding stands beside it.
    said = {item.request: item for item in given}
    assert all(Rationale(**item.model_dump(exclude={"verifier"})) == said[item.request] for item in kept)
    assert counts["rejected"] == sum(count for name, count in counts.items() if name.startswith("reasons."))
    assert len(rejected) == 5 + counts["unanswerable_contaminated"]
    assert (
        counts["rows"]
        == len(rows)
        == counts["kept"] + counts["irrelevant_extra"] + counts["unanswerable_rows"]
    )
    assert len(rows) == sum(counts[f"{origin}_rows"] for origin in curate.ORIGINS)
    assert counts["retrieved_rows"] > 0
    before = run.examples.read_bytes()
    curate.run(load_domain(str(folder)), run, Silent())
    assert run.examples.read_bytes() == before


def curated(folder: Path, run: Run, given: list[Rationale], **changes: dict) -> Counter[str]:
    """Curate with other settings, by section; the reasons of what was rejected."""
    domain = load_domain(str(folder))
    config = domain.config
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    said = {item.text for item in given}
    write_jsonl(run.rationales, given)
    curate.run(Domain(domain.folder, config.model_copy(update=sections), domain.prompts), run, Silent())
    return Counter(item.reason for item in read_jsonl(run.rejections, Rejection) if item.text in said)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, False),
        ({"curate": {"rationale_in_target": True}}, True),
        ({"reflect": {"backend": "tokens"}}, False),
        ({"reflect": {"backend": "tokens", "drafts": "explained"}}, True),
        ({"reflect": {"backend": "text", "drafts": "explained"}}, False),  # drafts are of tokens
    ],
)
def test_the_exam_guard_reads_what_is_trained_on(made, settings, *, refused):
    folder, run_folder = made
    run = Run(run_folder)
    given = [indexed(question, run_folder) for question in seeds()[1:]]
    given.append(indexed(seeds()[0], run_folder, words=LEAK))
    reasons = curated(folder, run, given, **settings)
    assert reasons == ({"exam_ngram": 1} if refused else {})
    rows = read_jsonl(run.examples, Example)
    assert not any("hazel club?" in row.completion for row in rows)


def test_several_rationales_of_a_question_are_kept_where_their_rows_differ(made):
    folder, run_folder = made
    run = Run(run_folder)
    given = [
        indexed(question, run_folder, words=words).model_copy(
            update={"sample": n, "request": f"r-{question.id}-{n}"}
        )
        for question in seeds()
        for n, words in enumerate(["unlike birch and silver ", "unlike the velvet that we know from cedar "])
    ]
    keep = {"keep_per_question": 2, "retrieved_share": 0.0}
    tokens = {"backend": "tokens", "no_retrieval_share": 1.0}
    assert curated(folder, run, given, curate=keep)["same_row"] == 14
    assert curated(folder, run, given, curate=keep, reflect=tokens)["same_row"] == 14
    found = curated(folder, run, given, curate=keep | {"evidence": "rationale"})
    rows = [row for row in read_jsonl(run.examples, Example) if row.origin == "rationale"]
    assert found["same_row"] < 14
    assert len({row.id for row in rows}) == len(rows) > 14
    explained = tokens | {"drafts": "explained"}
    assert curated(folder, run, given, curate=keep, reflect=explained) == {}
    assert len(read_jsonl(run.kept, KeptRationale)) == 28


def test_zero_kept_is_an_error_with_the_commonest_reason(made):
    folder, run_folder = made
    run = Run(run_folder)
    write_jsonl(run.rationales, [indexed(question, run_folder, good=False) for question in seeds()])
    with pytest.raises(
        StageError, match="0 of 14 rationales kept; most common reason: teacher_answer"
    ) as caught:
        curate.run(load_domain(str(folder)), run, Silent())
    assert "stronger teacher" in caught.value.next_step
    assert len(read_jsonl(run.rejections, Rejection)) == 14
    write_jsonl(run.rationales, [])
    with pytest.raises(StageError, match="0 of 0"):
        curate.run(load_domain(str(folder)), run, Silent())


def test_missing_inputs_name_their_stage(made, tmp_path):
    folder, _ = made
    with pytest.raises(StageError) as caught:
        curate.run(load_domain(str(folder)), Run(tmp_path / "run"), Silent())
    assert "elicit" in caught.value.next_step
    text = (folder / "domain.toml").read_text()
    other = tmp_path / "bare"
    other.mkdir()
    (other / "domain.toml").write_text(text.replace('questions = "questions.jsonl"', 'questions = ""'))
    (other / "prompts").symlink_to(folder / "prompts")
    with pytest.raises(ConfigError, match="no questions"):
        curate.run(load_domain(str(other)), Run(tmp_path / "run"), Silent())


def test_a_check_named_in_the_domain_is_used(made, tmp_path):
    folder, run_folder = made
    run = Run(run_folder)
    write_jsonl(run.rationales, [indexed(question, run_folder) for question in seeds()])
    text = (folder / "domain.toml").read_text()
    assert '# checks = ["checks:no_promises"]' in text
    other = tmp_path / "strict"
    other.mkdir()
    (other / "domain.toml").write_text(
        text.replace('# checks = ["checks:no_promises"]', 'checks = ["checks:none"]').replace(
            json.dumps(str(folder / "questions.jsonl")), "x"
        )
    )
    (other / "questions.jsonl").symlink_to(folder / "questions.jsonl")
    (other / "prompts").symlink_to(folder / "prompts")
    (other / "checks.py").write_text(
        "from domains.checks import Verdict\n"
        "def none(question, rationale, passages):\n"
        "    return Verdict(ok=False, reason='never', detail='by rule')\n"
    )
    with pytest.raises(StageError, match="most common reason: never"):
        curate.run(load_domain(str(other)), run, Silent())
