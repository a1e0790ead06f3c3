"""Every attention backend equals attention written out, for any mix of lengths, windows and shared calls."""

from __future__ import annotations

import random

import pytest
import torch

from hat_runtime.model.attention import BACKENDS, AttentionBatch, Span, make_backend
from hat_runtime.model.pages import KvCache

HEADS, KV_HEADS, DIM = 4, 2, 8
MIXES: dict[str, list[tuple[int, int] | tuple[int, int, tuple[int, ...]]]] = {
    "one token": [(1, 9)],
    "many decoding": [(1, 3), (1, 40), (1, 1), (1, 25)],
    "very different lengths": [(1, 1), (1, 300), (1, 2)],
    "prompt chunks": [(7, 0), (12, 20)],
    "a block and a bit after cached ones": [(280, 30), (3, 9)],
    "blocks of a prompt": [(290, 0), (1, 4)],
    "alternatives": [(8, 9, (10, 11, 11)), (1, 3), (4, 0, (0, 2)), (2, 7, (8,))],
    "alternatives alone": [(7, 21, (22, 22, 23))],
    "everything": [(1, 5), (6, 0), (1, 30), (4, 17), (1, 0), (1, 2)],
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("together", [False, True], ids=["scattered", "in a run"])
def test_equals_attention_written_out(name: str, window: int | None, mix: str, together: bool) -> None:
    torch.manual_seed(3)
    cache = KvCache(
        layers=1, kv_heads=KV_HEADS, head_dim=DIM, num_pages=1024, page_tokens=1, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    cache.keys.normal_()
    cache.values.normal_()
    free = random.Random(3).sample(range(1024), 1024)
    spans, first, lowest = [], 0, 0
    for count, start, *more in MIXES[mix]:
        aside = more[0] if more else ()
        if together:
            run = slice(lowest, lowest := lowest + start + count)
            spans.append(Span(first, count, start, torch.arange(run.start, run.stop), run, aside))
        else:
            slots = torch.tensor([free.pop() for _ in range(start + count)])
            spans.append(Span(first, count, start, slots, aside=aside))
        first += count
    query = torch.randn(HEADS, first, DIM)
    backend = make_backend(name)
    out = backend.attend(0, query, AttentionBatch(backend, cache, spans), scale=0.3, window=window)

    for span in spans:
        for row in range(span.count):
            own = span.start + row
            position = (*range(span.start, span.total - len(span.aside)), *span.aside)[row]
            oldest = 0 if window is None else max(0, position - window + 1)
            slots = span.slots[[*range(oldest, position), own]]
            for head in range(HEADS):
                kv_head = head // (HEADS // KV_HEADS)
                weights = (cache.keys[0, slots, kv_head] @ query[head, span.first + row] * 0.3).softmax(-1)
                expected = weights @ cache.values[0, slots, kv_head]
                torch.testing.assert_close(out[span.first + row, head], expected, atol=1e-5, rtol=1e-5)
