"""Text from documents, users and other models is untrusted: nothing in it may act as a control token.

A tokenizer matches control tokens (``<|im_end|>``, ``<|eot_id|>`` …) and Self-RAG's added tokens anywhere, so a
document that contains one would speak with the model's own voice. They are taken apart, the words stay readable.
"""

from __future__ import annotations

import re

# Llama 3's <|eot_id|>, SmolLM2's <|im_end|>, <file_sep> and <issue_start>, Llama 2's </s> and [INST], DeepSeek's
# <｜end▁of▁sentence｜>, Mistral's [TOOL_CALLS] …
_CONTROL = re.compile(r"<(/?[|｜]?[A-Za-z0-9_▁-]{1,64}[|｜]?)>")
_INSTRUCTION = re.compile(
    r"\[(/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|MODEL_SETTINGS|THINK|ARGS|CALL_ID"
    r"|IMG|IMG_BREAK|IMG_END|PREFIX|MIDDLE|SUFFIX))\]"
)
_REFLECTION = re.compile(
    r"\[\s*(No\s+Retrieval|Retrieval|Continue\s+to\s+Use\s+Evidence|Relevant|Irrelevant|Fully\s+supported"
    r"|Partially\s+supported|No\s+support\s*/\s*Contradictory|Utility\s*:\s*[1-5])\s*\]"
    r"|<\s*(/?\s*paragraph)\s*>",
    re.IGNORECASE,
)
_FENCE = re.compile(r"`{3,}")


def fenced(text: str) -> str:
    """Untrusted text between fences that are longer than any fence inside it."""
    longest = max((len(fence) for fence in _FENCE.findall(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{text.strip()}\n{fence}"


def disarm(text: str) -> str:
    """``text`` with everything that looks like a reflection token taken apart: ``( Relevant )``."""
    return _REFLECTION.sub(lambda match: f"( {match[1] or match[2]} )", text)


def neutralise(text: str) -> str:
    """``text`` with anything that looks like a control or a reflection token taken apart (``< |im_end| >``)."""
    return _INSTRUCTION.sub(r"( \1 )", _CONTROL.sub(r"< \1 >", disarm(text)))
