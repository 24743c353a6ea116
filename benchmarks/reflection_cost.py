"""What each reflection back-end costs at serving, beside no reflection: seconds and tokens per question.

Run by itself: ``python -m benchmarks.reflection_cost medical runs/medical/quick/bundle/index``. The student is the
135M base with the 15 tokens added untrained (cost does not depend on what they say), quantized as it is served.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domains.config import ReflectSection
from domains.domain import find_domain, load_domain
from domains.records import Answer, Question
from rag.prompt import render_question
from serve.assistant import Assistant, Retrieves
from serve.engine import Engine
from serve.models import SMOLLM2, cache_folder
from serve.quantizer import requantize
from serve.reflection import open_reflector

# Settings that are worth comparing; thresholds 0 and 1 force the decision.
SETTINGS: dict[str, ReflectSection] = {
    "none": ReflectSection(),
    "text": ReflectSection(backend="text"),
    "tokens, not retrieving": ReflectSection(backend="tokens", threshold=1.0),
    "tokens, 3 passages": ReflectSection(backend="tokens", threshold=0.0, passages=3),
    "tokens, 5 passages": ReflectSection(backend="tokens", threshold=0.0, passages=5),
    "tokens, long form": ReflectSection(backend="tokens", threshold=0.0, passages=5, form="long"),
    "grader, rules": ReflectSection(backend="grader"),
    "grader, second 135M": ReflectSection(backend="grader", judge="gguf"),
}


@dataclass(frozen=True)
class Cost:
    """Of one back-end. ``relative`` is its time per question divided by that of ``none``.

    ``tokens_per_s`` counts what is given as the answer, ``written_per_s`` everything that was written for it.
    """

    seconds_per_question: float
    relative: float
    tokens_per_s: float
    written_per_s: float
    passes: float


def student_with_tokens() -> Path:
    """The 135M base with untrained reflection tokens as a Q8_0 GGUF, made once and kept in the cache."""
    target = cache_folder() / "SmolLM2-135M-Instruct.reflection-untrained.Q8_0.gguf"
    if not target.is_file():
        _write_student(target)
    return target


def _write_student(target: Path) -> None:
    import torch

    from pipeline.gguf_writer import write_llama_gguf
    from pipeline.student import load_base
    from pipeline.token_rows import add_reflection_tokens

    base = load_base(SMOLLM2, dtype=torch.float16)
    add_reflection_tokens(base)
    full = target.with_suffix(".F16.gguf")
    write_llama_gguf(
        full,
        state=base.model.state_dict(),
        config=base.model.config,
        tokenizer=base.tokenizer,
        template=base.template,
        name=base.name,
        licence=base.licence,
        end_of_turn=base.end_of_turn,
    )
    requantize(full, target, "Q8_0")
    full.unlink()


def measure_backends(
    gguf: Path,
    retriever: Retrieves,
    questions: Sequence[Question],
    *,
    system: str,
    abstain: str,
    top_k: int,
    max_tokens: int,
    settings: dict[str, ReflectSection] | None = None,
    parallel: int = 4,
) -> dict[str, Cost]:
    """Seconds and tokens per question of each back-end, one question at a time as a person asks.

    Args:
        gguf: a student with the 15 tokens.
        retriever: finds the passages.
        questions: asked one after the other, caches forgotten between them.
        system: the domain's system prompt.
        abstain: the domain's sentence.
        top_k: passages of back-ends without a number of their own.
        max_tokens: most tokens of a reply.
        settings: back-ends by name; must have ``none`` first.
        parallel: sequences of the engine.
    """
    found: dict[str, Cost] = {}
    with Engine(gguf, context=2048, parallel=parallel) as engine:
        for name, reflect in (settings or SETTINGS).items():
            assistant = Assistant(
                engine,
                retriever,
                system=system,
                abstain=abstain,
                top_k=top_k,
                max_tokens=max_tokens,
                unsupported="keep",
                reflector=open_reflector(reflect, engine),
            )
            assistant.ask(render_question(questions[0]), query=questions[0].question)  # warm
            answers, seconds = [], 0.0
            for question in questions:
                engine.forget()
                begin = time.perf_counter()
                answers.append(assistant.ask(render_question(question), query=question.question))
                seconds += time.perf_counter() - begin
            assistant.close()
            base = found["none"].seconds_per_question if found else seconds / len(questions)
            found[name] = _cost(answers, seconds, base)
    return found


def _cost(answers: Sequence[Answer], seconds: float, base: float) -> Cost:
    written = [
        answer.reflection.tokens if answer.reflection else answer.completion_tokens for answer in answers
    ]
    passes = [answer.reflection.passes if answer.reflection else 1 for answer in answers]
    return Cost(
        seconds_per_question=round(seconds / len(answers), 3),
        relative=round(seconds / len(answers) / base, 2),
        tokens_per_s=round(sum(answer.completion_tokens for answer in answers) / seconds, 1),
        written_per_s=round(sum(written) / seconds, 1),
        passes=round(sum(passes) / len(passes), 2),
    )


def main(domain_name: str, index: str, count: str = "10") -> None:
    """Measure on a domain's exam questions and print JSON."""
    from rag.retrieve import open_retriever

    domain = load_domain(str(find_domain(domain_name)))
    questions = [question for question in domain.read_questions() if question.split == "exam"][: int(count)]
    config = domain.config
    with open_retriever(Path(index), config.retrieve, config.rerank) as retriever:
        costs = measure_backends(
            student_with_tokens(),
            retriever,
            questions,
            system=domain.prompts["system"],
            abstain=config.domain.abstain,
            top_k=config.retrieve.top_k,
            max_tokens=config.exam.max_tokens,
        )
    sys.stdout.write(json.dumps({name: vars(cost) for name, cost in costs.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
