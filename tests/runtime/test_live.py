"""GET /v1/hat/stats, and the page's files."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from hat_runtime.cli.top import COMMAND
from hat_runtime.cli.top_view import seconds
from hat_runtime.cloud.serve import running_cloud
from hat_runtime.device.api import live
from hat_runtime.device.api.page import FOLDER
from hat_runtime.device.chunking import ChunkConfig
from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.recent import KEPT
from hat_runtime.device.token_answer import SpeculationConfig
from tests.runtime.api_pair import MODEL, Pair, cloud_config, device_for, serving_pair
from tests.tiny_chat import make_tiny_chat_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY: dict[str, Any] = {"model": MODEL, "prompt": "The quick brown fox", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(folder: Path) -> AsyncIterator[Pair]:
    config = GeneratorConfig(chunking=ChunkConfig(16), drafting=DraftConfig(adaptive=False))
    async with serving_pair(folder, generator=config, drafter="ngram") as running:
        yield running
        await running.all_free()


async def stats(pair: Pair, after: int | None = None) -> dict[str, Any]:
    reply = await pair.http.get("/v1/hat/stats", params={} if after is None else {"after": after})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


async def complete(pair: Pair, **fields: Any) -> dict[str, Any]:
    reply = await pair.http.post("/v1/completions", json=BODY | fields)
    assert reply.status_code == 200, reply.text
    usage: dict[str, Any] = reply.json()["usage"]
    return usage


async def test_an_answers_figures_are_those_of_its_usage(pair: Pair) -> None:
    before = (await stats(pair))["answers"]
    usage = await complete(pair, prompt="one two three four " * 8)
    now = await stats(pair, after=before)
    (answer,) = now["recent"]
    assert answer["number"] == now["answers"] == before + 1
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    for name in set(answer) & set(usage["hat"]):
        assert answer[name] == usage["hat"][name], name
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["age_s"] >= 0
    assert now["chunk_tokens"] == answer["chunk_tokens"] == 16
    assert (now["model"], now["mode"], now["drafting"]) == (MODEL, "hat", True)
    assert now["cloud"] == {"address": pair.cloud.address, "ok": True, "reason": None}
    assert now["rtt_s"] > 0
    assert 0 <= now["acceptance"] <= 1
    assert now["tokens_per_round"] >= 1
    assert (await stats(pair, after=now["answers"]))["recent"] == []


async def test_an_answer_under_way_is_seen_and_then_ended(pair: Pair) -> None:
    before = (await stats(pair))["answers"]
    async with pair.http.stream(
        "POST", "/v1/completions", json=BODY | {"stream": True, "max_tokens": 400}
    ) as reply:
        lines = reply.aiter_lines()
        while "text" not in await anext(lines):
            pass
        now = await stats(pair)
        (running,) = now["running"]
        assert running["completion_tokens"] >= 1
        assert running["ttft_s"] > 0
        assert now["sessions"]["running"] == 1
        await lines.aclose()
    while (now := await stats(pair, after=before))["running"]:
        await asyncio.sleep(0.005)
    assert [answer["finish_reason"] for answer in now["recent"]] == ["cancelled"]


async def test_the_memory_is_bounded_and_the_reply_holds_no_text(pair: Pair) -> None:
    for _ in range(2):
        await complete(pair, prompt=["The quick brown fox"] * (KEPT - 20), max_tokens=1)
    now = await stats(pair)
    numbers = [answer["number"] for answer in now["recent"]]
    assert numbers == list(range(now["answers"] - KEPT + 1, now["answers"] + 1))
    words = {
        value
        for answer in now["recent"]
        for value in answer.values()
        if value is not None and not isinstance(value, int | float)
    }
    assert words <= {"stop", "length", "cancelled", "error"}
    assert "quick" not in json.dumps(now)


@pytest.mark.parametrize("after", ["-1", "x", "", "1.5", "²", "9" * 30])
async def test_a_wrong_number_is_refused_by_name(pair: Pair, after: str) -> None:
    reply = await pair.http.get("/v1/hat/stats", params={"after": after})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "after"
    assert f'"{after}"' in error["message"]


async def test_a_cloud_that_goes_away_and_comes_back_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "ASK_EVERY_S", 0.0)

    async def said(ok: bool) -> dict[str, Any]:
        while (now := await stats(pair))["cloud"]["ok"] is not ok:
            await asyncio.sleep(0.01)
        return now

    async with AsyncExitStack() as leaving:
        cloud = await leaving.enter_async_context(running_cloud(cloud_config(folder)))
        port = int(cloud.address.rpartition(":")[2])
        async with device_for(cloud, folder) as pair:
            await complete(pair)
            await said(ok=True)
            await leaving.aclose()
            gone = await said(ok=False)
            assert cloud.address in gone["cloud"]["reason"]
            assert gone["answers"] == 1  # what is known stays
            async with running_cloud(cloud_config(folder, port=port)):
                assert (await said(ok=True))["cloud"]["reason"] is None


async def test_a_key_is_asked_for_where_the_api_has_one(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-1\n")
    async with serving_pair(folder, api_key_file=keys) as pair:
        assert (await pair.http.get("/v1/hat/stats")).status_code == 401
        reply = await pair.http.get("/v1/hat/stats", headers={"Authorization": "Bearer secret-1"})
        assert reply.json()["recent"] == []
        assert (await pair.http.get("/")).status_code == 200  # it takes the key


async def test_token_mode_has_no_chunks_but_an_acceptance(folder: Path) -> None:
    async with (
        running_cloud(cloud_config(folder, mode="picospec", input_layers=None)) as cloud,
        device_for(
            cloud,
            folder,
            mode="picospec",
            draft_model=folder,
            speculation=SpeculationConfig(ahead=1, adaptive=False),
        ) as pair,
    ):
        await complete(pair)
        now = await stats(pair)
        assert (now["mode"], now["chunk_tokens"], now["drafting"]) == ("picospec", None, True)
        assert now["acceptance"] > 0.5
        await pair.all_free()


async def test_the_page_comes_from_here_alone(pair: Pair) -> None:
    page = await pair.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    assert "unsafe" not in policy
    for file in FOLDER.iterdir():
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        reply = await pair.http.get(path)
        assert reply.content == file.read_bytes()
        assert reply.headers["x-content-type-options"] == "nosniff"
        text = reply.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
    assert (await pair.http.get("/page/other.js")).status_code == 404


async def test_a_device_that_is_not_ready_says_so(folder: Path) -> None:
    from hat_runtime.device.serve import DeviceConfig, running_device
    from hat_runtime.http import bind

    probe = bind("127.0.0.1", 0, "--listen")
    port = probe.getsockname()[1]
    probe.close()
    config = DeviceConfig(
        model=folder, cloud="127.0.0.1:1", model_name=MODEL, listen_port=port, cloud_wait_s=60
    )
    device = running_device(config)
    starting = asyncio.create_task(device.__aenter__())
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            while True:
                try:
                    now = (await http.get("/v1/hat/stats")).json()
                except httpx.ConnectError:
                    await asyncio.sleep(0.01)
                    continue
                assert now["cloud"]["ok"] is False
                if "127.0.0.1:1" in now["cloud"]["reason"]:
                    break
                await asyncio.sleep(0.01)
        assert "recent" not in now
        assert now["sessions"] == {"running": 0, "waiting": 0, "idle": 0}
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


@pytest.mark.parametrize("columns", [80, 200])
async def test_hat_top_shows_a_real_device(
    pair: Pair, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await complete(pair)
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = argparse.ArgumentParser()
    COMMAND.configure(parser)
    assert COMMAND.run is not None
    arguments = parser.parse_args(["--once", "--url", pair.device.url])
    assert await asyncio.to_thread(COMMAND.run, arguments) == 0
    text = capsys.readouterr().out
    assert {len(line) for line in text.splitlines()} == {columns}
    assert pair.device.url in text
    assert f"cloud {pair.cloud.address}" in text
    assert "16 tokens" in text
    now = await stats(pair)
    for value in (seconds(now["recent"][-1]["ttft_s"]), f"{100 * now['acceptance']:.0f} %"):
        assert value in text
