"""A LoRA adapter in PEFT's own format, in files that say nothing about this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from domains.jsonl import write_text_atomic


def save_peft(adapted: Any, folder: Path, *, base_name: str) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``; same adapter, same bytes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sorted(state.items())}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = adapted.peft_config["default"].to_dict() | {"inference_mode": True}
    config["base_model_name_or_path"] = base_name  # not the place where it lies on this machine
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"
    write_text_atomic(folder / "adapter_config.json", text)
