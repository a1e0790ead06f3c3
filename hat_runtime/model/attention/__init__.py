"""Attention backends over the paged KV cache, chosen by name at start."""

from __future__ import annotations

from hat_runtime.errors import UsageError
from hat_runtime.model.attention.base import AttentionBackend, AttentionBatch, Span
from hat_runtime.model.attention.sdpa import SdpaAttention

BACKENDS: dict[str, type[AttentionBackend]] = {SdpaAttention.name: SdpaAttention}

__all__ = ["BACKENDS", "AttentionBackend", "AttentionBatch", "Span", "make_backend"]


def make_backend(name: str) -> AttentionBackend:
    """The backend called `name`. Raises UsageError for one that does not exist."""
    if name not in BACKENDS:
        raise UsageError(f"--attention {name!r}: write one of {', '.join(BACKENDS)}")
    return BACKENDS[name]()
