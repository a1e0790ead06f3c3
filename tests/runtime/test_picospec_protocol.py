"""Token mode message by message: what is wrong ends its own stream only, what is stale costs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.connect import connect
from hat_runtime.device.generator import GenerationRequest
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.token_connect import connect_tokens
from hat_runtime.errors import HandshakeError, UsageError
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb
from tests.runtime.picospec_pair import Whole, picospec
from tests.runtime.raw_client import RawSession, all_pages_back, channel_to, open_session
from tests.tiny_chat import make_tiny_chat_model

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PROMPT = [5, 9, 44, 102, 7, 31]
SAMPLING = {"sampler": "coupled", "temperature": 0.0, "top_p": 1.0, "seed": 3}


@pytest.fixture
async def cloud(tiny_llama: Path) -> AsyncIterator[RunningCloud]:
    config = CloudConfig(
        tiny_llama, mode="picospec", dtype="float32", kv_pages=96, page_tokens=4, drain_s=0.2
    )
    async with running_cloud(config) as running:
        yield running
        await all_pages_back(running)


@pytest.fixture(scope="module")
def text(tiny_llama: Path) -> list[int]:
    """The target's greedy continuation of PROMPT."""
    return Whole(tiny_llama).decode(PROMPT, 20)


async def opened(stub: Any, cloud: RunningCloud) -> RawSession:
    return await open_session(stub, cloud, mode="picospec", codec="tokens")


def step(
    start: int,
    ids: list[int],
    drafts: int = 0,
    *,
    epoch: int = 0,
    tokens: dict[str, Any] | None = None,
    **fields: Any,
) -> pb.DeviceMessage:
    carried = pb.TokenStep(ids=ids, drafts=drafts)
    if tokens:
        carried.MergeFrom(pb.TokenStep(**tokens))
    right = {"epoch": epoch, "start_pos": start, "n": len(ids), "want": pb.WANT_LAST, "tokens": carried}
    return pb.DeviceMessage(step=pb.Step(**(right | fields)))


def first(sampling: dict[str, Any] | None = None, **fields: Any) -> pb.DeviceMessage:
    chosen = pb.Sampling(**(SAMPLING | (sampling or {})))
    return step(0, PROMPT, tokens={"sampling": chosen}, **fields)


async def rows(cloud: RunningCloud) -> float:
    """Rows that went through the layers so far."""
    await cloud.engine.idle()  # a pass is counted after its answers are out
    kinds = ("short", "prefill")
    value = cloud.metrics.registry.get_sample_value
    return sum(value("hat_tokens_computed_total", {"kind": kind}) or 0.0 for kind in kinds)


async def test_verdicts(cloud: RunningCloud, text: list[int]) -> None:
    async with channel_to(cloud) as stub:
        session = await opened(stub, cloud)
        await session.send(first())
        result = await session.result()
        assert (result.verdict.next, result.verdict.refused) == (text[0], False)

        await session.send(step(6, text[:3], 3))
        result = await session.result()
        assert (result.verdict.accepted, result.verdict.refused, result.verdict.next) == (3, False, text[3])

        wrong = (text[4] + 1) % 199
        await session.send(step(9, [text[3], wrong, 8, 8], 3))
        result = await session.result()
        assert (result.verdict.accepted, result.verdict.refused, result.verdict.next) == (0, True, text[4])
        assert len(result.SerializeToString()) < 40

        await session.send(step(10, [text[4], *text[5:8]], 3, epoch=1))
        result = await session.result()
        assert (result.verdict.accepted, result.verdict.next) == (3, text[8])


async def test_what_is_behind_a_refusal_costs_no_compute(cloud: RunningCloud, text: list[int]) -> None:
    """The cloud knows the token after the prompt: drafts that begin otherwise are refused and answered at once."""
    async with channel_to(cloud) as stub:
        session = await opened(stub, cloud)
        await session.send(first())
        await session.result()
        before = await rows(cloud)
        wrong = (text[0] + 1) % 199
        await session.send(step(6, [wrong, 4, 4, 4], 4))
        for part in range(5):
            await session.send(step(10 + 4 * part, [4, 4, 4, 4], 4))
        results = [await session.result() for _ in range(6)]
        assert results[0].verdict.refused
        assert results[0].verdict.next == text[0]
        assert [result.status for result in results[1:]] == [pb.STATUS_STALE] * 5
        assert await rows(cloud) == before
        await session.send(step(6, text[:4], 3, epoch=1))
        assert (await session.result()).verdict.accepted == 3
        assert await rows(cloud) == before + 4


