"""The exam in plain words: did training help, did the export cost something, does it know what it doesn't know?

Whether to say "helped" is decided by the 95 % interval of the difference between two arms on the same questions,
never by two means side by side. "Do not fine-tune" is a verdict too: where retrieval helps and training adds less
than `MARGIN`, the untrained model with the index is the better assistant to keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

VerdictCode = Literal["helped", "hurt", "do_not_fine_tune", "no_difference"]
Numbers = Mapping[str, float]

FEW = 20  # exam questions; an interval from fewer is not worth the ink
MARGIN = 0.02  # a gain below 2 points is not worth a training run


@dataclass(frozen=True)
class Verdict:
    """``text`` is one to six sentences for people, ``code`` is for programs."""

    code: VerdictCode
    text: str


def give_verdict(
    *,
    differences: Mapping[str, Mapping[str, Numbers]],
    arms: Mapping[str, Mapping[str, Numbers]],
    n_questions: int,
    bits_equal: bool = False,
) -> Verdict:
    """The verdict of an exam.

    Args:
        differences: ``{"tuned_rag-base_rag": {"score": {mean, low, high}, …}, …}`` in [-1, 1].
        arms: ``{"exported_rag": {"abstention_recall": {mean, low, high}, …}, …}``.
        n_questions: how many each arm was asked.
        bits_equal: the served blocks are the trained ones: a difference is llama.cpp's arithmetic and F16's rounding.
    """
    training = differences["tuned_rag-base_rag"]["score"]
    retrieval = differences["base_rag-base"]["score"]
    code = _code(training, retrieval) if n_questions >= FEW else "no_difference"
    if n_questions < FEW:
        return Verdict(
            code,
            f"{_questions(n_questions)} cannot tell whether training helped "
            f"({points(training['mean'])} points): write at least {FEW} exam questions.",
        )
    sentences = [
        _training(code, training, n_questions),
        _answerable(code, differences["tuned_rag-base_rag"].get("score_answerable")),
        _retrieval(retrieval),
        _export(differences["exported_rag-tuned_rag"]["score"], bits_equal=bits_equal),
        _abstention(arms.get("exported_rag", {}), arms.get("base_rag", {})),
        _served(arms, differences["tuned_rag-base_rag"].get("score_served")),
    ]
    return Verdict(code, " ".join(sentence for sentence in sentences if sentence))


def _code(training: Numbers, retrieval: Numbers) -> VerdictCode:
    if training["low"] > 0:
        return "helped"
    if training["high"] < 0:
        return "hurt"
    if retrieval["low"] > 0 and training["mean"] < MARGIN:
        return "do_not_fine_tune"
    return "no_difference"


def _training(code: VerdictCode, training: Numbers, n: int) -> str:
    gain = f"{points(training['mean'])} points over the untrained model with the same retrieval"
    span = _span(training)
    if code == "helped":
        return f"Training helped: {gain} (95 % interval {span})."
    if code == "hurt":
        return (
            f"Training hurt: {gain} (95 % interval {span}). Serve the untrained model with retrieval instead."
        )
    if code == "do_not_fine_tune":
        return (
            f"Do not fine-tune: retrieval alone already gives it. Training: {gain} (95 % interval {span}, "
            f"{_questions(n)})."
        )
    return (
        f"No difference can be seen with {_questions(n)}: {gain} (95 % interval {span}).{_more(training, n)}"
    )


def _more(training: Numbers, n: int) -> str:
    """How many questions would show this difference: a half-width shrinks with the root of their number."""
    if abs(training["mean"]) < MARGIN:
        return ""
    needed = n * ((training["high"] - training["low"]) / 2 / abs(training["mean"])) ** 2
    return (
        f" If that is its true size, about {math.ceil(max(needed, n + 1) / 10) * 10} questions would show it."
    )


def _answerable(code: VerdictCode, difference: Numbers | None) -> str:
    """A gain that comes from abstaining only is said to be one."""
    if code != "helped" or difference is None or difference["low"] > 0:
        return ""
    size = f"{points(difference['mean'])} points, 95 % interval {_span(difference)}"
    if difference["high"] < 0:
        return f"But it answers worse where the documents do answer ({size}): the gain comes from abstaining."
    return f"On the questions that the documents answer, no gain can be seen ({size})."


def _retrieval(retrieval: Numbers) -> str:
    gain = f"{points(retrieval['mean'])} points, 95 % interval {_span(retrieval)}"
    if retrieval["low"] > 0:
        return f"Retrieval gives the untrained model {gain}."
    if retrieval["high"] < 0:
        return f"Retrieval hurts the untrained model ({gain}): look at what it finds with preceptor why."
    return f"Retrieval alone makes no difference that can be seen ({gain})."


def _export(export: Numbers, *, bits_equal: bool) -> str:
    span = f"{points(export['mean'])} points, 95 % interval {_span(export)}"
    if export["high"] < 0 and bits_equal:
        return (
            f"The served blocks are the trained ones bit for bit, and scored {points(-export['mean'], sign=False)} points "
            f"below the same network written in F16 (95 % interval {_span(export)})."
        )
    if export["high"] < 0:
        return f"Exporting cost {points(-export['mean'], sign=False)} points (95 % interval {_span(export)})."
    if export["low"] > 0:
        return f"The exported file scores higher than the student it was made of ({span})."
    if export["mean"] == export["low"] == export["high"] == 0:
        return "Exporting changed no score."
    return f"Exporting cost nothing that can be measured ({span})."


def _abstention(served: Mapping[str, Numbers], base: Mapping[str, Numbers]) -> str:
    due, wrong = served.get("abstention_recall"), served.get("false_abstention")
    parts = []
    if due is not None:
        parts.append(
            f"on {_share(due)} of the questions that the documents do not answer"
            f"{_versus(base, 'abstention_recall')}"
        )
    if wrong is not None:
        where = f"wrongly on {_share(wrong)} of the others" if due else f"wrongly on {_share(wrong)} of them"
        parts.append(f"{where}{_versus(base, 'false_abstention')}")
    if not parts:
        return ""
    said = f"The served student says that it does not know {', and '.join(parts)}."
    if wrong is not None and wrong["mean"] >= 0.5:
        said += " Careful: it abstains on most questions that it should answer."
    return said


def _served(arms: Mapping[str, Mapping[str, Numbers]], difference: Numbers | None) -> str:
    """What users see of it: answers without support never reach them."""
    withdrawn = arms.get("exported_rag", {}).get("withdrawn")
    if withdrawn is None or difference is None:
        return ""
    return (
        f"As served, {_share(withdrawn)} of its answers are replaced by that sentence, because no passage carries "
        f"them{_versus(arms.get('base_rag', {}), 'withdrawn')}; counting that, training makes a difference of "
        f"{points(difference['mean'])} points (95 % interval {_span(difference)})."
    )


def _versus(base: Mapping[str, Numbers], metric: str) -> str:
    return f" (untrained: {_share(base[metric])})" if metric in base else ""


def _share(value: Numbers) -> str:
    return f"{100 * value['mean']:.0f} %"


def _span(value: Numbers) -> str:
    low, high = points(value["low"], sign=False), points(value["high"], sign=False)
    return f"{low} to {high}"


def _questions(n: int) -> str:
    return f"{n} question{'' if n == 1 else 's'}"


def points(value: float, *, sign: bool = True) -> str:
    """A share in points: whole ones from 1 on, one decimal below; ``−`` is a minus sign, 0 has none."""
    scaled = 100 * value
    text = f"{abs(scaled):.0f}" if abs(scaled) >= 0.95 else f"{abs(scaled):.1f}"
    if text == "0.0" and abs(scaled) >= 0.001:
        text = f"{abs(scaled):.1g}"  # an interval that leaves out 0 never reads "0 to 29"
    if text == "0.0":
        return "0"
    return ("−" if scaled < 0 else "+" if sign else "") + text
