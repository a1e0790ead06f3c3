"""Collects what the cloud's pods know of the devices: devices are behind NAT, so nobody else can ask them.

Where a HatDeployment names a Prometheus server that has their metrics, that one tells, and pods say only which policy
they have.
"""

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
from hat_operator.answers import Report, Said, newest, parse, parse_policy
from hat_operator.bounded import read_at_most
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.devices import is_ready
from hat_operator.figures import CONTACT, Figures
from hat_operator.identity.authority import AuthorityError
from hat_operator.kinds import POD
from hat_operator.policy import CloudTuning
from hat_operator.policy_push import POLICY_PATH
from hat_operator.prometheus import PrometheusServers
from hat_operator.spec import HatDeployment
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
        self._servers = PrometheusServers(home)
        self._pods: dict[Key, dict[str, Pod]] | None = None
        """Of each HatDeployment, by the pod's uid; None before the first round.

        A pod that does not answer keeps what it said last.
        """

    def follow(self, hat: HatDeployment) -> None:
        """Take a HatDeployment's figures from where its spec says; each reconcile calls this."""
        if self._servers.use((hat.namespace, hat.name), hat.spec.prometheus):
            self.hurry()

    def forget(self, namespace: str, name: str) -> None:
        """The HatDeployment is gone."""
        self._servers.use((namespace, name), None)

    def figures(self, namespace: str, name: str) -> dict[str, Figures]:
        """The newest figures of each device of a HatDeployment, and its last contact."""
        now, clock = time.monotonic(), time.time()
        return {
            device: {**report.figures, CONTACT: events.rfc3339(clock - (now - report.contact))}
            for device, report in self.reports(namespace, name).items()
        }

    def reports(self, namespace: str, name: str) -> dict[str, Report]:
        """The newest report of each device of a HatDeployment, as the pod gave it that heard the device last.

        From the Prometheus server instead, where the HatDeployment names one.
        """
        if self._servers.named((namespace, name)):
            return newest((self._servers.told((namespace, name)).reports,), time.monotonic())
        return newest((pod.said.reports for pod in self.pods(namespace, name)), time.monotonic())

    def pods(self, namespace: str, name: str) -> list[Pod]:
        """The ready pods of a HatDeployment's cloud at the last round."""
        return list((self._pods or {}).get((namespace, name), {}).values())

    def tunings(self, namespace: str, name: str) -> list[CloudTuning]:
        """Cost and load of a HatDeployment's replicas as of the last round; none: nothing of now is known."""
        if self._servers.named((namespace, name)):
            known = self._servers.fresh((namespace, name))
            return self._servers.told((namespace, name)).tunings if known else []
        pods = self.pods(namespace, name)
        return [pod.said.tuning for pod in pods if pod.answered is not None and not pod.error]

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
        seen = MetricsSeen(len(telling), len(silent), len(pods) - len(telling) - len(silent), error)
        # Replicas that do not answer get no policy either, whatever a Prometheus server knows.
        return (
            self._servers.seen((namespace, name))
            if telling and self._servers.named((namespace, name))
            else seen
        )

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
        asking = asyncio.gather(*(self._ask(session, slots, pod) for pod in pods))
        answers, _ = await asyncio.gather(asking, self._servers.ask_all(session))
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
        door, url = Door(""), ""
        read: Callable[[bytes, float], Said] = parse
        try:
            door = await self._doors.of(pod)
            url = door.url
            if self._servers.named(_owner(pod)):
                url, read = door.at(POLICY_PATH), lambda body, now: parse_policy(body)
            async with slots, session.get(url, allow_redirects=False, **door.options) as response:
                if response.status != 200:
                    raise ValueError(f"status {response.status}")
                found = read(await read_at_most(response, MAX_BYTES), time.monotonic())
        except (aiohttp.ClientError, TimeoutError, ValueError, AuthorityError) as error:
            metrics.DEVICE_POLLS.labels("failed").inc()
            log.debug("%s: %s", url, error or type(error).__name__)
            # Without addresses and the like: it goes into a condition, which should stay the same.
            told = isinstance(error, ValueError | AuthorityError)
            return door, str(error) if told else type(error).__name__
        metrics.DEVICE_POLLS.labels("ok").inc()
        return door, found


def _owner(pod: Mapping[str, Any]) -> Key:
    """The HatDeployment of a pod: the namespace is the pod's own, whatever its labels say."""
    meta = pod["metadata"]
    return meta["namespace"], meta.get("labels", {}).get(names.LABEL_DEPLOYMENT, "")