async def test_the_correction_is_run_before_the_device_answers(cloud: RunningCloud, text: list[int]) -> None:
    async with channel_to(cloud) as stub:
        session = await opened(stub, cloud)
        await session.send(first({"ahead": 3}))
        assert (await session.result()).verdict.next == text[0]
        while len(session.notices) < 3:
            message = await session.call.read()
            session.notices.append(message.notice)
        assert [(n.decoded.start_pos, list(n.decoded.ids)) for n in session.notices] == [
            (6 + i, [text[i]]) for i in (1, 2, 3)
        ]
        # All of this is known: two drafts stand, the third does not, and no layer has to run.
        await session.send(step(6, [text[0], text[1], text[2], (text[3] + 1) % 199], 3))
        result = await session.result()
        verdict = result.verdict
        assert (verdict.accepted, verdict.refused, verdict.next) == (2, True, text[3])
        assert (result.compute_us, result.batch_tokens) == (0, 0)


async def test_the_cloud_decodes_no_further_than_the_text_goes(cloud: RunningCloud, text: list[int]) -> None:
    async with channel_to(cloud) as stub:
        session = await opened(stub, cloud)
        await session.send(first({"ahead": 50, "end": 9}))
        assert (await session.result()).verdict.next == text[0]
        while len(session.notices) < 2:
            message = await session.call.read()
            session.notices.append(message.notice)
        await cloud.engine.idle()
        before = await rows(cloud)
        # The last token is known, and only its own row was not run.
        await session.send(step(6, text[:3], 2))
        verdict = (await session.result()).verdict
        assert verdict.accepted == 2
        assert [(n.decoded.start_pos, list(n.decoded.ids)) for n in session.notices] == [
            (7, [text[1]]),
            (8, [text[2]]),
        ]
        assert await rows(cloud) == before + 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_the_first_draft_is_judged_in_a_pass_with_the_step_before_it(
    cloud: RunningCloud, tiny_llama: Path, temperature: float
) -> None:
    """Behind a long prompt both wait, and share a pass: what the draft must be, is known only in the middle of it."""
    prompt = (PROMPT * 50)[:250]
    sampling = {"sampler": "thinning", "temperature": temperature}
    right = Whole(tiny_llama).decode(prompt, 1)[0]
    draft = [(right + 1) % 199, 4, 4]
    q = {"q": [1.0] * len(draft)} if temperature else {}
    async with channel_to(cloud) as stub:
        for _ in range(20):
            session = await opened(stub, cloud)
            chosen = pb.Sampling(**(SAMPLING | sampling))
            await session.send(step(0, prompt[:-1], tokens={"sampling": chosen}, want=pb.WANT_NONE))
            await session.send(step(249, prompt[-1:]))
            await session.send(step(250, draft, len(draft), tokens=q))
            _, before, judged = [await session.result() for _ in range(3)]
            session.call.cancel()
            # Above temperature 0: it claims to be certain, and is one of 199 tokens.
            assert (judged.verdict.refused, judged.verdict.accepted) == (True, 0)
            if not temperature:
                assert before.verdict.next == judged.verdict.next == right
            if before.batch_tokens == judged.batch_tokens > 3:
                return
    raise AssertionError("the two Steps never shared a pass")


async def test_draws_can_be_asked_for_again(cloud: RunningCloud) -> None:
    thinning = {"sampler": "thinning", "temperature": 1.0}
    async with channel_to(cloud) as stub:
        session = await opened(stub, cloud)
        await session.send(first(thinning))
        token = (await session.result()).verdict.next
        offers = []
        await session.send(step(6, [token, 3], 1, tokens={"q": [1.0]}))
        verdict = (await session.result()).verdict
        epoch = int(verdict.refused)
        if verdict.refused:
            offers.append(list(verdict.ids))
        for attempt in (1, 2):
            await session.send(step(6, [token], epoch=epoch, tokens={"redraw": attempt}))
            verdict = (await session.result()).verdict
            assert not verdict.HasField("next")
            assert len(verdict.ids) == len(verdict.probabilities) == 16
            offers.append(list(verdict.ids))
        assert len(set(map(tuple, offers))) == len(offers)


