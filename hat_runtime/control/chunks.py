"""Where a prompt is cut into chunks.

The cloud computes nothing until the first chunk has been computed on the device and has crossed the link. So the first
chunks are smaller: the pipeline of device, link and cloud fills sooner, at the price of one or two more passes, which
overlap with the transfer of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

RAMP = (4, 2)
"""The first chunks are this many times shorter than the others."""
SHORTEST = 32
"""Tokens below which a chunk is not shortened: a pass over fewer costs the cloud as much."""


def chunk_ends(start: int, total: int, chunk: int) -> Iterator[int]:
    """The ends of the chunks of the tokens start <= i < total, in order; the last one is `total`.

    Args:
        start: first token to send, 0 <= start < total.
        total: tokens of the text.
        chunk: tokens of a chunk, at least 1. What fits into one chunk is not cut.

    Raises:
        ValueError: chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but must be at least 1")
    return varying_ends(start, total, lambda position: chunk)


def varying_ends(start: int, total: int, size_at: Callable[[int], int]) -> Iterator[int]:
    """The same with a size, at least 1, that is asked for anew at the beginning of each chunk."""
    end, ramp = start, list(RAMP)
    while end < total:
        chunk = size_at(end)
        if end == start and total - start <= chunk:
            ramp.clear()
        while ramp and chunk // ramp[0] < SHORTEST:
            ramp.pop(0)
        end = min(end + (chunk // ramp.pop(0) if ramp else chunk), total)
        yield end


def cut_at(ends: Iterable[int], borders: Sequence[int], start: int) -> Iterator[int]:
    """The ends of chunks that begin at `start`, with more ends at the ascending `borders` that lie inside."""
    for end in ends:
        yield from (border for border in borders if start < border < end)
        yield end
        start = end
