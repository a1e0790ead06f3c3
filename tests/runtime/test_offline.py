"""What devices do while their cloud, a real process, is dead: refuse, or let the small model answer and say so."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from hat_runtime.cli.processes import Child, hat_command
from hat_runtime.device import offline
from hat_runtime.device.chat import PromptEncoder
from hat_runtime.device.generator import GeneratorConfig
from hat_runtime.device.offline import CloudPresence
from hat_runtime.device.recovery import RecoveryConfig
from hat_runtime.device.sampling import SamplingParams
from hat_runtime.device.serve import DeviceConfig
from hat_runtime.errors import CloudOverloaded, CloudUnavailable, HandshakeError, UsageError
from hat_runtime.model.hf import load_tokenizer
from tests.runtime.api_pair import MODEL, Pair, device_for, metric
from tests.runtime.picospec_pair import Whole, perturbed
from tests.tiny_chat import make_tiny_chat_model

PROMPT = "The quick brown fox"
TOKENS = 16
SEEDED = SamplingParams(0.8, 0.9, 17)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own text is another one."""
    found = perturbed(target, tmp_path_factory.mktemp("draft") / "small", size=0.1)
    assert own_text(found) != own_text(target)
    return found


def own_text(folder: Path, params: SamplingParams | None = None) -> str:
    """What a model says by itself, by transformers."""
    tokenizer = load_tokenizer(folder)
    ids = Whole(folder).decode(tokenizer.encode(PROMPT), TOKENS, params)
    shown = PromptEncoder(tokenizer).detokenizer.stream()
    return "".join(map(shown.feed, ids)) + shown.finish()


class Cloud:
    """A process on an address of its own, to be killed and started again."""

    def __init__(self, model: Path, mode: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.address = f"127.0.0.1:{taken.getsockname()[1]}"
        served = ["--model", str(model), "--dtype", "float32", "--mode", mode]
        served += ["--input-layers", "2"] if mode == "hat" else []
        self._command = [*hat_command("cloud", "serve"), *served, "--listen", self.address]
        self._command += ["--http-listen", "127.0.0.1:0"]
        self._process: Child | None = None

    def start(self) -> None:
        self._process = Child("cloud", self._command)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.stop()
            self._process = None


@contextmanager
def cloud_of(model: Path, mode: str) -> Iterator[Cloud]:
    cloud = Cloud(model, mode)
    cloud.start()
    try:
        yield cloud
    finally:
        cloud.kill()


@asynccontextmanager
async def device(cloud: Cloud, target: Path, **fields: Any) -> AsyncIterator[Pair]:
    nobody: Any = None
    settings = {"generator": GeneratorConfig(recovery=RecoveryConfig(reconnect_for_s=1.0))} | fields
    async with device_for(nobody, target, cloud.address, cloud_wait_s=600.0, **settings) as pair:
        yield pair


async def ask(pair: Pair, params: SamplingParams | None = None, prompt: Any = PROMPT) -> httpx.Response:
    chosen = params or SamplingParams()
    fields = {"temperature": chosen.temperature, "top_p": chosen.top_p, "seed": chosen.seed}
    body = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, **fields}
    return await pair.http.post("/v1/completions", json=body)


def marks(reply: httpx.Response) -> tuple[str | None, str, bool]:
    """Whether header, model and usage say that the small model answered alone."""
    body = reply.json()
    return reply.headers.get("X-HAT-Offline"), body["model"], body["usage"]["hat"]["offline"]


ONLINE = (None, MODEL, False)
ALONE = ("draft-only", f"{MODEL}-offline-draft", True)


