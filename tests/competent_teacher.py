"""A scripted endpoint that answers every prompt of the product as a teacher would that has read the documents.

It knows the questions with their gold quotes, and otherwise only what the prompt shows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from domains.records import Instruction, Question
from domains.words import squash
from pipeline.wording import recall
from rag.words import sentence_spans
from tests.openai_server import Act, Call
from tests.strategy_example import MARKS

# How the tasks of a critic begin (`pipeline.critic_prompts`).
CRITIC = {
    "input": "Decide whether an assistant should look something up",
    "retrieve": "An assistant writes an answer sentence by sentence",
    "isrel": "Decide whether the evidence helps",
    "issup": "Decide how far the evidence supports",
    "isuse": "Rate how useful the answer is",
}
BETTER = "In other words, this one sentence of the documents settles it."
_FIELD = re.compile(
    r"^(Request|Preceding sentences|Evidence|Sentence|Answer):\n(`{3,})\n(.*?)\n\2$", re.MULTILINE | re.DOTALL
)
_BLOCK = re.compile(r"^(`{3,})\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)


class Teacher:
    """A script for `tests.openai_server.OpenAIServer`; ``asked`` counts its replies by kind of prompt."""

    def __init__(self, questions: Sequence[Question], instructions: Sequence[Instruction]) -> None:
        self.asked: Counter[str] = Counter()
        self._questions = sorted(questions, key=lambda each: -len(each.question))
        self._general = {each.instruction for each in instructions}
        self._written: dict[str, str] = {}

    def __call__(self, call: Call) -> Act:
        """The reply to one request."""
        prompt = call.question
        kinds = {**MARKS, **CRITIC}
        kind = next((name for name, mark in kinds.items() if mark in prompt), "label")
        self.asked[kind] += 1
        if kind in CRITIC:
            return Act(text=f"{self._label(kind, prompt)}\nExplanation: That is what is written there.")
        return Act(text=getattr(self, f"_{'explain' if kind == 'label' else kind}")(prompt))

    # -- explaining -----------------------------------------------------------------------------------

    def _explain(self, prompt: str) -> str:
        """Quotes what decides, says what follows, gives the right answer on a line of its own."""
        answer = _after(prompt, "Right answer: ")
        quotes = re.findall(r'^Evidence: "(.*)" \[(\d+)\]$', prompt, re.MULTILINE)
        said = " ".join(f'"{quote}" [{number}]' for quote, number in quotes)
        words = re.sub(r"^[A-H]\. ", "", answer)
        follows = (
            "This sentence decides it." if answer in {"yes", "no", "maybe"} else f"So it is this: {words}"
        )
        return f"{said} {follows}\nAnswer: {answer}"

    def _explain_options(self, prompt: str) -> str:
        question, right = self._known(prompt), _after(prompt, "Right answer: ")[0]
        reasons = {
            letter: f"Nothing in the passages makes {letter} the answer to this question."
            for letter in question.options or {}
        }
        reasons[right] = f"The documents say so: {question.gold[0].quote}"
        return json.dumps(reasons)

    # -- new questions --------------------------------------------------------------------------------

    def _generate_questions(self, prompt: str) -> str:
        """Asks how the longest sentence goes on; its second half is the answer."""
        title, passage = _after(prompt, "Title: "), _blocks(prompt)[0]
        sentences = [squash(passage[start:end]) for start, end in sentence_spans(passage)]
        sentence = max(sentences, key=len)
        words = sentence.split()
        half = len(words) // 2
        start, rest = " ".join(words[:half][:25]), " ".join(words[half:][:35])
        question = f"What does {title} say after these words: {start}?"
        self._written[question] = rest
        return json.dumps([{"question": question, "answer": rest, "quote": sentence}])

    def _answer_question(self, prompt: str) -> str:
        return f"Answer: {self._written[squash(_blocks(prompt)[1])]}"

    # -- judging --------------------------------------------------------------------------------------

    def _critique(self, prompt: str) -> str:
        if BETTER in prompt:
            return json.dumps({"issues": [], "score": 9, "revise": False})
        return json.dumps(
            {"issues": ["Say plainly that one sentence is enough."], "score": 6, "revise": True}
        )

    def _revise(self, prompt: str) -> str:
        before, _, answer = _blocks(prompt)[2].rpartition("\nAnswer:")
        return f"{before} {BETTER}\nAnswer:{answer}"

    def _rate(self, prompt: str) -> str:
        return json.dumps({"reason": "It quotes what decides.", "score": 5 if len(prompt) % 3 else 4})

    def _label(self, kind: str, prompt: str) -> str:
        """A critic's label; what is judged stands in the last field of each name."""
        fields = {match[1]: match[3] for match in _FIELD.finditer(prompt)}
        case = fields["Request"]
        request, evidence = case.split("\n")[0], fields.get("Evidence", "")
        if kind == "input":
            return "no" if request in self._general else "yes"
        if kind == "isuse":
            return "5"
        if kind == "isrel":
            gold = self._known(case).gold
            return (
                "relevant" if any(squash(each.quote) in squash(evidence) for each in gold) else "irrelevant"
            )
        share = recall(fields["Sentence"], evidence)
        if kind == "retrieve":
            return "reuse" if share >= 0.8 else "search"
        return "full" if share >= 0.8 else "partial" if share >= 0.4 else "none"

    def _known(self, prompt: str) -> Question:
        return next(each for each in self._questions if each.question in prompt)


def _after(text: str, mark: str) -> str:
    """The rest of the line behind the last ``mark`` at the beginning of a line."""
    return re.findall(rf"^{re.escape(mark)}(.*)$", text, re.MULTILINE)[-1].strip()


def _blocks(prompt: str) -> list[str]:
    return [match[2] for match in _BLOCK.finditer(prompt)]
