"""Clients that go away, clouds that go away, too much at once, and the end of the server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from openai import APIError, AsyncOpenAI, AuthenticationError, InternalServerError, RateLimitError

from hat_runtime.cloud.serve import running_cloud
from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.recovery import RecoveryConfig
from hat_runtime.device.serve import DeviceConfig, running_device
from hat_runtime.emulation.link import EmulatedLink, LinkSpec
from hat_runtime.errors import CloudUnavailable, HandshakeError, HatError, UsageError
from tests.runtime.api_pair import MODEL, Pair, cloud_config, device_for, metric, serving_pair, until
from tests.tiny_chat import make_tiny_chat_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

IMPATIENT = GeneratorConfig(recovery=RecoveryConfig(reconnect_for_s=0.5))
"""For a cloud that stays away."""
BODY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "The quick brown fox"}],
    "temperature": 0,
    "max_tokens": 400,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def slow_link(free_port: int) -> Iterator[EmulatedLink]:
    """To a cloud at free_port: a token takes at least 30 ms, so that an answer of 400 outlasts what tests do."""
    link = EmulatedLink(f"127.0.0.1:{free_port}", LinkSpec.parse("100mbit,30ms"))
    yield link
    link.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slow(folder: Path, slow_link: EmulatedLink, free_port: int) -> AsyncIterator[Pair]:
    """One answer at a time, one may wait; keep-alives after 10 ms of silence."""
    async with (
        running_cloud(cloud_config(folder, port=free_port)) as cloud,
        device_for(
            cloud, folder, slow_link.address, max_concurrent=1, max_waiting=1, keep_alive_s=0.01
        ) as pair,
    ):
        yield pair
        await pair.all_free()


async def start(pair: Pair, **fields: Any) -> AsyncExitStack:
    """A long streamed answer that has begun; closing the stack is its client's going away."""
    stack = AsyncExitStack()
    stream = pair.http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True} | fields)
    reply = await stack.enter_async_context(stream)
    lines = reply.aiter_lines()  # kept: an iterator that is dropped takes the connection with it
    stack.push_async_callback(lines.aclose)
    while '"delta":{"content":' not in await anext(lines):
        pass
    return stack


async def test_a_streaming_client_that_goes_away_frees_its_work(slow: Pair) -> None:
    cancelled = metric(slow, "hat_requests_total", finish_reason="cancelled")
    gone = await start(slow)
    assert slow.running == 1
    await gone.aclose()
    await slow.all_free()
    assert metric(slow, "hat_requests_total", finish_reason="cancelled") == cancelled + 1
    assert metric(slow, "hat_http_requests_total", route="/v1/chat/completions", status="499") >= 1


