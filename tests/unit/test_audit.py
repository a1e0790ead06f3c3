"""How the tests and the benchmark of the operator's cost read an apiserver's audit log."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.audit import most_in_window, requests, writes


def event(
    verb: str, resource: str, second: int, agent: str = "hat-operator/1", **about: str
) -> dict[str, Any]:
    return {
        "verb": verb,
        "userAgent": agent,
        "requestReceivedTimestamp": f"2026-01-01T00:00:{second:02}.250000Z",
        "stageTimestamp": f"2026-01-01T00:00:{second:02}.750000Z",
        "objectRef": {"resource": resource, "namespace": "team-a", "name": "chat", **about},
        "responseStatus": {"code": 200},
    }


def test_writes_are_told_from_reads_leases_and_other_programs() -> None:
    events = [
        event("patch", "hatdeployments", 9, subresource="status"),
        event("get", "hatdeployments", 1),
        event("update", "leases", 2),
        event("patch", "daemonsets", 3, agent="kube-controller-manager/v1"),
        event("create", "events", 4),
        {**event("get", "", 5), "objectRef": {}},
    ]
    found = writes(events, "hat-operator/")
    assert [(write.verb, write.resource) for write in found] == [
        ("create", "events"),
        ("patch", "hatdeployments/status"),
    ]
    assert found[1].done - found[1].received == pytest.approx(0.5)
    assert len(requests(events)) == 5


@pytest.mark.parametrize(
    ("times", "most"),
    [([], 0), ([5.0], 1), ([0.0, 30.0, 60.0], 1), ([60.0, 0.0, 29.9, 59.8], 2), ([1.0] * 3, 3)],
)
def test_most_in_a_window(times: list[float], most: int) -> None:
    assert most_in_window(times, 30.0) == most
