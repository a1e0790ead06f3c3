"""`--pad-frames`: what who watches the network sees of a real device and cloud, and that answers stay the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import Message

from hat_runtime.cloud.serve import CloudConfig, running_cloud
from hat_runtime.device.chunking import ChunkConfig
from hat_runtime.device.connect import connect
from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.request import GenerationRequest
from hat_runtime.errors import HandshakeError
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from tests.runtime.relay import relay

CHUNK, MAX_DRAFT = 16, 4
PROMPTS = [[5, 6, 7, 8] * 5, list(range(5, 75)), [9] * 33]
"""The first and the last are easy to draft for."""
NEW = 24


class Observer:
    """Sizes of messages, by direction and by whether they are a prompt's; Telemetry and Opened are no frames."""

    def __init__(self) -> None:
        self.sizes: defaultdict[str, list[int]] = defaultdict(list)
        self.rows: list[int] = []
        self._wants: dict[tuple[int, int], int] = {}

    def __call__(self, message: Message) -> Iterator[bytes]:
        data = message.SerializeToString()
        if isinstance(message, pb.DeviceMessage) and message.HasField("step"):
            step = message.step
            kind = "round" if step.want == pb.WANT_ALL else "prompt"
            self._wants[step.epoch, step.start_pos] = step.want
            self.rows += [step.n] if kind == "round" else []
            self.sizes[f"up, {kind}"].append(len(data))
        elif isinstance(message, pb.CloudMessage) and message.HasField("result"):
            result = message.result
            want = self._wants[result.epoch, result.start_pos]
            self.sizes[f"down, {'round' if want == pb.WANT_ALL else 'prompt'}"].append(len(data))
        yield data


async def answers(folder: Path, drafter: str, pad: bool) -> tuple[list[list[int]], Observer]:
    """The answers to PROMPTS, and what was seen of them."""
    observer = Observer()
    config = GeneratorConfig(
        chunking=ChunkConfig(tokens=CHUNK),
        drafting=DraftConfig(max_draft=MAX_DRAFT, stop_threshold=0.3, adaptive=False),
        pad_frames=pad,
    )
    small = CloudConfig(folder, input_layers=2, dtype="float32", kv_bytes=16 << 20, drain_s=0.1)
    found = []
    async with running_cloud(small) as cloud, relay(cloud.address, observer) as address:
        generator = await connect(folder, address, "float32", config=config, drafter=drafter)
        try:
            for prompt in PROMPTS:
                request = GenerationRequest(prompt, NEW, stop_ids=generator.model.eos_token_ids)
                found.append([event.token_id async for event in generator.generate(request)])
        finally:
            await generator.close()
    return found, observer


async def test_all_frames_of_a_kind_look_alike(tiny_llama: Path, drafters: dict[str, str]) -> None:
    """A model drafts, so that rounds have many different lengths, with alternatives."""
    plain, open_view = await answers(tiny_llama, drafters["model"], pad=False)
    padded, closed_view = await answers(tiny_llama, drafters["model"], pad=True)
    assert padded == plain
    assert len(set(closed_view.rows)) > 2
    assert all(len(set(open_view.sizes[kind])) > 2 for kind in ("up, round", "up, prompt", "down, round"))
    assert set(closed_view.sizes) == {"up, prompt", "up, round", "down, prompt", "down, round"}
    for sizes in closed_view.sizes.values():
        # A few sizes cannot be met, by one byte (wire/padding.py).
        assert max(sizes) - min(sizes) <= 1


async def test_an_older_cloud_is_refused(tiny_llama: Path) -> None:
    def older(message: Message) -> Iterator[bytes]:
        if isinstance(message, pb.DescribeReply):
            message.protocol_minor = 3
        yield message.SerializeToString()

    small = CloudConfig(tiny_llama, input_layers=2, dtype="float32", kv_bytes=16 << 20, drain_s=0.1)
    async with running_cloud(small) as cloud, relay(cloud.address, older) as address:
        with pytest.raises(HandshakeError, match=r"protocol 1\.3 and pads no frames"):
            await connect(tiny_llama, address, "float32", config=GeneratorConfig(pad_frames=True))
        generator = await connect(tiny_llama, address, "float32")
        await generator.close()
