"""Watches of devices' clusters: what changes there is looked at at once. The resync stays the safety net.

An event is only a reason to look at a HatDeployment; nothing of its content is used.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
from kubernetes import client
from kubernetes.client.rest import should_bypass_proxies

from hat_operator import metrics, names
from hat_operator.cluster import Cluster
from hat_operator.devices import is_ready
from hat_operator.kinds import CERTIFICATE_REQUEST, EDGE_CHILDREN, NODE, POD, POD_MONITOR, Kind

log = logging.getLogger(__name__)
Key = tuple[str, str]
KINDS = (*EDGE_CHILDREN, POD_MONITOR, POD, NODE, CERTIFICATE_REQUEST)
DELAY_S = 0.5
"""Events within this time make one pass: an update of all devices reports each of them several times."""
CONNECT_S = 10.0
STREAM_S = 300
"""The server ends each watch after this time, so that a change of rights is noticed."""
SILENCE_S = 100.0
"""The server sends a bookmark each minute: longer silence means that the connection is dead."""
RETRY_S = (1.0, 2.0, 4.0, 8.0, 15.0)
REFUSED_S = 300.0
MAX_EVENT = 8 << 20
OPEN = "OPEN"
_GONE = 410
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


class _WatchError(Exception):
    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(f"{status} {text}".strip())
        self.status = status


class EdgeWatches:
    """One watch for each kubeconfig and namespace, as long as a HatDeployment uses it."""

    def __init__(self, request: Callable[[str, str], None]) -> None:
        """`request` asks for a pass over a HatDeployment, by namespace and name."""
        self._request = request
        self._watches: dict[tuple[str, str], _Watch] = {}
        self._used: dict[Key, tuple[str, str]] = {}

    @property
    def users(self) -> frozenset[Key]:
        """Who uses a watch."""
        return frozenset(self._used)

    def use(self, user: Key, cluster: Cluster, namespace: str) -> None:
        """Watch this namespace of a cluster for a HatDeployment, and what it used before no more for it."""
        place = (cluster.identity, namespace)
        if self._used.get(user) == place:
            return
        self.drop(user)
        self._used[user] = place
        if place not in self._watches:
            self._watches[place] = _Watch(cluster, namespace, self._request)
        self._watches[place].users.add(user)

    def drop(self, user: Key) -> None:
        """A HatDeployment is gone or has no other cluster; a watch without users ends."""
        place = self._used.pop(user, None)
        if place is None:
            return
        self._watches[place].users.discard(user)
        if not self._watches[place].users:
            self._watches.pop(place).cancel()

    async def close(self) -> None:
        """End all watches."""
        watches = list(self._watches.values())
        self._watches.clear()
        self._used.clear()
        await asyncio.gather(*(watch.close() for watch in watches))


class _Watch:
    """A stream for each kind."""

    def __init__(self, cluster: Cluster, namespace: str, request: Callable[[str, str], None]) -> None:
        self.users: set[Key] = set()
        self._configuration, self._user_agent = cluster.configuration, cluster.user_agent
        self._namespace = namespace
        self._request = request
        self._due: dict[Key, asyncio.TimerHandle] = {}
        self._nodes: dict[str, tuple[bool, Mapping[str, str]]] = {}
        self._task = asyncio.create_task(self._run(), name=f"watch {namespace} at {self._configuration.host}")

    def cancel(self) -> None:
        """End soon."""
        for timer in self._due.values():
            timer.cancel()
        self._due.clear()
        self._task.cancel()

    async def close(self) -> None:
        """End, and wait for it."""
        self.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            headers, connector = _credentials(self._configuration)
        except (OSError, ValueError) as error:
            log.warning("%s is not watched: %s", self._configuration.host, error)
            return
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        async with (
            aiohttp.ClientSession(
                headers={**headers, "User-Agent": self._user_agent},
                connector=connector,
                timeout=timeout,
                read_bufsize=MAX_EVENT // 2,
            ) as session,
            asyncio.TaskGroup() as streams,
        ):
            for kind in KINDS:
                streams.create_task(self._follow(session, kind))

    async def _follow(self, session: aiohttp.ClientSession, kind: Kind) -> None:
        """Keep one stream open, for ever."""
        stream = _Stream(self._configuration, kind, self._namespace)
        failures = 0
        while True:
            begin = time.monotonic()
            try:
                async for event in stream.events(session):
                    if event["type"] == OPEN:
                        if failures or event["missed"]:
                            self._look_at_all()
                        continue
                    failures = 0
                    if event["type"] != "BOOKMARK":
                        self._saw(kind, event)
                failures = 0
                wait_s = RETRY_S[0] - (time.monotonic() - begin)
            except _WatchError as error:
                wait_s = REFUSED_S
                if error.status in (403, 404, 405):
                    log.info("%s at %s is not watched: %s", kind.plural, self._configuration.host, error)
                elif error.status == _GONE:
                    wait_s = RETRY_S[0]
                else:
                    failures, wait_s = self._failed(kind, error, failures)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                failures, wait_s = self._failed(kind, error, failures)
            except Exception as error:
                log.exception("watch of %s at %s failed", kind.plural, self._configuration.host)
                failures, wait_s = self._failed(kind, error, failures)
            await asyncio.sleep(max(0.0, wait_s))

    def _failed(self, kind: Kind, error: Exception, failures: int) -> tuple[int, float]:
        if not failures:
            text = str(error) or type(error).__name__
            log.info("watch of %s at %s: %s", kind.plural, self._configuration.host, text)
            # The cluster may be away: the conditions should say so.
            self._look_at_all()
        # Not all sites at once when the network comes back.
        wait_s = RETRY_S[min(failures, len(RETRY_S) - 1)] * random.uniform(0.8, 1.2)
        return failures + 1, wait_s

    def _saw(self, kind: Kind, event: Mapping[str, Any]) -> None:
        if kind is NODE:
            # A kubelet reports all the time; only these facts are ever used.
            node = event["object"]
            name, facts = node["metadata"]["name"], (is_ready(node), node["metadata"].get("labels", {}))
            gone = event["type"] == "DELETED"
            if gone or self._nodes.get(name) != facts:
                self._nodes[name] = facts
                self._look_at_all()
            if gone:
                del self._nodes[name]
        else:
            labels = event["object"]["metadata"].get("labels", {})
            self._look_at((labels.get(names.LABEL_NAMESPACE), labels.get(names.LABEL_DEPLOYMENT)))

    def _look_at_all(self) -> None:
        for user in self.users:
            self._look_at(user)

    def _look_at(self, user: tuple[str | None, str | None]) -> None:
        for known in self.users & {user}:
            if known not in self._due:
                self._due[known] = asyncio.get_running_loop().call_later(DELAY_S, self._ask, known)

    def _ask(self, user: Key) -> None:
        del self._due[user]
        if user in self.users:
            self._request(*user)


class _Stream:
    """One kind's watch, which goes on where the last connection ended."""

    def __init__(self, configuration: client.Configuration, kind: Kind, namespace: str) -> None:
        self._kind = kind
        self._url = configuration.host + kind.path(namespace if kind.namespaced else None)
        self._options: dict[str, Any] = {"allow_redirects": False}
        if configuration.tls_server_name:
            self._options["server_hostname"] = configuration.tls_server_name
        if configuration.proxy and not should_bypass_proxies(self._url, configuration.no_proxy or ""):
            self._options["proxy"] = configuration.proxy
        self._version = ""

    async def events(self, session: aiohttp.ClientSession) -> AsyncIterator[dict[str, Any]]:
        """Events of one connection, as the API writes them, after one of our own: OPEN, `missed` if others may be lost.

        Raises:
            _WatchError: the server refuses, or (410) has forgotten what has happened since; call again.
        """
        query = {}
        if self._kind is not NODE:
            query["labelSelector"] = f"{names.LABEL_MANAGED_BY}={names.FIELD_MANAGER}"
        missed = not self._version
        if missed:
            # A watch without a version would need a feature that not every store behind an API server has.
            async with session.get(self._url, params=query | {"limit": "1"}, **self._options) as response:
                _check(response)
                self._version = (await response.json())["metadata"]["resourceVersion"]
        query |= {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(STREAM_S)}
        version, self._version = self._version, ""
        query["resourceVersion"] = version
        # Labels are all that is looked at, but of nodes.
        headers = {} if self._kind is NODE else {"Accept": _METADATA}
        async with session.get(self._url, params=query, headers=headers, **self._options) as response:
            _check(response)
            self._version = version
            metrics.EDGE_STREAMS.inc()
            try:
                yield {"type": OPEN, "missed": missed}
                async for line in response.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        self._version = ""
                        raise _WatchError(
                            event["object"].get("code", 500), event["object"].get("message", "")
                        )
                    self._version = event["object"]["metadata"]["resourceVersion"]
                    yield event
            finally:
                metrics.EDGE_STREAMS.dec()


def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise _WatchError(response.status, response.reason or "")


def _credentials(configuration: client.Configuration) -> tuple[dict[str, str], aiohttp.TCPConnector]:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    headers = {}
    token = configuration.auth_settings().get("BearerToken")
    if token is not None:
        headers["Authorization"] = token["value"]
    return headers, aiohttp.TCPConnector(ssl=context)
