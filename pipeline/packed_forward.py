"""The forward pass over a pack: embedding, decoder layers, final norm; no head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.fused_layer import Reading, fusable, run_layer
from pipeline.layout import Layout, layout_of
from pipeline.levers import Levers
from pipeline.row_attention import RowAttention, Span

if TYPE_CHECKING:
    from pipeline.layer_cache import LayerCache
    from pipeline.packing import Pack


def hidden_of(
    network: Any, packed: Pack, layout: Layout, levers: Levers, below: LayerCache | None = None
) -> torch.Tensor:
    """The hidden states after which something is predicted, normed: [predictions, width]."""
    model, device = network.model, network.device
    first = below.layers if below else 0
    if below:
        _fill(below, network, packed, levers)
        hidden = below.find(packed, layout).to(device)
    else:
        hidden = model.embed_tokens(layout.input_ids.to(device))
    hidden, places = _run(model, hidden, layout, levers, range(first, len(model.layers)))
    result: torch.Tensor = model.norm(hidden[places.to(device)])
    return result


def _fill(below: LayerCache, network: Any, packed: Pack, levers: Levers) -> None:
    """Run the frozen layers for rows that they have not seen; each alone, so that packs make no difference."""
    for single in packed.singles:
        if not below.knows(single.rows[0]):
            layout = layout_of(single)
            with torch.no_grad():
                hidden = network.model.embed_tokens(layout.input_ids.to(network.device))
                hidden, _ = _run(network.model, hidden, layout, levers, range(below.layers))
            below.put(single.rows[0], hidden)


def _run(
    model: Any, hidden: torch.Tensor, layout: Layout, levers: Levers, numbers: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states after the layers, and where among them something is predicted."""
    positions = layout.position_ids[None].to(hidden.device)
    cos, sin = model.rotary_emb(hidden[None], position_ids=positions)
    twice = levers.checkpointing == "on" and torch.is_grad_enabled()
    spans = layout.spans
    for number in numbers:
        layer = model.layers[number]
        if not (levers.fused_layers and levers.matmul_attention and fusable(layer)):
            hidden = _plain(layer, hidden, (cos, sin), positions, layout, levers, twice)
            continue
        if number == len(model.layers) - 1 and levers.last_layer and layout.wanted is not None:
            some, tokens, places = layout.last_spans()
            return run_layer(layer, hidden, Reading(cos[0], sin[0], some, tokens, twice)), places
        hidden = run_layer(layer, hidden, Reading(cos[0], sin[0], spans, checkpoint=twice))
    return hidden, layout.places


def _plain(
    layer: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    layout: Layout,
    levers: Levers,
    twice: bool,
) -> torch.Tensor:
    """Transformers' own layer."""

    def call(states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = layer(
            states[None],
            position_embeddings=rotary,
            position_ids=positions,
            layout=layout,
            matmul=levers.matmul_attention and states.device.type == "cpu",
        )
        return result[0]

    if twice:
        again: torch.Tensor = checkpoint(call, hidden, use_reentrant=False)
        return again
    return call(hidden)


def attend_packed(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: None,
    *,
    scaling: float,
    dropout: float = 0.0,
    layout: Layout,
    matmul: bool,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row. query [1, heads, tokens, width]; key, value with fewer heads."""
    if matmul and not dropout:
        out = RowAttention.apply(query[0], key[0], value[0], layout.spans, scaling)  # type: ignore[no-untyped-call]
        return out[None], None
    return _by_kernel(module.num_key_value_groups, query, key, value, layout.spans, scaling, dropout), None


def _by_kernel(
    groups: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """PyTorch's fused kernel, row by row."""
    parts = []
    for span in spans:
        assert not span.prefix  # shared with `matmul_attention` only, and without dropout (`training_loop`)
        rows = slice(span.start, span.last)
        part = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, rows],
            key[:, :, rows].repeat_interleave(groups, dim=1),
            value[:, :, rows].repeat_interleave(groups, dim=1),
            is_causal=True,
            scale=scaling,
            dropout_p=dropout,
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


def no_mask(*_: Any, **__: Any) -> None:
    """Rows are told apart by the layout."""
