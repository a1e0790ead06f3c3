"""Asks the Prometheus servers that HatDeployments name (spec.observability.prometheusUrl) for their figures.

Whoever writes a HatDeployment chooses the address, so what comes from there is bounded in time and size, redirects are
not followed, and of what is no answer only Prometheus' own words are shown.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from hat_operator import metrics
from hat_operator.bounded import read_at_most
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.kinds import CONFIG_MAP, SECRET, Kind
from hat_operator.prometheus_answers import Told, parse, query, what_it_said
from hat_operator.prometheus_ref import Prometheus
from hat_operator.status import MetricsSeen

log = logging.getLogger(__name__)
TIMEOUT_S = 5.0
PARALLEL = 8
MAX_BYTES = 8 << 20
"""Longest answer that is read: that about some 2,500 devices."""
FRESH_S = 60.0
"""Samples that are older say nothing."""

Key = tuple[str, str]


@dataclass(frozen=True)
class _Server:
    """One HatDeployment's, and what it said last."""

    where: Prometheus
    since: float
    """Monotonic seconds of the first look."""
    told: Told = field(default_factory=Told)
    error: str | None = None
    """Why its last answer is of no use; "" where it was one, None before the first."""


class PrometheusServers:
    """The servers of all HatDeployments that name one."""

    def __init__(self, home: Cluster) -> None:
        """`home` has the Secrets and ConfigMaps that HatDeployments name. Nothing is asked before `ask_all`."""
        self._home = home
        self._servers: dict[Key, _Server] = {}

    def use(self, key: Key, where: Prometheus | None) -> bool:
        """A HatDeployment, by namespace and name, is to be asked about there, or at its pods; whether that is new."""
        known = self._servers.get(key)
        if (None if known is None else known.where) == where:
            return False
        if where is None:
            del self._servers[key]
        else:
            self._servers[key] = _Server(where, time.monotonic())
        return True

    def named(self, key: Key) -> bool:
        """Whether this HatDeployment names one."""
        return key in self._servers

    def told(self, key: Key) -> Told:
        """What the server of a HatDeployment that names one said last, however long ago."""
        return self._servers[key].told

    def fresh(self, key: Key) -> bool:
        """Whether its last answer tells of now."""
        server = self._servers[key]
        return server.error == "" and _is_fresh(server)

    def seen(self, key: Key) -> MetricsSeen:
        """What people should know of it."""
        server = self._servers[key]
        source = f"the Prometheus server {server.where.url}"
        if _is_fresh(server):
            return MetricsSeen(telling=1, source=source)
        if server.told.sampled is None and time.monotonic() - server.since < FRESH_S:
            return MetricsSeen(asked=1, source=source)
        return MetricsSeen(silent=1, error=server.error or _without_samples(key), source=source)

    async def ask_all(self, session: aiohttp.ClientSession) -> None:
        """One round over all servers. One that fails keeps what it told before."""
        slots = asyncio.Semaphore(PARALLEL)

        async def one(key: Key, server: _Server) -> None:
            async with slots:
                answer = await self._ask(session, key, server.where)
            if self._servers.get(key) is not server:
                return  # another one is named by now
            new = (
                replace(server, error=answer)
                if isinstance(answer, str)
                else replace(server, told=answer, error="")
            )
            self._servers[key] = new

        await asyncio.gather(*(one(key, server) for key, server in list(self._servers.items())))

    async def _ask(self, session: aiohttp.ClientSession, key: Key, where: Prometheus) -> Told | str:
        """The answer, or why there is none: without what changes from one time to the next."""
        namespace, name = key
        try:
            async with asyncio.timeout(TIMEOUT_S):
                headers = await self._headers(namespace, where)
                trusted = await self._trusted(namespace, where)
                begin = time.monotonic()
                body = await _get(
                    session, f"{where.url}/api/v1/query", query(namespace, name), headers, trusted
                )
            # Some ten milliseconds for each megabyte.
            found = await asyncio.to_thread(parse, body, begin, FRESH_S)
        except (aiohttp.ClientError, TimeoutError, ValueError, ClusterError, OSError) as error:
            metrics.PROMETHEUS_QUERIES.labels("failed").inc()
            text = _reason(error)
            log.debug("%s/%s: %s: %s", namespace, name, where.url, text)
            return text
        metrics.PROMETHEUS_QUERIES.labels("ok").inc()
        return found

    async def _headers(self, namespace: str, where: Prometheus) -> dict[str, str]:
        if where.token is None:
            return {}
        name, key = where.token.name, where.token.key
        token = (await self._read(SECRET, namespace, name, key)).strip()
        if not token or not (token.isascii() and token.isprintable()):
            raise ValueError(f"key {key!r} of the Secret {name!r} is no token: one line of ASCII")
        return {"Authorization": f"Bearer {token}"}

    async def _trusted(self, namespace: str, where: Prometheus) -> ssl.SSLContext | bool:
        if where.ca is None:
            return True
        kind, name, key = where.ca.kind, where.ca.name, where.ca.key
        pem = await self._read(SECRET if kind == SECRET.name else CONFIG_MAP, namespace, name, key)
        try:
            return ssl.create_default_context(cadata=pem)
        except (ssl.SSLError, ValueError):
            raise ValueError(f"key {key!r} of the {kind} {name!r} holds no certificates in PEM") from None

    async def _read(self, kind: Kind, namespace: str, name: str, key: str) -> str:
        """The text under a key, read anew each time, so that what is rotated is used.

        Raises:
            ValueError: it is not there, is no text, or may not be read.
        """
        try:
            found = await self._home.get(kind, name, namespace)
        except ClusterError as error:
            if error.reason != "Forbidden":
                raise
            raise ValueError(f"the operator may not read the {kind.name} {name!r}") from None
        if found is None:
            raise ValueError(f"there is no {kind.name} {name!r}")
        text = found.get("data", {}).get(key)
        if text is None:
            raise ValueError(f"the {kind.name} {name!r} has no key {key!r}")
        try:
            return base64.b64decode(text).decode() if kind is SECRET else str(text)
        except (binascii.Error, UnicodeDecodeError):
            raise ValueError(f"key {key!r} of the {kind.name} {name!r} is not text") from None


