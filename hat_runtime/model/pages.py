"""KV cache in pages, so that a sequence is shortened by dropping pages, without a copy.

Invariant, checked by `KvCache.check`: free + owned == total, and no page has two owners.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from hat_runtime.errors import HatError


class OutOfPages(HatError):
    """The pool has fewer free pages than were asked for; nothing was allocated."""


@dataclass(eq=False)
class PagedSequence:
    """One session's place in the cache: `length` tokens in `pages`, in order."""

    length: int = 0
    pages: list[int] = field(default_factory=list)


class KvCache:
    """Keys and values of all sequences: per layer [num_pages * page_tokens, kv_heads, head_dim].

    Not thread-safe: one thread owns it.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the whole pool, zeroed: now, so that a machine with too little memory fails here and not at night.

        Raises:
            ValueError: num_pages or page_tokens is not positive.
        """
        if num_pages < 1 or page_tokens < 1:
            raise ValueError(f"num_pages={num_pages} and page_tokens={page_tokens} must be at least 1")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        shape = (layers, num_pages * page_tokens, kv_heads, head_dim)
        # torch.zeros takes memory that the system only promises, page by page as it is used.
        self.keys = torch.empty(shape, dtype=dtype, device=device).zero_()
        self.values = torch.empty(shape, dtype=dtype, device=device).zero_()
        self.layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))
        """(keys, values) of each layer."""
        self._free: deque[int] = deque(range(num_pages))

    @property
    def free_pages(self) -> int:
        """Pages that no sequence owns."""
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """Most tokens that one sequence could hold if it had the pool to itself."""
        return self.num_pages * self.page_tokens

    def pages_needed(self, sequence: PagedSequence, total_tokens: int) -> int:
        """Pages to allocate before `sequence` can hold `total_tokens`; 0 if it can already."""
        return max(0, -(-total_tokens // self.page_tokens) - len(sequence.pages))

    def reserve(self, sequence: PagedSequence, total_tokens: int) -> None:
        """Give `sequence` the pages for `total_tokens` tokens. Its length stays.

        Raises:
            OutOfPages: too few free pages; nothing changed.
        """
        need = self.pages_needed(sequence, total_tokens)
        if need > len(self._free):
            raise OutOfPages(f"{need} pages needed, {len(self._free)} of {self.num_pages} free")
        sequence.pages.extend(self._free.popleft() for _ in range(need))

    def truncate(self, sequence: PagedSequence, length: int) -> None:
        """Forget all tokens from position `length` on, and give back the pages that held nothing else.

        Raises:
            ValueError: length is negative or beyond the sequence's.
        """
        if not 0 <= length <= sequence.length:
            raise ValueError(f"cannot truncate a sequence of {sequence.length} tokens to {length}")
        keep = -(-length // self.page_tokens)
        dropped = sequence.pages[keep:]
        del sequence.pages[keep:]
        sequence.length = length
        self._zero(dropped)
        self._free.extend(dropped)

    def release(self, sequence: PagedSequence) -> None:
        """Give back everything that the sequence owns."""
        self.truncate(sequence, 0)

    def slots(self, sequence: PagedSequence, total_tokens: int) -> torch.Tensor:
        """Where the first `total_tokens` positions lie in the pool: int64 [total_tokens], on the cache's device."""
        pages = torch.tensor(sequence.pages[: -(-total_tokens // self.page_tokens)], dtype=torch.int64)
        offsets = torch.arange(self.page_tokens, dtype=torch.int64)
        flat = (pages[:, None] * self.page_tokens + offsets).view(-1)[:total_tokens]
        return flat.to(self.keys.device)

    def run(self, sequence: PagedSequence, total_tokens: int) -> slice | None:
        """The slots of the first `total_tokens` positions where its pages follow one another in the pool, else None."""
        pages = sequence.pages[: -(-total_tokens // self.page_tokens)]
        # The last page first: this runs in every pass, and scattered sequences are told by it alone.
        if (
            not pages
            or pages[-1] != pages[0] + len(pages) - 1
            or pages != list(range(pages[0], pages[-1] + 1))
        ):
            return None
        first = pages[0] * self.page_tokens
        return slice(first, first + total_tokens)

    def check(self, sequences: Iterable[PagedSequence]) -> None:
        """Raise RuntimeError unless every page is free or has exactly one owner among `sequences`."""
        owned = [page for sequence in sequences for page in sequence.pages]
        everything = sorted([*owned, *self._free])
        if everything != list(range(self.num_pages)):
            raise RuntimeError(
                f"KV pages are not accounted for: {len(owned)} owned + {len(self._free)} free of {self.num_pages}"
            )

    def _zero(self, pages: list[int]) -> None:
        # The next owner may be another tenant: nothing of this one may be left to read.
        if not pages:
            return
        index = torch.tensor(pages, device=self.keys.device)
        for tensor in (self.keys, self.values):
            layers, _, kv_heads, head_dim = tensor.shape
            tensor.view(layers, self.num_pages, self.page_tokens, kv_heads, head_dim).index_fill_(1, index, 0)
