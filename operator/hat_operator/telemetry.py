"""Collects what the cloud's pods know of the devices: devices are behind NAT, so nobody else can ask them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from hat_operator import events, metrics, names
from hat_operator.admin import Door, Doors
from hat_operator.answers import Report, Said, newest, parse
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.devices import is_ready
from hat_operator.figures import CONTACT, Figures
from hat_operator.identity.authority import AuthorityError
from hat_operator.kinds import POD
from hat_operator.status import MetricsSeen

log = logging.getLogger(__name__)
TIMEOUT_S = 3.0
PARALLEL = 16
FLOOR_S = 1.0
"""Shortest time between two rounds, however many hurry."""
MAX_BYTES = 2 << 20
"""Longest answer that is read; a full table of a cloud pod is shorter."""
SILENT_S = 60.0
"""A pod that has not answered for so long is silent; a request that is lost now and then is no news."""

Key = tuple[str, str]
_SELECTOR = names.selector_text(
    {names.LABEL_MANAGED_BY: names.FIELD_MANAGER, names.LABEL_COMPONENT: names.CLOUD}
)


@dataclass(frozen=True)
class Pod:
    """One pod and what it said last."""

    uid: str
    door: Door
    """Where it lists its devices."""
    asked: float
    """Monotonic seconds of the first question."""
    answered: float | None = None
    """Of its last answer."""
    error: str = ""
    """Why it did not answer the last time; empty if it did."""
    said: Said = field(default_factory=Said)


class Telemetry:
    """Asks every ready pod of the cloud in turn; reconciles only read what was found, so no pod can hold them up."""

    def __init__(self, home: Cluster, namespaces: Sequence[str], doors: Doors, every_s: float) -> None:
        """Nothing is asked before `run`.

        Args:
            home: where the cloud's pods are.
            namespaces: those that are served; none means all.
            doors: how pods are reached.
            every_s: seconds between two rounds.
        """
        self._home = home
        self._namespaces = namespaces
        self._doors = doors
        self._every_s = every_s
        self._silent_s = max(SILENT_S, 2.5 * every_s)
        self._soon = asyncio.Event()
        self._pods: dict[Key, dict[str, Pod]] | None = None
        """Of each HatDeployment, by the pod's uid; None before the first round.

        A pod that does not answer keeps what it said last.
        """

    def figures(self, namespace: str, name: str) -> dict[str, Figures]:
        """The newest figures of each device of a HatDeployment, and its last contact."""
        now, clock = time.monotonic(), time.time()
        return {
            device: {**report.figures, CONTACT: events.rfc3339(clock - (now - report.contact))}
            for device, report in self.reports(namespace, name).items()
        }

    def reports(self, namespace: str, name: str) -> dict[str, Report]:
        """The newest report of each device of a HatDeployment, as the pod gave it that heard the device last."""
        return newest((pod.said.reports for pod in self.pods(namespace, name)), time.monotonic())

    def pods(self, namespace: str, name: str) -> list[Pod]:
        """The ready pods of a HatDeployment's cloud at the last round."""
        return list((self._pods or {}).get((namespace, name), {}).values())

    def has_policy(self, key: Key, pod: Pod, version: int) -> None:
        """A pod has taken a policy since it was asked."""
        known = (self._pods or {}).get(key, {})
        if pod.uid in known:
            said = replace(known[pod.uid].said, policy_version=version)
            known[pod.uid] = replace(known[pod.uid], said=said)

    def hurry(self) -> None:
        """Begin the next round now."""
        self._soon.set()

    def seen(self, namespace: str, name: str) -> MetricsSeen | None:
        """Whether the pods of a HatDeployment answer; None before the first round."""
        if self._pods is None:
            return None
        pods = self.pods(namespace, name)
        limit = time.monotonic() - self._silent_s
        telling = [pod for pod in pods if pod.answered is not None and pod.answered >= limit]
        silent = [pod for pod in pods if (pod.answered or pod.asked) < limit]
        error = min((pod.error for pod in silent), default="")
        return MetricsSeen(len(telling), len(silent), len(pods) - len(telling) - len(silent), error)

    async def run(self, after: Callable[[aiohttp.ClientSession], Awaitable[None]] | None = None) -> None:
        """Ask, round after round, until cancelled; call `after` at the end of each."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=PARALLEL, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while True:
                self._soon.clear()
                try:
                    await self.ask_all(session)
                    if after is not None:
                        await after(session)
                except Exception:
                    log.exception("asking the cloud's pods for their devices failed")
                await asyncio.sleep(min(FLOOR_S, self._every_s))
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, self._every_s - FLOOR_S)):
                        await self._soon.wait()

    async def ask_all(self, session: aiohttp.ClientSession) -> None:
        """One round. Where pods could not be listed, what was known of them stays."""
        pods: list[Mapping[str, Any]] = []
        found: dict[Key, dict[str, Pod]] = {}
        before = self._pods or {}
        for namespace in self._namespaces or (None,):
            try:
                listed = await self._home.list(POD, namespace, _SELECTOR)
            except ClusterError as error:
                log.warning("the cloud's pods were not listed: %s: %s", error.reason, error)
                found |= {key: known for key, known in before.items() if namespace in (None, key[0])}
                continue
            pods += [pod for pod in listed if is_ready(pod)]
        slots = asyncio.Semaphore(PARALLEL)
        begin = time.monotonic()
        answers = await asyncio.gather(*(self._ask(session, slots, pod) for pod in pods))
        for pod, (door, answer) in zip(pods, answers, strict=True):
            key, uid = _owner(pod), pod["metadata"]["uid"]
            known = replace(before.get(key, {}).get(uid, Pod(uid, door, begin)), door=door)
            if isinstance(answer, str):
                answered = replace(known, error=answer)
            else:
                answered = replace(known, answered=time.monotonic(), error="", said=answer)
            found.setdefault(key, {})[uid] = answered
        self._pods = found

    async def _ask(
        self, session: aiohttp.ClientSession, slots: asyncio.Semaphore, pod: Mapping[str, Any]
    ) -> tuple[Door, Said | str]:
        """What the pod says, or why it says nothing."""
        door = Door("")
        try:
            door = await self._doors.of(pod)
            async with slots, session.get(door.url, allow_redirects=False, **door.options) as response:
                if response.status != 200:
                    raise ValueError(f"status {response.status}")
                found = parse(await _body(response), time.monotonic())
        except (aiohttp.ClientError, TimeoutError, ValueError, AuthorityError) as error:
            metrics.DEVICE_POLLS.labels("failed").inc()
            log.debug("%s: %s", door.url, error or type(error).__name__)
            # Without addresses and the like: it goes into a condition, which should stay the same.
            told = isinstance(error, ValueError | AuthorityError)
            return door, str(error) if told else type(error).__name__
        metrics.DEVICE_POLLS.labels("ok").inc()
        return door, found


def _owner(pod: Mapping[str, Any]) -> Key:
    """The HatDeployment of a pod: the namespace is the pod's own, whatever its labels say."""
    meta = pod["metadata"]
    return meta["namespace"], meta.get("labels", {}).get(names.LABEL_DEPLOYMENT, "")


async def _body(response: aiohttp.ClientResponse) -> bytes:
    found = bytearray()
    async for part in response.content.iter_chunked(1 << 16):
        found += part
        if len(found) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
    return bytes(found)
