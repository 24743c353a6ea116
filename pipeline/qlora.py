"""QLoRA (arXiv 2305.14314): the base's block weights rounded to NF4, LoRA (arXiv 2106.09685) on all of them.

bitsandbytes' ``Linear4bit`` reads a weight back from NF4 at every use, in the forward and the backward pass.
Where memory allows, the weights are read back once and kept in the arithmetic's type: the same numbers, so
the same network, and faster on CPUs. Its other path is avoided altogether: in eval mode on CPUs with
AVX512-BF16, ``Linear4bit.forward`` repacks the weight in place and multiplies with bfloat16 block scales,
which is another network than the trained one. `attach_lora` gives every layer its own forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.levers import free_memory
from pipeline.quiet_libraries import known_peft_warnings, quiet_bitsandbytes

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_KEPT_SHARE = 1 / 3  # of the free memory that weights read back from NF4 may take


def training_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_dtype(*, bf16: bool = True) -> torch.dtype:
    """bfloat16 where it is allowed and the hardware multiplies it (CUDA, AVX512-BF16 or AMX), else float32."""
    if not bf16:
        return torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if found.get("avx512_bf16") or found.get("amx_bf16") else torch.float32


def to_training(model: Any, dtype: torch.dtype) -> Any:
    """Move a network to `training_device` and its weights into the arithmetic's type, in place.

    Weights only: ``model.to(dtype)`` would round buffers too, and with them the frequencies of the rotary embedding,
    which transformers keeps in float32 whatever it loads weights in. In bfloat16 these are off by up to 0.3 %, at
    position 1,000 an angle of more than one radian.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype=dtype)
    return model.to(training_device())


def quantize_nf4(model: Any, *, keep_quantized: bool | None = None) -> bool:
    """Round the linear layers of the blocks to NF4 with double quantization, in place.

    Embeddings, norms and the head stay as they are. The layers compute in the model's own dtype.

    Args:
        model: a ``LlamaForCausalLM``; moved to `training_device`.
        keep_quantized: keep ``Linear4bit`` layers (0.5 byte a weight) instead of plain layers that hold the
            rounded weights; by default on CUDA, and where the plain ones take over a third of free memory.

    Returns:
        Whether the layers were kept quantized.
    """
    with quiet_bitsandbytes():
        from bitsandbytes.nn import Linear4bit, Params4bit
    device = training_device()
    linears = [(path, m) for path, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]
    if keep_quantized is None:
        size = sum(linear.weight.numel() * linear.weight.element_size() for _, linear in linears)
        keep_quantized = device.type == "cuda" or size > _KEPT_SHARE * free_memory()
    for path, linear in linears:
        dtype = linear.weight.dtype
        rounded = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        rounded.weight = weight.to(device)
        if linear.bias is not None:
            rounded.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
        if keep_quantized:
            parent, _, name = path.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), name, rounded)
        else:
            linear.weight = nn.Parameter(_read_back(rounded, dtype), requires_grad=False)
    model.to(device)
    return keep_quantized


def dequantized_base_weight(layer: Any) -> torch.Tensor:
    """The weight that a base layer computes with, read back from NF4; float32 [out, in].

    Takes a ``Linear4bit``, or the plain layer that `quantize_nf4` left, whose weight already is that number.
    """
    weight: torch.Tensor = base_weight(layer, layer.compute_dtype if _is_4bit(layer) else layer.weight.dtype)
    return weight.detach().float()


def attach_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    token_rows: Sequence[int] = (),
    layers: int = 0,
) -> Any:
    """LoRA on every linear layer of the blocks; the adapter's own weights are float32.

    Args:
        model: a ``LlamaForCausalLM``.
        rank: of the adapter.
        alpha: its scaling is alpha / rank.
        dropout: on the adapter's input.
        seed: of its first values.
        token_rows: ids whose rows of the embedding and of the head are trained too (one and the same row where
            these are tied): a new token's row would stay as it was put there under LoRA alone.
        layers: only so many layers, the topmost; 0 = all.

    Returns:
        A PEFT model; only the adapter is trainable.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(BLOCK_LINEARS),
        layers_to_transform=_topmost(model, layers) if layers else None,
        layers_pattern="layers" if layers else None,
        bias="none",
        task_type="CAUSAL_LM",
        trainable_token_indices=_trained_rows(model, token_rows) if token_rows else None,
    )
    with torch.random.fork_rng(), known_peft_warnings():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    return own_forward(adapted)


def _topmost(model: Any, layers: int) -> list[int]:
    count = model.config.num_hidden_layers
    return list(range(max(0, count - layers), count))


def _trained_rows(model: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    matrices = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    return {name: list(ids) for name in matrices}


def load_adapter(model: Any, folder: Path) -> Any:
    """The PEFT model with the adapter saved in ``folder``, not trainable."""
    from peft import PeftModel

    with known_peft_warnings():
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    return own_forward(adapted)


def own_forward(adapted: Any) -> Any:
    """Give every adapter layer the forward pass of this module; see its docstring for why."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = partial(_lora_forward, layer)
        elif isinstance(layer, TrainableTokensLayer):
            for name, rows in list(layer.trainable_tokens_delta.items()):
                layer.trainable_tokens_delta[name] = nn.Parameter(rows.data.float(), rows.requires_grad)
            layer.forward = partial(_rows_forward, layer)
    return adapted