WARM = {"sampler": "thinning", "temperature": 1.0}
WRONG = {
    "id outside": (None, step(6, [3, 199]), "Step.tokens.ids holds 199, which is outside the vocabulary of 199"),
    "no ids": (None, step(6, [], n=1), "holds 0 ids, but Step.n=1"),
    "n differs": (None, step(6, [3], n=2), "holds 1 ids, but Step.n=2"),
    "too many": (None, step(6, [3], n=5000), "Step.n=5000"),
    "drafts": (None, step(6, [3], 2), "Step.tokens.drafts=2 is more than Step.n=1"),
    "draft unasked": (None, step(6, [3], 1, want=pb.WANT_NONE), "Step.want must be LAST"),
    "want all": (None, step(6, [3], want=pb.WANT_ALL), "Step.want=3"),
    "q unasked": (None, step(6, [3], 1, tokens={"q": [0.5]}), "Step.tokens.q holds 1 numbers, but 0"),
    "q missing": (WARM, step(6, [3, 4], 1), "Step.tokens.q holds 0 numbers, but 1"),
    "q zero": (WARM, step(6, [3, 4], 1, tokens={"q": [0.0]}), "Step.tokens.q holds 0.0"),
    "q above 1": (WARM, step(6, [3, 4], 1, tokens={"q": [1.5]}), "Step.tokens.q holds 1.5"),
    "q nan": (WARM, step(6, [3, 4], 1, tokens={"q": [float("nan")]}), "Step.tokens.q holds nan"),
    "redraw": (None, step(6, [3], tokens={"redraw": 1}), "Step.tokens.redraw=1"),
    "states": (None, step(6, [3], payload=b"1234"), "without Step.payload"),
    "no tokens": (None, pb.DeviceMessage(step=pb.Step(start_pos=6, n=1, want=2)), "needs Step.tokens"),
    "forward jump": (None, step(9, [3]), "start_pos=9 jumps forward: 6 tokens"),
    "row not kept": (None, step(4, [3], 1), "the row before the draft at 4 was not kept"),
    "sampler": (None, first({"sampler": "beam"}), "Sampling.sampler='beam'"),
    "temperature": (None, first({"temperature": -1.0}), "temperature is -1.0"),
    "top_p": (None, first({"top_p": float("nan")}), "top_p is nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_step_ends_its_own_stream_only(case: str, cloud: RunningCloud, text: list[int]) -> None:
    sampling, message, wanted = WRONG[case]
    async with channel_to(cloud) as stub:
        good, bad = await opened(stub, cloud), await opened(stub, cloud)
        await asyncio.gather(good.send(first()), bad.send(first(sampling)))
        await asyncio.gather(good.result(), bad.result())
        await asyncio.gather(bad.send(message), good.send(step(6, text[:4], 4)))
        code, details = await bad.end()
        assert code is INVALID, details
        assert wanted in details
        assert (await good.result()).verdict.accepted == 4


async def test_sampling_must_be_said_first(cloud: RunningCloud) -> None:
    async with channel_to(cloud) as stub:
        session = await opened(stub, cloud)
        await session.send(step(0, PROMPT))
        code, details = await session.end()
        assert (code, "Step.tokens.sampling is missing" in details) == (INVALID, True), details


async def test_modes_do_not_mix(tiny_llama: Path, cloud: RunningCloud) -> None:
    with pytest.raises(HandshakeError, match=r"mode differs: hat on this device .*picospec in the cloud"):
        await connect(tiny_llama, cloud.address, "float32")
    split = CloudConfig(tiny_llama, 2, dtype="float32", kv_pages=64, drain_s=0.1)
    async with running_cloud(split) as other:
        with pytest.raises(HandshakeError, match=r"mode differs: picospec on this device, hat in the cloud"):
            await connect_tokens(tiny_llama, tiny_llama, other.address, "float32")
    async with channel_to(cloud) as stub:
        session = RawSession(stub.Session())
        identity = cloud.identity
        await session.send(pb.DeviceMessage(open=pb.Open(
            model_revision=identity.model_revision, lo=identity.lo, hi=identity.hi, dtype=identity.dtype, codec="raw"
        )))  # fmt: skip
        code, details = await session.end()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "mode 'hat' of the device is not the cloud's 'picospec'" in details


async def test_another_vocabulary_is_refused_before_anything_is_loaded(
    tiny_llama: Path, tmp_path: Path
) -> None:
    chat = make_tiny_chat_model(tmp_path / "chat")
    same_size = make_tiny_chat_model(tmp_path / "same")
    path = same_size / "tokenizer.json"
    path.write_text(path.read_text().replace("<0x41>", "<0x4141>"))
    config = CloudConfig(chat, mode="picospec", dtype="float32", kv_pages=64, drain_s=0.1)
    async with running_cloud(config) as cloud:
        with pytest.raises(HandshakeError, match=r"vocab_size differs: 199 of the draft model .* share"):
            await connect_tokens(chat, tiny_llama, cloud.address, "float32")
        with pytest.raises(HandshakeError, match=r"the tokenizer differs: .* of the draft model"):
            await connect_tokens(chat, same_size, cloud.address, "float32")
        with pytest.raises(HandshakeError, match=r"the tokenizer differs: .* of --model"):
            await connect_tokens(same_size, chat, cloud.address, "float32")
        assert (cloud.metrics.registry.get_sample_value("hat_uplink_bytes_total") or 0) < 100  # Describe only


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"mode": "picospec", "input_layers": 2}, "--input-layers 2 goes with --mode hat"),
        ({"mode": "nonsense"}, "--mode 'nonsense': write hat or picospec"),
    ],
)
async def test_a_cloud_that_cannot_be(tiny_llama: Path, fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UsageError, match=wanted):
        async with running_cloud(CloudConfig(tiny_llama, dtype="float32", kv_pages=64, **fields)):
            pass


