"""In which type a machine trains: bfloat16 only where its hardware multiplies it."""

from __future__ import annotations

import pytest
import torch

from pipeline.qlora import training_dtype


def on_cpu(monkeypatch: pytest.MonkeyPatch, **capabilities: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.mark.parametrize(
    ("capabilities", "wanted"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True, "amx_tile": True}, torch.float32),
        ({"avx2": True}, torch.float32),  # another architecture names other capabilities
        ({}, torch.float32),
    ],
)
def test_the_cpu_is_asked(
    capabilities: dict[str, bool], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu(monkeypatch, **capabilities)
    assert training_dtype() == wanted
    assert training_dtype(bf16=False) == torch.float32  # the lever's switch


@pytest.mark.parametrize("supported", [True, False])
def test_a_graphics_card_speaks_for_itself(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch, avx512_bf16=not supported)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert training_dtype() == (torch.bfloat16 if supported else torch.float32)
