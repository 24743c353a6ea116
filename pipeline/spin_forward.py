"""A network whose weights are rotated and put onto the grid anew in every forward pass, for learning rotations.

The weights themselves stay frozen and unrotated; gradients reach R1 and the R2s through the rounding as if it
were the identity (straight-through). Loss: KL to the unrotated full-precision network, or cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.grids import GridName, fake_quantize
from pipeline.next_token_kl import next_token_kl
from pipeline.rotate import per_kv_head, rotated_output_columns, rotated_value_rows

if TYPE_CHECKING:
    import torch


class SpunNetwork:
    """Computes losses of the rotated, rounded network.

    Args:
        network: a ``LlamaForCausalLM`` with folded norms where R1 is used.
        grid: of the linear layers inside the blocks.
        r1: [D, D] or None.
        r2s: one per layer, or None.
    """

    def __init__(
        self,
        network: Any,
        grid: GridName,
        r1: torch.Tensor | None,
        r2s: Sequence[torch.Tensor] | None,
    ) -> None:
        self.network, self.grid, self.r1, self.r2s = network, grid, r1, r2s

    def kl(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean KL per token, in nats, from the full-precision network's next-token distribution."""
        import torch

        with torch.no_grad():
            target = self._hidden(ids)
        head = self.network.lm_head
        return next_token_kl(head, target, head, self._spun_hidden(ids))

    def cross_entropy(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next token, in nats."""
        from torch.utils.checkpoint import checkpoint

        hidden = self._spun_hidden(ids)
        total = hidden.new_zeros(())
        for row, mine in zip(ids, hidden, strict=True):
            total = total + checkpoint(self._row_entropy, row, mine, use_reentrant=False)
        return total / (ids.numel() - len(ids))

    def _row_entropy(self, row: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        import torch

        logits = self.network.lm_head(mine[:-1]).float()
        return torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.network.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def _spun_hidden(self, ids: torch.Tensor) -> torch.Tensor:
        with self._spinning():
            hidden = self._hidden(ids)
        return hidden if self.r1 is None else _precisely(hidden, self.r1.T)

    @contextmanager
    def _spinning(self) -> Iterator[None]:
        model = self.network.model
        handles = []
        patched: list[Any] = []
        try:
            if self.r1 is not None:
                r1 = self.r1
                handles.append(
                    model.embed_tokens.register_forward_hook(lambda _m, _i, out: _precisely(out, r1))
                )
            for index, layer in enumerate(model.layers):
                for linear, turn in self._turns(index, layer):
                    linear.forward = _spun_forward(linear, turn, self.grid)
                    patched.append(linear)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for linear in patched:
                del linear.forward

    def _turns(self, index: int, layer: Any) -> list[tuple[Any, Callable[[torch.Tensor], torch.Tensor]]]:
        """How the weights of one layer are rotated; row vectors, W [out, in]."""
        attention, mlp = layer.self_attn, layer.mlp
        r2 = None if self.r2s is None else per_kv_head(self.network, self.r2s[index])

        def read(weight: torch.Tensor) -> torch.Tensor:
            return weight if self.r1 is None else weight @ self.r1

        def write(weight: torch.Tensor) -> torch.Tensor:
            return weight if self.r1 is None else self.r1.T @ weight

        def value(weight: torch.Tensor) -> torch.Tensor:
            return read(weight) if r2 is None else rotated_value_rows(read(weight), r2)

        def output(weight: torch.Tensor) -> torch.Tensor:
            return write(weight if r2 is None else rotated_output_columns(weight, r2))

        readers = [attention.q_proj, attention.k_proj, mlp.gate_proj, mlp.up_proj]
        return [
            *((linear, read) for linear in readers),
            (attention.v_proj, value),
            (attention.o_proj, output),
            (mlp.down_proj, write),
        ]


def _spun_forward(
    linear: Any, turn: Callable[[torch.Tensor], torch.Tensor], grid: GridName
) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):  # bfloat16 would round the weight before the grid does
            weight = fake_quantize(turn(linear.weight), grid)
        return torch.nn.functional.linear(inputs, weight)

    return forward


def _precisely(hidden: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """A rotation of the stream in float32, whatever the layers compute in: the reference has none to lose bits in."""
    import torch

    with torch.autocast("cpu", enabled=False):
        return hidden.float() @ rotation
