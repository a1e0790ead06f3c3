"""The devices' cluster away, refusing or gone for good, and devices that are lost: what status says and what stays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hat_operator import names, rollout, sites
from hat_operator.children import Children
from hat_operator.cluster import Cluster
from hat_operator.devices import node_of
from hat_operator.kinds import DAEMONSET, HATDEPLOYMENT, SECRET, SERVICE
from hat_operator.spec import HatDeployment
from tests.harness.controlplane import ControlPlane
from tests.operator.devices import Devices
from tests.operator.home import SELECTOR, Home, inline, remote, store_kubeconfig
from tests.operator.oracle import settled
from tests.operator.running import Operator


async def eventually(check: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not await check():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.1)


async def cloud_side(home: Home) -> dict[str, str]:
    """Version of each object of the cloud's side: any write changes one."""
    hat = HatDeployment.parse(await home.hat())
    cloud, _ = await Children.read_home(home.cluster, hat)
    return {"/".join(key): obj["metadata"]["resourceVersion"] for key, obj in cloud.live.items()}


async def quiet(home: Home) -> dict[str, str]:
    """The cloud's side once the cluster's controllers have written all that they want to."""
    before = await cloud_side(home)
    while True:
        await asyncio.sleep(1.0)
        now = await cloud_side(home)
        if now == before:
            return now
        before = now


async def away(
    home: Home, site: tuple[Cluster, str], plane: ControlPlane, operator: Operator, seconds: float
) -> None:
    edge, namespace = site

    async def reachable(*wanted: str) -> bool:
        return (await home.conditions()).get("EdgeClusterReachable") == wanted

    await store_kubeconfig(home, inline(plane))
    await home.create(**remote(namespace))
    with operator:
        await settled(home.cluster, edge, home.namespace, "chat", 60)
        before, old = await quiet(home), await home.conditions()
        plane.stop_apiserver()
        try:
            await eventually(lambda: reachable("False", "Unreachable"), "the site is seen to be away", 30)
            await asyncio.sleep(seconds)
            found = await home.conditions()
            assert found["EdgeClusterReachable"] == ("False", "Unreachable")
            assert found["EdgeReady"] == ("Unknown", "EdgeClusterUnreachable")
            assert found["CloudReady"] == old["CloudReady"]
            assert await cloud_side(home) == before
        finally:
            plane.start_apiserver()
        await eventually(lambda: reachable("True", "Reachable"), "the site is seen to be back", 30)
        await settled(home.cluster, edge, home.namespace, "chat", 30)
        assert await cloud_side(home) == before


async def test_a_site_that_is_away_for_seconds(
    home: Home,
    site: tuple[Cluster, str],
    edge_plane: ControlPlane,
    control_plane: ControlPlane,
    tmp_path: Path,
) -> None:
    await away(home, site, edge_plane, Operator(control_plane, home.namespace, tmp_path), 3)


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_a_site_that_is_away_for_a_minute(
    home: Home,
    site: tuple[Cluster, str],
    edge_plane: ControlPlane,
    control_plane: ControlPlane,
    tmp_path: Path,
) -> None:
    await away(home, site, edge_plane, Operator(control_plane, home.namespace, tmp_path), 60)


async def test_refused_credentials_and_a_missing_secret_leave_both_sides_alone(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane
) -> None:
    edge, namespace = site
    good = inline(edge_plane)
    await store_kubeconfig(home, good)
    await home.create(**remote(namespace))
    await home.reconcile()
    await home.reconcile()
    before = await quiet(home)
    made = await edge.list(DAEMONSET, namespace)

    async def reason() -> str:
        await home.reconcile()
        found = await home.conditions()
        assert found["Ready"][0] == "False"
        return found["EdgeClusterReachable"][1]

    await store_kubeconfig(home, good.replace(edge_plane._credentials.admin, "no-such-token"))
    assert await reason() == "Unauthorized"
    secret = await home.cluster.get(SECRET, "site", home.namespace)
    assert secret is not None
    await home.cluster.delete(secret)
    assert await reason() == "SecretNotFound"
    assert (await home.conditions())["EdgeReady"] == ("Unknown", "EdgeClusterUnreachable")
    assert await cloud_side(home) == before
    assert [item["metadata"]["uid"] for item in await edge.list(DAEMONSET, namespace)] == [
        item["metadata"]["uid"] for item in made
    ]
    await store_kubeconfig(home, good)
    assert await reason() == "Reachable"


