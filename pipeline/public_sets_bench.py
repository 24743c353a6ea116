"""What `benchmarks/distillation.py` measures on public sets besides MedQuAD's retrieval. Sets that are not there are left out."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from domains.config import IndexSection, RerankSection
from domains.domain import Domain
from domains.records import Document, Message, Passage
from pipeline.abstention import Case as Response
from pipeline.abstention import ask_cases, measure_abstention
from pipeline.arms import PARALLEL
from pipeline.progress import Progress
from pipeline.public_sets import (
    RESAMPLES,
    accuracy,
    bioasq_yes_no,
    drawn,
    kqa_claims,
    openstax,
    pubmedqa,
)
from pipeline.public_sets_abstention import (
    Confidence,
    fit_on_pairs,
    measure_retrieval_confidence,
    medquad_cases,
)
from pipeline.public_sets_options import measure_options
from pipeline.public_sets_own import closed_questions, decided_by_retrieval, hybrid
from pipeline.public_sets_statements import kqa_consultations, measure_consultations
from pipeline.public_sets_support import measure_support
from pipeline.public_sets_yes_no import measure_yes_no
from pipeline.ranking import hit_at_1, ndcg_at_10
from pipeline.retrieval_bench import build_index, learning_documents, measure_case, take_groups
from pipeline.retrieval_cases import Case, medquad_case, prd_case
from rag.embed import MiniLMEmbedder
from rag.index import Index
from rag.lexical import LexicalIndex
from rag.load import load_documents
from serve.assistant import Assistant
from serve.engine import Engine
from serve.judges import WordJudge

SETS = ("openstax_health", "domains", "pubmedqa", "kqa", "kqa_answers", "prd_doc_qa")
ASKED = 16  # what the model scores of each set, in the quick run
PAIRS = 200  # questions that a confidence is fitted to; each is searched twice
_EVERYTHING = 0


def measure_public(
    data: Path,
    domains: Sequence[Domain],
    progress: Progress,
    *,
    split: str,
    quick: bool,
    engine: Engine,
    work: Path,
    sets: Container[str] = SETS,
    answering: Mapping[str, Path] = {},
) -> dict[str, Any]:
    """Options, yes/no, support and retrieval, each where its folder is in ``data``.

    Args:
        data: folder of the sets.
        domains: whose option questions are asked too.
        progress: told what happens.
        split: ``dev`` or ``hidden``.
        quick: the model scores `ASKED` of each set, and what needs every passage embedded is left out.
        engine: the model that scores, untrained.
        work: a folder for indexes.
        sets: which of `SETS`.
        answering: GGUF files by name, which answer K-QA's patients.
    """
    asked = ASKED if quick else _EVERYTHING
    embedder = MiniLMEmbedder()
    result: dict[str, Any] = {}
    if "openstax_health" in sets and (folder := data / "openstax_health").is_dir():
        progress.say("public: openstax_health")
        passages, questions = openstax(folder, split=split)
        result["openstax_health"] = measure_options(
            passages, questions, progress, engine=engine, asked=asked, embed=None if quick else embedder.embed
        )
    for domain in domains if "domains" in sets else ():
        progress.say(f"public: closed questions of {domain.name}")
        result |= closed_questions(domain, progress, engine=None if quick else engine)
        if not quick:
            result |= decided_by_retrieval(domain, work / "answerable", progress)
    if "pubmedqa" in sets and (folder := data / "pubmedqa").is_dir():
        progress.say("public: pubmedqa")
        result["pubmedqa"] = measure_yes_no(
            pubmedqa(folder, split=split),
            progress,
            learn=pubmedqa(folder, split="dev") if split != "dev" and _has(folder, "dev.jsonl") else (),
            elsewhere=bioasq_yes_no(data / "bioasq", split="dev")
            if _has(data / "bioasq", "dev.jsonl")
            else (),
            engine=engine,
            asked=asked,
        )
    if "kqa" in sets and (folder := data / "kqa").is_dir():
        progress.say("public: kqa")
        result["kqa"] = measure_support(
            kqa_claims(folder, split=split),
            progress,
            embed=None if quick else embedder.embed,
            judge=None if quick else WordJudge(EngineChat(engine)),
        )
    medical = next((domain for domain in domains if domain.name == "medical"), None)
    folder = data / "kqa"
    if "kqa_answers" in sets and medical is not None and not quick and _has(folder, f"{split}.jsonl"):
        progress.say("public: kqa_answers")
        result["kqa_answers"] = {}
        for name, path in answering.items():
            with Engine(path, context=medical.config.student.context, parallel=PARALLEL) as student:
                result["kqa_answers"][name] = answer_patients(
                    folder, medical, progress, split=split, engine=student, work=work
                )
    if "prd_doc_qa" in sets and (folder := data / "prd_doc_qa").is_dir():
        progress.say("public: prd_doc_qa")
        case = prd_case(folder, split=split)
        result["prd_doc_qa"] = (
            {"bm25": bm25_alone(case)}
            if quick
            else measure_case(case, work / "prd_doc_qa", progress, rerank=RerankSection())
        )
    return result


def answer_patients(
    folder: Path, domain: Domain, progress: Progress, *, split: str, engine: Engine, work: Path
) -> dict[str, Any]:
    """K-QA's questions to a model, from memory and with what a domain's own documents say."""
    documents, chars = load_documents(domain.documents).documents, domain.config.index.passage_chars
    index = build_index(
        documents, work / "answerable" / domain.name, MiniLMEmbedder(), progress, passage_chars=chars
    )
    with closing(index):
        return measure_consultations(
            kqa_consultations(folder, split=split),
            domain,
            {"closed_book": None, f"{domain.name}_passages": hybrid(index)},
            progress,
            engine=engine,
            asked=_EVERYTHING,
        )


class EngineChat:
    """An engine as a judge's chat, greedy."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def say(self, system: str, user: str, *, max_tokens: int) -> str:
        """The reply."""
        messages = [Message(role="system", content=system), Message(role="user", content=user)]
        tokens = self._engine.tokenize(self._engine.render(messages))
        return self._engine.generate([tokens], max_tokens=max_tokens)[0].text

    def close(self) -> None:
        """The engine is the caller's."""


