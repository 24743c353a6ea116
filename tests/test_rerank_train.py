"""What the reranker learns from, its losses, and its training; numpy's scores are torch's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.config import RerankSection
from domains.errors import ConfigError, StageError
from domains.records import Document, Passage
from pipeline.ranking import Judged, fit_weight, hit_at_1, measure, ndcg_at_10, rank_documents
from pipeline.rerank_loss import late_interaction, rerank_loss
from pipeline.rerank_pools import Candidate, Pool, Row, build_pools, draw, split_rows, standard_scores
from pipeline.rerank_tower import PassageStates, QuestionTower
from pipeline.rerank_train import Recipe, Trained, evaluate, score_pool, train_reranker
from rag.embed import MiniLMEmbedder, WordHashEmbedder, minilm_encoder
from rag.index import open_index, update_index
from rag.lexical import K1, B, LexicalIndex
from rag.rerank import Reranker, Tower, compress_passages
from rag.token_vectors import quantize

THINGS = [
    "pump",
    "valve",
    "boiler",
    "saw",
    "press",
    "lathe",
    "drill",
    "crane",
    "winch",
    "kiln",
    "mixer",
    "grinder",
]
CARE = {
    "cleaned": "It is cleaned each evening with a dry cloth and a soft brush against dust.",
    "stored": "It stands in a dry room below twenty degrees, away from acids and salt.",
    "repaired": "A broken one goes to the workshop, where the bearings and seals are replaced.",
}
RECIPE = Recipe(
    loss="kl", tau1=1.0, tau2=5.0, draws=6, epochs=2, batch=5, learning_rate=3e-3,
    rank=4, alpha=8.0, dropout=0.1, dimensions=32, seed=1,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("on_one_thread")


def passages() -> list[Passage]:
    return [
        Passage(
            passage_id=f"{thing}-{what}",
            doc_id=thing,
            title=thing.title(),
            heading="",
            text=text,
            start=0,
            end=len(text),
        )
        for thing in THINGS
        for what, text in CARE.items()
    ]


def rows() -> list[Row]:
    return [
        Row(f"{thing}-{what}", f"How is the {thing} {what}?", f"{thing.title()}: {text}", thing)
        for thing in THINGS
        for what, text in CARE.items()
    ]


@pytest.fixture(scope="module")
def pools() -> list[Pool]:
    return build_pools(rows(), passages(), k1=0.9, b=0.4, size=8)[0]


@pytest.fixture(scope="module")
def states() -> PassageStates:
    done: list[int] = []
    states = PassageStates.encode(passages(), MiniLMEmbedder(), advance=done.append)
    assert sum(done) == len(passages())
    return states


# -- pools -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75)])
def test_all_candidates_have_the_score_of_one_scorer(k1: float, b: float) -> None:
    pools, without = build_pools(rows(), passages(), k1=k1, b=b, size=5)
    assert without == []
    scorer = LexicalIndex.build(passages(), k1=k1, b=b)
    position = {passage.passage_id: i for i, passage in enumerate(passages())}
    for row, pool in zip(rows(), pools, strict=True):
        assert (pool.item_id, pool.question) == (row.item_id, row.question)
        scores = scorer.scores(row.rationale)
        assert [cand.s_r for cand in pool.cands] == pytest.approx(
            [scores[position[cand.pid]] for cand in pool.cands], abs=1e-4
        )
        names = [cand.pid for cand in pool.cands]
        assert len(set(names)) == len(names)
        by_rationale = [cand.pid for cand in pool.cands if cand.origin == "r"]
        assert by_rationale == [passages()[i].passage_id for i in scorer.search(row.rationale, top_k=5)]
        by_question = {passages()[i].passage_id for i in scorer.search(row.question, top_k=5)}
        assert set(names) == by_question | set(by_rationale)
        assert pool.cands[0].s_r == max(cand.s_r for cand in pool.cands)


SHELF = [
    Passage(passage_id=str(i), doc_id=f"d{i}", title="", heading="", text=text, start=0, end=len(text))
    for i, text in enumerate(["boiler boiler valve", "boiler crane", "winch winch winch saw kiln"])
]


def by_hand(*, k1: float, b: float) -> list[float]:
    """Lucene's BM25 of the shelf for "boiler boiler": a term that the query repeats counts twice."""
    lengths = [len(passage.text.split()) for passage in SHELF]
    mean = sum(lengths) / 3
    idf = np.log(1 + (3 - 2 + 0.5) / (2 + 0.5))

    def weight(count: int, length: int) -> float:
        return float(idf * count / (count + k1 * (1 - b + b * length / mean)))

    return [2 * weight(2, lengths[0]), 2 * weight(1, lengths[1]), 0.0]


