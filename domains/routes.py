"""What the training methods of ``[train] method`` are allowed, and what they bring where a key is left out.

``qlora`` trains beside NF4 weights and is merged and rounded again for serving. The others train the very blocks
that the GGUF file holds: the file's format follows from their grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from domains.config import DomainConfig

Method = Literal["qlora", "qalora", "qat", "grid-lora"]
Grid = Literal["Q4_0", "Q4_1", "Q8_0"]

# The first one is taken where [train] grid is left out.
GRIDS: Mapping[str, tuple[Grid, ...]] = {
    "qlora": (),
    "qalora": ("Q4_1", "Q4_0"),
    "qat": ("Q4_0", "Q4_1"),
    "grid-lora": ("Q8_0", "Q4_0", "Q4_1"),
}
# An adapter that is constant inside a block has 1/32 of the inputs: it wants a several times higher rate.
LEARNING_RATES: Mapping[str, float] = {"qlora": 1e-3, "qalora": 3e-3, "qat": 1e-3, "grid-lora": 1e-3}
_BLOCKS = ("Q4_0", "Q4_1", "Q8_0")
ON_BASE = {"qalora", "grid-lora"}  # methods that keep the codes of a base on the grid
MOST_VERDICTS = 3  # passages of a row of SAIL's (arXiv 2305.15225 §3)
LEAST_LABELS = 20  # of a task of the trained critic; fewer say too little
# Keys of [reflect] that only some back-ends read; beside "none" they may stand.
_REFLECTING: Mapping[tuple[str, ...], tuple[str, ...]] = {
    (
        "threshold",
        "relevance_weight",
        "support_weight",
        "utility_weight",
        "sequence_weight",
        "form",
        "beam",
        "depth",
        "fit",
        "drafts",
        "no_retrieval_share",
        "partial_share",
        "unsupported_share",
    ): ("tokens",),
    ("passages", "critic", "critic_sample", "max_unparsed"): ("tokens", "text"),
    ("drop_unsupported",): ("tokens", "grader"),
    (
        "judge",
        "judge_base_url",
        "judge_model",
        "judge_api_key_env",
        "judge_gguf",
        "judge_timeout_s",
        "rewrites",
    ): ("grader",),
    ("distracting",): ("text", "grader"),
}
_INSIDE = {"qalora", "qat"}  # methods whose adapter lies inside the weight


def complete_train(values: Mapping[str, Any]) -> dict[str, Any]:
    """``[train]`` with the method's own grid and learning rate where the table names none."""
    method = values.get("method", "qlora")
    if not isinstance(method, str) or method not in GRIDS:
        return dict(values)  # its type is checked next
    own: dict[str, Any] = {"learning_rate": LEARNING_RATES[method]}
    if GRIDS[method]:
        own["grid"] = GRIDS[method][0]
    return own | dict(values)


