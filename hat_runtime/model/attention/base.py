"""The seam between the layers and whatever computes attention over the paged KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from hat_runtime.model.pages import KvCache


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence in a packed pass: rows first <= i < first + count of the packed tensors."""

    first: int
    count: int
    start: int
    """Position of the first new token, which is also the number of tokens already cached."""
    slots: torch.Tensor
    """int64 [start + count]: where the sequence's positions lie in the cache, the new ones included."""
    run: slice | None = None
    """The same as a slice, where they follow one another: read and written without gathering."""
    aside: tuple[int, ...] = ()
    """Positions of the last rows, where these are alternatives to others (Segment.aside)."""

    @property
    def total(self) -> int:
        """Slots that the sequence uses in the pass."""
        return self.start + self.count

    def positions(self, device: torch.device) -> torch.Tensor:
        """Where the new tokens stand in the sequence: int64 [count]."""
        chain = torch.arange(self.start, self.total - len(self.aside), device=device)
        return torch.cat([chain, torch.tensor(self.aside, device=device)]) if self.aside else chain


class AttentionBatch:
    """What a backend prepares once per pass and reads in every layer."""

    def __init__(
        self, backend: AttentionBackend, cache: KvCache, spans: list[Span], *, cache_only: bool = False
    ) -> None:
        self.backend = backend
        self.cache = cache
        self.spans = spans
        self.cache_only = cache_only
        """Only keys and values are wanted: the last layer can end when it has stored them."""
        self.new_slots = torch.cat([span.slots[span.start :] for span in spans])
        """int64 [T]: where the packed new tokens go."""
        self._new_run = _new_run(spans)
        self.plan: Any = backend.prepare(spans, cache)
        self.rotation: Any = None
        """What packed layers prepare once per pass (packed_layer.py)."""

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the new tokens' keys and values, [kv_heads, T, head_dim] each, into a layer's cache."""
        keys, values = self.cache.layers[layer]
        for cached, new in ((keys, key), (values, value)):
            if self._new_run is not None:
                cached[self._new_run].copy_(new.transpose(0, 1))
            else:
                cached.index_copy_(0, self.new_slots, new.transpose(0, 1))


def _new_run(spans: list[Span]) -> slice | None:
    if len(spans) != 1 or (run := spans[0].run) is None:
        return None
    return slice(run.start + spans[0].start, run.stop)


class AttentionBackend(ABC):
    """Append attention: each new token attends to all tokens of its sequence up to itself (or the last `window`).

    An alternative attends to what is before its position, and to itself.

    Prompt chunks, verification of several tokens and plain decoding are the same call with other counts.
    """

    name: str

    @abstractmethod
    def prepare(self, spans: list[Span], cache: KvCache) -> Any:
        """Whatever can be computed once per pass, for all layers."""

    @abstractmethod
    def attend(
        self, layer: int, query: torch.Tensor, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of one layer over the cache, which already holds the new keys and values.

        Args:
            layer: index in the cache.
            query: [heads, T, head_dim], the packed new tokens.
            batch: this pass.
            scale: factor on the logits.
            window: number of positions that a token sees, itself included; None for all.

        Returns:
            [T, heads, head_dim]
        """
