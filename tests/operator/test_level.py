"""Whatever is deleted or edited, the wanted state is back within seconds; the resync of this operator is rare."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hat_operator import names
from hat_operator.children import Children
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.kinds import HATDEPLOYMENT
from hat_operator.kubeconfig import client_from_kubeconfig
from hat_operator.spec import HatDeployment
from tests.harness.audit import by_user
from tests.harness.controlplane import ControlPlane
from tests.operator.home import Home, inline, remote, store_kubeconfig
from tests.operator.manifests import changed, hat_deployment
from tests.operator.oracle import settled
from tests.operator.running import Operator, eventually, healthy
from tests.operator.test_rbac import POD_MONITOR_CRD
from tests.unit.operator.changes import CHANGES, WITHOUT_OBJECTS

WITHIN_S = 20.0
"""An event takes a second or two; this is for busy machines, and far below the next resync."""
EDITS: dict[str, dict[str, Any]] = {
    "Deployment": {"replicas": 7},
    "DaemonSet": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": "70%"}}},
    "Service": {"sessionAffinity": None, "selector": {"other": "x", names.LABEL_COMPONENT: "none"}},
    "NetworkPolicy": {"egress": [{}]},
    "PodDisruptionBudget": {"maxUnavailable": 3},
}
IMMUTABLE = {
    "model.source.hub",
    "model.source.claim.name",
    "model.source.claim.path",
    "edge.clusterRef.namespace",
}


@pytest.fixture(scope="module")
def served(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Operator]]:
    """A namespace whose operator acts on events only: the next resync is ten minutes away."""
    monitors = control_plane.folder / "podmonitors.yaml"
    monitors.write_text(POD_MONITOR_CRD)
    control_plane.install_crds(monitors)
    with (
        control_plane.namespace() as name,
        Operator(control_plane, name, tmp_path_factory.mktemp("operator"), resync_s=600) as operator,
    ):
        eventually(lambda: healthy(operator.port), "the operator is healthy")
        yield name, operator
    control_plane.kubectl("delete", "-f", str(monitors))


@pytest.fixture
def home(control_plane: ControlPlane, served: tuple[str, Operator]) -> Iterator[Home]:
    cluster = Cluster(client_from_kubeconfig(inline(control_plane)))
    yield Home(cluster, served[0])
    cluster.close()


async def children(home: Home, site: Cluster | None, name: str) -> list[tuple[Cluster, dict[str, Any]]]:
    body = await home.cluster.get(HATDEPLOYMENT, name, home.namespace)
    assert body is not None
    hat = HatDeployment.parse(body)
    cloud, local = await Children.read_home(home.cluster, hat)
    sides = [cloud, local] if site is None else [cloud, await Children.read_edge(site, hat)]
    return [(side.cluster, obj) for side in sides for obj in side.live.values()]


async def delete(home: Home, name: str) -> None:
    await home.cluster._request("delete", HATDEPLOYMENT.path(home.namespace, name))
    deadline = time.monotonic() + 30
    while await home.cluster.get(HATDEPLOYMENT, name, home.namespace) is not None:
        assert time.monotonic() < deadline, f"{name} is still there"
        await asyncio.sleep(0.1)


async def test_each_child_is_mended_and_made_again(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane
) -> None:
    edge, namespace = site
    await store_kubeconfig(home, inline(edge_plane))
    await home.create(**remote(namespace))
    try:
        await mend_all(home, edge)
    finally:
        await delete(home, "chat")


async def mend_all(home: Home, edge: Cluster) -> None:
    await settled(home.cluster, edge, home.namespace, "chat", 30)
    found = await children(home, edge, "chat")
    assert len(found) == 11
    took: list[float] = []

    async def back() -> None:
        begin = time.monotonic()
        await settled(home.cluster, edge, home.namespace, "chat", WITHIN_S)
        took.append(time.monotonic() - begin)

    for cluster, child in found:
        change: dict[str, Any] = {"metadata": {"labels": {"app.kubernetes.io/name": "other"}}}
        if child["kind"] in EDITS:
            change["spec"] = EDITS[child["kind"]]
        elif child["kind"] == "ServiceAccount":
            change["automountServiceAccountToken"] = True
        else:
            continue  # the operator does not watch PodMonitors of its own cluster, as their API may come and go
        await cluster.patch(child, change)
        await back()
    for cluster, child in await children(home, edge, "chat"):
        if child["kind"] != "PodMonitor":
            await cluster.delete(child)
            await back()
    print(f"back within {max(took):.1f} s, half of them within {sorted(took)[len(took) // 2]:.1f} s")
    before = {child["metadata"]["uid"]: child["kind"] for _, child in found}
    after = {child["metadata"]["uid"] for _, child in await children(home, edge, "chat")}
    assert len(after) == 11
    assert [before[uid] for uid in before.keys() & after] == ["PodMonitor"]


def groups() -> dict[str, list[str]]:
    """Fields that can be changed one after the other on one HatDeployment: those that need the same around them."""
    found: dict[str, list[str]] = {}
    for path, (_, around) in CHANGES.items():
        if path not in IMMUTABLE:
            found.setdefault(json.dumps(around), []).append(path)
    return found


async def test_each_field_of_the_spec(home: Home) -> None:
    await asyncio.gather(
        *(change_each(home, f"fields-{index}", *group) for index, group in enumerate(groups().items()))
    )


async def change_each(home: Home, name: str, around: str, paths: list[str]) -> None:
    edge = {"deviceSelector": {"matchLabels": {"hat.dev/device": "true"}}}
    body = hat_deployment(name, edge=edge)
    extra = json.loads(around)
    spec = {**body["spec"], **extra, "edge": {**edge, **extra.get("edge", {})}}
    body["spec"] = {key: item for key, item in spec.items() if item is not None}
    body["metadata"]["namespace"] = home.namespace
    await home.cluster.create(body)
    body = await settled(home.cluster, None, home.namespace, name, 60)
    for path in paths:
        value = CHANGES[path][0]
        change = {f"spec.{path}": copy.deepcopy(value)}
        if path == "cloud.accelerator.type":
            change["spec.cloud.accelerator.count"] = 0
        body = await home.cluster.patch(body, {"spec": changed(body, change)["spec"]})
        assert body["metadata"]["generation"] == body["status"]["observedGeneration"] + 1, path
        # Eight HatDeployments change at once here.
        body = await settled(home.cluster, None, home.namespace, name, 2 * WITHIN_S)
    await delete(home, name)


async def test_fields_that_never_change_are_refused(home: Home) -> None:
    for index, path in enumerate(sorted(IMMUTABLE)):
        value, around = CHANGES[path]
        # One refers to a cluster that is not there: its deletion would wait for it.
        edge = {"deviceSelector": {"matchLabels": {"a": "b"}}, "deletionTimeoutSeconds": 0}
        edge |= copy.deepcopy(around.get("edge", {}))
        rest = {key: item for key, item in around.items() if key != "edge"}
        body = hat_deployment(f"fixed-{index}", **{**rest, "edge": edge, "suspend": True})
        body["metadata"]["namespace"] = home.namespace
        made = await home.cluster.create(body)
        with pytest.raises(ClusterError, match="cannot be changed"):
            await home.cluster.patch(made, {"spec": changed(made, {f"spec.{path}": value})["spec"]})
        await delete(home, f"fixed-{index}")
    assert set(WITHOUT_OBJECTS).isdisjoint(CHANGES)


async def test_a_rotated_kubeconfig_is_used_and_the_old_one_no_more(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane, tmp_path: Path
) -> None:
    edge, namespace = site
    await store_kubeconfig(home, inline(edge_plane))
    await home.create(**remote(namespace))
    await settled(home.cluster, edge, home.namespace, "chat", 30)
    before = len(edge_plane.audit_events())
    user = "system:serviceaccount:default:rotated"
    edge_plane.kubectl("create", "serviceaccount", "rotated")
    edge_plane.kubectl(
        "create", "clusterrolebinding", "rotated", "--clusterrole=cluster-admin", f"--user={user}"
    )
    token = edge_plane.kubectl("create", "token", "rotated").stdout.strip()
    text = inline(edge_plane).replace(edge_plane._credentials.admin, token)
    uids = {child["metadata"]["uid"] for _, child in await children(home, edge, "chat")}
    try:
        await store_kubeconfig(home, text)
        # Secrets are not watched (the operator may not): any pass reads them.
        await home.patch(cloud={"replicas": 2})
        await settled(home.cluster, edge, home.namespace, "chat", WITHIN_S)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            events = list(by_user(edge_plane.audit_events()[before:], user))
            if {event["objectRef"]["resource"] for event in events if event["verb"] == "watch"} >= {
                "pods",
                "nodes",
            }:
                break
            await asyncio.sleep(0.2)
        else:
            pytest.fail("the new user does not watch")
        assert {child["metadata"]["uid"] for _, child in await children(home, edge, "chat")} == uids
    finally:
        await delete(home, "chat")
        edge_plane.kubectl("delete", "clusterrolebinding/rotated", "serviceaccount/rotated")
