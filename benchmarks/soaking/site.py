"""A device, a slow link and a cloud that can be started again, all but the link in this process."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import psutil
from prometheus_client import CollectorRegistry

from hat_runtime.cli.processes import free_address
from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.serve import DeviceConfig, RunningDevice, running_device
from hat_runtime.emulation.link import EmulatedLink, LinkSpec

LINK = LinkSpec.parse("200mbit,10ms")
SLOW = LinkSpec.parse("2mbit,150ms")
STALL_S = (0.1, 2.0)
AWAY_S = (0.0, 1.5)
"""How long a cloud that is started again is away, besides the time of its start."""
QUIET_S = 60.0
"""For the last answers and sessions to end."""


@dataclass(frozen=True)
class Census:
    """What must not grow, at a moment without traffic."""

    rss_mib: float
    """After what is free was given back to the system."""
    descriptors: int
    tasks: int
    series: int
    """Of the device, and of the clouds together as the most that one of them had."""
    pages: int
    """In use, of both sides; the leak of one would stay."""
    sessions: int


@dataclass
class Site:
    """One mode's device and cloud."""

    cloud_config: CloudConfig
    link: EmulatedLink
    faults: Counter[str] = field(default_factory=Counter)
    cloud: RunningCloud | None = None
    device: RunningDevice | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start_cloud(self) -> None:
        self.cloud = await self._stack.enter_async_context(running_cloud(self.cloud_config))

    async def stop_cloud(self) -> None:
        self.cloud = None
        await self._stack.aclose()
        self._stack = AsyncExitStack()

    async def harm(self, rng: random.Random) -> None:
        """One fault."""
        kind = rng.choice(["stall", "stall", "cut", "cut", "slow", "restart"])
        self.faults[kind] += 1
        if kind == "stall":
            self.link.stall(rng.uniform(*STALL_S))
        elif kind == "cut":
            self.link.cut()
        elif kind == "slow":
            self.link.set_link(SLOW)
            await asyncio.sleep(rng.uniform(1, 3))
            self.link.set_link(LINK)
        else:
            await self.stop_cloud()
            await asyncio.sleep(rng.uniform(*AWAY_S))
            await self.start_cloud()

    async def quiet(self) -> None:
        """Wait until nothing is under way; drop the conversations that are kept for later.

        Raises:
            AssertionError: pages or sessions are not free in time: a leak.
        """
        assert self.device is not None
        assert self.cloud is not None
        generator = self.device.generator
        ours = generator.model.cache
        deadline = asyncio.get_running_loop().time() + QUIET_S
        while asyncio.get_running_loop().time() < deadline:
            generator.conversations.clear()
            await generator.model.call(lambda: None)
            await self.cloud.engine.idle()
            running = self.device.metrics.registry.get_sample_value("hat_num_sessions_running")
            if self.used == 0 and not generator.link.sessions and not running:
                await generator.model.call(lambda: ours.check([]))
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{self.used} pages and {len(generator.link.sessions)} sessions are not free")

    @property
    def used(self) -> int:
        """Pages in use on both sides."""
        assert self.device is not None
        assert self.cloud is not None
        caches = (self.device.generator.model.cache, self.cloud.engine.runner.cache)
        return sum(cache.num_pages - cache.free_pages for cache in caches)

    @property
    def registries(self) -> list[CollectorRegistry]:
        assert self.device is not None
        assert self.cloud is not None
        return [self.device.metrics.registry, self.cloud.metrics.registry]


@asynccontextmanager
async def running_site(cloud: CloudConfig, device: DeviceConfig) -> AsyncIterator[Site]:
    """Both sides on ports of this machine; the device reaches the cloud through an emulated link."""
    port = int(free_address().rpartition(":")[2])
    with EmulatedLink(f"127.0.0.1:{port}", LINK) as link:
        site = Site(replace(cloud, port=port), link)
        await site.start_cloud()
        try:
            async with running_device(replace(device, cloud=link.address)) as running:
                site.device = running
                yield site
        finally:
            await site.stop_cloud()


def give_back_memory() -> None:
    """Clouds that are started again in one process leave freed memory to the arenas of their threads (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


async def census(sites: list[Site]) -> Census:
    """Once nothing is under way."""
    for site in sites:
        await site.quiet()
    await asyncio.sleep(0.5)  # closed connections leave the event loop a moment later
    gc.collect()
    give_back_memory()
    process = psutil.Process()
    registries = [registry for site in sites for registry in site.registries]
    return Census(
        rss_mib=process.memory_info().rss / 2**20,
        descriptors=process.num_fds(),
        tasks=len(asyncio.all_tasks()),
        series=sum(len(list(metric.samples)) for registry in registries for metric in registry.collect()),
        pages=sum(site.used for site in sites),
        sessions=sum(len(site.device.generator.link.sessions) for site in sites if site.device is not None),
    )
