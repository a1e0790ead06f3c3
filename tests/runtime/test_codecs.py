"""Sessions whose rows are encoded, through real servers: the same as the layers on rows that were encoded by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message import Message

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.connect import connect
from hat_runtime.device.generator import GenerationRequest, Generator
from hat_runtime.device.link import CloudLink
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import ALL, NONE, Binding
from hat_runtime.errors import HandshakeError
from hat_runtime.model.split import LayerRange
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from hat_runtime.wire.codec import CODECS, CodecChoice, codec_named
from tests.runtime.raw_client import LocalSplit, channel_to, open_session, states
from tests.runtime.relay import relay

TEXT = torch.randint(3, 199, (90,), generator=torch.Generator().manual_seed(5))
MIXED = CodecChoice("int4", "int8")


@pytest.fixture(scope="module")
def local(tiny_llama: Path) -> LocalSplit:
    return LocalSplit(tiny_llama)


def through(name: str, hidden: torch.Tensor) -> torch.Tensor:
    codec = codec_named(name)
    return codec.decode(codec.encode(hidden), len(hidden), 64, torch.float32)


@asynccontextmanager
async def cloud_of(model: Path, **fields: Any) -> AsyncIterator[RunningCloud]:
    small = {"input_layers": 2, "dtype": "float32", "kv_bytes": 64 << 20, "drain_s": 0.1}
    async with running_cloud(CloudConfig(model, **(small | fields))) as cloud:
        yield cloud


@asynccontextmanager
async def session_with(cloud: RunningCloud, codecs: CodecChoice) -> AsyncIterator[CloudSession]:
    link = CloudLink(cloud.address)
    served = (await link.describe()).model
    layers = LayerRange(served.lo, served.hi)
    binding = Binding(served.model_revision, layers, torch.float32, 64, codecs.prompt, codecs.decode)
    session = link.open_session(binding)
    try:
        await session.opened()
        yield session
    finally:
        await link.close()


@asynccontextmanager
async def device_of(model: Path, cloud: RunningCloud, codecs: CodecChoice) -> AsyncIterator[Generator]:
    generator = await connect(model, cloud.address, "float32", codecs=codecs)
    try:
        yield generator
    finally:
        await generator.close()


@pytest.mark.parametrize("prompt", CODECS)
@pytest.mark.parametrize("decode", CODECS)
async def test_a_session_computes_on_the_rows_as_they_were_encoded(
    tiny_llama: Path, local: LocalSplit, prompt: str, decode: str
) -> None:
    shallow = local.shallow(TEXT)
    arrives = torch.cat([through(prompt, shallow[:60]), through(decode, shallow[60:])])
    async with cloud_of(tiny_llama) as cloud, session_with(cloud, CodecChoice(prompt, decode)) as session:
        parts = [
            session.submit(0, shallow[:40], NONE),
            session.submit(40, shallow[40:60], ALL),
            session.submit(60, shallow[60:], ALL, decode=True),
        ]
        _, *results = await asyncio.gather(*parts)
    deep = torch.cat([result.deep for result in results if result.deep is not None])
    torch.testing.assert_close(deep, local.deep(arrives)[40:], atol=1e-4, rtol=1e-4)
    up = sum(
        len(rows) * codec_named(name).row_bytes(64, torch.float32)
        for name, rows in ((prompt, shallow[:60]), (decode, shallow[60:]))
    )
    assert up < session.uplink_bytes < up + 400


async def test_the_link_is_judged_by_the_bytes_that_crossed_it(
    tiny_llama: Path, local: LocalSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = local.shallow(TEXT)
    async with cloud_of(tiny_llama) as cloud, session_with(cloud, MIXED) as session:
        sent: list[int] = []
        monkeypatch.setattr(session.link.estimate, "add", lambda size, *_, **__: sent.append(size))
        await session.submit(0, shallow[:60], NONE)
        await session.submit(60, shallow[60:61], ALL, decode=True)
    assert sent == [60 * 82, 116]


async def test_a_cloud_serves_devices_with_other_codecs_in_one_pass(
    tiny_llama: Path, local: LocalSplit
) -> None:
    shallow = local.shallow(TEXT)
    async with cloud_of(tiny_llama) as cloud:

        async def one(name: str) -> None:
            async with session_with(cloud, CodecChoice(name, name)) as session:
                deep = (await session.submit(0, shallow, ALL)).deep
                want = local.deep(through(name, shallow))
                torch.testing.assert_close(deep, want, atol=1e-4, rtol=1e-4)

        await asyncio.gather(*(one(name) for name in CODECS for _ in range(2)))


class ByHand:
    """Greedy answers of the split model in this process, every row encoded by itself."""

    def __init__(self, local: LocalSplit, codecs: CodecChoice, stop_ids: frozenset[int]) -> None:
        self.local = local
        self.codecs = codecs
        self.stop_ids = stop_ids

    def greedy(self, tokens: list[int], new: int, answers: tuple[range, ...] = ()) -> list[int]:
        """Continue `tokens`, of which those at positions `answers` had been generated in earlier turns."""
        said: list[int] = []
        while len(said) < new and not (said and said[-1] in self.stop_ids):
            shallow = self.local.shallow(torch.tensor([*tokens, *said]))
            spans = (*answers, range(len(tokens), len(shallow)))
            decoded = torch.tensor([any(i in span for span in spans) for i in range(len(shallow))])
            arrives = torch.where(
                decoded[:, None], through(self.codecs.decode, shallow), through(self.codecs.prompt, shallow)
            )
            said.append(int(self.local.ends.head(self.local.deep(arrives)[-1:]).argmax()))
        return said


async def ids(generator: Generator, prompt: list[int], new: int) -> tuple[list[int], GenerationRequest]:
    request = GenerationRequest(prompt, new, stop_ids=generator.model.eos_token_ids, chunk_tokens=16)
    return [event.token_id async for event in generator.generate(request)], request


def prompts(count: int, low: int = 30, high: int = 70) -> list[list[int]]:
    random = torch.Generator().manual_seed(count)
    sizes = torch.randint(low, high, (count,), generator=random).tolist()
    return [torch.randint(3, 199, (size,), generator=random).tolist() for size in sizes]


@pytest.mark.parametrize("codecs", [CodecChoice("int8"), MIXED, CodecChoice("raw", "int4")], ids=str)
async def test_answers_are_those_of_the_rows_by_hand(
    tiny_llama: Path, local: LocalSplit, codecs: CodecChoice
) -> None:
    async with cloud_of(tiny_llama) as cloud, device_of(tiny_llama, cloud, codecs) as generator:
        hand = ByHand(local, codecs, generator.model.eos_token_ids)
        for prompt in prompts(3):
            assert (await ids(generator, prompt, 16))[0] == hand.greedy(prompt, 16)


async def test_rows_sent_again_after_an_eviction_are_encoded_as_the_first_time(
    tiny_llama: Path, local: LocalSplit
) -> None:
    """Pages for one and a half sessions: answers under way are uploaded again, prompt and answer each in its codec."""
    codecs = CodecChoice("raw", "int4")
    asked = prompts(3, low=60)
    async with cloud_of(tiny_llama, kv_pages=14) as cloud, device_of(tiny_llama, cloud, codecs) as generator:
        hand = ByHand(local, codecs, generator.model.eos_token_ids)
        want = [hand.greedy(prompt, 40) for prompt in asked]
        # The codec matters for these prompts.
        assert want != [ByHand(local, CodecChoice(), hand.stop_ids).greedy(prompt, 40) for prompt in asked]
        assert want != [
            ByHand(local, CodecChoice("int4", "int4"), hand.stop_ids).greedy(p, 40) for p in asked
        ]
        answers = await asyncio.gather(*(ids(generator, prompt, 40) for prompt in asked))
    assert [tokens for tokens, _ in answers] == want
    assert sum(request.stats.evictions for _, request in answers) > 0


async def test_an_earlier_answer_keeps_its_codec_also_when_it_is_uploaded_again(
    tiny_llama: Path, local: LocalSplit
) -> None:
    """Two conversations fit until their second turns grow: one of them has to upload its first answer again."""
    codecs = CodecChoice("raw", "int4")
    async with cloud_of(tiny_llama, kv_pages=14) as cloud, device_of(tiny_llama, cloud, codecs) as generator:
        hand = ByHand(local, codecs, generator.model.eos_token_ids)
        turns, want, forgetful = [], [], []
        for first in prompts(2, low=60):
            said, _ = await ids(generator, first, 20)
            turn = [*first, *said, 5, 6, 7]
            answer = range(len(first), len(turn) - 4)  # the last token's state was never sent
            turns.append(turn)
            want.append(hand.greedy(turn, 50, (answer,)))
            forgetful.append(hand.greedy(turn, 50))
        assert want != forgetful
        answers = await asyncio.gather(*(ids(generator, turn, 50) for turn in turns))
    assert [tokens for tokens, _ in answers] == want
    assert [request.stats.cached_tokens for _, request in answers] == [len(turn) - 4 for turn in turns]
    assert sum(request.stats.evictions for _, request in answers) > 0


def earlier_cloud(message: Message) -> Iterator[bytes]:
    if isinstance(message, pb.DescribeReply):
        del message.codecs[1:]
        message.protocol_minor = 1
    yield message.SerializeToString()


@pytest.mark.parametrize("codecs", [CodecChoice("int8"), CodecChoice("raw", "int8")], ids=str)
async def test_a_codec_that_the_cloud_lacks_is_refused_at_connect(
    tiny_llama: Path, codecs: CodecChoice
) -> None:
    async with cloud_of(tiny_llama) as cloud, relay(cloud.address, earlier_cloud) as address:
        with pytest.raises(HandshakeError) as refused:
            await connect(tiny_llama, address, "float32", codecs=codecs)
        assert "codec differs: " in str(refused.value)
        assert "the cloud does not know 'int8'" in str(refused.value)
        generator = await connect(tiny_llama, address, "float32")
        await generator.close()


async def test_the_cloud_refuses_a_codec_that_it_lacks(tiny_llama: Path) -> None:
    async with cloud_of(tiny_llama) as cloud, session_with(cloud, CodecChoice()) as session:
        for change, text in (
            ({"codec": "zip"}, "codec 'zip'"),
            ({"decode_codec": "zip"}, "decode_codec 'zip'"),
        ):
            refused = session.link.open_session(replace(session.binding, **change))
            with pytest.raises(HandshakeError, match=text):
                await refused.opened()


async def test_an_earlier_device_names_one_codec_for_all_rows(tiny_llama: Path, local: LocalSplit) -> None:
    """It sets neither decode_codec nor Step.decode; a Step with decode means the same codec then."""
    shallow = local.shallow(TEXT)
    payload = codec_named("int8").encode(shallow)
    async with cloud_of(tiny_llama) as cloud, channel_to(cloud) as stub:
        session = await open_session(stub, cloud, codec="int8")
        for decode in (False, True):
            await session.step(0, shallow, payload=payload, decode=decode)
            want = local.deep(through("int8", shallow))
            torch.testing.assert_close(states(await session.result()), want, atol=1e-4, rtol=1e-4)


INT8 = bytes(116)
WRONG = {
    "nan scale": ({"payload": b"\x00\x00\xc0\x7f" + INT8[4:]}, "not finite"),
    "infinite scale": ({"payload": b"\x00\x00\x80\x7f" + INT8[4:]}, "not finite"),
    "scale that overflows": ({"payload": b"\xff\xff\x7f\x7f" + INT8[4:52] + b"\x7f" * 64}, "not finite"),
    "nan outlier": ({"payload": INT8[:48] + b"\x00\x00\xc0\x7f" + INT8[52:]}, "not finite"),
    "outlier index": ({"payload": INT8[:4] + b"\x40\x00" + INT8[6:]}, "an outlier at element 64 of 64"),
    "prompt rows": (
        {"payload": INT8, "decode": False},
        "n=1 rows of 64 x float32 in codec int4 are 82 bytes",
    ),
    "raw rows": ({"payload": bytes(256)}, "n=1 rows of 64 x float32 in codec int8 are 116 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_payload_ends_its_stream(case: str, tiny_llama: Path, local: LocalSplit) -> None:
    fields, text = WRONG[case]
    async with cloud_of(tiny_llama) as cloud, channel_to(cloud) as stub:
        session = await open_session(stub, cloud, codec="int4", decode_codec="int8")
        await session.step(0, torch.zeros(1, 64), **({"decode": True} | fields))
        async with asyncio.timeout(20):
            code, details = await session.end()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert text in details


async def test_frames_of_one_step_agree_about_the_codec(tiny_llama: Path) -> None:
    async with cloud_of(tiny_llama) as cloud, channel_to(cloud) as stub:
        session = await open_session(stub, cloud, codec="int8", decode_codec="raw")
        await session.step(0, torch.zeros(1, 64), payload=INT8[:50], more=True)
        await session.step(0, torch.zeros(1, 64), payload=INT8[50:], decode=True)
        async with asyncio.timeout(20):
            code, details = await session.end()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "(epoch, start_pos, n, want, decode, alternatives)=(0, 0, 1, 3, True, ()) continues" in details
