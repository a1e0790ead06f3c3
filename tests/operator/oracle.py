"""What a HatDeployment's objects should be now, and how the real ones differ."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from hat_operator import devices, names, rollout
from hat_operator.children import Children, key_of
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.desired import Observed, desired_objects
from hat_operator.diff import needs_apply
from hat_operator.kinds import CONFIG_MAP, HATDEPLOYMENT, POD
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment


async def differences(home: Cluster, site: Cluster | None, body: dict[str, Any]) -> list[str]:
    """One line for each object that is missing, different or too many, and for a status that is not of this spec."""
    hat, settings = HatDeployment.parse(body), Settings()
    found = []
    if not hat.spec.version or body.get("status", {}).get("observedGeneration") != hat.generation:
        found.append("the spec was not looked at yet")
    cloud, local = await Children.read_home(home, hat)
    if hat.spec.cloud.quotas is not None:  # no ConfigMap is listed: they are read by name
        quotas = await home.get(CONFIG_MAP, names.cloud_quotas(hat), hat.namespace)
        cloud.live |= {} if quotas is None else {key_of(quotas): quotas}
    there = local if site is None else await Children.read_edge(site, hat)
    service = cloud.service(names.cloud(hat))
    deployments = rollout.by_revision(cloud.live.values())
    pods = await there.cluster.list(POD, names.edge_namespace(hat), f"{names.LABEL_COMPONENT}={names.EDGE}")
    observed = Observed(
        cloud_endpoint=rollout.live_endpoint(hat, service),
        endpoints=rollout.revision_endpoints(hat, cloud.live.values()),
        apis=cloud.apis,
        serving_revision=rollout.serving_revision(names.revision(hat, settings), deployments, service),
        edge_apis=there.apis,
        draining=devices.revisions_in_use(pods, None),
    )
    desired = desired_objects(hat, settings, observed)
    for side, wanted in ((cloud, desired.cloud), (there, desired.edge)):
        for obj in wanted:
            live = side.live.pop(key_of(obj), None)
            if live is None or "deletionTimestamp" in live["metadata"]:
                found.append(f"{key_of(obj)} is missing")
            elif needs_apply(obj, live, names.FIELD_MANAGER):
                found.append(f"{key_of(obj)} differs")
        found += [f"{key} is too many" for key, live in side.live.items() if not desired.keeps(live)]
    if there is not local:
        found += [f"{key} should be at the site" for key in local.live]
    return found


async def settled(
    home: Cluster, site: Cluster | None, namespace: str, name: str, timeout_s: float
) -> dict[str, Any]:
    """Wait until nothing differs, and return the HatDeployment. Fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        body = await home.get(HATDEPLOYMENT, name, namespace)
        assert body is not None
        try:
            left = await differences(home, site, body)
        except ClusterError as error:
            left = [str(error)]
        if not left:
            return body
        assert time.monotonic() < deadline, f"{namespace}/{name} after {timeout_s:g} s: {left}"
        await asyncio.sleep(0.1)