def test_bm25_is_the_textbooks() -> None:
    """The two parameters are those that were asked for."""
    found = LexicalIndex.build(SHELF, k1=1.2, b=0.6).scores("boiler, boiler")
    assert found == pytest.approx(by_hand(k1=1.2, b=0.6), rel=1e-4)
    assert LexicalIndex.build(SHELF).scores("unheard of").tolist() == [0.0] * 3


def test_bm25_is_pyserinis_in_the_index_and_in_the_rerankers_pools(tmp_path: Path) -> None:
    """KARD retrieves with k1 = 0.9 and b = 0.4; the index and the targets of the reranker must not drift apart."""
    assert (K1, B) == (0.9, 0.4)
    assert (RerankSection().k1, RerankSection().b) == (K1, B)
    wanted = by_hand(k1=0.9, b=0.4)
    assert LexicalIndex.build(SHELF).scores("boiler, boiler") == pytest.approx(wanted, rel=1e-4)
    row = Row("q", "Which crane?", "boiler boiler", "d0")
    ((pool,), _) = build_pools([row], SHELF, k1=RerankSection().k1, b=RerankSection().b, size=3)
    assert {cand.pid: cand.s_r for cand in pool.cands} == pytest.approx(
        {"0": wanted[0], "1": wanted[1]}, rel=1e-4
    )
    shelf = [Document(doc_id=each.doc_id, title="x", text=each.text, source="t") for each in SHELF]
    embedder = WordHashEmbedder()
    update_index(tmp_path, shelf, embedder=embedder, max_chars=400, overlap_chars=0)
    index = open_index(tmp_path, embedder=embedder)
    try:
        stored = index.score_lexical("boiler, boiler", top_k=3)
        rebuilt = LexicalIndex.build(index.passages, k1=0.9, b=0.4).scores("boiler, boiler")
        names = [passage.passage_id for passage in index.passages]
        assert stored == pytest.approx({names[i]: rebuilt[i] for i in np.flatnonzero(rebuilt)}, rel=1e-6)
    finally:
        index.close()


def test_rows_that_find_nothing_are_named() -> None:
    odd = Row("odd", "Quid?", "Nihil.", "none")
    pools, without = build_pools([odd, *rows()], passages(), k1=0.9, b=0.4, size=4)
    assert without == ["odd"]
    assert len(pools) == len(rows())


def pool_of(rationale: int, question: int) -> Pool:
    origins = ["r"] * rationale + ["q"] * question
    cands = [
        Candidate(pid=str(i), s_r=float(len(origins) - i), origin=origin) for i, origin in enumerate(origins)
    ]
    return Pool(item_id="x", question="?", cands=cands)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(2, 12), st.integers(0, 2**20))
def test_a_draw_has_the_best_and_nothing_twice(r: int, q: int, count: int, seed: int) -> None:
    pool = pool_of(r, q)
    drawn = draw(pool, count=count, rng=np.random.default_rng(seed))
    assert drawn[0] == 0
    assert len(drawn) == len(set(drawn)) == min(count, r + q)
    by_question = sum(pool.cands[i].origin == "q" for i in drawn)
    if r >= count - count // 2 and q >= count // 2:
        assert by_question == count // 2


def test_draws_differ_from_epoch_to_epoch_and_repeat_by_seed() -> None:
    pool = pool_of(32, 20)
    rng, same = np.random.default_rng(5), np.random.default_rng(5)
    first, second = (draw(pool, count=8, rng=rng) for _ in range(2))
    assert first != second
    assert draw(pool, count=8, rng=same) == first


def test_scores_are_standardised_per_pool() -> None:
    scores = standard_scores(pool_of(5, 3))
    assert scores.mean() == pytest.approx(0, abs=1e-6)
    assert scores.std() == pytest.approx(1, abs=1e-6)
    flat = Pool(item_id="x", question="?", cands=[Candidate(pid=p, s_r=2.0, origin="r") for p in ("a", "b")])
    assert standard_scores(flat).tolist() == [0.0, 0.0]


