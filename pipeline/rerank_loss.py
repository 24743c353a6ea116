"""Late interaction and the two losses of KARD's reranker (arXiv 2305.18395 §3.2; ColBERT, arXiv 2004.12832)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from domains.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def late_interaction(query: Tensor, query_mask: Tensor, passages: Tensor, passage_mask: Tensor) -> Tensor:
    """Score = Σ_i max_j <q_i, d_j>, [questions, candidates]; padding takes no part.

    Args:
        query: [questions, query tokens, dimensions].
        query_mask: [questions, query tokens], true for tokens, false for padding.
        passages: [questions, candidates, passage tokens, dimensions].
        passage_mask: [questions, candidates, passage tokens]; each passage has at least one token.
    """
    questions, candidates, tokens, size = passages.shape
    flat = passages.reshape(questions, candidates * tokens, size)
    products = (query @ flat.transpose(1, 2)).reshape(questions, -1, candidates, tokens)
    products = products.masked_fill(~passage_mask[:, None], float("-inf"))
    best = products.amax(dim=-1)  # [questions, query tokens, candidates]
    return best.masked_fill(~query_mask[..., None], 0.0).sum(dim=1)


def rerank_loss(
    scores: Tensor, targets: Tensor, mask: Tensor, *, kind: str, tau1: float, tau2: float
) -> Tensor:
    """How far the reranker's order is from the rationale's, in nats, averaged over the questions.

    ``kl``, the paper's: KL(softmax(targets / tau1) || softmax(scores / tau2)). ``ce``, the default of the released
    code: cross-entropy of softmax(scores / tau2) against the candidate with the highest target.
    The temperatures stay as they are: the release anneals both, which makes them negative at its defaults.

    Args:
        scores: the reranker's, [questions, candidates].
        targets: BM25 with the rationale, standardised, of the same shape.
        mask: true where there is a candidate.
        kind: ``kl`` or ``ce``.
        tau1: temperature of the targets.
        tau2: temperature of the scores.

    Raises:
        ConfigError: a temperature is not above 0.
    """
    if not (tau1 > 0 and tau2 > 0):
        raise ConfigError(
            f"temperatures tau1 = {tau1}, tau2 = {tau2}",
            expected="both above 0",
            next_step="mend [rerank] in domain.toml",
        )
    log_model = (scores / tau2).masked_fill(~mask, float("-inf")).log_softmax(dim=1)
    wanted = (targets / tau1).masked_fill(~mask, float("-inf"))
    if kind == "ce":
        return -log_model.gather(1, wanted.argmax(dim=1, keepdim=True)).mean()
    log_target = wanted.log_softmax(dim=1)
    # 0 · log 0 = 0 where there is no candidate
    terms = log_target.exp() * (log_target - log_model).masked_fill(~mask, 0.0)
    return terms.sum(dim=1).mean()
