"""Merges the adapter into the very weights it was trained on: NF4 (or a grid's), read back to float32.

Merging into the original full-precision weights would be merging into another network: the adapter has
learned to make up for NF4's rounding (spec of QLoRA, arXiv 2305.14314). PEFT's own merge rounds the sum to
NF4 again, which loses part of the adapter; here the sum stays in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from domains.errors import ModelError

if TYPE_CHECKING:
    import torch

    from pipeline.methods.method import Trained


def check_biases(base: str, config: Mapping[str, Any]) -> None:
    """Pass if the linear layers of a base have no biases: neither `merge_adapter` nor the GGUF writer has a place for them.

    Args:
        base: its name.
        config: its config.json.

    Raises:
        ModelError: they have.
    """
    found = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if found:
        raise ModelError(
            f"the linear layers of the base model {base!r} have biases ({' and '.join(found)} in its config.json)",
            expected="layers without biases, as Llama's: they could be trained on, but not exported",
            next_step="name another base in [student] of domain.toml",
        )


def plain_network(trained: Trained) -> Any:
    """A trained student as one ordinary network: merged, unless its adapter lies in the weights already.

    Takes ``trained.network`` apart, see `merge_adapter`.
    """
    inside = bool(trained.packed) and not trained.low_rank
    return trained.network if inside else merge_adapter(trained.network)


def merge_adapter(model: Any) -> Any:
    """The network without an adapter: every linear layer plain, float32, base + adapter.

    Embeddings and norms stay as they are, but for the rows of added tokens that were trained. The model given is taken apart: layers move one by one, so memory
    never holds both networks.

    Args:
        model: a PEFT model over ``LlamaForCausalLM``, its linear layers NF4 or plain.

    Returns:
        The ``LlamaForCausalLM`` inside, in eval mode; its ``state_dict`` has the usual names.

    Raises:
        ModelError: there is no adapter in the model, it has biases, or a merged weight is no number.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import TrainableTokensWrapper

    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_biases(network.config.name_or_path, network.config.to_dict())
    merged = 0
    with torch.no_grad():
        for path, module in list(network.named_modules()):
            if isinstance(module, LoraLayer):
                _replace(network, path, _merged_weight(module, path))
                merged += 1
        for path, module in list(network.named_modules()):
            if isinstance(module, TrainableTokensWrapper):
                parent, _, name = path.rpartition(".")
                setattr(network.get_submodule(parent), name, _with_rows(module.token_adapter, path))
        for path, module in list(network.named_modules()):
            if isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear:
                _replace(network, path, _base_weight(module))
    if not merged:
        raise ModelError(
            "the trained model has no adapter",
            expected="LoRA on its linear layers",
            next_step="preceptor train DOMAIN",
        )
    network.tie_weights()
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    return network.float().eval()


def _with_rows(layer: Any, path: str) -> Any:
    """The plain embedding or head, its trained rows in place."""
    import torch

    base = layer.get_base_layer()
    weight = base.weight.detach().float()
    for name in layer.active_adapters:
        weight[layer.token_indices[name]] = layer.trainable_tokens_delta[name].detach().float().to(weight)
    _check_finite(weight, path)
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    return base


def _check_finite(weight: torch.Tensor, path: str) -> None:
    if not weight.isfinite().all():
        raise ModelError(
            f"the merged weight of {path!r} holds numbers that are not finite",
            expected="a training run that converged",
            next_step="lower [train] learning_rate, then preceptor train DOMAIN",
        )


def _merged_weight(layer: Any, path: str) -> torch.Tensor:
    weight = _base_weight(layer.get_base_layer())
    for name in layer.active_adapters:
        delta = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
        weight = weight + layer.scaling[name] * delta.to(weight.device)
    _check_finite(weight, path)
    return weight


def _base_weight(layer: Any) -> torch.Tensor:
    """The weight a layer computes with, float32 [out, in]."""
    from bitsandbytes.nn import Linear4bit

    if isinstance(layer, Linear4bit):
        from pipeline.student import dequantized_base_weight

        weight: torch.Tensor = dequantized_base_weight(layer)
        return weight
    plain: torch.Tensor = layer.weight.detach().float()
    return plain


def _replace(network: Any, path: str, weight: torch.Tensor) -> None:
    import torch

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, linear)
