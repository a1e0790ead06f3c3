"""The operator's client against a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from hat_operator.cluster import Cluster, ClusterError
from hat_operator.kinds import DEPLOYMENT, POD_MONITOR, SERVICE, SERVICE_ACCOUNT
from hat_operator.kubeconfig import client_from_kubeconfig
from hat_operator.leader import Identity, Leader
from tests.harness.controlplane import ControlPlane
from tests.operator.home import inline


@pytest.fixture
def cluster(control_plane: ControlPlane) -> Iterator[Cluster]:
    found = Cluster(client_from_kubeconfig(inline(control_plane)))
    yield found
    found.close()


def service(namespace: str, port: int = 80, **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "s", "namespace": namespace, "labels": labels},
        "spec": {"selector": {"a": "b"}, "ports": [{"name": "p", "port": port, "targetPort": port}]},
    }


async def test_apply_writes_once_and_repairs(cluster: Cluster, namespace: str) -> None:
    first = await cluster.apply(service(namespace, x="1"))
    again = await cluster.apply(service(namespace, x="1"))
    assert (first.written, again.written) == (True, False)
    await cluster.patch(first.live, {"metadata": {"labels": {"x": "2", "theirs": "1"}}})
    repaired = await cluster.apply(service(namespace, x="1"))
    assert repaired.written
    assert repaired.live["metadata"]["labels"] == {"x": "1", "theirs": "1"}
    assert not (await cluster.apply(service(namespace, x="1"))).written


async def test_a_field_that_is_no_longer_wanted_goes(cluster: Cluster, namespace: str) -> None:
    await cluster.apply(service(namespace, x="1", y="2"))
    less = await cluster.apply(service(namespace, x="1"))
    assert less.live["metadata"]["labels"] == {"x": "1"}
    assert not (await cluster.apply(service(namespace, x="1"))).written


async def test_an_object_of_someone_else_is_not_taken_over(
    cluster: Cluster, namespace: str, control_plane: ControlPlane
) -> None:
    control_plane.kubectl("create", "service", "clusterip", "s", "--tcp=80", "-n", namespace)
    with pytest.raises(ClusterError, match="not hat-operator's") as caught:
        await cluster.apply(service(namespace))
    assert caught.value.reason == "NameConflict"


async def test_list_pages_and_filters(
    cluster: Cluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hat_operator.cluster.PAGE", 2)
    for index in range(5):
        meta = {"name": f"a{index}", "namespace": namespace, "labels": {"mine": "yes"}}
        await cluster.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})
    found = await cluster.list(SERVICE_ACCOUNT, namespace, "mine=yes")
    assert [obj["metadata"]["name"] for obj in found] == [f"a{index}" for index in range(5)]
    assert found[0]["kind"] == "ServiceAccount"


async def test_delete_spares_a_successor_of_the_same_name(cluster: Cluster, namespace: str) -> None:
    first = (await cluster.apply(service(namespace))).live
    await cluster.delete(first)
    second = (await cluster.apply(service(namespace))).live
    await cluster.delete(first)
    found = await cluster.get(SERVICE, "s", namespace)
    assert found is not None
    assert found["metadata"]["uid"] == second["metadata"]["uid"]


async def test_errors_have_reasons(cluster: Cluster, namespace: str, control_plane: ControlPlane) -> None:
    assert await cluster.get(DEPLOYMENT, "none", namespace) is None
    assert not await cluster.has(POD_MONITOR)
    with pytest.raises(ClusterError) as caught:
        await cluster.apply(service(namespace, port=99999))
    assert caught.value.reason == "Invalid"
    assert "99999" in str(caught.value)
    content = yaml.safe_load(inline(control_plane))
    content["users"][0]["user"] = {"token": "wrong"}
    stranger = Cluster(client_from_kubeconfig(yaml.safe_dump(content)))
    with pytest.raises(ClusterError) as caught:
        await stranger.list(SERVICE, namespace)
    assert caught.value.reason == "Unauthorized"


async def test_an_address_without_anyone_is_unreachable(control_plane: ControlPlane) -> None:
    text = inline(control_plane).replace(control_plane.server, "https://127.0.0.1:1")
    with pytest.raises(ClusterError, match="refused") as caught:
        await Cluster(client_from_kubeconfig(text)).list(SERVICE, "default")
    assert caught.value.reason == "Unreachable"


async def test_one_leader_at_a_time(cluster: Cluster, namespace: str) -> None:
    first = Leader(cluster, Identity(namespace, "lease", "first"))
    second = Leader(cluster, Identity(namespace, "lease", "second"))
    await asyncio.wait_for(first.acquire(), 10)
    waiting = asyncio.create_task(second.acquire())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 5)
    await first.release()
    await asyncio.wait_for(waiting, 10)


async def test_a_leader_that_died_is_followed(cluster: Cluster, namespace: str) -> None:
    await Leader(cluster, Identity(namespace, "lease", "dead"), lease_s=2).acquire()
    await asyncio.wait_for(Leader(cluster, Identity(namespace, "lease", "next")).acquire(), 20)


async def test_a_cluster_that_does_not_answer_costs_one_timeout(
    cluster: Cluster, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hat_operator.cluster.REQUEST_TIMEOUT_S", 1.0)
    with control_plane.pause_apiserver(), pytest.raises(ClusterError) as caught:
        await cluster.list(SERVICE, "default")
    assert caught.value.reason == "Unreachable"
