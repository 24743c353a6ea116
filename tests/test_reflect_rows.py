"""Rows that reflect: every row is what it says, abstentions stay within their share, counts add up."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_curate import ABSTAIN, all_kept, finds_home, indexed, made, misses, nobody, passages, seeds

from domains.config import ReflectSection, TeacherSection
from domains.domain import load_domain
from domains.jsonl import read_jsonl, write_jsonl
from domains.records import Critique, Example, Instruction, Passage
from pipeline import curate
from pipeline.augment import Find, Sampling
from pipeline.critic import Ask
from pipeline.critic_rules import NAME, RuleCritic
from pipeline.critics import draw_sample
from pipeline.progress import Silent
from pipeline.reflect_ground import Ground
from pipeline.reflect_rows import token_rows
from pipeline.rows import Kept, gold_quotes
from pipeline.run_folder import Run
from pipeline.verdict_rows import draw_passages, verdict_rows
from rag.answers import is_abstention, parse_reply, reference_answer
from rag.reflection import RELEVANCE, RETRIEVE, SUPPORT, TOKENS, UTILITY
from rag.verdicts import split_verdict
from tests.openai_server import Act, Call, OpenAIServer

SHARE = 0.3
assert made  # a fixture


def ground(find: Find, *, seed: int = 0) -> Ground:
    return Ground(
        system="S",
        abstain=ABSTAIN,
        find=find,
        critic=RuleCritic(),
        top_k=3,
        passages=4,
        rationale_in_target=False,
        sampling=Sampling(seed=seed),
    )


def plain(text: str) -> str:
    for token in TOKENS:
        text = text.replace(token, "")
    return text


def abstains(row: Example) -> bool:
    return is_abstention(parse_reply(plain(row.completion)).answer, abstain=ABSTAIN)


def check(rows: list[Example], counts: Counter[str]) -> None:
    origins = Counter(row.origin for row in rows)
    assert all(counts[f"{origin}_rows"] == number for origin, number in origins.items())
    assert len({row.id for row in rows}) == len(rows)
    refused = [row for row in rows if abstains(row)]
    assert {row.id for row in refused} == {
        row.id for row in rows if row.origin in {"irrelevant", "unanswerable"}
    }
    assert len(refused) <= SHARE * len(rows) + 1e-9


def many_kept() -> list[Kept]:
    """Each question five times over, with other words."""
    kept = all_kept()
    return [
        Kept(
            item.question.model_copy(
                update={"id": f"{item.question.id}-{copy}", "question": f"{copy}: {item.question.question}"}
            ),
            item.rationale.model_copy(update={"question_id": f"{item.question.id}-{copy}"}),
            item.passages,
        )
        for item in kept
        for copy in range(5)
    ]


def test_a_token_row_asks_without_passages_and_reflects_in_its_answer() -> None:
    kept = all_kept()
    rows, counts, labels = token_rows(
        ground(finds_home), kept, nobody(), irrelevant_share=0.1, abstention_share=SHARE
    )
    check(rows, counts)
    left_out = (
        "no_retrieval_left_out",
        "no_sentence_left",
        "answer_left_out",
        "drawn_irrelevant_left_out",
    )
    assert len(rows) == (
        len(kept)
        - sum(counts[name] for name in left_out)
        + counts["irrelevant_extra"]
        + counts["unanswerable_rows"]
    )
    assert counts["retrieved_rows"] == len(kept)
    assert counts["rows_of_several_segments"] == 0
    texts = {passage.passage_id: passage for passage in passages()}
    for row in rows:
        assert "Passages:" not in row.messages[1].content
        (shown,) = [texts[name] for name in row.passages]
        (span,) = row.unsupervised
        assert row.completion[slice(*span)] == f"{shown.title}\n{shown.text}"
        assert row.completion.startswith(RETRIEVE["retrieve"] + "<paragraph>")
        if abstains(row):
            assert RELEVANCE["irrelevant"] in row.completion
            assert not any(token in row.completion for token in SUPPORT.values())
            assert row.completion.endswith(f"Answer: {ABSTAIN}{UTILITY[1]}")
        else:
            assert row.completion.endswith(SUPPORT["full"] + UTILITY[5])
            for quote, number in parse_reply(plain(row.completion)).quotes:
                assert number == 1
                assert quote in shown.text
    assert {label.task for label in labels} == {"retrieve", "isrel", "issup", "isuse"}
    assert {label.teacher for label in labels} == {NAME}


def test_an_answer_of_two_sentences_becomes_two_segments_and_is_counted() -> None:
    kept = [
        replace(
            item,
            question=item.question.model_copy(update={"answer": f"{item.question.answer} {passage.text}"}),
        )
        for item, passage in zip(all_kept(), passages(), strict=False)
        if item.question.kind == "open"
    ]
    rows, counts, _ = token_rows(ground(finds_home), kept, [], irrelevant_share=0, abstention_share=0)
    several = [row for row in rows if sum(row.completion.count(token) for token in RETRIEVE.values()) > 1]
    assert several
    assert counts["rows_of_several_segments"] == len(several)


def test_an_explained_answer_goes_on_with_its_rationale_sentence_by_sentence() -> None:
    kept = all_kept()
    rows, counts, _ = token_rows(
        ground(finds_home), kept, [], irrelevant_share=0, abstention_share=0, explained=True
    )
    assert counts["rows_of_several_segments"] > 0
    by_question = {row.question_id: row for row in rows}
    for item in kept:
        text = plain(by_question[item.question.id].completion)
        first = reference_answer(item.question)
        assert parse_reply(text).answer.startswith(first.rstrip("."))
    continued = [row for row in rows if RETRIEVE["continue"] in row.completion]
    assert continued, "where the evidence at hand has a sentence's words, the student goes on with it"
    for row in rows:
        for begin, end in row.unsupervised:  # passages alone
            assert not any(token in row.completion[begin:end] for token in TOKENS)


def test_where_only_irrelevant_passages_are_found_the_row_abstains_up_to_the_share() -> None:
    kept = many_kept()
    rows, counts, _ = token_rows(ground(misses), kept, [], irrelevant_share=0.0, abstention_share=SHARE)
    # nothing answers: no answer gives no room for an abstention
    assert rows == []
    assert counts["drawn_irrelevant_left_out"] == len(kept)

    def sometimes(query: str, top_k: int) -> list[Passage]:
        return (misses if "alder" in query else finds_home)(query, top_k)

    rows, counts, _ = token_rows(ground(sometimes), kept, [], irrelevant_share=0.0, abstention_share=SHARE)
    check(rows, counts)
    assert counts["irrelevant_rows"] == counts["drawn_irrelevant"] - counts["drawn_irrelevant_left_out"] > 0


def test_a_text_row_begins_with_a_true_verdict_about_its_passages() -> None:
    kept = many_kept()
    rows, counts, labels = verdict_rows(
        ground(finds_home), kept, nobody(), irrelevant_share=0.1, abstention_share=SHARE
    )
    check(rows, counts)
    assert len(rows) == (
        len(kept)
        - counts["uninformative_left_out"]
        + counts["irrelevant_extra"]
        + counts["unanswerable_rows"]
    )
    asked = {item.question.id: item.question for item in kept}
    texts = {passage.passage_id: passage for passage in passages()}
    answers = 0
    for row in rows:
        shown = [texts[name] for name in row.passages]
        verdict, reply = split_verdict(row.completion, len(shown))
        assert verdict is not None
        assert row.unsupervised == []
        assert all(f"[{number}] " in row.messages[1].content for number in range(1, len(shown) + 1))
        if row.question_id not in asked or abstains(row):
            assert not any(verdict)
            continue
        answers += 1
        question = asked[row.question_id]
        assert verdict == [bool(gold_quotes(question, [passage])) for passage in shown]
        for quote, number in parse_reply(reply).quotes:
            assert quote in shown[number - 1].text
            assert verdict[number - 1]
    assert answers == counts["retrieved_rows"] > 40
    assert {label.task for label in labels} == {"isrel"}


def test_the_number_of_passages_is_sails() -> None:
    draw, pool = random.Random(0), passages()
    sizes = Counter(len(draw_passages(pool, draw)) for _ in range(4000))
    shares = [sizes[number] / 4000 for number in range(4)]
    assert shares == pytest.approx([0.2, 0.1, 0.3, 0.4], abs=0.03)
    assert len(draw_passages(pool[:1], random.Random(1))) <= 1


@pytest.mark.parametrize("kind", ["tokens", "text"])
def test_same_seed_same_rows_another_seed_others(kind: str) -> None:
    def build(seed: int) -> list[Example]:
        make = token_rows if kind == "tokens" else verdict_rows
        return make(
            ground(finds_home, seed=seed), many_kept(), nobody(), irrelevant_share=0.1, abstention_share=SHARE
        )[0]

    assert build(0) == build(0)
    assert build(0) != build(1)


@pytest.mark.parametrize("backend", ["tokens", "text", "grader", "none"])
def test_the_stage_writes_what_the_backend_needs(made: tuple[Path, Path], backend: str) -> None:
    folder, run_folder = made
    config = folder / "domain.toml"
    before = config.read_text("utf-8")
    run = Run(run_folder)
    write_jsonl(run.rationales, [indexed(question, run_folder) for question in seeds()])
    curate.run(load_domain(str(folder)), run, Silent())
    ordinary = run.examples.read_bytes()
    try:
        assert 'backend = "none"' in before
        config.write_text(before.replace('backend = "none"', f'backend = "{backend}"'), encoding="utf-8")
        report = curate.run(load_domain(str(folder)), run, Silent())
    finally:
        config.write_text(before, encoding="utf-8")
    rows = read_jsonl(run.examples, Example)
    assert report.counts["rows"] == len(rows) > 14
    if backend in {"none", "grader"}:
        assert run.examples.read_bytes() == ordinary
        assert not run.critiques.exists()
        assert "critic" not in report.facts
        return
    labels = read_jsonl(run.critiques, Critique)
    assert sum(count for name, count in report.facts["critic"].items() if ", by " in name) == len(labels) > 0
    assert all(bool(row.unsupervised) is (backend == "tokens") for row in rows)


def test_general_instructions_open_without_retrieval_and_are_kept_by_the_published_share() -> None:
    kept = all_kept()
    general = [
        Instruction(
            id=f"g{place}", instruction=f"What is {place} plus 1?", answer=f"{place + 1}."
        ).as_question()
        for place in range(200)
    ]
    rows, counts, labels = token_rows(
        ground(finds_home), kept, [], general, irrelevant_share=0.0, abstention_share=SHARE
    )
    check(rows, counts)
    assert len(rows) == len(kept) + len(general) - counts["no_retrieval_left_out"]
    own = [row for row in rows if row.origin == "general"]
    assert 0.3 < len(own) / len(general) < 0.5  # the paper keeps 0.4
    for row in own:
        assert row.completion.startswith(RETRIEVE["no_retrieval"] + "Answer: ")
        assert row.completion.endswith("." + UTILITY[5])
        assert row.passages == row.unsupervised == []
    said = {
        label.label
        for label in labels
        if label.task == "retrieve" and label.question_id in {each.id for each in general}
    }
    assert said == {"no_retrieval"}


def test_an_instruction_that_the_critic_would_look_up_is_left_out_and_counted() -> None:
    class Curious(RuleCritic):
        def judge(self, asks: Sequence[Ask]) -> list[Critique | None]:
            said = super().judge(asks)
            return [
                each.model_copy(update={"label": "retrieve"}) if each and each.task == "retrieve" else each
                for each in said
            ]

    one = Instruction(
        id="g", instruction="What does an alder like?", answer="An alder likes wet feet."
    ).as_question()
    rows, counts, _ = token_rows(
        replace(ground(finds_home), critic=Curious()),
        [],
        [],
        [one],
        irrelevant_share=0.0,
        abstention_share=SHARE,
    )
    assert rows == []
    assert counts["instructions"] == 1
    assert counts["general_left_out"] + counts["no_sentence_left"] == 1


WORDS = ["lamp", "chair", "bridge", "kettle", "violin", "pillow", "ladder", "mirror", "anchor", "basket"]


def instructions() -> list[Instruction]:
    """Forty requests that no document is needed for."""
    asked = [
        pair
        for number, word in enumerate(WORDS)
        for pair in (
            (f"Spell the word {word} backwards.", f"{word[::-1]}."),
            (f"Write the word {word} in capital letters.", f"{word.upper()}."),
            (f"How many letters are in the word {word}?", f"It has {len(word)} letters."),
            (f"What is {number + 13} plus {7 * number + 5}?", f"{8 * number + 18}."),
        )
    ]
    return [
        Instruction(id=f"general-{place}", instruction=text, answer=answer)
        for place, (text, answer) in enumerate(asked)
    ]


def says_as_a_teacher(call: Call) -> Act:
    """Whatever speaks of a club has to be looked up; evidence counts where it is about that club."""
    task, item = call.question.split("\n\n")[0], call.question.rpartition("\n\n")[2]
    club = re.search(r"the (\w+) club", item)
    if "look something up" in task:
        label = "yes" if club else "no"
    elif task.startswith("Decide whether the evidence"):
        label = "relevant" if club and f"Evidence:\n```\nThe {club[1]} club" in item else "irrelevant"
    elif task.startswith("Decide how far"):
        label = "full" if club and f"Evidence:\n```\nThe {club[1]} club" in item else "none"
    else:
        label = "5" if task.startswith("Rate") else "search"
    return Act(text=f"{label}\nExplanation: so it is.")


def test_a_trained_critic_has_seen_general_instructions_and_leaves_some_without_retrieval(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, run_folder = made
    run = Run(run_folder)
    write_jsonl(run.rationales, [indexed(question, run_folder) for question in seeds()])
    given = instructions()
    write_jsonl(tmp_path / "instructions.jsonl", given)
    domain = load_domain(str(folder))
    with OpenAIServer(says_as_a_teacher) as server:
        changed = {
            "reflect": ReflectSection(
                backend="tokens",
                instructions=str(tmp_path / "instructions.jsonl"),
                critic="trained",
                critic_sample=24,
            ),
            "teacher": TeacherSection(kind="endpoint", base_url=server.base_url, model="big", api_key_env=""),
        }
        report = curate.run(replace(domain, config=domain.config.model_copy(update=changed)), run, Silent())
    own = [row for row in read_jsonl(run.examples, Example) if row.origin == "general"]
    said = {
        label.question_id: label
        for label in read_jsonl(run.critiques, Critique)
        if label.task == "retrieve" and not label.passage_id
    }
    by_teacher = [name for name, label in said.items() if label.teacher == "big"]
    assert len(by_teacher) == 24
    assert 6 <= sum(name.startswith("general-") for name in by_teacher) < len(given)
    assert report.counts["instructions"] == len(given)
    assert report.counts["general_left_out"] == 0
    assert len(own) == len(given) - report.counts["no_retrieval_left_out"] > 8
    assert any(said[row.question_id].teacher != "big" for row in own)
    assert all(row.completion.startswith(RETRIEVE["no_retrieval"]) for row in own)
    clubs = [label.label for name, label in said.items() if not name.startswith("general-")]
    assert set(clubs) == {"retrieve"}


def test_a_quarter_of_the_teachers_sample_are_general_instructions() -> None:
    questions, general = [f"q{i}" for i in range(300)], [f"g{i}" for i in range(60)]

    def drawn(count: int, own: list[str], others: list[str]) -> tuple[int, int]:
        chosen = draw_sample(own, others, count=count, seed=0)
        return len(chosen & set(own)), len(chosen & set(others))

    assert drawn(200, questions, general) == (150, 50)
    assert drawn(200, questions, general[:9]) == (191, 9)
    assert drawn(200, questions[:100], general) == (100, 60)
    assert drawn(200, questions, []) == (200, 0)
    assert draw_sample(questions, general, count=20, seed=0) != draw_sample(
        questions, general, count=20, seed=1
    )
