"""From prompts to token ids, with the mark of what is the user's in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hat_runtime.data import Prompt
from hat_runtime.device.chat import PromptEncoder
from hat_runtime.errors import UsageError

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")
"""Written for the audit."""

_UNLIKE = ("0", "Zz")
"""Two messages that share no token at either end, to see what the chat template puts around every message."""


def encode(prompt: Prompt, encoder: PromptEncoder) -> tuple[list[int], slice]:
    """Token ids of a prompt as a device sends it, and which of them are the user's.

    Raises:
        UsageError: a chat prompt, but the model has no chat template.
    """
    if not prompt.chat:
        ids = encoder.encode_text(prompt.text)
        return ids, slice(0, len(ids))
    ids = _chat(prompt.text, encoder)
    others = [_chat(text, encoder) for text in _UNLIKE]
    before = min(_common(ids, other) for other in others)
    after = min(_common(ids[:before:-1], other[:before:-1]) for other in others)
    return ids, slice(before, len(ids) - after)


def _chat(text: str, encoder: PromptEncoder) -> list[int]:
    if not encoder.has_chat_template:
        raise UsageError("the model has no chat template, which chat prompts need")
    return encoder.encode_chat([{"role": "user", "content": text}])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts begin with."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
