"""Why pods are refused: the newest word since the last change, without names that change at each try."""

from __future__ import annotations

import time
from typing import Any

import pytest

from hat_operator import refusals
from hat_operator.cluster import ClusterError
from hat_operator.events import rfc3339

WHY = 'is forbidden: violates PodSecurity "restricted:latest": hostPort'


class Events:
    """The part of a Cluster that lists events."""

    def __init__(self, *ages_and_messages: tuple[float, str], error: ClusterError | None = None) -> None:
        self.events = [
            {"lastTimestamp": rfc3339(time.time() - age), "message": message}
            for age, message in ages_and_messages
        ]
        self.error = error

    async def list(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        return self.events


def daemonset(changed_ago: float) -> dict[str, Any]:
    written = {"manager": "hat-operator", "operation": "Apply", "time": rfc3339(time.time() - changed_ago)}
    return {"metadata": {"uid": "u", "name": "edge", "namespace": "hat", "managedFields": [written]}}


async def of(cluster: Events, changed_ago: float = 900.0) -> str | None:
    return await refusals.of_daemonset(cluster, daemonset(changed_ago))  # type: ignore[arg-type]


async def test_the_newest_word_since_the_last_change() -> None:
    old, new = (800.0, f'Error creating: pods "edge-a" {WHY}'), (30.0, "Error creating: quota exceeded")
    assert await of(Events(new, old)) == "quota exceeded"
    assert await of(Events(old)) == WHY
    assert await of(Events(old), changed_ago=600.0) is None, "it was mended since"
    assert await of(Events((3000.0, "Error creating: quota exceeded")), changed_ago=9000.0) is None
    assert await of(Events()) is None


@pytest.mark.parametrize("reason", ["Forbidden", "Unreachable", "RequestFailed"])
async def test_it_explains_only_so_that_nothing_depends_on_it(reason: str) -> None:
    assert await of(Events(error=ClusterError(reason, "no"))) is None


@pytest.mark.parametrize(
    "message",
    [
        f'pods "edge-x7k2f" {WHY}',
        f'Error creating: pods "edge-x7k2f" {WHY}',
        f'(combined from similar events): Error creating: pods "edge-abcde" {WHY}',
        f'Error creating: Pod "edge-abcde" {WHY}',
        f"Error creating: {WHY}",
    ],
)
def test_the_pods_name_is_left_out(message: str) -> None:
    assert refusals.refusal_text(message) == WHY


def test_a_deployments_condition() -> None:
    def deployment(status: str) -> dict[str, Any]:
        condition = {"type": "ReplicaFailure", "status": status, "message": f'pods "cloud-1" {WHY}'}
        return {"status": {"conditions": [{"type": "Available", "status": "False"}, condition]}}

    assert refusals.of_deployment(deployment("True")) == WHY
    assert refusals.of_deployment(deployment("False")) is None
    assert refusals.of_deployment({}) is None
    assert refusals.of_deployment(None) is None
