"""A device that names itself appears in the cloud's list, with figures of its own measuring."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device import link
from hat_runtime.device.chunking import ChunkConfig
from hat_runtime.device.connect import connect
from hat_runtime.device.drafting.factory import NONE
from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.request import GenerationRequest


async def rows(cloud: RunningCloud) -> list[dict[str, Any]]:
    def read() -> Any:
        with urllib.request.urlopen(f"{cloud.admin_url}/v1/devices", timeout=10) as reply:
            return json.load(reply)["devices"]

    found: list[dict[str, Any]] = await asyncio.to_thread(read)
    return found


async def answer(cloud: RunningCloud, model: Path, name: str, chunk: int, drafter: str = NONE) -> None:
    config = GeneratorConfig(chunking=ChunkConfig(chunk), device_name=name)
    generator = await connect(model, cloud.address, "float32", config=config, drafter=drafter)
    try:
        request = GenerationRequest(list(range(5, 75)), 6, stop_ids=frozenset())
        assert len([event async for event in generator.generate(request)]) == 6
        # Telemetry is one-way: a round after it has gone through says that the cloud has read it.
        again = GenerationRequest(list(range(5, 75)), 2, stop_ids=frozenset())
        assert len([event async for event in generator.generate(again)]) == 2
    finally:
        await generator.close()


async def test_named_devices_are_listed_with_their_figures(tiny_llama: Path) -> None:
    config = CloudConfig(tiny_llama, input_layers=2, dtype="float32", kv_bytes=16 << 20, drain_s=0.1)
    async with running_cloud(config) as cloud:
        assert await rows(cloud) == []
        await answer(cloud, tiny_llama, "jetson-1", 16)
        await answer(cloud, tiny_llama, "", 16)
        await answer(cloud, tiny_llama, "jetson-2", 0)
        one, two = await rows(cloud)
    assert (one["name"], two["name"]) == ("jetson-1", "jetson-2")
    assert one["chunk_tokens"] == 16
    assert 0 <= two["seconds_since_contact"] <= one["seconds_since_contact"] < 60
    # Neither device drafts, and whole prompts have no chunk size: what nobody measured is not there.
    assert "acceptance" not in one
    assert "chunk_tokens" not in two


async def test_a_device_that_drafts_reports_its_acceptance(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model itself as drafter: nearly all of its drafts are right."""
    monkeypatch.setattr(link, "TELEMETRY_EVERY_S", 0.0)
    config = CloudConfig(tiny_llama, input_layers=2, dtype="float32", kv_bytes=16 << 20, drain_s=0.1)
    async with running_cloud(config) as cloud:
        await answer(cloud, tiny_llama, "jetson-1", 16, f"model:{tiny_llama}")
        (row,) = await rows(cloud)
    assert 0.5 < row["acceptance"] <= 1
