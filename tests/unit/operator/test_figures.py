"""Figures in status.devices: how far they must change, and how often they may."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hat_operator import figures
from hat_operator.figures import EVERY_S, Pace

KEY = ("team-a", "chat")


def row(name: str, **found: Any) -> dict[str, Any]:
    return {"name": name, "node": name, "phase": "Ready", **found}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (
            {"chunk_tokens": 128, "uplink_bytes_per_s": 7_512_345.0, "rtt_s": 0.02, "acceptance": 0.7512},
            {"chunkSize": 128, "uplinkMbps": 60.1, "rttMs": 20.0, "acceptance": 0.75},
        ),
        ({"uplink_bytes_per_s": 1234.5}, {"uplinkMbps": 0.00988}),
        ({"acceptance": 0}, {"acceptance": 0}),
        ({}, {}),
        ({"chunk_tokens": 0, "uplink_bytes_per_s": 0, "acceptance": 1.1}, {}),
        ({"chunk_tokens": 2**40, "uplink_bytes_per_s": float("inf"), "acceptance": float("nan")}, {}),
        ({"chunk_tokens": "128", "uplink_bytes_per_s": True, "acceptance": None}, {}),
    ],
)
def test_reports_in_the_units_of_status(report: dict[str, Any], expected: dict[str, float]) -> None:
    assert figures.from_report(report) == expected


@pytest.mark.parametrize(
    ("shown", "seen", "worth"),
    [
        ({"uplinkMbps": 10.0}, {"uplinkMbps": 11.9}, False),
        ({"uplinkMbps": 10.0}, {"uplinkMbps": 8.1}, False),
        ({"uplinkMbps": 10.0}, {"uplinkMbps": 12.0}, True),
        ({"uplinkMbps": 10.0}, {"uplinkMbps": 8.0}, True),
        ({"acceptance": 0.0}, {"acceptance": 0.0}, False),
        ({"acceptance": 0.0}, {"acceptance": 0.01}, True),
        ({}, {"chunkSize": 64}, True),
        ({"chunkSize": 64, "acceptance": 0.5}, {"chunkSize": 64}, True),
        ({"rttMs": 20.0}, {"rttMs": 25.0}, True),
        ({}, {}, False),
    ],
)
def test_a_fifth_is_worth_a_write(shown: dict[str, float], seen: dict[str, float], worth: bool) -> None:
    assert figures.differ(shown, seen) is worth


def test_the_last_contact_is_worth_a_write_now_and_then_only() -> None:
    def at(minute: int) -> dict[str, Any]:
        return {"chunkSize": 64, "lastContact": f"2026-11-22T10:{minute:02}:00Z"}

    assert not figures.differ(at(0), at(9))
    assert figures.differ(at(0), at(10))
    assert not figures.differ(at(10), at(0))
    assert not figures.differ({"chunkSize": 64}, at(10))  # it comes with the next figure
    pace = Pace()
    pace.rows(KEY, [row("a", **at(0))], {"a": at(1)}, 0.0)
    changed = {**at(1), "chunkSize": 512}
    assert pace.rows(KEY, [row("a", **at(0))], {"a": changed}, EVERY_S) == ([row("a", **changed)], None)


def test_a_late_write_counts_from_its_end() -> None:
    pace, rows, seen = Pace(), [row("a")], {"a": {"chunkSize": 64}}
    pace.rows(KEY, rows, seen, 0.0)
    assert pace.rows(KEY, rows, seen, EVERY_S)[1] is None
    pace.written(KEY, EVERY_S + 2)
    assert pace.rows(KEY, rows, seen, 2 * EVERY_S)[1] == 2.0
    pace.written(KEY, 2 * EVERY_S)  # of conditions only
    assert pace.rows(KEY, rows, seen, 2 * EVERY_S + 2)[1] is None


def test_one_change_brings_all_up_to_date_and_the_rest_of_a_row_stays() -> None:
    pace = Pace()
    before = [row("a", l4t="r36.4", uplinkMbps=10.0), row("b", uplinkMbps=10.0), row("c", uplinkMbps=10.0)]
    seen = {
        "a": {"uplinkMbps": 10.5},
        "b": {"uplinkMbps": 20.0, "chunkSize": 64},
        "elsewhere": {"chunkSize": 1},
    }
    assert pace.rows(KEY, before, seen, 0.0) == (before, EVERY_S)
    assert pace.rows(KEY, before, seen, EVERY_S - 1) == (before, 1.0)
    after, again_s = pace.rows(KEY, before, seen, EVERY_S)
    assert again_s is None
    assert after == [
        row("a", l4t="r36.4", uplinkMbps=10.5),
        row("b", uplinkMbps=20.0, chunkSize=64),
        row("c", uplinkMbps=10.0),  # not heard of lately: what it reported last stays
    ]
    assert pace.rows(KEY, after, seen, EVERY_S + 1) == (after, None)


def test_devices_that_have_no_row_cause_nothing() -> None:
    pace, rows = Pace(), [row("a", uplinkMbps=10.0)]
    for now in (0.0, 100.0, 200.0):
        assert pace.rows(KEY, rows, {"b": {"uplinkMbps": now + 1}, "a": {"uplinkMbps": 11.0}}, now) == (
            rows,
            None,
        )


def test_each_hatdeployment_has_its_own_pace_and_a_new_one_of_the_name_begins_anew() -> None:
    pace, rows, seen = Pace(), [row("a")], {"a": {"chunkSize": 64}}
    pace.rows(KEY, rows, seen, 0.0)
    assert pace.rows(("team-b", "chat"), rows, seen, 40.0)[1] == EVERY_S
    assert pace.rows(KEY, rows, seen, 40.0)[1] is None
    pace.forget(KEY)
    assert pace.rows(KEY, rows, seen, 100.0)[1] == EVERY_S


readings = st.fixed_dictionaries(
    {},
    optional={
        "chunkSize": st.integers(1, 4096),
        "uplinkMbps": st.floats(1e-6, 1e6),
        "acceptance": st.floats(0, 1),
    },
)
looks = st.lists(
    st.tuples(
        st.floats(0, 90),  # seconds since the look before
        st.dictionaries(st.sampled_from(["a", "b", "c"]), readings),
        st.booleans(),  # whether another process has taken over
        st.booleans(),  # whether the write, if there is one, fails
    ),
    max_size=40,
)


@given(looks)
def test_no_sequence_of_figures_is_written_twice_in_30_s(sequence: list[Any]) -> None:
    """Whoever looks however often, with restarts and failed writes between; and each write has a reason."""
    pace, status, now, tries = Pace(), [row("a"), row("b")], 1000.0, []
    for elapsed, seen, restarted, fails in sequence:
        now += elapsed
        if restarted:
            pace = Pace()
        rows, again_s = pace.rows(KEY, status, seen, now)
        worth = any(
            one["name"] in seen and figures.differ(figures.of_row(one), seen[one["name"]]) for one in status
        )
        if rows == status:
            assert (again_s is not None) == worth  # held back and said when, or nothing to write
            continue
        assert worth
        tries.append(now)
        if not fails:
            status = rows
    assert all(later - earlier >= EVERY_S for earlier, later in itertools.pairwise(tries))


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=20))
def test_a_change_is_written_when_its_time_has_come(uplinks: list[float]) -> None:
    pace, status, now = Pace(), [row("a")], 0.0
    for uplink in uplinks:
        seen = {"a": {"uplinkMbps": uplink}}
        rows, again_s = pace.rows(KEY, status, seen, now)
        if again_s is not None:
            now += again_s
            rows, again_s = pace.rows(KEY, status, seen, now)
        assert again_s is None
        status = rows
        assert not figures.differ(figures.of_row(status[0]), seen["a"])