async def _get(
    session: aiohttp.ClientSession,
    url: str,
    expr: str,
    headers: Mapping[str, str],
    trusted: ssl.SSLContext | bool,
) -> bytes:
    options: dict[str, Any] = {"headers": headers, "ssl": trusted, "allow_redirects": False}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with session.get(url, params={"query": expr}, timeout=timeout, **options) as response:
        body = await read_at_most(response, MAX_BYTES)
        if response.status != 200:
            said = what_it_said(body)
            raise ValueError(f"it answers with status {response.status}" + (f": {said}" if said else ""))
        return body


def _is_fresh(server: _Server) -> bool:
    sampled = server.told.sampled
    return sampled is not None and time.monotonic() - sampled <= FRESH_S


def _without_samples(key: Key) -> str:
    return (
        f'it has no samples of the cloud with hat_namespace="{key[0]}" and hat_deployment="{key[1]}" that are at most '
        f"{FRESH_S:g} s old"
    )


def _reason(error: Exception) -> str:
    """In words that stay the same as long as the cause does: they go into a condition."""
    if isinstance(error, ClusterError):
        return f"its Secret or ConfigMap could not be read: {error.reason}"
    if isinstance(error, TimeoutError):
        return f"no answer in {TIMEOUT_S:g} s"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is refused: {getattr(error.certificate_error, 'verify_message', '') or 'invalid'}"
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno or 0
        # asyncio puts the address into the text; a name that is not found has a number below 0.
        return f"not reachable: {os.strerror(number) if number > 0 else error.os_error.strerror}"
    if isinstance(error, ValueError) and not isinstance(error, aiohttp.ClientError):
        return str(error)
    return type(error).__name__
