"""Leader election by a Lease: of several operators one works.

A process that cannot renew in time ends itself: it cannot know whether another has taken over, and any moment is a
good one to be cut off at (see reconcile.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hat_operator import metrics
from hat_operator.cluster import Cluster, ClusterError, Object
from hat_operator.kinds import LEASE

log = logging.getLogger(__name__)
LEASE_S = 15.0
RENEW_S = 5.0
RETRY_S = 2.0
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Identity:
    """Which lease, and who asks for it."""

    namespace: str
    lease: str
    holder: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Identity:
        """Read HAT_OPERATOR_LEASE_NAME, _POD_NAME and _POD_NAMESPACE (else the pod's own, else default)."""
        namespace = environment.get("HAT_OPERATOR_POD_NAMESPACE", "")
        if not namespace and _NAMESPACE_FILE.exists():
            namespace = _NAMESPACE_FILE.read_text().strip()
        name = environment.get("HAT_OPERATOR_POD_NAME") or os.uname().nodename
        lease = environment.get("HAT_OPERATOR_LEASE_NAME") or "hat-operator"
        # A restarted container has the same pod's name, but is another process.
        return cls(namespace or "default", lease, f"{name}_{uuid.uuid4().hex[:8]}")


class Leader:
    """Takes the lease, holds it, gives it back."""

    def __init__(self, cluster: Cluster, identity: Identity, lease_s: float = LEASE_S) -> None:
        self._cluster = cluster
        self._identity = identity
        self._lease_s = lease_s
        self._seen: tuple[str, float] | None = None
        """resourceVersion of another's lease, and when (time.monotonic()) it was first seen: clocks of two machines
        are never compared."""
        self._renewed = 0.0

    async def acquire(self) -> None:
        """Return once this process holds the lease."""
        log.info("waiting for the lease %s/%s", self._identity.namespace, self._identity.lease)
        while not await self._try():  # noqa: ASYNC110 - another process's doing is no event here
            await asyncio.sleep(RETRY_S)
        metrics.LEADER.set(1)
        log.info("leading as %s", self._identity.holder)

    async def hold(self, lost: Callable[[], None]) -> None:
        """Renew until the lease is lost, then call `lost`; never wait for an answer longer than the lease lasts."""
        while time.monotonic() - self._renewed < self._lease_s - RENEW_S:
            await asyncio.sleep(RENEW_S if time.monotonic() - self._renewed < RENEW_S else RETRY_S)
            left = self._lease_s - 1.0 - (time.monotonic() - self._renewed)
            try:
                async with asyncio.timeout(max(left, 0.1)):
                    await self._try()
            except TimeoutError:
                log.error("the lease could not be renewed in time")
                break
            if self._seen is not None:
                log.error("another process has taken the lease")
                break
        metrics.LEADER.set(0)
        lost()

    async def release(self) -> None:
        """Let another process lead at once."""
        metrics.LEADER.set(0)
        try:
            lease = await self._cluster.get(LEASE, self._identity.lease, self._identity.namespace)
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity.holder:
                lease["spec"]["holderIdentity"] = ""
                await self._cluster.replace(lease)
        except ClusterError as error:
            log.warning("the lease was not given back: %s", error)

    async def _try(self) -> bool:
        try:
            return await self._take()
        except ClusterError as error:
            log.warning("lease: %s: %s", error.reason, error)
            return False

    async def _take(self) -> bool:
        begin = time.monotonic()
        lease = await self._cluster.get(LEASE, self._identity.lease, self._identity.namespace)
        if lease is None:
            await self._cluster.create(self._lease(None))
        else:
            holder = lease["spec"].get("holderIdentity")
            if holder and holder != self._identity.holder and not self._expired(lease):
                return False
            await self._cluster.replace(self._lease(lease))
        self._seen, self._renewed = None, begin
        return True

    def _expired(self, lease: Object) -> bool:
        version = str(lease["metadata"]["resourceVersion"])
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, time.monotonic())
            return False
        duration = float(lease["spec"].get("leaseDurationSeconds") or self._lease_s)
        return time.monotonic() - self._seen[1] > duration

    def _lease(self, old: Object | None) -> Object:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        meta = {"name": self._identity.lease, "namespace": self._identity.namespace}
        spec = {} if old is None else old["spec"]
        mine = spec.get("holderIdentity") == self._identity.holder
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": meta if old is None else old["metadata"],
            "spec": {
                "holderIdentity": self._identity.holder,
                "leaseDurationSeconds": round(self._lease_s),
                "renewTime": now,
                "acquireTime": spec.get("acquireTime", now) if mine else now,
                "leaseTransitions": int(spec.get("leaseTransitions", 0)) + (0 if mine or old is None else 1),
            },
        }
