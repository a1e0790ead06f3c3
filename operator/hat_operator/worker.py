"""Who is reconciled when: one pass at a time for each HatDeployment, requests during a pass make one more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence

from hat_operator import metrics
from hat_operator.cluster import Cluster, ClusterError
from hat_operator.kinds import HATDEPLOYMENT
from hat_operator.reconcile import Reconciler
from hat_operator.watches import EdgeWatches

log = logging.getLogger(__name__)
Key = tuple[str, str]
PARALLEL = 8
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
FLOOR_S = 1.0
"""Shortest time between the begins of two passes: children report each of their replicas."""
SPREAD = 0.5
"""Over this part of the time between two resyncs its passes are asked for; all at once would wait for each other."""


class Worker:
    """Runs a Reconciler in tasks of its own."""

    def __init__(
        self,
        reconciler: Reconciler,
        home: Cluster,
        namespaces: Sequence[str],
        resync_s: float,
        watches: EdgeWatches,
    ) -> None:
        """Nothing runs before `start`; a pass over a user of `watches` that is gone ends its watch."""
        self._reconciler = reconciler
        self._home = home
        self._namespaces = namespaces
        self._resync_s = resync_s
        self._watches = watches
        self._dirty: dict[Key, asyncio.Event] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(PARALLEL)
        self._resyncing: asyncio.Task[None] | None = None
        self.last_resync: float | None = None
        """time.monotonic() of the last complete list of HatDeployments."""

    def start(self) -> None:
        """Begin the resync loop in the running event loop."""
        self._resyncing = asyncio.create_task(self._resync_forever(), name="resync")

    async def stop(self) -> None:
        """End all tasks; what they were doing is done again by the next process."""
        await self._watches.close()
        tasks = [task for task in (*self._tasks.values(), self._resyncing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def serves(self, namespace: str) -> bool:
        """Whether HatDeployments of this namespace are this operator's."""
        return not self._namespaces or namespace in self._namespaces

    def request(self, namespace: str, name: str) -> None:
        """Ask for a pass. During one, and however often, this makes exactly one more."""
        key = (namespace, name)
        dirty = self._dirty.setdefault(key, asyncio.Event())
        dirty.set()
        if key not in self._tasks:
            task = asyncio.create_task(self._run(key, dirty), name=f"reconcile {namespace}/{name}")
            self._tasks[key] = task
            metrics.QUEUED.set(len(self._tasks))

    async def _run(self, key: Key, dirty: asyncio.Event) -> None:
        failures = 0
        while True:
            dirty.clear()
            begin = time.monotonic()
            async with self._slots:
                again_s, failed = await self._once(key)
            if failed:
                again_s = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
                failures += 1
            else:
                failures = 0
            await asyncio.sleep(max(0.0, FLOOR_S - (time.monotonic() - begin)))
            if again_s is None and not dirty.is_set():
                # Without an await since the look at `dirty`, so that no request falls between this task and the next.
                del self._tasks[key], self._dirty[key]
                metrics.QUEUED.set(len(self._tasks))
                return
            if again_s is not None and not dirty.is_set():
                try:
                    async with asyncio.timeout(again_s):
                        await dirty.wait()
                except TimeoutError:
                    pass

    async def _once(self, key: Key) -> tuple[float | None, bool]:
        begin, result = time.monotonic(), "ok"
        try:
            return await self._reconciler.reconcile(*key), False
        except ClusterError as error:
            # The HatDeployment has changed or gone since it was read; the next pass sees it.
            result = "conflict" if error.reason in ("Conflict", "NotFound") else "error"
            log.log(
                logging.INFO if result == "conflict" else logging.ERROR,
                "%s/%s: %s: %s",
                *key,
                error.reason,
                error,
            )
            return None, True
        except Exception:
            result = "bug"
            log.exception("%s/%s: the reconcile failed", *key)
            return None, True
        finally:
            metrics.RECONCILE_SECONDS.labels(result).observe(time.monotonic() - begin)

    async def _resync_forever(self) -> None:
        while True:
            begin = time.monotonic()
            await self._resync()
            await asyncio.sleep(max(0.0, self._resync_s - (time.monotonic() - begin)))

    async def _resync(self) -> None:
        ready: Counter[str] = Counter({"True": 0, "False": 0, "Unknown": 0})
        found: list[Key] = []
        complete = True
        for namespace in self._namespaces or (None,):
            try:
                bodies = await self._home.list(HATDEPLOYMENT, namespace)
            except ClusterError as error:
                log.error("resync: %s: %s", error.reason, error)
                complete = False
                continue
            for body in bodies:
                found.append((body["metadata"]["namespace"], body["metadata"]["name"]))
                stated = body.get("status", {}).get("conditions", ())
                ready[next((item["status"] for item in stated if item["type"] == "Ready"), "Unknown")] += 1
        due = found
        if complete:
            for value, count in ready.items():
                metrics.HATDEPLOYMENTS.labels(value).set(count)
            self.last_resync = time.monotonic()
            metrics.LAST_RESYNC.set_to_current_time()
            due = [*found, *set(self._watches.users).difference(found)]
        for key in due:
            self.request(*key)
            await asyncio.sleep(SPREAD * self._resync_s / len(due))
