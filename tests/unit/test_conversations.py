from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.device.conversations import Conversation, common_prefix

TOKENS = st.lists(st.integers(0, 3), max_size=12)


@given(TOKENS, TOKENS, TOKENS)
def test_common_prefix_is_the_longest(shared: list[int], left: list[int], right: list[int]) -> None:
    a, b = shared + left, shared + right
    n = common_prefix(a, b)
    assert n >= len(shared)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def conversation(prompt: int, *, one_codec: bool = False) -> Conversation:
    session: Any = SimpleNamespace(binding=SimpleNamespace(one_codec=one_codec))
    return Conversation(session, tokens=[0] * prompt)


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30), st.integers(1, 9)), max_size=6),
)
def test_what_was_generated_is_told_from_prompts(prompt: int, turns: list[tuple[int, int, int]]) -> None:
    """Against a list with a mark for every token: answers grow, turns cut anywhere and bring more prompt."""
    one = conversation(prompt)
    generated = [False] * prompt
    for said, cut, more in turns:
        generated += [True] * said
        cut = min(cut, len(generated) - 1)
        generated = [*generated[:cut], *[False] * more]
        one.continue_with([0] * len(generated), cut)
        assert [one.decodes(i) for i in range(len(generated))] == generated
        assert one.decodes(len(generated))
        assert one.borders == [
            i for i, (a, b) in enumerate(zip([False, *generated], [*generated, True], strict=True)) if a != b
        ]


def test_with_one_codec_nothing_needs_to_be_cut() -> None:
    one = conversation(5, one_codec=True)
    one.continue_with([0] * 9, 6)
    assert one.borders == []
    assert one.decodes(5)
    assert not one.decodes(6)
