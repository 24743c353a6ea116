"""The 15 reflection tokens: masks, rows, training, merge, and the ids in the exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import read_tensors
from tiny_llama import make_tiny_llama

from domains.config import DomainConfig
from domains.domain import Domain
from domains.jsonl import write_jsonl
from domains.records import Example, Message, Passage, Question, Quote, Segment
from pipeline import train
from pipeline.augment import to_example
from pipeline.gguf_writer import write_llama_gguf
from pipeline.merge import merge_adapter
from pipeline.packing import IGNORED, Pack, encode_examples
from pipeline.parity import check_parity, replay_logits, torch_network
from pipeline.progress import Silent
from pipeline.replays import exam_turns, make_replay
from pipeline.run_folder import Run
from pipeline.student import Base, load_base, load_trained
from pipeline.token_rows import add_reflection_tokens
from rag.reflection import TOKENS
from serve.engine import Engine
from serve.gguf_check import Array, check_gguf

pytestmark = pytest.mark.usefixtures("on_one_thread")


def make_base(folder: Path, *, tied: bool) -> Path:
    make_tiny_llama(folder)
    if not tied:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        head = torch.nn.Parameter(model.model.embed_tokens.weight.detach() * 0.7)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = head
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny", tied=request.param)


def passage(text: str, number: int = 0) -> Passage:
    return Passage(
        passage_id=f"p{number}",
        doc_id="d",
        title=f"Note {number}",
        heading="",
        text=text,
        start=0,
        end=len(text),
    )


def reflected(number: int) -> Example:
    segments = [
        Segment(
            decision="retrieve",
            passage=passage(f"The dose is {number} at noon.", 1),
            relevant=True,
            text=f"Answer: the dose is {number}.",
            support="full",
        ),
        Segment(
            decision="retrieve", passage=passage("The clinic is shut.", 2), relevant=False, text=" Not more."
        ),
        Segment(decision="continue", text=" The end."),
    ]
    return to_example(
        segments,
        5,
        messages=[
            Message(role="system", content="Answer."),
            Message(role="user", content=f"Question: {number}?"),
        ],
        question_id=f"q-{number}",
        origin="retrieved",
        request="r",
    )


def test_only_prompt_and_passages_are_masked(place: Path) -> None:
    base = load_base(str(place), dtype=torch.float32)
    ids = dict(zip(TOKENS, add_reflection_tokens(base), strict=True))
    example = reflected(3)
    (row,), _ = encode_examples([example], base, max_tokens=800)
    labels = Pack((row,)).labels.tolist()
    assert labels[: row.n_prompt] == [IGNORED] * row.n_prompt
    assert labels[-1] == row.ids[-1] == base.end_of_turn
    opened = [i for i, token in enumerate(row.ids) if token == ids["<paragraph>"]]
    closed = [i for i, token in enumerate(row.ids) if token == ids["</paragraph>"]]
    assert len(opened) == len(closed) == 2
    inside = {i for start, end in zip(opened, closed, strict=True) for i in range(start + 1, end)}
    assert {i for i, label in enumerate(labels) if label == IGNORED} == inside | set(range(row.n_prompt))
    between = labels[closed[0] : opened[1] + 1]
    assert IGNORED not in between
    assert base.tokenizer.decode(between) == (
        "</paragraph>[Relevant]Answer: the dose is 3.[Fully supported][Retrieval]<paragraph>"
    )
    assert row.supervised == sum(label != IGNORED for label in labels)
    # pieces tokenized apart are what the whole completion gives, so that serving sees the same ids
    whole = base.tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    assert list(row.ids[row.n_prompt : -1]) == whole


def test_new_rows_are_the_mean_of_their_words(place: Path) -> None:
    base = load_base(str(place), dtype=torch.float32)
    plain = load_base(str(place), dtype=torch.float32)
    old = plain.model.lm_head.weight.detach()
    ids = add_reflection_tokens(base)
    assert len(set(ids)) == 15
    assert base.model.config.vocab_size % 8 == 0
    for matrix in (base.model.model.embed_tokens.weight, base.model.lm_head.weight):
        assert matrix.shape[0] == base.model.config.vocab_size
    pieces = plain.tokenizer(" Fully supported", add_special_tokens=False)["input_ids"]
    row = base.model.lm_head.weight[ids[TOKENS.index("[Fully supported]")]]
    assert torch.allclose(row, old[pieces].mean(dim=0), atol=1e-6)
    assert torch.equal(base.model.lm_head.weight[: len(old)], old)
    padding = base.model.lm_head.weight[len(base.tokenizer) :]
    assert torch.allclose(padding, old.mean(dim=0).expand_as(padding), atol=1e-6)
    tied = base.model.config.tie_word_embeddings
    assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) is tied


def domain(base: Path, **changes: Any) -> Domain:
    settings = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-2, "epochs": 2, "pack_tokens": 512}
    config = {
        "domain": {"name": "tiny", "title": "Tiny"},
        "corpus": {"documents": "."},
        "student": {"base": str(base), "context": 512},
        "train": settings | {"checkpoint_steps": 2, "packs_per_step": 1} | changes,
        "reflect": {"backend": "tokens"},
    }
    return Domain(folder=Path(), config=DomainConfig.model_validate(config), prompts={})


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "whole")
    write_jsonl(run.examples, [reflected(number) for number in range(12)])
    report = train.run(domain(place), run, Silent())
    assert report.facts["validation_after"] < report.facts["validation_before"]
    return run


def rows_of(run: Run) -> dict[str, torch.Tensor]:
    tensors = load_file(run.training / "adapter" / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "trainable_tokens" in name}


def test_the_new_rows_are_trained_and_saved_and_nothing_else_of_the_matrix(trained: Run, place: Path) -> None:
    base = load_base(str(place), dtype=torch.float32)
    ids = add_reflection_tokens(base)
    tied = base.model.config.tie_word_embeddings
    saved = rows_of(trained)
    assert len(saved) == (1 if tied else 2)
    for name, rows in saved.items():
        matrix = base.model.model.embed_tokens if "embed_tokens" in name else base.model.lm_head
        assert rows.shape == (15, 64)
        moved = (rows.float() - matrix.weight[ids]).abs().amax(dim=1)
        written = torch.tensor([token in reflected(0).completion for token in TOKENS])
        assert moved[written].min() > 1e-3


def test_a_resumed_training_gives_the_same_rows(trained: Run, place: Path, tmp_path: Path) -> None:
    class Stop(Silent):
        steps = 0

        def advance(self, amount: int = 1) -> None:
            self.steps += amount
            if self.steps == 3:
                raise KeyboardInterrupt

    run = Run(tmp_path / "stopped")
    write_jsonl(run.examples, [reflected(number) for number in range(12)])
    with pytest.raises(KeyboardInterrupt):
        train.run(domain(place), run, Stop())
    assert not (run.training / "adapter").exists()
    train.run(domain(place), run, Silent())
    ours, theirs = rows_of(run), rows_of(trained)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def exported(trained: Run, place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Base, Any]:
    model, base = load_trained(trained.training, base=str(place))
    replays = [make_replay(base, (reflected(n).messages, reflected(n).completion)) for n in (2, 7)]
    training = replay_logits(torch_network(model), replays)
    network = merge_adapter(model)
    merged = replay_logits(torch_network(network), replays)
    path = tmp_path_factory.mktemp("export") / "student.gguf"
    write_llama_gguf(
        path,
        state=network.state_dict(),
        config=network.config,
        tokenizer=base.tokenizer,
        template=base.template,
        name="tiny",
        licence="apache-2.0",
        end_of_turn=base.end_of_turn,
    )
    parity = check_parity(
        replays,
        training=training,
        merged=merged,
        f16=path,
        served=path,
        served_kind="F16",
        context=512,
        max_kl=0.01,
        min_top1=0.95,
    )
    return path, base, (network, parity)


def test_the_merged_network_is_plain_and_input_row_is_output_row(
    exported: tuple[Path, Base, Any], trained: Run
) -> None:
    _, base, (network, _) = exported
    ids = base.tokenizer.convert_tokens_to_ids(list(TOKENS))
    first, head = network.model.embed_tokens, network.lm_head
    assert (type(first), type(head)) == (torch.nn.Embedding, torch.nn.Linear)
    if network.config.tie_word_embeddings:
        assert torch.equal(first.weight[ids], head.weight[ids])
    for name, rows in rows_of(trained).items():
        matrix = first if "embed_tokens" in name else head
        assert torch.equal(matrix.weight[ids], rows)


def test_the_exported_file_keeps_the_ids_and_passes_the_gate(exported: tuple[Path, Base, Any]) -> None:
    path, base, (network, parity) = exported
    assert parity.ready, parity.problem
    facts = check_gguf(path, arrays=True)
    types = facts.metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, Array)
    with Engine(path, context=256, parallel=1) as engine:
        for token in TOKENS:
            number = base.tokenizer.convert_tokens_to_ids(token)
            assert engine.token_id(token) == number
            assert engine.tokenize(f"a{token}b", begin=False).count(number) == 1
            assert engine.detokenize([number]) == token
            assert types.values[number] == 4  # USER_DEFINED
    name = "token_embd.weight"
    assert read_tensors(path)[name].shape[0] == network.config.vocab_size == len(types.values)


def test_a_copied_vocabulary_gets_the_tokens_appended(place: Path, tmp_path: Path) -> None:
    """The default base's vocabulary comes from its own GGUF file, which knows nothing of them."""
    plain, base = (load_base(str(place), dtype=torch.float32) for _ in range(2))
    ids = add_reflection_tokens(base)
    common: dict[str, Any] = {"template": base.template, "name": "tiny", "licence": "apache-2.0"}
    for name, each, source in (("old", plain, None), ("new", base, tmp_path / "old.gguf")):
        write_llama_gguf(
            tmp_path / f"{name}.gguf",
            state=each.model.state_dict(),
            config=each.model.config,
            tokenizer=each.tokenizer,
            end_of_turn=each.end_of_turn,
            copy_tokenizer_from=source,
            **common,
        )
    texts = check_gguf(tmp_path / "new.gguf", arrays=True).metadata["tokenizer.ggml.tokens"]
    assert isinstance(texts, Array)
    assert [texts.values[number] for number in ids] == list(TOKENS)
    with Engine(tmp_path / "new.gguf", context=256, parallel=1) as engine:
        assert [engine.token_id(token) for token in TOKENS] == ids
        assert engine.vocab_size == base.model.config.vocab_size
        text = f"the dose{TOKENS[0]} is{TOKENS[-2]}two{TOKENS[-1]}"
        expected = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert engine.tokenize(text, begin=False) == expected