def _rows_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """An embedding or a head in which some rows are trained: only these take a gradient.

    PEFT copies the trained rows into the whole matrix in every pass and takes that matrix' gradient, which
    doubles the head's backward pass.
    """
    base = layer.get_base_layer()
    is_head = isinstance(base, nn.Linear)
    y = nn.functional.linear(x, base.weight) if is_head else nn.functional.embedding(x, base.weight)
    if layer.disable_adapters or layer.merged:
        return y
    (name,) = layer.active_adapters
    rows = layer.trainable_tokens_delta[name].to(y.dtype)
    ids = torch.tensor(layer.token_indices[name], device=y.device)
    if is_head:
        return y.index_copy(-1, ids, nn.functional.linear(x, rows))
    hits = x[..., None] == ids  # [..., rows]
    ours = nn.functional.embedding(hits.int().argmax(-1), rows)
    return torch.where(hits.any(-1, keepdim=True), ours, y)


def is_plain_lora(layer: Any) -> bool:
    """Whether a layer is `own_forward`'s LoRA, with one adapter and nothing random in it now."""
    forward = vars(layer).get("forward")
    if getattr(forward, "func", None) is not _lora_forward:
        return False
    if layer.disable_adapters or layer.merged:
        return True
    names = layer.active_adapters
    dropout = layer.lora_dropout[names[0]]
    return len(names) == 1 and not (layer.training and isinstance(dropout, nn.Dropout))


def _lora_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Base and adapter together: x Wᵀ + scaling · x Aᵀ Bᵀ, x being [..., in]."""
    base = layer.get_base_layer()
    bias = None if base.bias is None else base.bias.to(x.dtype)
    if layer.disable_adapters or layer.merged:
        return nn.functional.linear(x, base_weight(base, x.dtype), bias)
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout = layer.lora_dropout[name]
    dropped = dropout(x) if layer.training and isinstance(dropout, nn.Dropout) else None
    y: torch.Tensor = _LoraMatmul.apply(x, dropped, base, a, b, layer.scaling[name])  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


class _LoraMatmul(torch.autograd.Function):
    """Base and adapter in one step: keeps only x, and multiplies in x's dtype with float32 adapter weights.

    PEFT's own layer casts x and the result to float32 and back and keeps the copies for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        base: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        source = x if dropped is None else dropped
        flat = source.reshape(-1, source.shape[-1])
        low = flat @ a.to(x.dtype).T  # [tokens, rank]
        y = x.reshape(flat.shape) @ base_weight(base, x.dtype).T
        y.addmm_(low, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(flat, low, a, b)
        ctx.base, ctx.scaling, ctx.dropped = base, scaling, dropped is not None
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, low, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        d_low = (dy @ b.to(dy.dtype)).mul_(ctx.scaling)
        d_a = (d_low.T @ flat).to(a.dtype)
        d_b = (dy.T @ low).to(b.dtype).mul_(ctx.scaling)
        dx = dy @ base_weight(ctx.base, dy.dtype)
        through_adapter = a.to(dy.dtype)
        d_dropped = None
        if ctx.dropped:
            d_dropped = (d_low @ through_adapter).view(*grads[0].shape[:-1], -1)
        else:
            dx.addmm_(d_low, through_adapter)
        return dx.view(*grads[0].shape[:-1], -1), d_dropped, None, d_a, d_b, None


def base_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that a base layer multiplies with, [out, in] in ``dtype``."""
    if not _is_4bit(layer):
        plain: torch.Tensor = layer.weight
        return plain.to(dtype)
    return _read_back(layer, layer.compute_dtype).to(dtype)


def _read_back(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(dtype)


def _is_4bit(layer: Any) -> bool:
    return getattr(layer.weight, "quant_state", None) is not None
