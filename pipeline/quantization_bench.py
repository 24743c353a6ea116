"""What `benchmarks/quantization.py` measures on: texts, training rows without a teacher, and a network without a history.

The default model's weights lie on the Q4_1 grid already, as its publisher rounded them: rounding them there again loses
nothing and says nothing. So its candidates start from a fine-tuned student, and the same table is made for a
network without that history: the default model cut to widths that are multiples of 256 (K-quants want that; 576 is
none), all of its weights trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domains.records import Example, Passage, Question
from pipeline.fidelity import Text
from pipeline.metrics import mark_answer
from pipeline.qlora import training_dtype
from pipeline.replays import Turn
from pipeline.rows import gold_quotes
from pipeline.student import Base
from rag.answers import format_reply, reference_answer
from rag.prompt import neutralise, render_question, student_messages

if TYPE_CHECKING:
    import torch

    from serve.engine import Engine

_QUOTES = 2


def taught_examples(
    questions: Sequence[Question],
    passages: Sequence[Passage],
    *,
    system: str,
    abstain: str,
    shown: int,
    count: int,
) -> list[Example]:
    """Rows of seed questions with passages that hold their gold quotes: no teacher, no retrieval.

    Args:
        questions: of the domain; those of the seed split with gold quotes are taken.
        passages: of the index.
        system: the student's system prompt.
        abstain: the domain's sentence for "I don't know".
        shown: passages per row, the gold ones first.
        count: most rows.
    """
    rows = []
    order = [question for question in questions if question.split == "seed" and question.gold]
    random.Random(0).shuffle(order)  # noqa: S311  not for secrets
    for question in order:
        evidence = gold_passages(question, passages, shown)
        quotes = gold_quotes(question, evidence)[:_QUOTES]
        if not quotes:
            continue
        messages, completion = _turn(question, evidence, quotes, system, abstain)
        rows.append(
            Example(
                id=question.id, question_id=question.id, messages=messages, completion=completion,
                passages=[each.passage_id for each in evidence], origin="gold", request="",
            )
        )  # fmt: skip
        if len(rows) == count:
            break
    return rows


def gold_passages(question: Question, passages: Sequence[Passage], shown: int) -> list[Passage]:
    """Passages that hold a gold quote, then others of its documents."""
    documents = {quote.doc_id for quote in question.gold}
    own = [each for each in passages if each.doc_id in documents]
    holding = [each for each in own if any(quote.quote in each.text for quote in question.gold)]
    return [*holding, *(each for each in own if each not in holding)][:shown]


def _turn(
    question: Question, evidence: Sequence[Passage], quotes: list[tuple[str, int]], system: str, abstain: str
) -> Turn:
    answer = neutralise(reference_answer(question)) if question.answer else abstain
    messages = student_messages(system, render_question(question), evidence)
    return messages, format_reply(quotes=quotes, rationale="", answer=answer)


def score_file(
    engine: Engine,
    questions: Sequence[Question],
    passages: Sequence[Passage],
    *,
    system: str,
    abstain: str,
    shown: int,
    max_tokens: int,
) -> list[float]:
    """The exam's headline score of each question, answered from its gold passages."""
    from serve.assistant import Assistant
    from serve.engine import Completion

    assistant = Assistant(
        engine, None, system=system, abstain=abstain, top_k=shown, max_tokens=max_tokens, unsupported="keep"
    )
    asked = []
    for question in questions:
        evidence = gold_passages(question, passages, shown)
        messages = student_messages(system, render_question(question), evidence)
        item = assistant.prepare(render_question(question))
        asked.append(replace(item, tokens=engine.tokenize(engine.render(messages))))
    replies: list[Completion] = engine.generate([item.tokens for item in asked], max_tokens=max_tokens)
    scores = []
    for question, item, reply in zip(questions, asked, replies, strict=True):
        answer = assistant.judge(item, reply)
        scores.append(mark_answer(question, answer, gold=[], abstain=abstain, seconds=0)["score"][0])
    return scores


def articles(path: Path) -> list[str]:
    """The texts of a JSONL file of articles, in its order."""
    lines = path.read_text("utf-8").splitlines()
    return [str(json.loads(line)["text"]) for line in lines if line.strip()]


def windows(base: Base, texts: Sequence[str], *, length: int, count: int) -> list[list[int]]:
    """The first ``count`` pieces of ``length`` tokens of the texts put end to end."""
    ids: list[int] = []
    for text in texts:
        ids += base.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= length * count:
            break
    pieces = [ids[begin : begin + length] for begin in range(0, len(ids) - length + 1, length)]
    return pieces[:count]


def held_out_texts(base: Base, texts: Sequence[str], *, length: int, count: int) -> list[Text]:
    """`windows` whose every position counts."""
    return [Text(tuple(piece)) for piece in windows(base, texts, length=length, count=count)]


def heal(
    model: Any, texts: Sequence[Sequence[int]], *, steps: int, batch: int, learning_rate: float = 3e-4
) -> list[float]:
    """Train all weights of a network on windows of one length, in place; returns the loss of every step."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.95), fused=True
    )
    losses = []
    model.train()
    for step, ids in enumerate(_batches(texts, steps, batch)):
        rate = learning_rate * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training_dtype() == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    return losses


def _batches(texts: Sequence[Sequence[int]], steps: int, batch: int) -> Iterator[torch.Tensor]:
    import torch

    shuffler = random.Random(0)  # noqa: S311
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch:
            order = [*order, *shuffler.sample(range(len(texts)), len(texts))]
        yield torch.tensor([list(texts[place]) for place in order[:batch]])
        del order[:batch]


def merge_into_unquantized(model: Any, adapted: Any) -> Any:
    """The usual merge: the adapter, learnt beside NF4 weights, added to the base's unquantized ones; in place.

    Args:
        model: the base in float32.
        adapted: the PEFT model that was trained; stays as it is.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for path, layer in adapted.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                for name in layer.active_adapters:
                    delta = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
                    model.get_submodule(path).weight += layer.scaling[name] * delta
    return model.eval()
