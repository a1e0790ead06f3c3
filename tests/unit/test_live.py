"""Whether the cloud answers is asked seldom, and never waited for long."""

from __future__ import annotations

import asyncio

import pytest

from hat_runtime.device.api import live
from hat_runtime.device.api.live import CloudWatch
from hat_runtime.errors import CloudUnavailable


class Cloud:
    """Answers as it is told, once it is let go."""

    def __init__(self) -> None:
        self.asked = 0
        self.error: str | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def check(self) -> None:
        self.asked += 1
        await self.go.wait()
        if self.error is not None:
            raise CloudUnavailable(self.error)


async def test_many_who_look_ask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = Cloud()
    watch = CloudWatch(cloud.check)
    states = await asyncio.gather(*(watch.state() for _ in range(20)))
    assert states == [{"ok": True, "reason": None}] * 20
    assert cloud.asked == 1
    cloud.error = "gone"
    assert (await watch.state())["ok"] is True  # known a moment ago: not asked again
    assert cloud.asked == 1
    monkeypatch.setattr(live, "ASK_EVERY_S", 0.0)
    await watch.state()  # asks, and does not wait
    await asyncio.sleep(0)
    assert await watch.state() == {"ok": False, "reason": "gone"}


async def test_a_cloud_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "WAIT_S", 0.01)
    cloud = Cloud()
    cloud.go.clear()
    watch = CloudWatch(cloud.check)
    for _ in range(3):
        assert await watch.state() == {"ok": None, "reason": None}
    assert cloud.asked == 1
    cloud.go.set()
    await asyncio.sleep(0.01)
    assert await watch.state() == {"ok": True, "reason": None}