def complete_export(values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole file with ``[export]`` following the grid where it names no formats of its own."""
    train, export = values.get("train", {}), values.get("export", {})
    if not isinstance(train, Mapping) or not isinstance(export, Mapping):
        return dict(values)
    grid = complete_train(train).get("grid")
    if grid is None:
        return dict(values)
    return dict(values) | {"export": {"serve": grid, "formats": [grid]} | dict(export)}


def contradictions(config: DomainConfig) -> list[str]:
    """Settings that can't go together, each with what to write instead."""
    train, found = config.train, []
    allowed = GRIDS[train.method]
    if train.grid is not None and train.grid not in allowed:
        choice = " or ".join(repr(grid) for grid in allowed) or "none: it trains beside NF4 weights"
        return [f"train.grid = {train.grid!r}: method = {train.method!r} knows {choice}"]
    if train.base_rounding != "search" and train.method not in ON_BASE:
        found.append(
            f"train.base_rounding = {train.base_rounding!r}: method = {train.method!r} has no base that was rounded to "
            'the grid before training; leave it out, or write method = "qalora" or "grid-lora"'
        )
    if train.grid is not None and config.export.serve != train.grid:
        found.append(
            f"export.serve = {config.export.serve!r}: method = {train.method!r} trains the blocks that are served; "
            f'leave serve out, or write serve = "{train.grid}", or another [train] grid or method = "qlora"'
        )
    if train.grid is not None and config.reflect.backend == "tokens":
        found.append(
            f"train.method = {train.method!r}: [reflect] backend = 'tokens' trains rows of the embedding, which only "
            'method = "qlora" does; write that and leave grid out, or backend = "text"'
        )
    if train.grid is not None and config.export.rounding != "llama.cpp":
        found.append(
            f"export.rounding = {config.export.rounding!r}: method = {train.method!r} trains the blocks that are served, "
            'so nothing is rounded; leave rounding out, or write [train] method = "qlora"'
        )
    elif config.export.rounding not in {"llama.cpp", "search"} and config.export.serve not in _BLOCKS:
        found.append(
            f"export.rounding = {config.export.rounding!r}: made for the grids {', '.join(_BLOCKS)}, not for "
            f'serve = {config.export.serve!r}; write one of these in serve, or rounding = "llama.cpp"'
        )
    if train.method in _INSIDE and train.dropout:
        found.append(
            f"train.dropout = {train.dropout}: the adapter of method = {train.method!r} lies inside the weight, where "
            "no input can be dropped; write dropout = 0"
        )
    return found + _unserved(config)


def _unserved(config: DomainConfig) -> list[str]:
    """Settings with which questions would be answered from something that is not there, or rows be written twice."""
    reflect, found = config.reflect, []
    if config.serve.yes_no == "evidence" and not config.calibrate.enabled:
        found.append(
            "serve.yes_no = 'evidence': fitted by the calibrate stage, which [calibrate] enabled = false leaves out; "
            'write enabled = true, or yes_no = "student"'
        )
    if reflect.drafts == "explained" and config.curate.rationale_in_target:
        found.append(
            "curate.rationale_in_target = true: [reflect] drafts = 'explained' writes the rationale behind the answer already; "
            "leave one of them out"
        )
    if config.serve.options == "evidence" and not config.retrieve.lexical_weight:
        found.append(
            "serve.options = 'evidence': it compares the options by their lexical scores, which [retrieve] lexical_weight = 0 "
            'leaves out; write another weight, or options = "student"'
        )
    if reflect.backend == "text" and config.retrieve.top_k > MOST_VERDICTS:
        found.append(
            f"retrieve.top_k = {config.retrieve.top_k}: [reflect] backend = 'text' learns verdicts on at most {MOST_VERDICTS} "
            f"passages; write at most {MOST_VERDICTS}, or another backend"
        )
    return found


def idle(config: DomainConfig) -> dict[str, str]:
    """Settings that would do nothing beside another one, by their names; each with what to write instead."""
    train, curate, reflect = config.train, config.curate, config.reflect
    found = {}
    for key in ("kl_weight", "kl_temperature", "kl_teacher"):
        if train.objective == "ce" and getattr(train, key) != type(train).model_fields[key].default:
            found[f"train.{key}"] = (
                f"train.{key} = {getattr(train, key)!r}: objective = 'ce' has no divergence; leave {key} out, or write "
                'objective = "ce+kl"'
            )
    for key in ("evidence", "retrieved_share"):
        if (
            reflect.backend in {"tokens", "text"}
            and getattr(curate, key) != type(curate).model_fields[key].default
        ):
            found[f"curate.{key}"] = (
                f"curate.{key} = {getattr(curate, key)!r}: [reflect] backend = {reflect.backend!r} draws the passages of "
                f'its rows itself; leave {key} out, or write backend = "none" or "grader"'
            )
    for keys, users in _REFLECTING.items():
        for key in keys:
            value = getattr(reflect, key)
            if reflect.backend not in {"none", *users} and value != type(reflect).model_fields[key].default:
                names = " or ".join(f'"{name}"' for name in users)
                found[f"reflect.{key}"] = (
                    f"reflect.{key} = {value!r}: backend = {reflect.backend!r} does not read it; leave {key} out, or write "
                    f"backend = {names}"
                )
    if reflect.backend != "none" and config.serve.votes > 1:
        found["serve.votes"] = (
            f"serve.votes = {config.serve.votes}: [reflect] backend = {reflect.backend!r} writes one reply; leave votes out, or "
            'write backend = "none"'
        )
    return found
