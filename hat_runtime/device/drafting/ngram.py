"""Prompt lookup: what followed the last tokens when they were there before (LLMA, arXiv 2304.04487)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hat_runtime.device.drafting.base import Draft, Drafter, DraftState, Wish, certain

LONGEST = 8
"""Tokens of the tail that are looked for."""
CONFIDENCE = (0.0, 0.15, 0.35, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
"""How much a match of so many tokens is trusted before anything was seen of it."""
SHORTEST_ALONE = 2
"""A match of one token is no hint."""


class NgramDrafter(Drafter):
    """Needs no model; one-hot proposals."""

    name = "ngram"

    def open(self) -> DraftState:
        """See Drafter."""
        return DraftState()

    def propose(self, wishes: Sequence[Wish]) -> list[Draft | None]:
        """See Drafter."""
        return [lookup(wish.tokens, wish.with_proposal) for wish in wishes]


def lookup(tokens: Sequence[int], with_proposal: bool) -> Draft | None:
    """The continuation of the longest tail that was there before, its latest place first."""
    if len(tokens) < SHORTEST_ALONE + 1:
        return None
    ids = np.asarray(tokens, dtype=np.int64)
    last = len(ids) - 1
    places = np.flatnonzero(ids[:last] == ids[last])  # ends of matches of one token
    length, best = 1, places
    while len(places) and length < LONGEST:
        places = places[places >= length]
        places = places[ids[places - length] == ids[last - length]]
        if len(places):
            length += 1
            best = places
    if length < SHORTEST_ALONE or not len(best):
        return None
    token = int(ids[best[-1] + 1])
    return Draft(token, CONFIDENCE[length], NgramDrafter.name, certain(token) if with_proposal else None)
