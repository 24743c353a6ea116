"""A small exam with made-up documents, a retriever and an engine that behaves as its model file says."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from domains.errors import ContextOverflow
from domains.jsonl import write_text_atomic
from domains.records import Hit, Passage, Question, Quote
from pipeline import exam
from pipeline.arms import Conditions
from pipeline.progress import Silent
from pipeline.run_folder import Finished, Run
from serve.engine import Completion, LogProbs

ABSTAIN = "I don't know: the documents do not say."
CLUBS = [
    "alder",
    "birch",
    "cedar",
    "dogwood",
    "elm",
    "fir",
    "ginkgo",
    "hazel",
    "ivy",
    "juniper",
    "kapok",
    "larch",
]


def passages() -> list[Passage]:
    made = []
    for number, club in enumerate(CLUBS):
        text = f"Members of the {club} club pay {number + 11} euros. They meet on Mondays in the old mill."
        made.append(
            Passage(
                passage_id=f"{club}#0-{len(text)}",
                doc_id=club,
                title=f"The {club} club",
                heading="Rules",
                text=text,
                start=0,
                end=len(text),
            )
        )
    return made


def questions() -> list[Question]:
    made = []
    for number, club in enumerate(CLUBS):
        euros = number + 11
        gold = [Quote(doc_id=club, quote=f"Members of the {club} club pay {euros} euros.")]
        common = {"about": club, "split": "exam"}
        made += [
            Question(
                id=f"{club}-open",
                kind="open",
                question=f"What do members of the {club} club pay?",
                answer=f"{euros} euros",
                gold=gold,
                **common,
            ),
            Question(
                id=f"{club}-options",
                kind="options",
                question=f"Which fee does the {club} club ask for?",
                answer="B",
                options={"A": f"{euros + 40} euros", "B": f"{euros} euros"},
                gold=gold,
                **common,
            ),
            Question(
                id=f"{club}-yes",
                kind="yes_no",
                question=f"Do members of the {club} club pay {euros} euros?",
                answer="yes",
                gold=gold,
                **common,
            ),
            Question(
                id=f"{club}-none",
                kind="unanswerable",
                question=f"Who founded the {club} club?",
                answer=None,
                **common,
            ),
        ]
    return made


class Shelf:
    """Finds the passages of the club that the query names, and counts how often it is asked."""

    def __init__(self, shelf: list[Passage]) -> None:
        self.shelf = shelf
        self.queries: list[str] = []

    def retrieve(self, query: str, *, top_k: int) -> list[Hit]:
        self.queries.append(query)
        first = sorted(self.shelf, key=lambda passage: f" {passage.doc_id} " not in query)
        return [Hit(passage=passage, score=1 / rank) for rank, passage in enumerate(first[:top_k], 1)]


class ActorEngine:
    """An engine whose model file holds the share of clubs (in percent) that it answers well.

    A token is a byte. Only what stands in the prompt can be answered, so closed-book replies are guesses.
    """

    opened: list[str] = []
    asked = 0

    def __init__(self, gguf: Path, *, context: int = 20_000, fail_after: int | None = None) -> None:
        self.skill = int(gguf.read_text("utf-8"))
        self.context = context
        self.fail_after = fail_after
        self.closed = False
        ActorEngine.opened.append(gguf.name)

    def __enter__(self) -> ActorEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def render(self, messages: list) -> str:
        return "\n".join(message.content for message in messages)

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens + max_tokens > self.context:
            raise ContextOverflow(f"{prompt_tokens} + {max_tokens} tokens")

    def forget(self) -> None:
        assert not self.closed

    def detokenize(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def generate(
        self, prompts: list[list[int]], *, max_tokens: int, watch: tuple[int, ...] | None = None
    ) -> list[Completion]:
        assert not self.closed
        made = []
        for prompt in prompts:
            ActorEngine.asked += 1
            if self.fail_after is not None and ActorEngine.asked > self.fail_after:
                raise KeyboardInterrupt
            text = self._reply(bytes(prompt).decode())
            tokens = list(text.encode())[:max_tokens]
            log_probs = None
            if watch is not None:  # it is surer of what it can read than of what it makes up
                taken = np.full(len(tokens) + 1, -0.1 if '"' in text else -2.0, dtype=np.float32)
                log_probs = LogProbs(taken, np.full((len(taken), len(watch)), -5.0, dtype=np.float32))
            made.append(Completion(text, tokens, len(prompt), "stop", log_probs))
        return made

    def _reply(self, prompt: str) -> str:
        question = prompt.rpartition("Question: ")[2]
        club = re.search(r"(\w+) club", question)[1]
        fact = re.search(rf"Members of the {club} club pay (\d+) euros\.", prompt)
        if not fact or CLUBS.index(club) * 100 >= self.skill * len(CLUBS):
            return "Answer: That is rather complicated to tell."
        if "founded" in question:
            return f"Answer: {ABSTAIN}"
        answer = "B" if "fee" in question else "yes" if question.startswith("Do") else f"{fact[1]} euros"
        return f'"{fact[0]}" [1]\nAnswer: {answer}'


def make_run(folder: Path, *, base: int = 30, tuned: int = 90, exported: int = 85) -> tuple[Run, dict]:
    """A run folder as the export stage leaves it, with models that are as good as their numbers."""
    run = Run(folder / "runs" / "clubs" / "first")
    models = {
        "base": folder / "base.gguf",
        "tuned": run.export / "student-F16.gguf",
        "exported": run.bundle / "student.gguf",
    }
    for path, skill in zip(models.values(), (base, tuned, exported), strict=True):
        write_text_atomic(path, str(skill))
    write_text_atomic(
        run.bundle / "parity.json",
        json.dumps({"ready": True, "kl": 0.00123456, "top1_agreement": 0.992, "bits_equal": True}),
    )
    losses = [{"step": step, "loss": 3 * 0.93**step + 0.4} for step in range(1, 31)]
    losses += [{"step": step, "validation_loss": 3 * 0.94**step + 0.5} for step in (10, 20, 30)]
    write_text_atomic(run.training / "loss.jsonl", "".join(json.dumps(row) + "\n" for row in losses))
    reasons = {"reasons.does_not_support_answer": 55, "reasons.quote": 21, "reasons.length": 4}
    counts = {"in": 200, "kept": 120, "rejected": 80, **reasons}
    entries = {
        "curate": Finished(fingerprint="c", counts=counts, facts={}, seconds=3.2),
        "train": Finished(fingerprint="t", counts={"rows": 130, "steps": 30}, facts={}, seconds=251),
    }
    write_text_atomic(
        run.folder / "run.json", json.dumps({name: asdict(entry) for name, entry in entries.items()})
    )
    return run, models


def take_exam(run: Run, models: dict, **changes) -> tuple[dict, Silent]:
    """Examine with the actors; the report as written, and what was said."""
    progress = Silent()
    arguments = {
        "models": models,
        "retriever": Shelf(passages()),
        "passages": passages(),
        "conditions": Conditions(
            system="You answer from the passages.",
            abstain=ABSTAIN,
            top_k=3,
            max_tokens=100,
            context=20_000,
        ),
        "open_engine": ActorEngine,
        "resamples": 300,
        "seed": 0,
        "not_drawn": 2,
        "seen_documents": set(),
        "about": {
            "name": "clubs",
            "title": "Clubs <of> town",
            "disclaimer": "All of it is made up.",
            "licence": "CC0-1.0",
            "base": "smollm2-135m",
        },
        "progress": progress,
        **changes,
    }
    exam.examine(run, arguments.pop("questions", questions()), **arguments)
    return json.loads((run.bundle / "report.json").read_text("utf-8")), progress
