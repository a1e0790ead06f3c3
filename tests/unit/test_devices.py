"""The cloud's list of devices: bounded, forgetful, and without figures that nobody measured."""

from __future__ import annotations

import pytest

from hat_runtime.cloud.devices import DeviceTable
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_row_has_what_was_measured_and_nothing_else(clock: Clock) -> None:
    table = DeviceTable(clock=clock)
    table.heard("b")
    table.heard("a", pb.Telemetry(rtt_s=0.02, chunk_tokens=128))
    clock.now += 1.5
    table.heard("b", pb.Telemetry(uplink_bytes_per_s=1e6, acceptance=0.75))
    assert table.rows() == [
        {"name": "a", "seconds_since_contact": 1.5, "rtt_s": 0.02, "chunk_tokens": 128},
        {"name": "b", "seconds_since_contact": 0.0, "uplink_bytes_per_s": 1e6, "acceptance": 0.75},
    ]
    # The latest report replaces the one before: a figure that is not measured any more goes.
    table.heard("a", pb.Telemetry(rtt_s=0.03))
    table.heard("a")
    assert table.rows()[0] == {"name": "a", "seconds_since_contact": 0.0, "rtt_s": 0.03}


def test_figures_that_are_none_are_left_out(clock: Clock) -> None:
    table = DeviceTable(clock=clock)
    bad = pb.Telemetry(rtt_s=float("nan"), uplink_bytes_per_s=float("inf"), acceptance=1.5)
    table.heard("a", bad)
    table.heard("b", pb.Telemetry(rtt_s=-1, uplink_bytes_per_s=-float("inf"), acceptance=float("nan")))
    assert table.rows() == [
        {"name": "a", "seconds_since_contact": 0.0},
        {"name": "b", "seconds_since_contact": 0.0},
    ]


def test_names_that_could_forge_something_are_not_listed(clock: Clock) -> None:
    table = DeviceTable(clock=clock)
    for name in ("", "a b", "a\n", "é", "x" * 254, "<script>"):
        table.heard(name)
    table.heard("x" * 253)
    assert [row["name"] for row in table.rows()] == ["x" * 253]


def test_silent_devices_are_forgotten(clock: Clock) -> None:
    table = DeviceTable(stale_s=60, clock=clock)
    table.heard("old")
    clock.now += 40
    table.heard("new")
    clock.now += 20
    assert [row["name"] for row in table.rows()] == ["new", "old"]
    clock.now += 0.1
    assert [row["name"] for row in table.rows()] == ["new"]


def test_the_longest_silent_make_room(clock: Clock) -> None:
    table = DeviceTable(max_devices=3, clock=clock)
    for name in ("a", "b", "c", "a", "d"):
        clock.now += 1
        table.heard(name)
    assert [row["name"] for row in table.rows()] == ["a", "c", "d"]