async def test_one_address_for_all_revisions_stays_with_devices_that_cannot_be_updated(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane
) -> None:
    _, namespace = site
    good = inline(edge_plane)

    async def selected() -> str:
        service = await home.cluster.get(SERVICE, "chat-cloud", home.namespace)
        assert service is not None
        return str(service["spec"]["selector"][names.LABEL_REVISION])

    await store_kubeconfig(home, good)
    one_address = {"expose": {"type": "LoadBalancer", "host": "cloud.example.com"}}
    await home.create(**{**remote(namespace), "cloud": one_address})
    await home.reconcile()
    old = await selected()
    await home.serve(old)
    await home.reconcile()
    await store_kubeconfig(home, good.replace(edge_plane._credentials.admin, "no-such-token"))
    await home.patch(split={"inputLayers": 4})
    await home.reconcile()
    (new,) = {str(rollout.revision_of(item)) for item in await home.deployments()} - {old}
    await home.serve(new)
    await home.reconcile()
    assert await selected() == old
    assert len(await home.deployments()) == 2
    (progressing,) = [
        item["message"]
        for item in (await home.hat())["status"]["conditions"]
        if item["type"] == "Progressing"
    ]
    assert progressing == f"revision {new} starts; {old} serves until the devices' cluster answers"
    await store_kubeconfig(home, good)
    await home.reconcile()
    assert await selected() == new
    await home.cluster.delete(await home.hat())
    assert await home.reconcile() is None


async def test_a_site_that_is_gone_for_good_holds_deletion_up_for_the_documented_time(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane
) -> None:
    edge, namespace = site
    await store_kubeconfig(home, inline(edge_plane))
    await home.create(**remote(namespace, deletionTimeoutSeconds=6))
    await home.reconcile()
    port = edge_plane.server.rpartition(":")[2]
    await store_kubeconfig(home, inline(edge_plane).replace(f":{port}", ":1"))
    begin = time.monotonic()
    await home.cluster._request("delete", HATDEPLOYMENT.path(home.namespace, "chat"))
    while (wait_s := await home.reconcile()) is not None:
        assert time.monotonic() - begin < 30
        await asyncio.sleep(wait_s)
    # The API server writes the time of deletion in whole seconds.
    assert time.monotonic() - begin >= 5
    assert await home.cluster.get(HATDEPLOYMENT, "chat", home.namespace) is None
    assert (await home.events())["EdgeObjectsLeftBehind"] == "Warning"
    assert await edge.list(DAEMONSET, namespace) != []


async def test_a_lost_device_keeps_its_pod_and_row_and_comes_back(home: Home) -> None:
    async with Devices(home.cluster, home.namespace, 2) as devices:
        await home.create(edge={"deviceSelector": {"matchLabels": devices.labels}})
        await home.reconcile()
        while len(await devices.dialled()) < 2:
            await devices.run_pods()
        await home.reconcile()
        assert await phases(home) == {"Ready": 2}
        pods = {pod["metadata"]["uid"] for pod in await devices.pods()}
        await devices.report(devices.nodes[0], "Unknown")
        await home.reconcile()
        assert await phases(home) == {"Lost": 1, "Ready": 1}
        assert (await home.hat())["status"]["devices"][0]["name"] == devices.nodes[0]
        # The node controller taints the node; the pod tolerates it for ever.
        await asyncio.sleep(3)
        await home.reconcile()
        assert await phases(home) == {"Lost": 1, "Ready": 1}
        assert {pod["metadata"]["uid"] for pod in await devices.pods()} == pods
        await devices.report(devices.nodes[0], "True")
        await devices.run_pods()
        await home.reconcile()
        assert await phases(home) == {"Ready": 2}


async def test_a_device_that_is_off_stops_no_update(home: Home) -> None:
    async with Devices(home.cluster, home.namespace, 3) as devices:
        allowed: list[int | str] = []

        async def updated(count: int) -> None:
            """Wait until that many devices are to have a pod, and have one of the present template that is ready."""
            deadline = time.monotonic() + 40
            while time.monotonic() < deadline:
                await home.reconcile()
                await devices.run_pods()
                (found,) = await home.cluster.list(DAEMONSET, home.namespace)
                allowed.append(found["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"])
                status = found["status"]
                seen = status.get("observedGeneration") == found["metadata"]["generation"]
                fields = ("desiredNumberScheduled", "updatedNumberScheduled", "numberReady")
                if seen and {status.get(field, 0) for field in fields} == {count}:
                    return
                await asyncio.sleep(0.1)
            pytest.fail(f"{count} are not updated: {status}; allowed were {allowed}")

        await home.create(edge={"deviceSelector": {"matchLabels": devices.labels}})
        await updated(3)
        off = devices.nodes[0]
        await devices.report(off, "Unknown")
        for pod in await devices.pods():
            if node_of(pod) == off:  # as the node controller does
                status = {"conditions": [{"type": "Ready", "status": "False"}]}
                await home.cluster.patch(pod, {"status": status}, "status")
        await updated(2)  # Kubernetes starts no pods there
        assert set(allowed) == {"10%"}
        await home.patch(observability={"logLevel": "debug"})
        await updated(2)
        assert 2 in allowed
        allowed.clear()
        await updated(2)
        await devices.report(off, "True")
        await updated(3)
        assert set(allowed) == {"10%"}


