"""A device and a cloud of other minor versions: a relay between a real pair rewrites what each says to the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from google.protobuf.message import Message
from transformers import AutoModelForCausalLM

from hat_runtime.cloud.serve import CloudConfig, running_cloud
from hat_runtime.device.connect import connect
from hat_runtime.device.request import GenerationRequest
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from tests.runtime.relay import Rewrite, relay

UNKNOWN = b"\xf8\x7c\x07" + b"\x82\x7d\x03new"
"""Field 1999 as a varint, field 2000 as bytes."""

# What the protocol could do without: everything that is for people, for estimates or for later mechanisms.
OPTIONAL = {
    "Open": ("max_tokens", "tenant", "request_id", "protocol_minor", "device", "decode_codec"),
    "Step": ("request_id", "decode"),
    "DescribeReply": ("protocol_minor", "software", "pages"),
    "Opened": ("cost", "replica"),
    "Result": ("queue_us", "compute_us", "batch_tokens", "suggested_chunk"),
}


def parts(message: Message) -> Iterator[Message]:
    """The messages set inside a message."""
    for field, value in message.ListFields():
        if field.message_type is not None and not field.is_repeated:
            yield value


def later(message: Message) -> Iterator[bytes]:
    """As a later version would say it: more fields at every level, and messages of a kind that nobody here knows."""

    def extended(whole: Message) -> bytes:
        for part in parts(whole):
            part.ParseFromString(extended(part))
        return whole.SerializeToString() + UNKNOWN

    yield extended(message)
    if isinstance(message, pb.CloudMessage | pb.DeviceMessage):
        yield UNKNOWN


def earlier(message: Message) -> Iterator[bytes]:
    """As a version would say it that had fewer fields."""

    def strip(whole: Message) -> None:
        for name in OPTIONAL.get(whole.DESCRIPTOR.name, ()):
            whole.ClearField(name)
        for part in parts(whole):
            strip(part)

    strip(message)
    yield message.SerializeToString()


@pytest.mark.parametrize("rewrite", [later, earlier])
async def test_other_minor_versions_work_together(tiny_llama: Path, rewrite: Rewrite) -> None:
    prompt = list(range(5, 75))
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    expected = whole.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[
        0, len(prompt) :
    ].tolist()
    small = CloudConfig(tiny_llama, input_layers=2, dtype="float32", kv_bytes=16 << 20, drain_s=0.1)
    async with running_cloud(small) as cloud, relay(cloud.address, rewrite) as address:
        generator = await connect(tiny_llama, address, "float32")
        try:
            request = GenerationRequest(
                prompt, 12, stop_ids=generator.model.eos_token_ids, request_id="r1", chunk_tokens=16
            )
            tokens = [event.token_id async for event in generator.generate(request)]
        finally:
            await generator.close()
    assert tokens == expected
    assert request.stats.rounds == len(tokens)
    # The rewriting did take place: figures that an earlier cloud does not send are not there.
    assert (request.stats.cloud_compute_s == 0) == (rewrite is earlier)
