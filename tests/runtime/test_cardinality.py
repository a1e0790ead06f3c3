"""However many devices talk to a cloud, its metrics stay as many."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from pathlib import Path

import grpc

from hat_runtime.cloud.serve import RunningCloud, running_cloud
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.proto.hat.v1 import runtime_pb2_grpc as rpc
from tests.runtime.api_pair import cloud_config
from tests.runtime.raw_client import channel_to, open_session

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 1000
AT_ONCE = 20


async def series(cloud: RunningCloud) -> list[str]:
    """Names and labels of everything that the cloud exports."""

    def read() -> str:
        with urllib.request.urlopen(f"{cloud.admin_url}/metrics", timeout=30) as reply:
            return str(reply.read().decode())

    text = await asyncio.to_thread(read)
    return [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]


async def visit(stub: rpc.RuntimeStub, cloud: RunningCloud, number: int) -> None:
    """A device opens a session, reports figures of its own and leaves."""
    session = await open_session(stub, cloud, device=f"device-{number}", tenant=f"tenant-{number}")
    telemetry = pb.Telemetry(
        uplink_bytes_per_s=1e5 + 1e4 * number, rtt_s=0.001 + 0.0001 * number, ttft_s=0.1, chunk_tokens=64
    )
    await session.send(pb.DeviceMessage(telemetry=telemetry))
    await session.call.done_writing()
    await session.end()


def stated() -> int:
    """The bound that the documentation gives."""
    text = (ROOT / "docs" / "operations.md").read_text()
    (found,) = re.findall(r"at most (\d+) series for each pod of the cloud", text)
    return int(found)


async def test_a_thousand_devices_add_no_series(tiny_llama: Path) -> None:
    async with running_cloud(cloud_config(tiny_llama)) as cloud, channel_to(cloud) as stub:
        await visit(stub, cloud, 0)
        few = await series(cloud)
        for first in range(1, DEVICES, AT_ONCE):
            await asyncio.gather(
                *(visit(stub, cloud, number) for number in range(first, min(first + AT_ONCE, DEVICES)))
            )
        many = await series(cloud)
        listed = cloud.admin_url + "/v1/devices"
        rows = await asyncio.to_thread(
            lambda: urllib.request.urlopen(listed, timeout=30).read().count(b'"name"')
        )
    assert rows == DEVICES
    assert set(many) == set(few)
    # Room for what has not occurred here: each status of a stream (a count, and when that began), kinds of rows, the
    # cost model's terms.
    assert len(many) + 2 * len(grpc.StatusCode) + 2 * 2 + 4 <= stated()
    assert [line for line in many if "device-" in line or "tenant-" in line] == []