async def test_top_k_tells_its_bound(tiny_llama: Path, other_llama: Path) -> None:
    from hat_runtime.device.token_answer import SpeculationConfig

    async with picospec(tiny_llama, other_llama, SpeculationConfig(sampler="topk")) as (generator, _):
        request = GenerationRequest(PROMPT, 30, SamplingParams(1.0, seed=4))
        assert len([event async for event in generator.generate(request)]) == 30
        value = generator.metrics.registry.get_sample_value
        refused = value("hat_topk_tv_bound_count")
        assert refused > 0
        assert 0 < value("hat_topk_tv_bound_sum") < refused
        drafted, accepted = value("hat_draft_tokens_total"), value("hat_accepted_tokens_total")
        assert (drafted, accepted) == (request.stats.draft_tokens, request.stats.accepted_tokens)
        assert 30 <= accepted + refused + 1 <= 31


async def test_drafts_after_a_step_that_keeps_no_row_are_refused_also_in_the_same_pass(
    cloud: RunningCloud,
) -> None:
    blocker = asyncio.Event()
    cloud.engine._inbox.put(lambda: asyncio.run(_wait(blocker)))
    async with channel_to(cloud) as stub:
        session = await opened(stub, cloud)
        await session.send(first(want=pb.WANT_NONE))
        await session.send(step(len(PROMPT), [3, 4], 2))
        await asyncio.sleep(0.1)  # both wait for the next pass
        blocker.set()
        code, text = await session.end()
        assert code is INVALID
        assert "the row before the draft at 6 was not kept" in text


async def _wait(event: asyncio.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.005)


async def test_an_epoch_must_leave_one_to_the_cloud(cloud: RunningCloud) -> None:
    async with channel_to(cloud) as stub:
        session = await opened(stub, cloud)
        await session.send(first(epoch=(1 << 32) - 1))
        assert await session.end() == (INVALID, "Step.epoch=4294967295 is more than 4294967294")
