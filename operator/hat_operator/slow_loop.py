"""The slow loop: after each round of questions to the cloud's pods, a policy of chunk sizes for each HatDeployment.

The pods get it at once. A ConfigMap holds it for pods that start; the reconcile writes it, on large changes only. Pods
that do not answer freeze it, as does a Prometheus server that is to know their figures and does not: without fresh
figures nothing moves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import aiohttp

from hat_operator import events, metrics
from hat_operator.cluster import Cluster, Object
from hat_operator.objects.replica_files import POLICY
from hat_operator.policy import Policy, adaptive, common, differs, next_policy, restored
from hat_operator.policy_news import REASON, News
from hat_operator.policy_push import push
from hat_operator.spec import HatDeployment
from hat_operator.telemetry import Telemetry
from hat_operator.tuning import Chunking
from hat_runtime.control.published import PolicyError, PublishedPolicy, parse

log = logging.getLogger(__name__)
Key = tuple[str, str]
FRESH_S = 60.0
"""A device that was not heard for so long does not move its size."""
STORE_EVERY_S = 30.0
"""Shortest time between two writes of a ConfigMap."""
EMPTY = PublishedPolicy()


@dataclass
class _Loop:
    """Of one HatDeployment."""

    body: Object
    rule: Chunking
    policy: Policy
    published: PublishedPolicy
    stored: PublishedPolicy
    """What the ConfigMap should hold."""
    stored_at: float
    """Monotonic seconds of the last change of it, or of the first look."""
    fresh_at: float
    """When there were fresh figures last."""
    news: News


class SlowLoop:
    """Policies of all HatDeployments. What was published survives a restart in the ConfigMap and in the pods."""

    def __init__(self, home: Cluster, telemetry: Telemetry, request: Callable[[str, str], None]) -> None:
        """`request` asks for a pass over a HatDeployment, by namespace and name."""
        self._home = home
        self._telemetry = telemetry
        self._request = request
        self._loops: dict[Key, _Loop] = {}

    def stored(self, body: Object, hat: HatDeployment, live: Object | None) -> str | None:
        """The text that the ConfigMap should hold now; None where sizes are nobody's choice. Called by each reconcile.

        Args:
            body: the HatDeployment as it is in the cluster.
            hat: the same, read.
            live: the ConfigMap as it is; a process that knows nothing yet starts from it.
        """
        key, rule = (hat.namespace, hat.name), hat.spec.chunking
        if not adaptive(hat.spec.mode, rule):
            self.forget(*key)
            return None
        loop, now = self._loops.get(key), time.monotonic()
        if loop is None or loop.body["metadata"]["uid"] != body["metadata"]["uid"]:
            found = _content(live)
            policy = restored(found)
            self._loops[key] = _Loop(body, rule, policy, found, found, now, now, News(policy.choices))
            metrics.POLICY_CHANGES.labels(*key)  # from 0 on, so that the first change is an increase
        elif loop.rule != rule:
            self._telemetry.hurry()
        self._loops[key].body, self._loops[key].rule = body, rule
        return self._loops[key].stored.to_json()

    def forget(self, namespace: str, name: str) -> None:
        """The HatDeployment is gone, or its sizes are fixed."""
        self._loops.pop((namespace, name), None)
        metrics.forget_policy(namespace, name)

    async def round(self, session: aiohttp.ClientSession) -> None:
        """Look at what the pods have just said, choose, and push."""
        for key, loop in list(self._loops.items()):
            try:
                await self._one(key, loop, session)
            except Exception:
                log.exception("%s/%s: the chunk policy failed", *key)

    async def _one(self, key: Key, loop: _Loop, session: aiohttp.ClientSession) -> None:
        now, pods = time.monotonic(), self._telemetry.pods(*key)
        telling = [pod for pod in pods if pod.answered is not None and not pod.error]
        tunings = self._telemetry.tunings(*key)
        if telling and tunings:
            loop.fresh_at = now
            fresh = {
                name: report.seen
                for name, report in self._telemetry.reports(*key).items()
                if now - report.contact <= FRESH_S
            }
            cloud, rule = common(tunings), loop.rule
            # Some milliseconds of arithmetic for each device.
            policy = await asyncio.to_thread(next_policy, loop.policy, rule, cloud, fresh)
            if self._loops.get(key) is not loop:
                return
            self._choose(key, loop, policy, rule)
            versions = [pod.said.policy_version or 0 for pod in telling]
            if max(versions) > loop.published.version:
                # Of this operator's predecessor, or somebody else's: this one is to be in effect.
                loop.published = replace(loop.published, version=max(versions) + 1)
            if loop.published.version:
                text = loop.published.to_json()
                behind = [
                    pod for pod in telling if pod.said.policy_version not in (None, loop.published.version)
                ]
                taken = await asyncio.gather(*(push(session, pod.door, text) for pod in behind))
                for pod, took in zip(behind, taken, strict=True):
                    if took:
                        self._telemetry.has_policy(key, pod, loop.published.version)
            await self._tell(loop, now)
            self._store(key, loop, now)
        if not pods:  # there is nobody to ask, which other metrics tell
            loop.fresh_at = now
        seen = self._telemetry.seen(*key)
        if self._loops.get(key) is loop:
            metrics.POLICY_FROZEN.labels(*key).set(seen is not None and seen.frozen)
            metrics.POLICY_AGE.labels(*key).set(now - loop.fresh_at)

    def _choose(self, key: Key, loop: _Loop, policy: Policy, rule: Chunking) -> None:
        loop.policy = policy
        published = policy.published(loop.published.version, rule)
        if published != loop.published:
            loop.published = replace(published, version=published.version + 1)
            metrics.POLICY_CHANGES.labels(*key).inc()

    async def _tell(self, loop: _Loop, now: float) -> None:
        text = loop.news.tell(loop.policy.choices, loop.rule, now)
        if text is not None:
            await events.post(self._home, loop.body, "Normal", REASON, text)

    def _store(self, key: Key, loop: _Loop, now: float) -> None:
        if now - loop.stored_at < STORE_EVERY_S or not _differ(loop.stored, loop.published):
            return
        loop.stored, loop.stored_at = loop.published, now
        self._request(*key)


def _content(live: Object | None) -> PublishedPolicy:
    if live is None:
        return EMPTY
    try:
        return parse(str(live.get("data", {}).get(POLICY.key, "")))
    except PolicyError as error:
        meta = live["metadata"]
        log.warning("ConfigMap %s/%s: %s; it is written anew", meta["namespace"], meta["name"], error)
        return EMPTY


def _differ(stored: PublishedPolicy, new: PublishedPolicy) -> bool:
    """Whether a pod that starts with `stored` would propose sizes that are far from the new ones."""
    sizes = [(stored.chunk_for(name), one.chunk_tokens) for name, one in new.devices.items()]
    sizes.append((stored.chunk_for(""), new.chunk_for("")))
    return any(new and (not old or differs(old, new)) for old, new in sizes)
