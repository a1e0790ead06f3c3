"""The simulated link: first come, first served, and sessions that take turns by frames."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_runtime.wire.frames import MAX_FRAME_BYTES
from tests import benchmark_modules  # noqa: F401

from fleet.events import Events  # isort: skip
from fleet.link import Direction, Stream  # isort: skip


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**7)), min_size=1, max_size=20),
    st.floats(1e4, 1e8),
)
def test_bytes_leave_at_the_rate_in_the_order_in_which_they_came(
    sent: list[tuple[float, int]], rate: float
) -> None:
    events, arrivals, free_s = Events(), [], 0.0
    link = Direction(events, rate, 0.05)
    for when, size in sorted(sent):
        events.at(when, lambda size=size: arrivals.append(link.send(size)[1]))
    events.run()
    for (when, size), arrival in zip(sorted(sent), arrivals, strict=True):
        free_s = max(free_s, when) + size / rate
        assert arrival == pytest.approx(free_s + 0.05)
    assert link.bytes == sum(size for _, size in sent)


def test_a_short_message_waits_for_one_frame_of_anothers_long_one() -> None:
    events, seen = Events(), {}
    link = Direction(events, MAX_FRAME_BYTES, 0.0)  # a frame a second
    long, short = Stream(events, link), Stream(events, link)
    long.send(4 * MAX_FRAME_BYTES, lambda: seen.setdefault("long", events.now))
    long.send(MAX_FRAME_BYTES, lambda: seen.setdefault("behind it", events.now))
    events.at(0.5, short.send, MAX_FRAME_BYTES / 4, lambda: seen.setdefault("short", events.now))
    events.run()
    assert seen == {"short": 1.25, "long": 4.25, "behind it": 5.25}


def test_what_has_not_begun_to_leave_can_be_dropped() -> None:
    events, seen = Events(), []
    stream = Stream(events, Direction(events, 10.0, 0.0))
    for name in ("leaving", "dropped", "dropped too"):
        stream.send(10, lambda name=name: seen.append(name))
    events.at(0.5, lambda: seen.append(stream.drop_unsent()))
    events.run()
    assert seen == [2, "leaving"]


@pytest.mark.parametrize(("rate", "delay"), [(0.0, 0.0), (-1.0, 0.0), (1.0, -0.1)])
def test_a_link_that_cannot_be(rate: float, delay: float) -> None:
    with pytest.raises(ValueError, match=f"{rate} bytes/s with a delay of {delay} s"):
        Direction(Events(), rate, delay)
