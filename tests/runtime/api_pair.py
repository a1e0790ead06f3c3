"""A cloud and a device in this process, with a tiny model between them, and clients for the device's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.serve import DeviceConfig, RunningDevice, running_device

MODEL = "tiny"


@dataclass
class Pair:
    """Both sides and two clients of the device."""

    cloud: RunningCloud
    device: RunningDevice
    openai: AsyncOpenAI
    http: httpx.AsyncClient

    @property
    def running(self) -> float:
        """Requests that the generator works for."""
        return metric(self, "hat_num_sessions_running")

    async def all_free(self) -> None:
        """Once the idle conversations are dropped, every page of both sides is free."""
        generator = self.device.generator
        await until(lambda: self.running == 0)
        generator.conversations.clear()
        ours, theirs = generator.model.cache, self.cloud.engine.runner.cache
        for _ in range(250):
            await generator.model.call(lambda: None)
            await self.cloud.engine.idle()
            if ours.free_pages == ours.num_pages and theirs.free_pages == theirs.num_pages:
                return
            await asyncio.sleep(0.02)
        lost = ours.num_pages - ours.free_pages, theirs.num_pages - theirs.free_pages
        raise AssertionError(f"pages not free on device, cloud: {lost}")


@asynccontextmanager
async def device_for(
    cloud: RunningCloud, model: Path, address: str = "", **fields: Any
) -> AsyncIterator[Pair]:
    """A device, by default in float32 and named "tiny", that talks to `address` (a link) or straight to the cloud."""
    settings = {"dtype": "float32", "model_name": MODEL, "grace_s": 0.2, "kv_tokens": 4096} | fields
    async with (
        running_device(DeviceConfig(model=model, cloud=address or cloud.address, **settings)) as device,
        AsyncOpenAI(base_url=f"{device.url}/v1", api_key="none", max_retries=0) as openai,
        httpx.AsyncClient(base_url=device.url, timeout=60) as http,
    ):
        yield Pair(cloud, device, openai, http)


def cloud_config(model: Path, **fields: Any) -> CloudConfig:
    return CloudConfig(
        model=model, **({"input_layers": 2, "dtype": "float32", "kv_pages": 512, "drain_s": 0.2} | fields)
    )


@asynccontextmanager
async def serving_pair(model: Path, **fields: Any) -> AsyncIterator[Pair]:
    async with running_cloud(cloud_config(model)) as cloud, device_for(cloud, model, **fields) as pair:
        yield pair


def metric(pair: Pair, name: str, **labels: str) -> float:
    """A value of the device's registry, 0 where there is none yet."""
    return pair.device.metrics.registry.get_sample_value(name, labels) or 0.0


async def until(reached: Callable[[], bool]) -> None:
    """Wait for something that must come; the test's own time limit is the only one."""
    while not reached():
        await asyncio.sleep(0.005)
