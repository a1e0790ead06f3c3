"""HatDeployments reconciled against real API servers; there are no nodes, so pods' readiness is written by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest

from hat_operator import names, rollout
from hat_operator.cluster import Cluster
from hat_operator.kinds import (
    DAEMONSET,
    DEPLOYMENT,
    HATDEPLOYMENT,
    NETWORK_POLICY,
    NODE,
    POD,
    SERVICE,
)
from tests.harness.controlplane import ControlPlane
from tests.operator.devices import Devices
from tests.operator.home import SELECTOR, Home, inline, remote, store_kubeconfig


def writes(plane: ControlPlane, namespace: str) -> list[str]:
    """The operator's writes to children and HatDeployments of a namespace, by the server's audit log."""
    verbs = {"create", "update", "patch", "delete"}
    return [
        f"{event['verb']} {event['objectRef']['resource']} {event['objectRef'].get('name')}"
        for event in plane.audit_events()
        if event["verb"] in verbs
        and event.get("objectRef", {}).get("namespace") == namespace
        and "controller" not in event["user"].get("username", "")
        and not event["user"].get("username", "").startswith("system:serviceaccount")
    ]


async def test_children_version_and_no_finalizer(home: Home) -> None:
    await home.create(edge=SELECTOR)
    await home.reconcile()
    hat = await home.hat()
    assert hat["spec"]["runtime"]["version"] == "9.9"
    assert "finalizers" not in hat["metadata"]
    assert hat["metadata"].get("annotations", {}) == {}
    assert hat["status"]["observedGeneration"] == hat["metadata"]["generation"]
    for kind, name in ((SERVICE, "chat-cloud"), (DAEMONSET, "chat-edge-cpu")):
        child = await home.cluster.get(kind, name, home.namespace)
        assert child is not None
        assert child["metadata"]["ownerReferences"][0]["uid"] == hat["metadata"]["uid"]
    assert (await home.conditions())["CloudReady"] == ("False", "WaitingForReplicas")


async def test_a_second_pass_writes_nothing(home: Home, control_plane: ControlPlane) -> None:
    await home.create(edge=SELECTOR, cloud={"expose": {"type": "NodePort", "host": "h"}})
    await home.reconcile()
    await settled(home)
    before = writes(control_plane, home.namespace)
    for _ in range(3):
        await home.reconcile()
    assert writes(control_plane, home.namespace)[len(before) :] == []


async def settled(home: Home) -> None:
    """Wait until the cluster's controllers have seen all children, then take their words into status."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = await home.deployments() + await home.cluster.list(DAEMONSET, home.namespace)
        seen = [
            item.get("status", {}).get("observedGeneration") == item["metadata"]["generation"]
            for item in children
        ]
        if all(seen):
            break
    await home.reconcile()


async def test_drift_is_repaired_and_strays_are_pruned(home: Home) -> None:
    await home.create(edge=SELECTOR)
    await home.reconcile()
    (deployment,) = await home.deployments()
    await home.cluster.patch(deployment, {"spec": {"replicas": 7}})
    service = await home.cluster.get(SERVICE, "chat-edge", home.namespace)
    assert service is not None
    await home.cluster.delete(service)
    policies = await home.cluster.list(NETWORK_POLICY, home.namespace)
    assert len(policies) == 2
    foreign = {**policies[0], "metadata": {"name": "theirs", "namespace": home.namespace}}
    await home.cluster.create(foreign)
    images = [{"name": "pc", "arch": "amd64"}]
    await home.patch(edge={**SELECTOR, "images": images}, security={"networkPolicies": False})
    await home.reconcile()
    (deployment,) = await home.deployments()
    assert deployment["spec"]["replicas"] == 1
    assert await home.cluster.get(SERVICE, "chat-edge", home.namespace) is not None
    left = await home.cluster.list(NETWORK_POLICY, home.namespace)
    assert [item["metadata"]["name"] for item in left] == ["theirs"]
    daemonsets = await home.cluster.list(DAEMONSET, home.namespace)
    assert [item["metadata"]["name"] for item in daemonsets] == ["chat-edge-pc"]


async def test_blue_green(home: Home) -> None:
    await home.create(edge=SELECTOR)
    await home.reconcile()
    (old,) = await home.deployments()
    old_revision = old["metadata"]["labels"][names.LABEL_REVISION]
    await home.serve(old_revision)
    await home.reconcile()
    assert (await home.conditions())["CloudReady"] == ("True", "ReplicasReady")

    await home.patch(split={"inputLayers": 4})
    await home.reconcile()
    (new,) = [item for item in await home.deployments() if item["metadata"]["uid"] != old["metadata"]["uid"]]
    new_revision = new["metadata"]["labels"][names.LABEL_REVISION]
    assert len(await home.deployments()) == 2
    assert await selected(home) == old_revision
    assert (await daemonset(home))["metadata"]["labels"][names.LABEL_REVISION] == old_revision
    assert (await home.conditions())["Progressing"] == ("True", "NewRevisionStarting")
    assert (await home.conditions())["CloudReady"] == ("True", "ReplicasReady")

    await home.serve(new_revision)
    await home.reconcile()
    assert [rollout.revision_of(item) for item in await home.deployments()] == [new_revision]
    assert await selected(home) == new_revision
    assert (await daemonset(home))["metadata"]["labels"][names.LABEL_REVISION] == new_revision
    assert (await home.hat())["status"]["cloud"]["revision"] == new_revision


