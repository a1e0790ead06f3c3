"""The device's end of the session stream against a real cloud."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from hat_runtime.cloud.serve import CloudConfig, RunningCloud, running_cloud
from hat_runtime.device.link import CloudLink
from hat_runtime.device.refusals import CloudRefused
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import ALL, LAST, NONE, Binding
from hat_runtime.errors import CloudOverloaded, CloudUnavailable, HandshakeError, HatError
from hat_runtime.model.split import LayerRange
from hat_runtime.wire.codec import DTYPES
from hat_runtime.wire.frames import MAX_FRAME_BYTES


@asynccontextmanager
async def linked(model: Path, **config: Any) -> AsyncIterator[tuple[CloudLink, Binding, RunningCloud]]:
    config = {"input_layers": 2, "dtype": "float32", "kv_bytes": 64 << 20, "drain_s": 0.1} | config
    async with running_cloud(CloudConfig(model, **config)) as cloud:
        link = CloudLink(cloud.address)
        served = (await link.describe()).model
        layers = LayerRange(served.lo, served.hi)
        try:
            yield (
                link,
                Binding(served.model_revision, layers, DTYPES[served.dtype], served.hidden_size),
                cloud,
            )
        finally:
            await link.close()


@asynccontextmanager
async def opened(model: Path, **config: Any) -> AsyncIterator[CloudSession]:
    async with linked(model, **config) as (link, binding, _):
        session = link.open_session(binding)
        await session.opened()
        yield session


def states(n: int, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden states of 8 KiB in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=2048,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    folder = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


async def test_large_steps_travel_as_frames_in_both_directions(wide_model: Path) -> None:
    hidden = states(300, 2048)
    async with opened(wide_model, input_layers=1) as session:
        whole = await session.submit(0, hidden, ALL)
        assert whole.deep is not None
        assert whole.deep.shape == (300, 2048)
        assert hidden.nbytes > 4 * MAX_FRAME_BYTES
        assert hidden.nbytes < session.uplink_bytes < hidden.nbytes + 1000
        assert hidden.nbytes < session.downlink_bytes < hidden.nbytes + 1000
        parts = [session.submit(start, hidden[start : start + 100], ALL) for start in (0, 100, 200)]
        deep = torch.cat([result.deep for result in await asyncio.gather(*parts) if result.deep is not None])
    assert torch.allclose(deep, whole.deep, atol=1e-4)


async def test_steps_in_flight_are_answered_in_order(tiny_llama: Path) -> None:
    hidden = states(60)
    async with opened(tiny_llama) as session:
        whole = await session.submit(0, hidden, ALL)
        assert whole.deep is not None
        wants = [NONE, LAST, ALL] * 4
        futures = [session.submit(5 * i, hidden[5 * i : 5 * i + 5], want) for i, want in enumerate(wants)]
        assert session.unanswered == 12
        for i, (want, result) in enumerate(zip(wants, await asyncio.gather(*futures), strict=True)):
            assert (result.start, result.n, result.stale) == (5 * i, 5, False)
            rows = whole.deep[5 * i : 5 * i + 5]
            if want == NONE:
                assert result.deep is None
            else:
                assert result.deep is not None
                assert torch.allclose(result.deep, rows[-1:] if want == LAST else rows, atol=1e-4)
        assert session.committed == 60


async def test_a_lower_start_truncates(tiny_llama: Path) -> None:
    hidden = states(30)
    async with opened(tiny_llama) as session:
        whole = await session.submit(0, hidden, ALL)
        await session.submit(10, states(15, seed=1), NONE)
        assert session.committed == 25
        again = await session.submit(10, hidden[10:], ALL)
        assert whole.deep is not None
        assert again.deep is not None
        assert torch.allclose(again.deep, whole.deep[10:], atol=1e-4)


async def test_discarded_steps_leave_the_session_usable(tiny_llama: Path) -> None:
    hidden = states(200)
    async with opened(tiny_llama) as session:
        whole = await session.submit(0, hidden, ALL)
        assert whole.deep is not None
        for pause_s in (0, 0.001, 0.003, 0.003, 0.01, 0.03, 0.1):
            draft = [session.submit(100 + i, states(1, seed=i), ALL) for i in range(20)]
            await asyncio.sleep(pause_s)  # none, some or all of the draft are answered by now
            session.discard()
            assert all(future.cancelled() or future.done() for future in draft)
            # Straight on in the new epoch, in place of the draft, while Results of the old one are on their way.
            deep = (await session.submit(100, hidden[100:150], LAST)).deep
            assert deep is not None
            assert torch.allclose(deep, whole.deep[149:150], atol=1e-4)
        assert await session.drained(5)
        assert session.committed == 150


async def test_what_the_cloud_refuses_is_told_to_whoever_waits(tiny_llama: Path) -> None:
    async with opened(tiny_llama) as session:
        good = await session.submit(0, states(3), LAST)
        assert good.deep is not None
        pending = [session.submit(3, states(2) * float("nan"), NONE), session.submit(5, states(1), LAST)]
        for future in pending:
            with pytest.raises(CloudRefused, match="not finite"):
                await future
        assert not session.alive
        with pytest.raises(CloudRefused):
            session.submit(0, states(1), LAST)
        assert session not in session.link.sessions


async def test_a_closed_session_gives_its_pages_back(tiny_llama: Path) -> None:
    async with linked(tiny_llama) as (link, binding, cloud):
        cache = cloud.engine.runner.cache
        session = link.open_session(binding)
        await session.submit(0, states(100), NONE)
        assert cache.free_pages < cache.num_pages
        pending = session.submit(100, states(50), LAST)
        session.close()
        with pytest.raises(CloudUnavailable, match="closed by this device"):
            await pending
        async with asyncio.timeout(5):
            while cache.free_pages < cache.num_pages:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("wrong", [states(2, 63), states(0), states(2).to(torch.bfloat16)])
async def test_wrong_states_are_refused_on_the_device(tiny_llama: Path, wrong: torch.Tensor) -> None:
    async with opened(tiny_llama) as session:
        with pytest.raises(ValueError, match="shallow states are"):
            session.submit(0, wrong, LAST)
        assert (await session.submit(0, states(2), LAST)).deep is not None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_revision": "f" * 64}, "model_revision"),
        ({"layers": LayerRange(3, 6)}, "3:6.*2:6"),
        ({"dtype": torch.bfloat16}, "bfloat16.*float32"),
        ({"codec": "zip"}, "zip"),
    ],
)
async def test_the_cloud_compares_too(tiny_llama: Path, change: dict[str, Any], text: str) -> None:
    async with linked(tiny_llama) as (link, binding, _):
        session = link.open_session(Binding(**(vars(binding) | change)))
        with pytest.raises(HandshakeError, match=text):
            await session.opened()


async def test_a_full_cloud_names_the_time_to_come_back(tiny_llama: Path) -> None:
    async with linked(tiny_llama, max_sessions=1) as (link, binding, _):
        first = link.open_session(binding)
        await first.submit(0, states(1), NONE)
        with pytest.raises(CloudOverloaded) as refused:
            await link.open_session(binding).opened()
        assert refused.value.retry_after_s == 1.0
        assert first.alive


async def test_a_silent_peer_is_given_up(tiny_llama: Path) -> None:
    """Something that takes connections and says nothing is not a cloud."""
    taken: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: taken.append(writer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    link = CloudLink(f"127.0.0.1:{port}", timeout_s=0.5)
    binding = Binding("0" * 64, LayerRange(2, 6), torch.float32, 64)
    try:
        with pytest.raises(CloudUnavailable):
            await link.describe()
        session = link.open_session(binding)
        pending = session.submit(0, states(1), LAST)
        with pytest.raises(HatError):
            await pending
    finally:
        await link.close()
        for writer in taken:
            writer.close()
        server.close()


async def test_link_figures(tiny_llama: Path) -> None:
    async with linked(tiny_llama) as (link, binding, _):
        assert 0 < await link.measure_rtt() < 1
        rate = await link.measure_rate()
        assert rate.up > 1e5
        assert rate.down > 1e5
        session = link.open_session(binding)
        for i in range(5):
            await session.submit(i, states(1), LAST)
        assert 0 < link.estimate.rtt_s < 1
        counted = link.metrics.registry.get_sample_value("hat_uplink_bytes_total")
        assert counted == session.uplink_bytes
        before = session.uplink_bytes
        for _ in range(3):  # at most one in 5 s for the whole link
            link.send_telemetry(session, shallow_s_per_token=1e-3, chunk=64, ttft_s=0.2)
        await session.submit(5, states(1), LAST)
        assert before < session.uplink_bytes < before + 2 * 256 + 150


async def test_a_draining_cloud_is_noticed(tiny_llama: Path) -> None:
    config = CloudConfig(tiny_llama, 2, dtype="float32", kv_bytes=1 << 24, drain_s=1.0)
    async with running_cloud(config) as cloud:
        link = CloudLink(cloud.address)
        served = (await link.describe()).model
        binding = Binding(served.model_revision, LayerRange(2, 6), torch.float32, 64)
        session = link.open_session(binding)
        await session.opened()

        async def watch() -> bool:
            async with asyncio.timeout(5):
                while not session.draining and session.alive:
                    await asyncio.sleep(0.005)
            return session.draining

        watching = asyncio.create_task(watch())
    assert await watching
    await link.close()


async def test_the_reason_survives_a_write_that_meets_the_end_of_the_stream(tiny_llama: Path) -> None:
    """grpc.aio hides the cloud's status behind INTERNAL when a write fails; whoever waits must see the real one."""
    async with linked(tiny_llama) as (link, binding, _):
        for _ in range(20):
            session = link.open_session(binding)
            futures = [session.submit(0, states(3), NONE), session.submit(3, states(2) * float("nan"), NONE)]
            start = 5
            while session.alive:
                futures.append(session.submit(start, states(40), NONE))
                start = start + 40 if start < 400 else 0
                await asyncio.sleep(0)
            with pytest.raises(CloudRefused, match="not finite"):
                await asyncio.gather(*futures)
