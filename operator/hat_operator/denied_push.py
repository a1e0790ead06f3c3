"""Brings deny-lists to the cloud's pods (PUT /v1/denied): at once when one has changed, and again and again.

Again, because a container that was restarted has the list of its ConfigMap, which may be a minute old.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import aiohttp

from hat_operator import metrics, names
from hat_operator.admin import Doors, has_admin_port
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.identity.authority import AuthorityError
from hat_operator.kinds import POD
from hat_runtime.errors import UsageError
from hat_runtime.json_document import MAX_BYTES
from hat_runtime.security.denied import DenyList, parse

log = logging.getLogger(__name__)
Key = tuple[str, str]
PATH = "/v1/denied"
TIMEOUT_S = 3.0
PARALLEL = 16
_CLOUD = {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_COMPONENT: names.CLOUD}


class DeniedPush:
    """The lists of all HatDeployments as they should be in effect."""

    def __init__(
        self,
        home: Cluster,
        namespaces: Sequence[str],
        doors: Doors,
        every_s: float,
        request: Callable[[str, str], None],
    ) -> None:
        """Nothing is sent before `run`.

        Args:
            home: where the cloud's pods are.
            namespaces: those that are served; none means all.
            doors: how pods are reached.
            every_s: seconds between two rounds where nothing changes.
            request: asks for a pass over a HatDeployment, by namespace and name.
        """
        self._home = home
        self._namespaces = namespaces
        self._doors = doors
        self._every_s = every_s
        self._request = request
        self._lists: dict[Key, DenyList] = {}
        self._least: dict[Key, int] = {}
        self._soon = asyncio.Event()

    def want(self, namespace: str, name: str, listed: DenyList) -> None:
        """From now on the pods of this HatDeployment's cloud should have this list."""
        key = (namespace, name)
        if self._lists.get(key) != listed:
            self._lists[key] = listed
            self._soon.set()

    def forget(self, namespace: str, name: str) -> None:
        """The HatDeployment is gone, or its pods know no certificates."""
        self._lists.pop((namespace, name), None)
        self._least.pop((namespace, name), None)

    def least(self, namespace: str, name: str) -> int:
        """The least version that the list must have to replace other ones that pods were found with; 0: any."""
        return self._least.get((namespace, name), 0)

    async def run(self) -> None:
        """Push, round after round, until cancelled."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=PARALLEL, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            misses = 0
            while True:
                self._soon.clear()
                missed = True
                try:
                    missed = await self.round(session)
                except Exception:
                    log.exception("pushing deny-lists failed")
                misses = misses + 1 if missed else 0
                wait_s = min(2.0 ** (misses - 1), self._every_s) if missed else self._every_s
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._soon.wait()
                        misses = 0

    async def round(self, session: aiohttp.ClientSession) -> bool:
        """Give every pod its list; whether a pod that runs has not taken it. A list of version 0 says nothing."""
        lists = {key: listed for key, listed in self._lists.items() if listed.version}
        if not lists:
            return False
        pods: list[Mapping[str, Any]] = []
        for namespace in self._namespaces or (None,):
            try:
                pods += await self._home.list(POD, namespace, names.selector_text(_CLOUD))
            except ClusterError as error:
                log.warning("the cloud's pods were not listed: %s: %s", error.reason, error)
        told = []
        for pod in pods:
            meta, status = pod["metadata"], pod.get("status", {})
            key = meta["namespace"], meta.get("labels", {}).get(names.LABEL_DEPLOYMENT, "")
            runs = status.get("phase") == "Running" and status.get("podIP") and has_admin_port(pod)
            if runs and key in lists:
                told.append(self._tell(session, key, pod, lists[key]))
        return not all(await asyncio.gather(*told))

    async def _tell(
        self, session: aiohttp.ClientSession, key: Key, pod: Mapping[str, Any], listed: DenyList
    ) -> bool:
        """Whether the pod need not be told again soon."""
        try:
            door = await self._doors.of(pod)
            url, options = door.at(PATH), {**door.options, "allow_redirects": False}
            headers = {"Content-Type": "application/json"}
            async with session.put(
                url, data=listed.to_json().encode(), headers=headers, **options
            ) as response:
                if response.status == 409:
                    await self._overtaken(session, key, url, options)
                if response.status != 200:
                    raise ValueError(f"status {response.status}: {(await response.content.read(500))!r}")
        except (aiohttp.ClientError, TimeoutError, ValueError, AuthorityError, UsageError) as error:
            metrics.DENIED_PUSHES.labels("failed").inc()
            where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
            # A pod that still loads its model does not listen yet; it starts with the ConfigMap's list.
            log.info("%s: the deny-list was not taken: %s", where, error or type(error).__name__)
            return False
        metrics.DENIED_PUSHES.labels("ok").inc()
        return True

    async def _overtaken(
        self, session: aiohttp.ClientSession, key: Key, url: str, options: Mapping[str, Any]
    ) -> None:
        """A pod has another list, of this version or a higher one: the operator's has to be put above it."""
        async with session.get(url, **options) as response:
            found = parse(await response.content.read(MAX_BYTES + 1))
        # A container that has just started may have the next one from its ConfigMap already.
        if found != self._lists.get(key) and found.version >= self._least.get(key, 0):
            self._least[key] = found.version + 1
            self._request(*key)
