"""A pushed policy of chunk sizes: on the admin port, on live streams, and in what a device does."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.control.chunk_policy import FALLBACK
from hat_runtime.device.connect import connect
from hat_runtime.device.drafting.factory import NONE
from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.request import GenerationRequest
from hat_runtime.json_document import MAX_BYTES
from tests.runtime.raw_client import LocalSplit, channel_to, open_session


def config(folder: Path, **more: Any) -> CloudConfig:
    return CloudConfig(folder, input_layers=2, dtype="float32", kv_bytes=16 << 20, drain_s=0.1, **more)


def proposal(chunk: int) -> dict[str, int]:
    return {"chunk_tokens": chunk, "min_tokens": 8, "max_tokens": 512}


async def call(cloud: RunningCloud, path: str, body: bytes | None = None) -> tuple[int, Any]:
    """GET, or PUT of `body`."""

    def ask() -> tuple[int, Any]:
        method = "GET" if body is None else "PUT"
        request = urllib.request.Request(f"{cloud.admin_url}{path}", body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    return await asyncio.to_thread(ask)


async def put(cloud: RunningCloud, version: int, **devices: int) -> None:
    policy = {"version": version, "devices": {name: proposal(chunk) for name, chunk in devices.items()}}
    policy["default"] = proposal(99)
    assert await call(cloud, "/v1/policy", json.dumps(policy).encode()) == (200, policy)


async def test_live_streams_get_what_was_pushed_last(tiny_llama: Path, tmp_path: Path) -> None:
    start = tmp_path / "policy.json"
    start.write_text(json.dumps({"version": 3, "devices": {"one": proposal(64)}}))
    local = LocalSplit(tiny_llama)
    shallow = local.shallow(torch.arange(5, 15))
    async with running_cloud(config(tiny_llama, policy_file=start)) as cloud, channel_to(cloud) as stub:
        sessions = [await open_session(stub, cloud, device=name) for name in ("one", "two", "")]
        done = 0

        async def suggested() -> list[int]:
            nonlocal done
            done += 1
            found = []
            for session in sessions:
                await session.step(done - 1, shallow[done - 1 : done])
                found.append((await session.result()).suggested_chunk)
            return found

        assert await suggested() == [64, 0, 0]
        await put(cloud, 4, one=128, two=32)
        assert await suggested() == [128, 32, 99]
        # What is wrong changes nothing, and says what is wrong.
        for body, status, field, value in (
            (b"{", 400, "policy", "'{'"),
            (b'{"version": 5, "devices": {"one": {"min_tokens": 0}}}', 400, "devices.one.min_tokens", "0"),
            (b'{"version": 2}', 409, "version", "4"),
            (b" " * (MAX_BYTES + 1), 413, "policy", f"more than {MAX_BYTES} bytes"),
        ):
            code, reply = await call(cloud, "/v1/policy", body)
            assert (code, reply["error"]["field"], reply["error"]["value"]) == (status, field, value)
            assert field in reply["error"]["message"] or status == 413
        assert (await call(cloud, "/v1/policy"))[1]["version"] == 4
        assert await suggested() == [128, 32, 99]
        await put(cloud, 7)
        assert await suggested() == [99, 99, 99]


async def test_a_device_starts_with_the_proposal_and_reports_what_the_loop_needs(tiny_llama: Path) -> None:
    async with running_cloud(config(tiny_llama)) as cloud:
        code, before = await call(cloud, "/v1/devices")
        assert (code, before["devices"], before["policy_version"], before["cost"]) == (200, [], 0, None)
        assert before["load"] == {"wait_s": 0.0, "company_tokens": 0.0, "prompt_rows": 512}
        await put(cloud, 1, jetson=256)
        generator = await connect(
            tiny_llama, cloud.address, "float32", config=GeneratorConfig(device_name="jetson"), drafter=NONE
        )
        try:
            # 50 tokens of 256 bytes are too few to tell the link's rate: the device does not know better.
            first, second = (
                GenerationRequest(list(range(begin, begin + 50)), 8, stop_ids=frozenset())
                for begin in (5, 80)
            )
            assert len([event async for event in generator.generate(first)]) == 8
            assert generator.link.suggested_chunk == 256
            assert len([event async for event in generator.generate(second)]) == 8
            assert (first.stats.chunk_tokens, second.stats.chunk_tokens) == (FALLBACK, 256)
            assert generator.link.estimate.uplink_bytes_per_s == 0
        finally:
            await generator.close()
        _, after = await call(cloud, "/v1/devices")
    (row,) = after["devices"]
    assert row["name"] == "jetson"
    assert row["row_bytes"] == 64 * 4
    assert row["ttft_s"] > 0
    assert row["shallow_s_per_token"] > 0
    assert after["policy_version"] == 1
    assert set(after["cost"]) == {"fixed_s", "per_token_s", "per_pair_s", "per_cached_s", "error"}
    assert after["load"]["wait_s"] > 0
