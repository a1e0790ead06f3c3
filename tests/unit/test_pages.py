"""The page pool: nothing is lost, nothing is owned twice, nothing of one session is left for the next."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hat_runtime.model.pages import KvCache, OutOfPages, PagedSequence


def cache(num_pages: int = 8, page_tokens: int = 4) -> KvCache:
    return KvCache(
        layers=2,
        kv_heads=1,
        head_dim=2,
        num_pages=num_pages,
        page_tokens=page_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@settings(deadline=None)
@given(
    page_tokens=st.integers(1, 5),
    actions=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["grow", "cut", "drop"]), st.integers(0, 30))
    ),
)
def test_pages_are_always_accounted_for(page_tokens: int, actions: list[tuple[int, str, int]]) -> None:
    pool = cache(page_tokens=page_tokens)
    sequences = [PagedSequence() for _ in range(3)]
    for which, action, amount in actions:
        sequence = sequences[which]
        if action == "grow":
            free, total = pool.free_pages, sequence.length + amount
            needed = pool.pages_needed(sequence, total)
            try:
                pool.reserve(sequence, total)
                sequence.length = total
            except OutOfPages:
                assert needed > free == pool.free_pages
        elif action == "cut":
            pool.truncate(sequence, min(amount, sequence.length))
        else:
            pool.release(sequence)
        pool.check(sequences)
        for s in sequences:
            assert len(s.pages) == -(-s.length // page_tokens)
            slots = pool.slots(s, s.length).tolist()
            assert len(set(slots)) == s.length
            assert {slot // page_tokens for slot in slots} <= set(s.pages)
            run = pool.run(s, s.length)
            together = slots == list(range(slots[0], slots[0] + s.length)) if slots else False
            assert (run is not None) == together
            assert run is None or list(range(run.start, run.stop)) == slots


def test_a_rollback_keeps_what_stays_and_zeroes_what_goes() -> None:
    pool = cache()
    sequence = PagedSequence()
    pool.reserve(sequence, 10)
    sequence.length = 10
    slots = pool.slots(sequence, 10)
    pool.keys[:, slots] = 7
    pool.values[:, slots] = 7
    pool.truncate(sequence, 5)
    assert (pool.keys[:, slots[:5]] == 7).all()
    assert not pool.keys[:, slots[8:]].any(), "the page of positions 8 and 9 was given back"
    assert pool.free_pages == 6
    pool.release(sequence)
    assert not pool.keys.any()
    assert not pool.values.any()


def test_a_lost_page_is_found() -> None:
    pool = cache()
    sequence = PagedSequence()
    pool.reserve(sequence, 9)
    with pytest.raises(RuntimeError, match="0 owned \\+ 5 free of 8"):
        pool.check([])
    with pytest.raises(RuntimeError):
        pool.check([sequence, sequence])
    pool.check([sequence])


@pytest.mark.parametrize("length", [-1, 4])
def test_truncating_beyond_the_sequence_is_an_error(length: int) -> None:
    sequence = PagedSequence(length=3)
    with pytest.raises(ValueError, match=f"3 tokens to {length}"):
        cache().truncate(sequence, length)
