from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.device.conversations import common_prefix

TOKENS = st.lists(st.integers(0, 3), max_size=12)


@given(TOKENS, TOKENS, TOKENS)
def test_common_prefix_is_the_longest(shared: list[int], left: list[int], right: list[int]) -> None:
    a, b = shared + left, shared + right
    n = common_prefix(a, b)
    assert n >= len(shared)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
