"""Attention by torch's scaled_dot_product_attention: right on any device, the reference for other backends.

Masks are explicit except for a sequence's first tokens: SDPA's is_causal aligns the mask top-left, which is wrong as
soon as a sequence has cached tokens and more than one new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from hat_runtime.model.attention.base import AttentionBackend, AttentionBatch, Span
from hat_runtime.model.pages import KvCache

PADDING_LIMIT = 3
"""Sequences are decoded in one padded call while it reads at most this many times the tokens that they have."""

BLOCK_ROWS = 256
"""New tokens of one sequence that share a call. SDPA also computes what the mask hides, half of a block's square."""


@dataclass
class _Decoding:
    """Sequences with one new token each, padded to one call."""

    rows: torch.Tensor
    """int64 [B]: their rows in the packed tensors."""
    slots: torch.Tensor
    """int64 [B, longest]: their cache slots, padded with slot 0."""
    totals: torch.Tensor
    """int64 [B]: how many of the slots are theirs."""


@dataclass
class _Plan:
    decoding: _Decoding | None
    others: list[Span]
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)
    """Additive masks by (first packed row, or -1 for the decoding call; window), made in the first layer."""


class SdpaAttention(AttentionBackend):
    """Gathers the pages of each sequence, unless they lie together, and calls SDPA on it.

    All sequences that decode one token share a call.
    """

    name = "sdpa"

    def prepare(self, spans: list[Span], cache: KvCache) -> _Plan:
        """Which sequences share a call."""
        single = [span for span in spans if span.count == 1]
        longest = max((span.total for span in single), default=0)
        if len(single) < 2 or longest * len(single) > PADDING_LIMIT * sum(span.total for span in single):
            return _Plan(None, spans)
        slots = torch.zeros(len(single), longest, dtype=torch.int64, device=cache.keys.device)
        for row, span in enumerate(single):
            slots[row, : span.total] = span.slots
        decoding = _Decoding(
            rows=torch.tensor([span.first for span in single], device=slots.device),
            slots=slots,
            totals=torch.tensor([span.total for span in single], device=slots.device),
        )
        return _Plan(decoding, [span for span in spans if span.count > 1])

    def attend(
        self, layer: int, query: torch.Tensor, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """See AttentionBackend.attend."""
        keys, values = batch.cache.layers[layer]
        heads, tokens, head_dim = query.shape
        plan: _Plan = batch.plan
        if len(batch.spans) == 1:  # one session alone: no buffer to gather into
            return self._attend_span(plan, batch.spans[0], query, keys, values, scale, window)
        out = query.new_empty(tokens, heads, head_dim)
        if (decoding := plan.decoding) is not None:
            attended = F.scaled_dot_product_attention(
                query.transpose(0, 1)[decoding.rows].unsqueeze(2),
                keys[decoding.slots].transpose(1, 2),
                values[decoding.slots].transpose(1, 2),
                attn_mask=_decoding_mask(plan, decoding, window, query),
                scale=scale,
                enable_gqa=True,
            )
            out[decoding.rows] = attended.squeeze(2)
        for span in plan.others:
            rows = slice(span.first, span.first + span.count)
            out[rows] = self._attend_span(plan, span, query[:, rows], keys, values, scale, window)
        return out

    @staticmethod
    def _attend_span(
        plan: _Plan,
        span: Span,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """One sequence: query [heads, count, head_dim] -> [count, heads, head_dim]."""
        oldest = 0 if window is None else max(0, span.start - window + 1)
        plain = (
            span.start == 0 and span.count > 1 and not span.aside and (window is None or window >= span.count)
        )
        mask = None if plain else _span_mask(plan, span, oldest, window, query)
        k, v = (_of_span(cached, span, oldest).transpose(0, 1)[None] for cached in (keys, values))
        blocks = []
        size = span.count if mask is None else BLOCK_ROWS
        for first in range(0, span.count, size):
            last = min(first + size, span.count)
            seen = span.start + last - oldest
            attended = F.scaled_dot_product_attention(
                query[None, :, first:last],
                k[:, :, :seen],
                v[:, :, :seen],
                attn_mask=None if mask is None else mask[first:last, :seen],
                is_causal=plain,
                scale=scale,
                enable_gqa=True,
            )
            blocks.append(attended[0].transpose(0, 1))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _of_span(cached: torch.Tensor, span: Span, oldest: int) -> torch.Tensor:
    """Keys or values of one sequence from position `oldest` on, [total - oldest, kv_heads, head_dim]."""
    if span.run is not None:
        return cached[span.run.start + oldest : span.run.stop]
    return cached.index_select(0, span.slots[oldest:])


def _decoding_mask(plan: _Plan, decoding: _Decoding, window: int | None, query: torch.Tensor) -> torch.Tensor:
    """Additive mask [B, 1, 1, longest] in the query's dtype: padding and what the window has left behind."""
    mask = plan.masks.get((-1, window))
    if mask is None:
        position = torch.arange(decoding.slots.shape[1], device=query.device)[None, :]
        hidden = position >= decoding.totals[:, None]
        if window is not None:
            hidden |= position < decoding.totals[:, None] - window
        mask = plan.masks[(-1, window)] = _additive(hidden, query)[:, None, None]
    return mask


def _span_mask(
    plan: _Plan, span: Span, oldest: int, window: int | None, query: torch.Tensor
) -> torch.Tensor | None:
    """Additive mask [count, total - oldest] in the query's dtype, or None where a single token sees everything."""
    if span.count == 1:
        return None
    mask = plan.masks.get((span.first, window))
    if mask is None:
        new = span.positions(query.device)[:, None]
        own = torch.arange(span.start, span.total, device=query.device)[:, None]
        seen = torch.arange(oldest, span.total, device=query.device)[None, :]
        hidden = (seen >= new) & (seen != own)
        if window is not None:
            hidden |= seen <= new - window
        mask = plan.masks[(span.first, window)] = _additive(hidden, query)
    return mask


def _additive(hidden: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(
        hidden, float("-inf")
    )
