"""Runs a range of layers over new tokens of many sequences in one packed pass. Device and cloud both use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from hat_runtime.model.attention import AttentionBackend, AttentionBatch, Span
from hat_runtime.model.hf import DecoderSlice
from hat_runtime.model.pages import KvCache, PagedSequence


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence: hidden states [n, hidden_size] for positions start <= p < start + n."""

    sequence: PagedSequence
    start: int
    hidden: torch.Tensor
    wanted: bool = True
    """False: only its keys and values matter, as for all but the last chunk of a prompt."""
    offset: int = 0
    """Position of the sequence's first token in its text, where the cache does not begin with the text."""
    aside: tuple[int, ...] = ()
    """Positions of the last rows, start <= p <= start + n - len(aside), where these are alternatives: tokens that may
    stand at p instead. Each sees what is before p and itself, nothing sees it, and the sequence does not keep it: a
    token tree (SpecInfer, arXiv 2305.09781) whose side branches are one token long."""


class Layers(Protocol):
    """What computes hidden states from hidden states, with keys and values in a paged cache."""

    device: torch.device
    hidden_size: int

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Packed rows [T, width] at positions int64 [T] -> [T, hidden_size]; writes the new keys and values."""


class LayerRunner:
    """A slice of layers with the KV cache of its sequences. Not thread-safe: one thread owns it."""

    def __init__(self, layers: Layers, cache: KvCache, backend: AttentionBackend) -> None:
        self.layers = layers
        self.cache = cache
        self.backend = backend

    @torch.inference_mode()
    def run(self, segments: list[Segment]) -> list[torch.Tensor]:
        """One pass over any mix of segments, each of another sequence.

        A segment that starts before its sequence's end truncates the sequence first; afterwards the sequence ends
        with the segment, its alternatives left out.

        Args:
            segments: at least one; the hidden states may be on any device.

        Returns:
            The last layer's output of each segment, [n, hidden_size], on the layers' device; [0, hidden_size] where
            no segment's output is wanted.

        Raises:
            ValueError: a segment starts beyond its sequence's end.
            OutOfPages: too few free pages; no sequence has grown.
        """
        for segment in segments:
            if segment.start > segment.sequence.length:
                raise ValueError(
                    f"segment starts at {segment.start}, but its sequence has {segment.sequence.length} tokens"
                )
            if segment.start < segment.sequence.length:
                self.cache.truncate(segment.sequence, segment.start)
        for segment in segments:
            self.cache.reserve(segment.sequence, segment.start + len(segment.hidden))

        spans: list[Span] = []
        first = 0
        for segment in segments:
            count = len(segment.hidden)
            total = segment.start + count
            slots, run = self.cache.slots(segment.sequence, total), self.cache.run(segment.sequence, total)
            spans.append(Span(first, count, segment.start, slots, run, segment.aside))
            first += count
        device = self.layers.device
        hidden = torch.cat([segment.hidden.to(device) for segment in segments])
        positions = torch.cat(
            [span.positions(device) + segment.offset for span, segment in zip(spans, segments, strict=True)]
        )
        cache_only = not any(segment.wanted for segment in segments)
        batch = AttentionBatch(self.backend, self.cache, spans, cache_only=cache_only)
        deep = self.layers.forward(hidden, positions, batch)
        for segment in segments:
            segment.sequence.length = segment.start + len(segment.hidden) - len(segment.aside)
        return [deep[span.first : span.first + span.count] for span in spans]


def make_cache(layers: DecoderSlice, *, num_pages: int, page_tokens: int) -> KvCache:
    """A KV cache that fits the slice: same device and dtype."""
    return KvCache(
        layers=len(layers.layers),
        kv_heads=layers.kv_heads,
        head_dim=layers.head_dim,
        num_pages=num_pages,
        page_tokens=page_tokens,
        dtype=layers.dtype,
        device=layers.device,
    )