def test_no_document_is_on_both_sides() -> None:
    learn, held = split_rows(rows(), share=0.25, seed=0)
    assert len(learn) + len(held) == len(rows())
    assert {row.group for row in held}.isdisjoint(row.group for row in learn)
    assert len({row.group for row in held}) == 3
    assert split_rows(rows(), share=0.25, seed=0) == (learn, held)
    assert split_rows(rows(), share=0.25, seed=1) != (learn, held)
    with pytest.raises(StageError, match="can't be split"):
        split_rows(rows()[:3], share=0.5, seed=0)


# -- losses ------------------------------------------------------------------------------------------


@given(st.integers(0, 2**20), st.floats(0.1, 10), st.floats(0.1, 100))
def test_kl_is_zero_at_equality_and_never_below(seed: int, tau1: float, tau2: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, targets = torch.randn(2, 3, 5, generator=generator)
    mask = torch.rand(3, 5, generator=generator) > 0.4
    mask[:, 0] = True
    loss = rerank_loss(scores, targets, mask, kind="kl", tau1=tau1, tau2=tau2)
    assert float(loss) >= -1e-6
    equal = rerank_loss(targets * (tau2 / tau1) + 7, targets, mask, kind="kl", tau1=tau1, tau2=tau2)
    assert float(equal) == pytest.approx(0, abs=1e-5)


def test_kl_is_the_one_of_torch() -> None:
    scores, targets = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(
        (scores / 3).log_softmax(1), (targets / 0.7).softmax(1), reduction="batchmean"
    )
    loss = rerank_loss(scores, targets, torch.ones(4, 8, dtype=torch.bool), kind="kl", tau1=0.7, tau2=3.0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_ce_wants_the_best_candidate() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 9.0]])
    targets = torch.tensor([[0.1, 3.0, -1.0], [2.0, 1.0, 5.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss = rerank_loss(scores, targets, mask, kind="ce", tau1=1.0, tau2=2.0)
    first = torch.nn.functional.cross_entropy(scores[:1] / 2, torch.tensor([1]))
    second = torch.nn.functional.cross_entropy(scores[1:, :2] / 2, torch.tensor([0]))
    assert float(loss) == pytest.approx(float(first + second) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("tau1", "tau2"), [(0.0, 1.0), (1.0, 0.0), (-3.0, 1.0), (1.0, -300.0), (float("nan"), 1.0)]
)
@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_temperatures_are_above_zero(kind: str, tau1: float, tau2: float) -> None:
    one = torch.zeros(1, 2)
    with pytest.raises(ConfigError, match="temperatures"):
        rerank_loss(one, one, torch.ones(1, 2, dtype=torch.bool), kind=kind, tau1=tau1, tau2=tau2)


def test_gradients_are_finite_where_candidates_are_missing() -> None:
    scores = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    rerank_loss(scores, torch.randn(2, 4), mask, kind="kl", tau1=1.0, tau2=1.0).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[0, 2:].abs().sum() == 0


@settings(max_examples=30)
@given(st.integers(0, 2**20))
def test_padding_takes_no_part(seed: int) -> None:
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((rng.integers(1, 5), 6)).astype(np.float32)
    shelf = [rng.standard_normal((n, 6)).astype(np.float32) for n in rng.integers(1, 6, size=3)]
    wide = np.full((1, 3, 7, 6), 50.0, dtype=np.float32)  # padding that would win
    mask = np.zeros((1, 3, 7), dtype=bool)
    for i, tokens in enumerate(shelf):
        wide[0, i, : len(tokens)], mask[0, i, : len(tokens)] = tokens, True
    padded = np.full((1, 6, 6), 50.0, dtype=np.float32)
    padded[0, : len(query)] = query
    query_mask = np.arange(6)[None] < len(query)
    found = late_interaction(*(torch.from_numpy(each) for each in (padded, query_mask, wide, mask)))
    expected = [float((query @ tokens.T).max(axis=1).sum()) for tokens in shelf]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


# -- the tower and its training ------------------------------------------------------------------------


def train(pools: list[Pool], states: PassageStates, recipe: Recipe = RECIPE) -> Trained:
    return train_reranker(pools[:18], pools[-6:], states, recipe)


@pytest.fixture(scope="module")
def trained(pools: list[Pool], states: PassageStates) -> Trained:
    return train(pools, states)


def test_the_untrained_tower_is_minilm(states: PassageStates) -> None:
    axes = np.eye(16, 384, dtype=np.float32)
    tower = QuestionTower(axes, rank=4, alpha=8.0, dropout=0.1, seed=0)
    tower.set_training(False)
    texts = ["How is the pump cleaned?", "Saw"]
    vectors, mask = tower.questions(texts)
    embedder = MiniLMEmbedder()
    for i, hidden in enumerate(minilm_encoder({}).encode_tokens(embedder.token_ids(texts))):
        assert int(mask[i].sum()) == len(hidden)
        assert np.abs(vectors[i, : len(hidden)].detach().numpy() - hidden[:, :16]).max() < 1e-4
    assert tower.export()[0] == {}


@pytest.mark.parametrize("rank", [0, 4])
def test_numpy_scores_are_torchs(pools: list[Pool], states: PassageStates, rank: int) -> None:
    axes = states.principal_axes(32, sample=100, seed=0)
    tower = QuestionTower(axes, rank=rank, alpha=8.0, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    tower.set_training(False)
    pool = pools[0]
    with torch.no_grad():
        expected = score_pool(tower, states, pool).numpy()
    changed, compressor = tower.export()
    assert all(("query" in name or "value" in name) and "weight" in name for name in changed) == (rank > 0)
    embedder = MiniLMEmbedder()
    hidden = minilm_encoder(changed).encode_tokens(embedder.token_ids([pool.question]))[0]
    kept = {pid: states.gather([[pid]])[0].numpy() for pid in (cand.pid for cand in pool.cands)}
    query = hidden @ compressor.T
    found = [float((query @ (kept[c.pid] @ compressor.T).T).max(axis=1).sum()) for c in pool.cands]
    assert np.abs(found / np.abs(expected) - expected / np.abs(expected)).max() < 1e-4

    # In the product the passages lie in eight bits: the order of clearly different scores stays.
    shelf = {passage.passage_id: passage for passage in passages()}
    vectors = compress_passages([shelf[cand.pid] for cand in pool.cands], compressor, embedder)
    reranker = Reranker(
        Tower(changed, compressor),
        vectors,
        {cand.pid: i for i, cand in enumerate(pool.cands)},
        fused_weight=0.0,
        embedder=embedder,
    )
    rough = reranker.scores(pool.question, [cand.pid for cand in pool.cands])
    assert np.abs(rough - expected).max() < 0.02 * np.abs(expected).max()


def test_training_lowers_the_held_out_loss(trained: Trained) -> None:
    assert [entry.epoch for entry in trained.history] == [0, 1, 2]
    assert trained.best == min(trained.history, key=lambda entry: entry.loss)
    assert trained.best.loss < 0.9 * trained.history[0].loss
    assert trained.steps == 2 * 4
    assert trained.changed
    assert trained.compressor.shape == (32, 384)
    for entry in trained.history:
        assert 0 <= entry.top1 <= entry.top3 <= entry.top5 <= 1
        assert 0 <= entry.hit1 <= 1
        assert 0 < entry.ndcg10 <= 1


def test_same_seed_same_reranker(pools: list[Pool], states: PassageStates, trained: Trained) -> None:
    again = train(pools, states)
    assert again.history == trained.history
    assert again.compressor.tobytes() == trained.compressor.tobytes()
    assert {name: tensor.tobytes() for name, tensor in again.changed.items()} == {
        name: tensor.tobytes() for name, tensor in trained.changed.items()
    }


def test_an_epoch_that_makes_it_worse_is_not_kept(pools: list[Pool], states: PassageStates) -> None:
    wild = train(pools, states, replace(RECIPE, learning_rate=3.0, epochs=1))
    assert wild.best.epoch == 0
    assert wild.changed == {}
    axes = states.principal_axes(32, sample=1000, seed=RECIPE.seed)
    assert wild.compressor.tobytes() == axes.tobytes()


def test_the_evaluation_counts_places(pools: list[Pool], states: PassageStates) -> None:
    """A pool whose targets are the tower's own scores is ordered perfectly."""
    axes = states.principal_axes(32, sample=1000, seed=0)
    tower = QuestionTower(axes, rank=4, alpha=8.0, dropout=0.0, seed=0)
    own: list[Pool] = []
    reverse: list[Pool] = []
    for pool in pools[:3]:
        with torch.no_grad():
            scores = score_pool(tower, states, pool).numpy()
        for target, sign in ((own, 1), (reverse, -1)):
            order = np.argsort(-sign * scores)
            cands = [
                Candidate(
                    pid=pool.cands[i].pid,
                    s_r=float(100 + sign * scores[i] - sign * scores.mean()),
                    origin="r",
                )
                for i in order
            ]
            target.append(Pool(item_id=pool.item_id, question=pool.question, cands=cands))
    good = evaluate(tower, own, states, RECIPE, epoch=0)
    bad = evaluate(tower, reverse, states, RECIPE, epoch=0)
    assert (good.top1, good.hit1) == (1.0, 1.0)
    assert good.ndcg10 == pytest.approx(1.0)
    assert (bad.top1, bad.top3, bad.top5, bad.hit1) == (0.0, 0.0, 0.0, 0.0)
    assert bad.loss > good.loss


def test_a_batch_is_packed_and_placed(states: PassageStates) -> None:
    names = [passage.passage_id for passage in passages()[:3]]
    packed, places, there = states.gather([names, names[1:2]])
    assert there.tolist() == [[True, True, True], [True, False, False]]
    axes = np.eye(8, 384, dtype=np.float32)
    tower = QuestionTower(axes, rank=2, alpha=2.0, dropout=0.0, seed=0)
    vectors = tower.passages(packed, places)
    for i, pool in enumerate([names, names[1:2]]):
        for j, name in enumerate(pool):
            own = states.gather([[name]])[0]
            assert int(places[i, j].sum()) == len(own)
            assert torch.allclose(vectors[i, j, : len(own)], own[:, :8], atol=1e-5)
            assert vectors[i, j, len(own) :].abs().sum() == 0
    assert places[1, 1:].sum(dim=1).tolist() == [1, 1]


# -- rankings ----------------------------------------------------------------------------------------


def test_a_document_stands_where_its_best_passage_does() -> None:
    assert rank_documents(["a", "b", "a", "c"], [1.0, 3.0, 4.0, 3.0]) == ["a", "b", "c"]
    assert hit_at_1(["a", "b"], {"b"}) == 0.0
    assert hit_at_1([], {"b"}) == 0.0
    assert ndcg_at_10(["a", "b"], {"b"}) == pytest.approx(1 / np.log2(3))
    assert ndcg_at_10(["b", "x", "a"], {"a", "b"}) == pytest.approx((1 + 0.5) / (1 + 1 / np.log2(3)))
    assert ndcg_at_10([*"klmnopqrst", "b"], {"b"}) == 0.0


def test_the_weight_is_the_one_that_finds_most() -> None:
    fused = np.array([1 / 61, 1 / 62, 1 / 63])
    right = Judged(["a", "b", "c"], fused, np.array([0.0, 0.3, -3.0], dtype=np.float32), {"b"})
    fitted = fit_weight([right])
    assert fitted.questions == 1
    assert fitted.weight == pytest.approx(8 * right.scores.std())  # the largest of those that do as well
    assert (fitted.hybrid_hit1, fitted.reranked_hit1) == (0.0, 1.0)
    assert (fitted.p, fitted.helps) == (1.0, False)  # one question shows nothing
    eight = fit_weight([right] * 8)
    assert eight.p == pytest.approx(2 / 2**8)
    assert eight.helps
    mixed = fit_weight([right] * 8 + [Judged(right.documents, fused, right.scores, {"a"})] * 3)
    assert (mixed.reranked_hit1 > mixed.hybrid_hit1, mixed.helps) == (True, False)
    # Where the reranker is wrong and the fused order right, the fused order counts more.
    wrong = Judged(["a", "b", "c"], fused * [50, 1, 1], np.array([0.0, 1.0, 0.0], dtype=np.float32), {"a"})
    fitted = fit_weight([wrong])
    assert fitted.weight > 0
    assert fitted.reranked_hit1 == 1.0
    assert measure([wrong], 0.0)[0, 0] == 0.0
    assert measure([wrong], None)[0, 0] == 1.0
    assert not fitted.helps
    nothing = Judged([], np.zeros(0), np.zeros(0, dtype=np.float32), {"a"})
    assert fit_weight([nothing]).questions == 0


def test_quantize_keeps_an_empty_shelf() -> None:
    assert quantize([], dimensions=8).count == 0