async def test_the_revision_that_serves_survives_a_replica_that_is_not_ready_for_a_moment(home: Home) -> None:
    await home.create(edge=SELECTOR)
    await home.reconcile()
    (deployment,) = await home.deployments()
    old = str(rollout.revision_of(deployment))
    await home.serve(old)
    await home.reconcile()
    await home.patch(runtime={"version": "no-such-tag"})
    await home.reconcile()
    for ready in ("False", "True"):
        (pod,) = await home.cluster.list(POD, home.namespace, f"{names.LABEL_REVISION}={old}")
        conditions = [{"type": "Ready", "status": ready}]
        await home.cluster.patch(pod, {"status": {"conditions": conditions}}, "status")
        deadline = time.monotonic() + 30
        while rollout.ready_replicas(
            await home.cluster.get(DEPLOYMENT, f"chat-cloud-{old}", home.namespace)
        ) != (ready == "True"):
            assert time.monotonic() < deadline
        await home.reconcile()
        assert await selected(home) == old
        assert (await daemonset(home))["metadata"]["labels"][names.LABEL_REVISION] == old
        assert (await home.conditions())["Progressing"] == ("True", "NewRevisionStarting")
        assert (await home.conditions())["CloudReady"][0] == ready


async def test_a_switch_under_devices_leaves_each_the_service_of_its_revision(home: Home) -> None:
    async with Devices(home.cluster, home.namespace, 2) as devices:
        await switch(home, devices)


async def switch(home: Home, devices: Devices) -> None:
    selector = {"deviceSelector": {"matchLabels": devices.labels}}
    await home.create(edge=selector)
    await home.reconcile()
    (deployment,) = await home.deployments()
    old = str(rollout.revision_of(deployment))
    await home.serve(old)
    await devices.run_pods()
    await home.reconcile()
    assert (await home.conditions())["Ready"] == ("True", "AllReady")
    assert (await home.hat())["status"]["cloud"]["endpoint"] == f"chat-cloud-{old}.{home.namespace}.svc:7070"
    writes_before = await versions(home, old)

    await home.patch(split={"inputLayers": 4})
    await home.reconcile()
    new = next(
        str(rollout.revision_of(item))
        for item in await home.deployments()
        if item["metadata"]["name"][-8:] != old
    )
    await home.serve(new)
    # Between any two passes each device dials replicas of its own revision, ready ones.
    for _ in range(40):
        await home.reconcile()
        dialled = await devices.dialled()
        for revision in dialled.values():
            assert await selected(home, f"chat-cloud-{revision}") == revision
            assert rollout.ready_replicas(
                await home.cluster.get(DEPLOYMENT, f"chat-cloud-{revision}", home.namespace)
            )
        if set(dialled.values()) == {new} and len(dialled) == 2:
            break
        if old in dialled.values():
            assert await versions(home, old) == writes_before
        await devices.run_pods()
    else:
        pytest.fail("the devices have not moved")
    await devices.run_pods()
    await home.reconcile()
    assert [rollout.revision_of(item) for item in await home.deployments()] == [new]
    assert await home.cluster.get(SERVICE, f"chat-cloud-{old}", home.namespace) is None
    assert await selected(home) == new
    assert (await home.hat())["status"]["cloud"]["endpoint"] == f"chat-cloud-{new}.{home.namespace}.svc:7070"


async def versions(home: Home, revision: str) -> list[int]:
    """Generations of what a revision's devices talk to: they change when someone writes to it."""
    service = await home.cluster.get(SERVICE, f"chat-cloud-{revision}", home.namespace)
    deployment = await home.cluster.get(DEPLOYMENT, f"chat-cloud-{revision}", home.namespace)
    assert service is not None
    assert deployment is not None
    return [int(service["metadata"]["resourceVersion"]), deployment["metadata"]["generation"]]


async def selected(home: Home, name: str = "chat-cloud") -> str:
    service = await home.cluster.get(SERVICE, name, home.namespace)
    assert service is not None
    return str(service["spec"]["selector"][names.LABEL_REVISION])


async def daemonset(home: Home) -> dict[str, Any]:
    found = await home.cluster.get(DAEMONSET, "chat-edge-cpu", home.namespace)
    assert found is not None
    return found