def bm25_alone(case: Case) -> dict[str, Any]:
    """hit@1 and nDCG@10 of BM25 over a case's documents, each one passage: no vectors are needed."""
    index = LexicalIndex.build([_whole(document) for document in case.documents])
    ranked = [[case.documents[i].doc_id for i in index.search(ask.question, top_k=10)] for ask in case.asks]
    pairs = list(zip(ranked, case.asks, strict=True))
    groups = [ask.group for ask in case.asks]
    hits = accuracy([hit_at_1(names, ask.gold) > 0 for names, ask in pairs], groups)
    gains = [ndcg_at_10(names, ask.gold) for names, ask in pairs]
    return {
        "hit@1": hits["accuracy"],
        "hit@1_interval": hits["interval"],
        "ndcg@10": round(sum(gains) / len(gains), 4),
        "n": len(pairs),
    }


@contextmanager
def medquad_indexes(
    data: Path, work: Path, progress: Progress, *, split: str, rows: int
) -> Iterator[tuple[Index, Index, list[Response]]]:
    """The index of MedQuAD's test, one of other diseases, and questions about those; what `measure_case` left is reused.

    Args:
        data: folder of the sets.
        work: of the retrieval part.
        progress: told what happens.
        split: ``dev`` or ``hidden``.
        rows: as in the retrieval part, 0 = all.
    """
    case = medquad_case(data / "medquad_answerable", data / "medquad" / "dev.jsonl", split=split)
    chosen = take_groups(case.rows, count=rows, seed=0)
    embedder = MiniLMEmbedder()

    def opened(name: str, documents: Sequence[Document]) -> Index:
        # An update: nothing is embedded again where the retrieval part left these very documents.
        return build_index(
            documents, work / name, embedder, progress, passage_chars=IndexSection().passage_chars
        )

    with (
        closing(opened("index", case.documents)) as index,
        closing(opened("learn", learning_documents(case, chosen))) as learn,
    ):
        pairs = [Response(row.question, case.gold[row.item_id]) for row in chosen[:PAIRS]]
        yield index, learn, pairs


def retrieval_confidence(
    index: Index, learn: Index, pairs: Sequence[Response], folder: Path, *, split: str
) -> tuple[Confidence, dict[str, Any]]:
    """The confidence fitted to ``pairs``, and what it is worth on MedQuAD's test."""
    confidence = fit_on_pairs(pairs, hybrid(learn))
    cases, groups = medquad_cases(folder, split=split)
    found = measure_retrieval_confidence(cases, groups, hybrid(index), confidence, resamples=RESAMPLES)
    return confidence, found


def answer_confidence(
    index: Index,
    folder: Path,
    confidence: Confidence,
    progress: Progress,
    *,
    split: str,
    engine: Engine,
    domain: Domain,
    asked: int,
) -> dict[str, Any]:
    """Abstention of a student on MedQuAD's test, served as the domain serves.

    Args:
        index: of the test.
        folder: ``medquad_answerable``.
        confidence: see `retrieval_confidence`.
        progress: told what happens.
        split: ``dev`` or ``hidden``.
        engine: the student.
        domain: whose prompt, passages and ``[serve]`` are used.
        asked: how many questions, drawn at random; 0 = all.

    Returns:
        See `measure_abstention`; ``selective`` ranks by retrieval's confidence, ``selective_likelihood`` by the student's own
        likelihood.
    """
    config = domain.config
    cases, _ = medquad_cases(folder, split=split)
    cases = [cases[i] for i in drawn(len(cases), asked, seed=0)]
    progress.say(f"abstention: asking {len(cases)} questions")
    assistant = Assistant(
        engine,
        hybrid(index),
        system=domain.prompts["system"],
        abstain=config.domain.abstain,
        top_k=config.retrieve.top_k,
        max_tokens=config.exam.max_tokens,
        unsupported=config.serve.unsupported,
        signals=True,
    )
    answers = ask_cases(cases, assistant)
    by_likelihood = measure_abstention(cases, answers, resamples=RESAMPLES)
    return measure_abstention(cases, answers, confidence.right, resamples=RESAMPLES) | {
        "selective_likelihood": by_likelihood["selective"]
    }


def _whole(document: Document) -> Passage:
    return Passage(
        passage_id=document.doc_id, doc_id=document.doc_id, title=document.title, heading="", text=document.text,
        start=0, end=len(document.text),
    )  # fmt: skip


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()
