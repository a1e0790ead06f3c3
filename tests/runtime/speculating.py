"""A device that drafts and its cloud in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.chunking import ChunkConfig
from hat_runtime.device.connect import connect
from hat_runtime.device.generator import Generator, GeneratorConfig
from hat_runtime.device.policy import DraftConfig
from hat_runtime.emulation.link import emulated_link
from hat_runtime.emulation.spec import LinkSpec
from tests.tiny_drafters import INPUT_LAYERS


def cloud_config(model: Path) -> CloudConfig:
    return CloudConfig(model, INPUT_LAYERS, dtype="float32", kv_bytes=64 << 20, drain_s=0.1, page_tokens=4)


@asynccontextmanager
async def speculating(
    model: Path, drafter: str, config: DraftConfig, link: str = "", **fields: Any
) -> AsyncIterator[tuple[Generator, RunningCloud]]:
    """Both sides, over an emulated link if one is named. On the way out no page is left over on either side."""
    async with running_cloud(cloud_config(model)) as cloud:
        with emulated_link(cloud.address, LinkSpec.parse(link or "10gbit,0ms")) as emulated:
            address = emulated.address if link else cloud.address
            async with device(model, drafter, config, cloud, address, **fields) as generator:
                yield generator, cloud


@asynccontextmanager
async def device(
    model: Path, drafter: str, config: DraftConfig, cloud: RunningCloud, address: str, **fields: Any
) -> AsyncIterator[Generator]:
    """The device alone, for a cloud that is reached at `address`."""
    generator = await connect(
        model,
        address,
        "float32",
        config=GeneratorConfig(chunking=ChunkConfig(32), drafting=config),
        drafter=drafter,
        page_tokens=4,
        **({"kv_tokens": 4096} | fields),
    )
    try:
        yield generator
        generator.conversations.clear()
        await generator.model.call(lambda: generator.model.cache.check([]))
    finally:
        await generator.close()
    async with asyncio.timeout(10):
        while cloud.engine.runner.cache.free_pages < cloud.engine.runner.cache.num_pages:
            await asyncio.sleep(0.01)
    await cloud.engine.idle()
