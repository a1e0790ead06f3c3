"""Quotas of a HatDeployment on a real API server: their ConfigMap, and what becomes of the cloud's pods."""

from __future__ import annotations

import json
from typing import Any

from hat_operator.kinds import CONFIG_MAP
from hat_operator.objects.replica_files import QUOTAS
from tests.harness.controlplane import ControlPlane
from tests.operator.home import Home
from tests.operator.test_reconcile import settled, writes

LIMITS = {"deviceDefault": {"sessions": 2, "kvShare": 0.000001}}
IN_FILE = {"device_default": {"sessions": 2, "kv_share": 1e-6}}


async def stored(home: Home) -> dict[str, Any]:
    found = await home.cluster.get(CONFIG_MAP, "chat-cloud-quotas", home.namespace)
    assert found is not None
    return found


def content(stored: dict[str, Any]) -> Any:
    return json.loads(stored["data"][QUOTAS.key])


async def test_other_limits_reach_the_file_and_replace_no_pod(
    home: Home, control_plane: ControlPlane
) -> None:
    await home.create(cloud={"quotas": {}})
    await home.reconcile()
    await settled(home)
    first = await stored(home)
    assert content(first) == {}
    (owner,) = first["metadata"]["ownerReferences"]  # with which it ends
    assert owner["uid"] == (await home.hat())["metadata"]["uid"]
    (before,) = await home.deployments()
    assert QUOTAS.path in before["spec"]["template"]["spec"]["containers"][0]["args"]

    await home.patch(cloud={"quotas": LIMITS})
    await home.reconcile()
    assert content(await stored(home)) == IN_FILE
    (after,) = await home.deployments()
    assert after["metadata"]["generation"] == before["metadata"]["generation"]

    # What is there is not written again, and what somebody else wrote is undone.
    seen = writes(control_plane, home.namespace)
    for _ in range(2):
        await home.reconcile()
    assert writes(control_plane, home.namespace)[len(seen) :] == []
    await home.cluster.patch(await stored(home), {"data": {QUOTAS.key: "{}"}})
    await home.reconcile()
    assert content(await stored(home)) == IN_FILE


async def test_the_field_comes_and_goes_with_new_pods_of_the_same_revision(home: Home) -> None:
    await home.create()
    await home.reconcile()
    assert await home.cluster.get(CONFIG_MAP, "chat-cloud-quotas", home.namespace) is None
    (bare,) = await home.deployments()

    await home.patch(cloud={"quotas": LIMITS})
    await home.reconcile()
    (limited,) = await home.deployments()
    assert limited["metadata"]["uid"] == bare["metadata"]["uid"]
    assert limited["metadata"]["generation"] > bare["metadata"]["generation"]
    assert content(await stored(home)) == IN_FILE

    await home.patch(cloud={"quotas": None})
    await home.reconcile()
    (last,) = await home.deployments()
    assert last["spec"]["template"] == bare["spec"]["template"]
    # Pods of before, which still end, hold on to it; what is written later is in it at once.
    assert content(await stored(home)) == IN_FILE
    await home.patch(cloud={"quotas": {}})
    await home.reconcile()
    assert content(await stored(home)) == {}


async def test_a_config_map_of_somebody_else_is_left_alone(home: Home, control_plane: ControlPlane) -> None:
    theirs = ("create", "configmap", "chat-cloud-quotas", "--from-literal=theirs=yes")
    control_plane.kubectl("-n", home.namespace, *theirs)
    await home.create(cloud={"quotas": LIMITS})
    await home.reconcile()
    assert (await stored(home))["data"] == {"theirs": "yes"}
    assert (await home.conditions())["CloudReady"] == ("False", "NameConflict")
