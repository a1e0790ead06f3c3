"""Chunks cover the prompt, are no longer than asked for, and begin small where that pays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.control.chunks import SHORTEST, chunk_ends, cut_at


@given(st.integers(0, 3000), st.integers(1, 3000), st.integers(1, 600))
def test_every_token_once_and_no_chunk_too_long(start: int, count: int, chunk: int) -> None:
    ends = list(chunk_ends(start, start + count, chunk))
    sizes = [end - before for before, end in zip([start, *ends], ends, strict=False)]
    assert ends[-1] == start + count
    assert all(0 < size <= chunk for size in sizes)
    assert all(size >= min(SHORTEST, chunk) for size in sizes[:-1])


def test_the_first_chunks_are_smaller() -> None:
    assert list(chunk_ends(0, 400, 128)) == [32, 96, 224, 352, 400]


def test_what_fits_into_one_chunk_is_not_cut() -> None:
    assert list(chunk_ends(10, 138, 128)) == [138]


def test_small_chunks_are_not_made_smaller() -> None:
    assert list(chunk_ends(0, 90, 32)) == [32, 64, 90]
    assert list(chunk_ends(0, 200, 64)) == [32, 96, 160, 200]


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk is 0"):
        list(chunk_ends(0, 5, 0))


@given(st.lists(st.integers(0, 60), unique=True).map(sorted), st.integers(0, 20), st.integers(1, 20))
def test_no_chunk_straddles_a_border(borders: list[int], start: int, chunk: int) -> None:
    plain = list(chunk_ends(start, 50, chunk))
    ends = list(cut_at(plain, borders, start))
    assert ends == sorted({*plain, *(border for border in borders if start < border < 50)})
