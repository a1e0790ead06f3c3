"""Prompts leave time to sessions that decode, in a real cloud, and come to an end all the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from hat_runtime.cloud.engine import EngineConfig
from hat_runtime.cloud.scheduler import SchedulerConfig
from hat_runtime.cloud.serve import CloudConfig, running_cloud
from hat_runtime.control.sharing import Courtesy
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from tests.runtime.raw_client import RawSession, channel_to, open_session, states

PROMPT = 400


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(3)) * 0.1


async def decode(session: RawSession, until: asyncio.Event, start: int) -> list[int]:
    """Decode token after token; rows of the passes that it shared."""
    shared = []
    while not until.is_set():
        await session.step(start, rows(1), pb.WANT_ALL)
        shared.append((await session.result()).batch_tokens)
        start += 1
    return shared


@pytest.mark.parametrize("stretch", [None, 1e-6])
async def test_a_prompt_beside_a_session_that_decodes(tiny_llama: Path, stretch: float | None) -> None:
    courtesy = Courtesy(stretch) if stretch else None
    config = CloudConfig(
        tiny_llama,
        input_layers=2,
        dtype="float32",
        kv_pages=1024,
        page_tokens=4,
        drain_s=0.1,
        engine=EngineConfig(SchedulerConfig(max_batch_tokens=512, courtesy=courtesy)),
    )
    async with running_cloud(config) as cloud, channel_to(cloud) as stub:
        prompter, decoder = await open_session(stub, cloud), await open_session(stub, cloud)

        async def prompt() -> torch.Tensor:
            await prompter.step(0, rows(PROMPT), pb.WANT_LAST)
            return states(await prompter.result())

        alone = await prompt()  # nobody to be polite to
        await decoder.step(0, rows(PROMPT), pb.WANT_NONE)
        assert (await decoder.result()).batch_tokens == PROMPT
        done = asyncio.Event()
        decoding = asyncio.create_task(decode(decoder, done, PROMPT))
        while cloud.engine.cost.fit() is None:
            await asyncio.sleep(0.01)
        beside = await prompt()
        done.set()
        most = max(await decoding)
        torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)
        if stretch is None:
            assert cloud.engine.prompt_rows == 512
        else:
            assert most <= 1 + Courtesy.least_rows  # no time to spare: only what prompts have in any case
