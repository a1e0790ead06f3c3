"""The resync: one pass after the other, and a namespace that cannot be listed holds up no other."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from hat_operator.cluster import ClusterError
from hat_operator.worker import Worker

Key = tuple[str, str]


class Home:
    """The part of a Cluster that lists HatDeployments."""

    def __init__(self, found: dict[str, list[str]]) -> None:
        self.found = found

    async def list(self, kind: Any, namespace: str) -> list[dict[str, Any]]:
        if namespace not in self.found:
            raise ClusterError("Forbidden", "no Role")
        return [{"metadata": {"namespace": namespace, "name": name}} for name in self.found[namespace]]


class Passes:
    """A Reconciler that notes when it is called."""

    def __init__(self) -> None:
        self.seen: dict[Key, float] = {}

    async def reconcile(self, namespace: str, name: str) -> None:
        self.seen[namespace, name] = time.monotonic()


class Watches:
    """HatDeployments whose devices' clusters are watched."""

    def __init__(self, *users: Key) -> None:
        self.users = set(users)

    async def close(self) -> None:
        """Nothing."""


async def resync(home: Home, namespaces: list[str], watches: Watches, resync_s: float = 4.0) -> Passes:
    passes = Passes()
    worker = Worker(passes, home, namespaces, resync_s, watches)  # type: ignore[arg-type]
    worker.start()
    await asyncio.sleep(resync_s * 0.7)
    await worker.stop()
    return passes


async def test_passes_are_spread_over_half_of_the_time() -> None:
    home = Home({"a": [f"chat-{i}" for i in range(5)]})
    seen = sorted((await resync(home, ["a"], Watches())).seen.values())
    assert len(seen) == 5
    assert seen[-1] - seen[0] >= 1.2


async def test_a_namespace_that_cannot_be_listed_holds_up_no_other() -> None:
    home, watches = Home({"a": ["chat"], "c": ["chat"]}), Watches(("b", "chat"), ("a", "gone"))
    # Nobody knows whether b/chat is gone.
    assert set((await resync(home, ["a", "b", "c"], watches, 0.5)).seen) == {("a", "chat"), ("c", "chat")}
    assert set((await resync(home, ["a", "c"], watches, 0.5)).seen) == {
        ("a", "chat"),
        ("c", "chat"),
        ("b", "chat"),
        ("a", "gone"),
    }
