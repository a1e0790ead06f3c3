"""The chunk policy on a real API server: its ConfigMap, what pods get, status, events, and what is left at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from prometheus_client import REGISTRY

from hat_operator import names, slow_loop
from hat_operator.admin import Doors
from hat_operator.edges import EdgeClusters
from hat_operator.figures import Pace
from hat_operator.kinds import CONFIG_MAP, EVENT, HATDEPLOYMENT
from hat_operator.objects.replica_files import POLICY
from hat_operator.reconcile import Reconciler
from hat_operator.settings import Settings
from hat_operator.slow_loop import SlowLoop
from hat_operator.spec import HatDeployment
from hat_operator.telemetry import Telemetry
from hat_runtime.control.published import PublishedPolicy, parse
from tests.harness.cloudpods import CloudPods
from tests.operator.devices import Devices
from tests.operator.home import Home

SETTINGS = Settings(version="9.9")


class Policies:
    """An operator with its slow loop; rounds and passes are made by hand."""

    def __init__(
        self, home: Home, devices: Devices, cloud: CloudPods, session: aiohttp.ClientSession
    ) -> None:
        self.home, self.devices, self.cloud, self._session = home, devices, cloud, session
        self.asked: list[tuple[str, str]] = []
        self.telemetry = Telemetry(
            home.cluster, [home.namespace], Doors(Settings(devices_url=cloud.url)), 60.0
        )
        self.loop = SlowLoop(home.cluster, self.telemetry, lambda *key: self.asked.append(key))
        home.reconciler = Reconciler(
            home.cluster, EdgeClusters(home.cluster), SETTINGS, self.telemetry, None, self.loop
        )
        home.reconciler._pace = Pace(0.0)

    async def round(self) -> None:
        """What the operator does every 15 s, and then at once."""
        await self.telemetry.ask_all(self._session)
        await self.loop.round(self._session)
        await self.home.reconcile()

    async def stored(self) -> PublishedPolicy:
        found = await self.home.cluster.get(CONFIG_MAP, "chat-cloud-policy", self.home.namespace)
        assert found is not None
        return parse(found["data"][POLICY.key])

    def pushed(self) -> PublishedPolicy:
        (store,) = self.cloud.policies.values()
        return store.current

    def metric(self, name: str) -> float | None:
        labels = {"namespace": self.home.namespace, "name": "chat"}
        return REGISTRY.get_sample_value(f"hat_operator_policy_{name}", labels)


@pytest.fixture
async def policies(home: Home, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Policies]:
    """One HatDeployment with two devices and a ready replica."""
    monkeypatch.setattr(slow_loop, "STORE_EVERY_S", 0.0)
    async with Devices(home.cluster, home.namespace, 2) as devices, aiohttp.ClientSession() as session:
        with CloudPods({"chat": devices.nodes}, tuning=True).serving() as cloud:
            found = Policies(home, devices, cloud, session)
            selector = {"deviceSelector": {"matchLabels": devices.labels}}
            await home.create(edge=selector, chunking={"mode": "balance"})
            await home.reconcile()
            await home.serve(names.revision(HatDeployment.parse(await home.hat()), SETTINGS))
            await home.reconcile()
            yield found


async def test_from_figures_to_policy_status_and_event_and_back(policies: Policies) -> None:
    home, (one, two) = policies.home, policies.devices.nodes
    assert await policies.stored() == PublishedPolicy()
    template = [(obj["metadata"]["generation"], obj["spec"]["template"]) for obj in await home.deployments()]
    policies.cloud.hold({one: 200.0, two: 1.0})
    await policies.round()
    stored = await policies.stored()
    assert stored == policies.pushed()
    assert (stored.version, stored.chunk_for(one), stored.chunk_for(two)) == (1, 512, 64)
    rows = {row["name"]: row for row in (await home.hat())["status"]["devices"]}
    assert (rows[one]["chunkSize"], rows[one]["rttMs"]) == (128, 20.0)
    assert rows[one]["lastContact"].endswith("Z")
    assert policies.metric("changes_total") == 1
    # Throttled: pods, ConfigMap and event say the same, and no pod is replaced for it.
    policies.cloud.hold({one: 2.0})
    await policies.round()
    assert policies.pushed().chunk_for(one) == 64
    assert await policies.stored() == policies.pushed()
    (event,) = [
        item
        for item in await home.cluster.list(EVENT, home.namespace)
        if item["reason"] == "ChunkSizeChanged"
    ]
    assert event["message"].startswith(f"{one}: 512 to 64 tokens (link rate ")
    assert (event["type"], event["involvedObject"]["name"]) == ("Normal", "chat")
    assert [
        (obj["metadata"]["generation"], obj["spec"]["template"]) for obj in await home.deployments()
    ] == template
    # A drift is mended, and a policy of another process found.
    live = await home.cluster.get(CONFIG_MAP, "chat-cloud-policy", home.namespace)
    assert live is not None
    (owner,) = live["metadata"]["ownerReferences"]  # with which it ends
    assert owner["uid"] == (await home.hat())["metadata"]["uid"]
    await home.cluster.patch(live, {"data": {POLICY.key: "{}"}})
    await home.reconcile()
    assert await policies.stored() == policies.pushed()
    # Silence freezes it, and the condition says so.
    policies.cloud.silent = True
    policies.telemetry._silent_s = 0.0
    policies.cloud.hold({one: 200.0})
    frozen = policies.pushed()
    await policies.round()
    assert (await home.conditions())["MetricsAvailable"] == ("False", "PolicyFrozen")
    assert policies.pushed() == frozen
    assert policies.metric("frozen") == 1
    # It ends with the HatDeployment.
    await home.cluster.delete(await home.hat())
    async with asyncio.timeout(30):
        while await home.cluster.get(HATDEPLOYMENT, "chat", home.namespace) is not None:
            await asyncio.sleep(0.1)
    await home.reconcile()
    await policies.loop.round(policies._session)
    for name in ("frozen", "age_seconds", "changes_total"):
        assert policies.metric(name) is None
