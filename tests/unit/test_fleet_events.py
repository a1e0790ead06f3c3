"""The simulator's clock."""

from __future__ import annotations

import pytest

from tests import benchmark_modules  # noqa: F401

from fleet.events import Events  # isort: skip


def test_order_of_times_then_of_planning() -> None:
    events, seen = Events(), []
    for name, when in (("late", 2.0), ("first", 1.0), ("second", 1.0)):
        events.at(when, seen.append, name)
    events.at(1.0, lambda: events.at(1.0, seen.append, "planned meanwhile"))
    assert events.run(until=1.5)
    assert (seen, events.now) == (["first", "second", "planned meanwhile"], 1.0)
    assert not events.run()
    assert seen[-1] == "late"


def test_nothing_is_planned_for_the_past() -> None:
    events = Events()
    events.at(1.0, lambda: None)
    events.run()
    with pytest.raises(ValueError, match=r"0\.5 s is before now, 1\.0 s"):
        events.at(0.5, lambda: None)


def test_stop_forgets_what_is_planned() -> None:
    events, seen = Events(), []
    events.at(1.0, events.stop)
    events.at(2.0, seen.append, "never")
    assert not events.run()
    assert (seen, events.now) == ([], 1.0)
