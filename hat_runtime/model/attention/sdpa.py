"""Attention by torch's scaled_dot_product_attention: right on any device, the reference for other backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hat_runtime.model.attention.base import AttentionBackend, AttentionBatch, Span
from hat_runtime.model.pages import KvCache


class SdpaAttention(AttentionBackend):
    """Gathers each sequence's pages and calls SDPA on it.

    Masks are explicit: SDPA's is_causal aligns the mask top-left, which is wrong as soon as a sequence has cached
    tokens and more than one new one.
    """

    name = "sdpa"

    def prepare(self, spans: list[Span], cache: KvCache) -> dict[tuple[int, int | None], torch.Tensor | None]:
        """An empty mask store, filled at the first layer that needs a mask of (span, window)."""
        return {}

    def attend(
        self, layer: int, query: torch.Tensor, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> torch.Tensor:
        """See AttentionBackend.attend."""
        keys, values = batch.cache.keys[layer], batch.cache.values[layer]
        heads, tokens, head_dim = query.shape
        out = query.new_empty(tokens, heads, head_dim)
        for index, span in enumerate(batch.spans):
            oldest = 0 if window is None else max(0, span.start - window + 1)
            slots = span.slots[oldest:]
            rows = slice(span.first, span.first + span.count)
            attended = F.scaled_dot_product_attention(
                query[None, :, rows],
                keys.index_select(0, slots).transpose(0, 1)[None],
                values.index_select(0, slots).transpose(0, 1)[None],
                attn_mask=self._mask(batch, index, span, oldest, window, query),
                scale=scale,
                enable_gqa=True,
            )
            out[rows] = attended[0].transpose(0, 1)
        return out

    @staticmethod
    def _mask(
        batch: AttentionBatch, index: int, span: Span, oldest: int, window: int | None, query: torch.Tensor
    ) -> torch.Tensor | None:
        """Additive mask [count, total - oldest] in the query's dtype, or None where a single token sees everything."""
        if span.count == 1:
            return None
        store: dict[tuple[int, int | None], torch.Tensor] = batch.plan
        mask = store.get((index, window))
        if mask is None:
            new = torch.arange(span.start, span.total, device=query.device)[:, None]
            seen = torch.arange(oldest, span.total, device=query.device)[None, :]
            hidden = seen > new
            if window is not None:
                hidden |= seen <= new - window
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            mask.masked_fill_(hidden, float("-inf"))
            store[(index, window)] = mask
        return mask