async def phases(home: Home) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in (await home.hat())["status"]["devices"]:
        found[row["phase"]] = found.get(row["phase"], 0) + 1
    return found


async def test_without_another_cluster_no_operator_is_needed_to_delete(home: Home) -> None:
    await home.create(edge=SELECTOR)
    await home.reconcile()
    hat = HatDeployment.parse(await home.hat())
    await home.cluster._request("delete", HATDEPLOYMENT.path(home.namespace, "chat"))
    assert await home.cluster.get(HATDEPLOYMENT, "chat", home.namespace) is None

    async def gone() -> bool:
        sides = await Children.read_home(home.cluster, hat)
        return not any(side.live for side in sides)

    await eventually(gone, "the garbage collector has deleted all children", 60)


async def objects(cluster: Cluster, body: dict[str, Any]) -> dict[str, str]:
    found = (await Children.read_edge(cluster, HatDeployment.parse(body))).live
    return {"/".join(key): obj["metadata"]["uid"] for key, obj in found.items()}


async def test_devices_that_move_to_another_cluster_leave_nothing_behind(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane, control_plane: ControlPlane
) -> None:
    edge, namespace = site
    await store_kubeconfig(home, inline(edge_plane))
    await home.create(**remote(namespace))
    await home.reconcile()
    first = await objects(edge, await home.hat())
    assert len(first) == 4
    # The same cluster under another address is no other cluster.
    await store_kubeconfig(home, inline(edge_plane).replace("127.0.0.1", "localhost"))
    await home.reconcile()
    assert await objects(edge, await home.hat()) == first
    control_plane.kubectl("create", "namespace", namespace)
    try:
        await store_kubeconfig(home, inline(control_plane))
        await home.reconcile()
        body = await home.hat()
        assert await objects(edge, body) == {}
        assert len(await objects(home.cluster, body)) == 4
        # Back again, but by another Secret, and with a new process at each step: the annotation remembers.
        await store_kubeconfig(home, inline(edge_plane), "second")
        home.restart()
        await home.patch(edge={"clusterRef": {"kubeconfigSecretRef": {"name": "second"}}})
        await home.reconciler._complete(await home.hat(), HatDeployment.parse(await home.hat()))
        home.restart()
        await home.reconcile()
        assert len(await objects(edge, body)) == 4
        assert await objects(home.cluster, body) == {}
        assert sites.places(await home.hat()) == [sites.Place("second", "kubeconfig", "")]
        assert "EdgeObjectsLeftBehind" not in await home.events()
        # Gone while both may hold something: both are clean.
        await home.patch(edge={"clusterRef": {"kubeconfigSecretRef": {"name": "site"}}})
        await home.reconciler._complete(await home.hat(), HatDeployment.parse(await home.hat()))
        await home.cluster._request("delete", HATDEPLOYMENT.path(home.namespace, "chat"))
        assert await home.reconcile() is None
        assert await objects(edge, body) == {}
    finally:
        control_plane.kubectl("delete", "namespace", namespace, "--wait=false")


async def test_the_second_of_two_that_would_share_objects_is_refused(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane, control_plane: ControlPlane
) -> None:
    edge, namespace = site
    await store_kubeconfig(home, inline(edge_plane))
    await home.create(**remote(namespace))
    await home.reconcile()
    first = await objects(edge, await home.hat())
    with control_plane.namespace() as other:
        second = Home(home.cluster, other)
        await store_kubeconfig(second, inline(edge_plane))
        await second.create(**remote(namespace))
        for _ in range(2):
            await second.reconcile()
            await home.reconcile()
        assert (await second.conditions())["EdgeReady"] == ("False", "NameConflict")
        (message,) = [
            item["message"]
            for item in (await second.hat())["status"]["conditions"]
            if item["type"] == "EdgeReady"
        ]
        assert f"HatDeployment {home.namespace}/chat" in message
        assert (await home.conditions())["EdgeReady"][1] != "NameConflict"
        assert await objects(edge, await home.hat()) == first
        await home.cluster._request("delete", HATDEPLOYMENT.path(other, "chat"))
        assert await second.reconcile() is None
        assert await objects(edge, await home.hat()) == first
