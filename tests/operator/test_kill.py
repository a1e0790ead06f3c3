"""SIGKILL at random moments: whatever was half done, the next process brings everything to the wanted state."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from hat_operator import names
from hat_operator.cluster import Cluster
from hat_operator.kinds import CHILDREN, EDGE_CHILDREN, HATDEPLOYMENT, LEASE
from tests.harness.controlplane import ControlPlane
from tests.operator.home import Home, inline, remote, store_kubeconfig
from tests.operator.oracle import settled
from tests.operator.running import Operator

WITHIN_S = 60.0
SEED = int(os.environ.get("HAT_KILL_SEED") or random.SystemRandom().randrange(10**6))
CHANGES: list[dict[str, Any]] = [
    {"split": {"inputLayers": 4}, "cloud": {"replicas": 2}},
    {"security": {"networkPolicies": False}, "chunking": {"mode": "fixed", "tokens": 0}},
    {"edge": {"images": [{"name": "pc", "arch": "amd64"}], "api": {"port": 9000}}},
]


class Killed:
    """Runs the operator again and again, each time for as long as the test says."""

    def __init__(self, plane: ControlPlane, home: Home, folder: Path) -> None:
        self._plane, self._home, self._folder = plane, home, folder
        self._count = 0

    async def start(self) -> Operator:
        """A new process; it need not wait for the lease of the one that was killed."""
        lease = await self._home.cluster.get(LEASE, "hat-operator", self._home.namespace)
        if lease is not None:
            await self._home.cluster.delete(lease)
        self._count += 1
        return Operator(self._plane, self._home.namespace, self._folder, pod=f"pod-{self._count}")

    async def killed_after(self, seconds: float) -> None:
        """Start one, wait until it leads and so works, kill it `seconds` later."""
        with await self.start() as operator:
            deadline = time.monotonic() + WITHIN_S
            while not await self._leads(operator):
                assert operator.process.poll() is None, operator.log.read_text()
                assert time.monotonic() < deadline, "the operator does not lead"
                await asyncio.sleep(0.02)
            await asyncio.sleep(seconds)

    async def _leads(self, operator: Operator) -> bool:
        lease = await self._home.cluster.get(LEASE, "hat-operator", self._home.namespace)
        return lease is not None and f"{operator.log.stem}_" in (lease["spec"].get("holderIdentity") or "")


@pytest.fixture
def killed(control_plane: ControlPlane, home: Home, tmp_path: Path) -> Killed:
    return Killed(control_plane, home, tmp_path)


async def left(home: Home, edge: Cluster, namespace: str) -> list[str]:
    """All that any operator has made in both namespaces and that is not on its way out."""
    own = f"{names.LABEL_MANAGED_BY}={names.FIELD_MANAGER}"
    found = []
    for cluster, kinds, where in ((home.cluster, CHILDREN, home.namespace), (edge, EDGE_CHILDREN, namespace)):
        for kind in kinds:
            found += [
                f"{where}/{kind.plural}/{item['metadata']['name']}"
                for item in await cluster.list(kind, where, own)
                if "deletionTimestamp" not in item["metadata"]
            ]
    return found


async def live_through(
    home: Home, edge: Cluster, namespace: str, killed: Killed, points: list[float], change: dict[str, Any]
) -> None:
    """Create, change and delete, with a kill in each: at a time after the process begins to work."""
    create_s, change_s, delete_s = points
    await home.create(**remote(namespace))
    await killed.killed_after(create_s)
    print(f"killed {create_s:.2f} s into the creation, with {len(await left(home, edge, namespace))} objects")
    await home.patch(**change)
    await killed.killed_after(change_s)
    with await killed.start():
        body = await settled(home.cluster, edge, home.namespace, "chat", WITHIN_S)
        assert body["metadata"]["finalizers"] == [names.FINALIZER]
        found = await left(home, edge, namespace)
        assert len([name for name in found if "/deployments/" in name]) == 1
        assert len([name for name in found if "/daemonsets/" in name]) == 1
        await home.cluster._request("delete", HATDEPLOYMENT.path(home.namespace, "chat"))
        await asyncio.sleep(delete_s / 2)
    print(
        f"killed {delete_s / 2:.2f} s into the deletion, with {len(await left(home, edge, namespace))} objects"
    )
    with await killed.start():
        deadline = time.monotonic() + WITHIN_S
        while await home.cluster.get(HATDEPLOYMENT, "chat", home.namespace) or await left(
            home, edge, namespace
        ):
            assert time.monotonic() < deadline, await left(home, edge, namespace)
            await asyncio.sleep(0.2)


async def run(
    home: Home, site: tuple[Cluster, str], plane: ControlPlane, killed: Killed, rounds: int
) -> None:
    # A pass from nothing takes about half a second; most points should lie inside one.
    chance = random.Random(SEED)
    print(f"HAT_KILL_SEED={SEED}")
    edge, namespace = site
    await store_kubeconfig(home, inline(plane))
    for index in range(rounds):
        points = [chance.uniform(0.0, 1.0) for _ in range(3)]
        await live_through(home, edge, namespace, killed, points, CHANGES[index % len(CHANGES)])


async def test_killed_at_some_points(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane, killed: Killed
) -> None:
    await run(home, site, edge_plane, killed, 2)


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_killed_at_twenty_points(
    home: Home, site: tuple[Cluster, str], edge_plane: ControlPlane, killed: Killed
) -> None:
    await run(home, site, edge_plane, killed, 7)