def test_the_gates_prompts_are_those_of_the_backend() -> None:
    held = passage("The dose is 3 at noon.", 1)
    question = Question(
        id="q",
        kind="open",
        question="What is the dose?",
        answer="It is 3.",
        about="d",
        gold=[Quote(doc_id="d", quote="The dose is 3 at noon.")],
        split="exam",
    )
    nobody = Question(id="u", kind="unanswerable", question="Who?", answer=None, about="d", split="exam")

    def turns(backend: Any) -> dict[str, tuple[str, str]]:
        found = exam_turns(
            [question, nobody],
            lambda _: [held],
            system="S",
            abstain="I don't know.",
            count=2,
            backend=backend,
        )
        return {
            messages[1].content.rpartition("Question: ")[2]: (messages[1].content, completion)
            for messages, completion in found
        }

    asked, reply = turns("tokens")["What is the dose?"]
    assert "noon" not in asked
    assert reply == (
        "[Retrieval]<paragraph>Note 1\nThe dose is 3 at noon.</paragraph>[Relevant]"
        '"The dose is 3 at noon." [1]\nAnswer: It is 3.[Fully supported][Utility:5]'
    )
    assert turns("tokens")["Who?"][1].endswith("[Irrelevant]Answer: I don't know.[Utility:1]")
    asked, reply = turns("text")["What is the dose?"]
    assert "noon" in asked
    assert reply == f"The passage is informative.\n{turns('none')['What is the dose?'][1]}"
    assert turns("text")["Who?"][1].startswith("The passage is distracting.\n")
    assert turns("grader") == turns("none")