async def deletion_leaves_nothing(home: Home, edge: Cluster, namespace: str) -> None:
    await home.cluster._request("delete", HATDEPLOYMENT.path(home.namespace, "chat"))
    assert await home.reconcile() is None
    assert await edge.list(DAEMONSET, namespace) == []
    assert await home.cluster.get(HATDEPLOYMENT, "chat", home.namespace) is None


async def test_devices_of_another_cluster(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane
) -> None:
    edge, namespace = site
    await store_kubeconfig(home, inline(edge_plane))
    await home.create(**remote(namespace))
    await home.reconcile()
    hat = await home.hat()
    assert hat["metadata"]["finalizers"] == [names.FINALIZER]
    assert (await home.conditions())["EdgeClusterReachable"] == ("True", "Reachable")
    (found,) = await edge.list(DAEMONSET, namespace)
    assert "ownerReferences" not in found["metadata"]
    assert hat["status"]["cloud"]["endpoint"] in str(found["spec"])
    await deletion_leaves_nothing(home, edge, namespace)


async def test_nodes_that_cannot_be_listed_hold_up_nothing_else(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Devices(home.cluster, home.namespace, 1) as devices:
        await home.create(edge={"deviceSelector": {"matchLabels": devices.labels}})
        await home.reconcile()
        (old,) = await home.deployments()
        await home.serve(str(rollout.revision_of(old)))
        await devices.run_pods()
        await home.reconcile()
        before = (await home.hat())["status"]["devices"]
        assert [row["phase"] for row in before] == ["Ready"]
        listed = home.cluster.list

        async def refused(kind: Any, namespace: Any = None, selector: str = "", **others: Any) -> Any:
            # As of a selector that a CRD without the rule for keys has let in.
            return await listed(
                kind, namespace, "hat dev/device=true" if kind is NODE else selector, **others
            )

        monkeypatch.setattr(home.cluster, "list", refused)
        await home.patch(cloud={"replicas": 2})
        await home.reconcile()
        assert (await home.conditions())["EdgeReady"] == ("False", "ReadRequestFailed")
        (deployment,) = await home.deployments()
        assert deployment["spec"]["replicas"] == 2
        assert (await home.hat())["status"]["devices"] == before
        assert len(await devices.pods()) == 1
        monkeypatch.undo()
        await home.reconcile()
        assert (await home.conditions())["EdgeReady"] == ("True", "DevicesReady")


async def test_deletion_of_an_invalid_one_leaves_nothing_at_the_site(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane
) -> None:
    edge, namespace = site
    await store_kubeconfig(home, inline(edge_plane))
    await home.create(**remote(namespace))
    await home.reconcile()
    twice = [{"name": "a", "arch": "amd64"}, {"name": "b", "arch": "amd64"}]
    await home.patch(edge={"images": twice})
    await home.reconcile()
    assert (await home.conditions())["Ready"] == ("False", "InvalidSpec")
    assert await edge.list(DAEMONSET, namespace) != []
    await deletion_leaves_nothing(home, edge, namespace)


async def test_reasons_of_an_edge_cluster_that_cannot_be_used(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane
) -> None:
    _, namespace = site
    good = inline(edge_plane)
    await home.create(**remote(namespace))

    async def reason() -> str:
        await home.reconcile()
        return (await home.conditions())["EdgeClusterReachable"][1]

    assert await reason() == "SecretNotFound"
    await store_kubeconfig(home, "users: [{name: x, user: {exec: {command: id}}}]")
    assert await reason() == "KubeconfigInvalid"
    port = edge_plane.server.rpartition(":")[2]
    await store_kubeconfig(home, good.replace(f":{port}", ":1"))
    assert await reason() == "Unreachable"
    await store_kubeconfig(home, good)
    assert await reason() == "Reachable"
    assert (await home.events())["KubeconfigInvalid"] == "Warning"


async def test_deletion_gives_up_an_edge_cluster_that_stays_away(home: Home) -> None:
    await home.create(**remote("devices", deletionTimeoutSeconds=2))
    await home.reconcile()
    await home.cluster._request("delete", HATDEPLOYMENT.path(home.namespace, "chat"))
    wait_s = await home.reconcile()
    assert wait_s is not None
    assert 0 < wait_s <= 5
    time.sleep(3)
    assert await home.reconcile() is None
    assert await home.cluster.get(HATDEPLOYMENT, "chat", home.namespace) is None
    assert (await home.events())["EdgeObjectsLeftBehind"] == "Warning"


async def test_suspend_and_resume(home: Home) -> None:
    await home.create(edge=SELECTOR)
    await home.reconcile()
    await home.patch(suspend=True)
    await home.reconcile()
    (deployment,) = await home.deployments()
    assert deployment["spec"]["replicas"] == 0
    assert await home.cluster.list(DAEMONSET, home.namespace) == []
    assert (await home.conditions())["Ready"] == ("False", "Suspended")
    await home.patch(suspend=False)
    await home.reconcile()
    assert len(await home.cluster.list(DAEMONSET, home.namespace)) == 1