async def test_a_client_that_waits_for_a_whole_answer_and_goes_away_frees_its_work(slow: Pair) -> None:
    cancelled = metric(slow, "hat_requests_total", finish_reason="cancelled")
    for path, body in (
        ("/v1/chat/completions", BODY),
        ("/v1/completions", {"model": MODEL, "prompt": ["one", "two", "three"], "max_tokens": 400}),
    ):
        call = asyncio.create_task(slow.http.post(path, json=body))
        await until(lambda: slow.running == 1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await slow.all_free()
    assert metric(slow, "hat_requests_total", finish_reason="cancelled") == cancelled + 2


async def test_one_answer_runs_one_waits_and_one_is_refused(slow: Pair) -> None:
    first = await start(slow)
    second = asyncio.create_task(slow.openai.chat.completions.create(**(BODY | {"max_tokens": 2})))
    await until(lambda: metric(slow, "hat_num_sessions_waiting") == 1)
    with pytest.raises(RateLimitError) as caught:
        await slow.openai.chat.completions.create(**BODY)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "overloaded"
    await first.aclose()
    assert (await second).usage.completion_tokens == 2  # type: ignore[union-attr]


async def test_a_client_that_goes_away_while_it_waits_gives_up_its_place(slow: Pair) -> None:
    first = await start(slow)
    waiting = asyncio.create_task(slow.http.post("/v1/chat/completions", json=BODY))
    await until(lambda: metric(slow, "hat_num_sessions_waiting") == 1)
    waiting.cancel()
    await until(lambda: metric(slow, "hat_num_sessions_waiting") == 0)
    await first.aclose()
    await slow.openai.chat.completions.create(**(BODY | {"max_tokens": 1}))


async def test_silence_is_filled_with_comments(slow: Pair) -> None:
    body = BODY | {"stream": True, "max_tokens": 4, "hat_chunk_tokens": 1}
    text = (await slow.http.post("/v1/chat/completions", json=body)).text
    assert ": keep-alive\n\n" in text
    assert text.endswith("data: [DONE]\n\n")
    stream = await slow.openai.chat.completions.create(**(BODY | {"stream": True, "max_tokens": 4}))
    assert [chunk.choices[0].finish_reason async for chunk in stream][-1] == "length"


async def test_forty_clients_a_third_of_which_go_away(folder: Path) -> None:
    async with serving_pair(folder, max_concurrent=8, max_waiting=40) as pair:
        want = await pair.openai.chat.completions.create(**(BODY | {"max_tokens": 40}))

        async def ask(index: int) -> None:
            call = pair.openai.chat.completions.create(**(BODY | {"max_tokens": 40}))
            if index % 3 == 0:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(call, 0.001 + index * 0.002)
                return
            assert (await call).choices[0].message.content == want.choices[0].message.content

        await asyncio.gather(*(ask(index) for index in range(40)))
        await pair.all_free()
        assert metric(pair, "hat_num_sessions_waiting") == 0


async def test_a_full_cloud_is_429_with_retry_after(folder: Path) -> None:
    async with (
        running_cloud(cloud_config(folder, max_sessions=1)) as cloud,
        device_for(cloud, folder) as holder,
        device_for(cloud, folder) as other,
    ):
        held = await start(holder)
        with pytest.raises(RateLimitError) as caught:
            await other.openai.chat.completions.create(**BODY)
        assert caught.value.code == "overloaded"
        assert "try again in 1.0 s" in str(caught.value)
        assert caught.value.response.headers["retry-after"] == "1"  # as the cloud said, not the device's own
        await held.aclose()


async def test_a_cloud_that_goes_away_and_comes_back(folder: Path) -> None:
    async with AsyncExitStack() as stack:
        leaving = AsyncExitStack()
        cloud = await leaving.enter_async_context(running_cloud(cloud_config(folder)))
        pair = await stack.enter_async_context(device_for(cloud, folder, generator=IMPATIENT))
        stream = await pair.openai.chat.completions.create(**(BODY | {"stream": True}))
        await anext(stream)
        await leaving.aclose()
        with pytest.raises(APIError, match="cloud"):
            async for _ in stream:
                pass
        with pytest.raises(InternalServerError) as caught:
            await pair.openai.chat.completions.create(**BODY)
        assert caught.value.status_code == 503
        assert caught.value.code == "cloud_unavailable"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        ready = await pair.http.get("/readyz")
        assert ready.status_code == 503
        assert cloud.address in ready.text
        assert (await pair.http.get("/healthz")).status_code == 200
        port = int(cloud.address.rpartition(":")[2])
        async with running_cloud(cloud_config(folder, port=port)):
            while (await pair.http.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
            await pair.openai.chat.completions.create(**(BODY | {"max_tokens": 2}))


async def test_a_mid_stream_failure_is_an_event_and_the_end(folder: Path) -> None:
    async with AsyncExitStack() as leaving:
        cloud = await leaving.enter_async_context(running_cloud(cloud_config(folder)))
        async with device_for(cloud, folder, generator=IMPATIENT) as pair:
            lines = []
            async with pair.http.stream(
                "POST", "/v1/chat/completions", json=BODY | {"stream": True}, headers={"X-Request-ID": "r1"}
            ) as reply:
                async for line in reply.aiter_lines():
                    lines.append(line)
                    if len(lines) == 5:
                        await leaving.aclose()
            assert lines[-2].startswith('data: {"error":{"message":"')
            assert '"request_id":"r1"' in lines[-2]
            assert "data: [DONE]" not in lines


@pytest.mark.parametrize("grace_s", [0.0, 60.0])
async def test_the_end_of_the_server_finishes_or_cancels_answers(folder: Path, grace_s: float) -> None:
    async with running_cloud(cloud_config(folder)) as cloud, httpx.AsyncClient(timeout=60) as http:
        config = DeviceConfig(
            model=folder, cloud=cloud.address, dtype="float32", model_name=MODEL, grace_s=grace_s
        )
        async with running_device(config) as device:
            stream = http.stream("POST", f"{device.url}/v1/chat/completions", json=BODY | {"stream": True})
            async with AsyncExitStack() as stack:
                reply = await stack.enter_async_context(stream)
                lines = reply.aiter_lines()
                await anext(lines)
                reading = asyncio.create_task(_join(lines))
                held = stack.pop_all()
        text = await reading
        await held.aclose()
        if grace_s:
            assert text.endswith("data: [DONE]")
        else:
            assert '"code":"interrupted"' in text
        with pytest.raises(httpx.ConnectError):
            await http.get(f"{device.url}/healthz")


async def _join(lines: AsyncIterator[str]) -> str:
    return "\n".join([line async for line in lines]).strip()


async def test_api_keys(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key\n\nsecond-key\n")
    async with serving_pair(folder, api_key_file=keys) as pair:
        for wrong in ("none", "first-key-and-more", "ключ".encode().decode("latin-1")):
            reply = await pair.http.get(
                "/v1/models", headers=[(b"authorization", f"Bearer {wrong}".encode("latin-1"))]
            )
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
        assert (await pair.http.get("/v1/models")).status_code == 401
        with pytest.raises(AuthenticationError):
            await pair.openai.chat.completions.create(**BODY)
        for right in ("first-key", "second-key"):
            async with AsyncOpenAI(base_url=f"{pair.device.url}/v1", api_key=right) as client:
                assert (await client.models.list()).data[0].id == MODEL
        assert (await pair.http.get("/readyz")).status_code == 200


async def test_a_body_that_is_too_large_is_refused(folder: Path) -> None:
    async with serving_pair(folder, max_body_bytes=1000) as pair:
        reply = await pair.http.post("/v1/completions", content=b"x" * 5000)
        assert reply.status_code == 413
        assert "1000" in reply.json()["error"]["message"]


async def test_what_cannot_start_says_why(folder: Path, tmp_path: Path, tiny_llama: Path) -> None:
    async def fails(**fields: Any) -> HatError:
        settings = {"model": folder, "cloud": "127.0.0.1:1", "dtype": "float32"} | fields
        with pytest.raises(HatError) as caught:
            async with running_device(DeviceConfig(**settings)):
                pass
        return caught.value

    assert isinstance(await fails(), CloudUnavailable)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--listen 127.0.0.1:{port}" in str(await fails(listen_port=port))
    assert "config.json" in str(await fails(model=tmp_path / "no-such-model"))
    empty = tmp_path / "keys"
    empty.write_text("\n")
    assert isinstance(await fails(api_key_file=empty), UsageError)
    assert "--max-concurrent 0" in str(await fails(max_concurrent=0))
    async with running_cloud(cloud_config(folder)) as cloud:
        other = await fails(cloud=cloud.address, model=make_tiny_chat_model(tmp_path / "other", seed=3))
        assert isinstance(other, HandshakeError)
        assert "tokenizer" in str(await fails(cloud=cloud.address, model=tiny_llama))
