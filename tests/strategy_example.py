"""A small shelf, a scripted teacher that tells requests apart by their prompt, and contexts over both."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from domains.records import Passage, Question, Quote
from domains.steps import STEPS, StepOptions
from pipeline.ledger import Ledger
from pipeline.progress import Silent
from pipeline.strategies.context import Ctx, Material
from pipeline.strategies.desk import Desk, Voice
from pipeline.strategies.plan import PreparedStep, prepare
from pipeline.strategies.row import Row, seed_row
from pipeline.teacher import Outcome, Reply, Request, ScriptedTeacher

FACTS = {
    "kettle": "The kettle is cleaned with vinegar every month.",
    "toaster": "The crumb tray of the toaster is emptied every week.",
    "fridge": "The fridge is defrosted twice a year.",
    "oven": "The oven is preheated for ten minutes.",
}
# How each prompt begins or what only it has.
MARKS = {
    "critique": "You review an explanation",
    "revise": "You improve an explanation",
    "rate": "You judge an explanation",
    "generate_questions": "questions that the passage below answers",
    "answer_question": "Answer the question from the passage only.",
    "explain_options": "You explain the options",
}
Say = Callable[[Request, int], str | Outcome]


def passages() -> dict[str, Passage]:
    return {
        f"{name}-1": Passage(
            passage_id=f"{name}-1",
            doc_id=name,
            title=name.title(),
            heading="",
            text=text,
            start=0,
            end=len(text),
        )
        for name, text in FACTS.items()
    }


def question(number: int = 0, **changes: object) -> Question:
    row = {
        "id": f"q{number}",
        "kind": "open",
        "question": f"How often is kettle number {number} cleaned?",
        "answer": "Every month",
        "about": "kettle",
        "gold": [Quote(doc_id="kettle", quote=FACTS["kettle"])],
        "split": "seed",
    }
    return Question.model_validate(row | changes)


def options_question(number: int = 0) -> Question:
    return question(
        number,
        id=f"o{number}",
        kind="options",
        question=f"When is the fridge number {number} defrosted?",
        options={"A": "Every morning", "B": "Twice a year", "C": "Never at all"},
        answer="B",
        about="fridge",
        gold=[Quote(doc_id="fridge", quote=FACTS["fridge"])],
    )


def part_of(request: Request) -> str:
    """The prompt that a request was made from; ``label`` where none of the strategies' own."""
    content = request.messages[-1].content
    return next((name for name, mark in MARKS.items() if mark in content), "label")


class Shelf:
    """Material, a ledger and a scripted teacher; ``asked`` counts requests by prompt."""

    def __init__(
        self,
        folder: Path,
        says: Mapping[str, Say],
        *,
        questions: Sequence[Question] = (),
        samples: int = 1,
        max_cost: float = 1.0,
        price: float = 0.0,
    ) -> None:
        self.asked: Counter[str] = Counter()
        self.folder = folder
        self.teacher = ScriptedTeacher(self._say, price_prompt=price, price_completion=price)
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.progress = Silent()
        self.max_cost = max_cost
        self.says = says
        self.material = Material(
            questions=questions,
            passages=passages(),
            evidence=lambda each: [passages()[f"{each.about}-1"], passages()["oven-1"]],
            instruction="Explain the answer.",
            samples=samples,
        )
        self.new_desk()

    def new_desk(self) -> None:
        """As another process would have it: nothing but the ledger is left."""
        voice = Voice(self.teacher, 0.7, 160)
        self.desk = Desk(
            {"teacher": voice, "judge": Voice(self.teacher, 0.0, 160)},
            self.ledger,
            self.max_cost,
            "USD",
            self.progress,
        )

    def _say(self, request: Request) -> str | Outcome:
        part = part_of(request)
        self.asked[part] += 1
        return self.says[part](request, self.asked[part])

    def step(self, use: str, prompts: Mapping[str, str] | None = None, **options: object) -> PreparedStep:
        made: StepOptions = STEPS[use].model_validate({"use": use, **options})
        lead = [] if use in {"label", "orca", "explain_options", "generate_questions"} else [STEPS["label"]()]
        tail = [STEPS["label"]()] if use == "generate_questions" else []
        return prepare([*lead, made, *tail], prompts or {})[len(lead)]

    def ctx(self, use: str, **options: object) -> Ctx:
        return self.step(use, **options).context(self.material, self.desk)


def tasks(count: int, make: Callable[[int], Question] = question) -> list[Row]:
    """Explained answers as labelling gives them."""
    return [
        seed_row(make(number)).model_copy(
            update={
                "id": f"t{number:03}",
                "kind": "task",
                "passages": [f"{make(number).about}-1"],
                "rationale": "It is cleaned with vinegar every month.",
                "output": make(number).answer,
            }
        )
        for number in range(count)
    ]


def as_json(value: object) -> str:
    return json.dumps(value)


def cut(text: str) -> Reply:
    """A reply that ``max_tokens`` ended."""
    return Reply(text, "length", 10, 10)


def number_in(request: Request) -> int:
    """The number that the question of a request carries."""
    words = request.messages[-1].content.split("number ")
    return int(words[1].split()[0]) if len(words) > 1 else -1