@pytest.mark.parametrize("mode", ["picospec", "hat"])
async def test_the_small_model_answers_alone_and_says_so_until_the_cloud_is_back(
    mode: str, target: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "LOOK_AGAIN_S", 0.2)
    fields: dict[str, Any] = {"offline": "draft-only"}
    fields |= {"mode": mode, "draft_model": draft} if mode == "picospec" else {"drafter": f"model:{draft}"}
    with cloud_of(target, mode) as cloud:
        async with device(cloud, target, **fields) as pair:
            reply = await ask(pair)
            assert reply.json()["choices"][0]["text"] == own_text(target)
            assert marks(reply) == ONLINE
            cloud.kill()
            # The first one finds out, the second knows.
            for _ in range(2):
                reply = await ask(pair)
                assert reply.json()["choices"][0]["text"] == own_text(draft)
                assert marks(reply) == ALONE
            seeded = await ask(pair, SEEDED)
            assert seeded.json()["choices"][0]["text"] == own_text(draft, SEEDED)
            both = (await ask(pair, prompt=[PROMPT, PROMPT])).json()["choices"]
            assert [choice["text"] for choice in both] == [own_text(draft)] * 2
            assert metric(pair, "hat_offline_answers_total") == 5
            await check_stream(pair, own_text(draft))
            ready = await pair.http.get("/readyz")
            assert (ready.status_code, "the small model alone" in ready.text) == (200, True)
            stats = (await pair.http.get("/v1/hat/stats")).json()
            assert stats["offline"] == "draft-only"
            assert stats["recent"][-1]["offline"]
            too_long = await pair.http.post(
                "/v1/completions", json={"model": MODEL, "prompt": PROMPT, "max_tokens": 10_000}
            )
            assert too_long.json()["error"]["code"] == "context_length_exceeded"
            cloud.start()
            while marks(reply := await ask(pair)) != ONLINE:
                await asyncio.sleep(0.3)
            assert reply.json()["choices"][0]["text"] == own_text(target)
            assert (await pair.http.get("/readyz")).text == "ready\n"
            generator = pair.device.generator
            generator.conversations.clear()
            await generator.model.call(lambda: generator.model.cache.check([]))


async def check_stream(pair: Pair, text: str) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    body |= {"hat_token_kinds": True}
    reply = await pair.http.post("/v1/completions", json=body)
    assert reply.headers["X-HAT-Offline"] == "draft-only"
    chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
    assert {chunk["model"] for chunk in chunks} == {ALONE[1]}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert [chunk.get("hat") for chunk in chunks] == [None] * (len(chunks) - 1) + [{"offline": True}]
    tokens = [token for chunk in chunks for token in chunk["choices"][0].get("hat", {}).get("tokens", ())]
    assert {token["kind"] for token in tokens} == {"unchecked"}


async def test_an_answer_that_has_begun_stays_the_models_and_by_default_others_are_refused(
    target: Path, draft: Path
) -> None:
    fields: dict[str, Any] = {"mode": "picospec", "draft_model": draft}
    with cloud_of(target, "picospec") as cloud:
        async with (
            device(cloud, target, **fields) as strict,
            device(cloud, target, offline="draft-only", **fields) as pair,
        ):
            assert marks(await ask(strict)) == ONLINE
            body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 480, "temperature": 0, "stream": True}
            got = b""
            async with pair.http.stream("POST", "/v1/completions", json=body) as reply:
                async for part in reply.aiter_raw():
                    got += part
                    cloud.kill()
            events = [
                json.loads(line[6:]) for line in got.decode().split("\n\n") if line.startswith("data: {")
            ]
            text = "".join(event["choices"][0]["text"] for event in events if "choices" in event)
            whole = own_text(target)
            assert text[: len(whole)] == whole[: len(text)]
            assert "X-HAT-Offline" not in reply.headers
            assert events[-1]["error"]["code"] == "cloud_unavailable"
            assert marks(await ask(pair)) == ALONE
            refused = await ask(strict)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "cloud_unavailable"
            assert (await strict.http.get("/readyz")).status_code == 503
            assert (await strict.http.get("/v1/hat/stats")).json()["offline"] == "refuse"
            assert metric(strict, "hat_offline_answers_total") == 0


@pytest.mark.parametrize("drafter", ["auto", "ngram", "none", "adapter"])
def test_a_device_without_a_small_model_is_refused_at_its_start(drafter: str, target: Path) -> None:
    with pytest.raises(
        UsageError, match=f"--offline draft-only needs a whole small model.*--drafter {drafter}"
    ):
        DeviceConfig(model=target, cloud="127.0.0.1:1", drafter=drafter, offline="draft-only")
    with pytest.raises(UsageError, match="--offline 'always': must be one of refuse, draft-only"):
        DeviceConfig(model=target, cloud="127.0.0.1:1", offline="always")


async def test_the_cloud_is_away_only_once_a_look_has_failed_and_until_one_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offline, "LOOK_AGAIN_S", 0.0)
    says: Exception | None = None
    looks = 0

    async def check() -> None:
        nonlocal looks
        looks += 1
        if says is not None:
            raise says

    presence = CloudPresence(check)
    assert presence.away is None
    assert not await presence.is_away()
    for there in (CloudOverloaded("full", 1.0), HandshakeError("another model")):
        says = there
        assert not await presence.is_away()
    says = CloudUnavailable("no route")
    presence.suspect()
    while presence.away is None:
        await asyncio.sleep(0)
    assert presence.away == "no route"
    before = looks
    assert await presence.is_away()
    assert looks == before  # it is known
    while looks < before + 3:
        await asyncio.sleep(0)
    says = None
    while presence.away is not None:
        await asyncio.sleep(0)
    await presence.close()
