"""Mutated HTTP requests to the device's API and to the cloud's admin port: 4xx or a right answer, never 500."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.fuzz.http import Reply, Request, Requests, send
from tests.fuzz.watch import Watch
from tests.runtime.api_pair import MODEL, Pair, cloud_config, device_for, running_cloud
from tests.tiny_chat import make_tiny_chat_model

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "The quick fox"},
    ],
    "max_tokens": 2,
    "temperature": 0.8,
    "top_p": 0.9,
    "seed": 7,
    "stop": ["###"],
    "user": "someone",
}
TEXT: dict[str, Any] = {
    "model": MODEL,
    "prompt": ["one two", "three"],
    "max_tokens": 2,
    "hat_chunk_tokens": 4,
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}, "hat_token_kinds": True}
DEVICE = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", CHAT | STREAM),
    ("POST", "/v1/completions", TEXT),
    ("POST", "/v1/completions", TEXT | STREAM | {"prompt": [5, 9, 44]}),
    ("GET", "/v1/models", None),
    ("GET", f"/v1/models/{MODEL}", None),
    ("GET", "/v1/hat/stats", None),
]
PROPOSAL = {"chunk_tokens": 128, "min_tokens": 64, "max_tokens": 512}
POLICY = {"version": 1, "devices": {"orin-1": PROPOSAL, "orin-2": PROPOSAL}, "default": PROPOSAL}
ADMIN = [
    ("PUT", "/v1/policy", POLICY),
    ("PUT", "/v1/policy", POLICY | {"version": 2**53 - 1}),
    ("PUT", "/v1/policy", {"version": 1}),
    ("GET", "/v1/policy", None),
    ("GET", "/v1/devices", None),
    ("GET", "/metrics", None),
    ("GET", "/readyz", None),
]
PARALLEL = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


async def bombard(url: str, requests: Requests, watch: Watch, check: Callable[[], Awaitable[None]]) -> None:
    address = urlsplit(url)

    async def one(request: Request) -> str:
        reply = await send(str(address.hostname), int(address.port or 0), request)
        expect(request, reply)
        return f"{reply.status // 100}xx" if reply.status else "cut" if request.cut else "closed"

    while watch.under_way:
        batch = [requests.next() for _ in range(PARALLEL)]
        watch.count(PARALLEL, *await asyncio.gather(*map(one, batch)))
        if watch.sent % (PARALLEL * 25) == 0:
            await check()
    assert watch.outcomes["2xx"]
    assert watch.outcomes["4xx"]
    watch.end()


def expect(request: Request, reply: Reply) -> None:
    """The reply is one that a client may get for such a request."""
    shown = f"{request.kind}: {request.data[:600]!r} -> {reply.status} {reply.body[:300]!r}"
    if request.cut:
        return
    assert reply.status or request.malformed, shown
    assert reply.status < 500, shown
    if request.kind == "right" or (request.kind == "JSON" and reply.status == 200):
        assert reply.status in (200, 409), shown
        if reply.body.startswith(b"data: "):
            assert reply.body.endswith(b"data: [DONE]\n\n"), shown
            assert b'"error"' not in reply.body, shown
    if request.kind == "JSON" and reply.status >= 400:  # in the form that each server has for errors
        assert "message" in json.loads(reply.body)["error"], shown


async def bombard_device(folder: Path, watch: Watch) -> None:
    async with (
        running_cloud(cloud_config(folder)) as cloud,
        device_for(cloud, folder, max_concurrent=4, max_waiting=64) as pair,
    ):
        whole = await answer(pair)
        tasks = 0

        async def check() -> None:
            nonlocal tasks
            assert await answer(pair) == whole
            tasks = tasks or len(asyncio.all_tasks())

        await bombard(pair.device.url, Requests(watch.seed, DEVICE), watch, check)
        assert await answer(pair) == whole
        await pair.all_free()
        assert len(asyncio.all_tasks()) <= tasks + 4


async def answer(pair: Pair) -> str:
    body = CHAT | {"temperature": 0, "max_tokens": 12}
    reply = await pair.http.post("/v1/chat/completions", json=body)
    return str(reply.json()["choices"][0]["message"]["content"])


async def bombard_admin(folder: Path, watch: Watch) -> None:
    async with running_cloud(cloud_config(folder)) as cloud:

        async def check() -> None:
            await cloud.engine.idle()

        await bombard(cloud.admin_url, Requests(watch.seed, ADMIN), watch, check)


async def test_fuzz_the_device(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        await bombard_device(folder, Watch("requests to the device", seed=1, total=800))
    assert not caplog.records


async def test_fuzz_the_admin_port(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        await bombard_admin(folder, Watch("requests to the cloud's admin port", seed=1, total=800))
    assert not caplog.records


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_fuzz_the_device_long(folder: Path) -> None:
    await bombard_device(folder, Watch("requests to the device", seed=2, total=20_000))


@pytest.mark.long
@pytest.mark.timeout(3600)
async def test_fuzz_the_admin_port_long(folder: Path) -> None:
    await bombard_admin(folder, Watch("requests to the cloud's admin port", seed=3, total=5_000))
