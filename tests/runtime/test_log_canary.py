"""Unusual words in prompts, keys and failing requests: no log, metric or page of either side repeats them."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hat_runtime.cli.processes import Child, Children, free_address, hat_command
from hat_runtime.emulation.link import EmulatedLink, LinkSpec
from hat_runtime.model.hf import load_tokenizer
from hat_runtime.model.runner import LayerRunner, Segment
from tests.fuzz.http import Request, http, send
from tests.runtime.api_pair import MODEL, serving_pair
from tests.runtime.picospec_pair import perturbed
from tests.runtime.raw_client import LocalSplit, to_bytes
from tests.tiny_chat import make_tiny_chat_model

CANARY = "Zanzibarquux kanarienvogel 7391"
KEY = "sk-kanarienschluessel-55021"
WORDS = ("Zanzibarquux", "kanarienvogel", KEY)
FORBIDDEN_FORMS = (
    re.compile(r"tensor\("),
    re.compile(r"array\(\["),
    re.compile(r"(?i)authorization(?!: Bearer KEY')"),
    re.compile(r"Bearer (?!KEY')"),
)
"""What hidden states, tokens and headers look like when a program prints them; the device's hint says KEY."""


@dataclass
class Secrets:
    """What must be found nowhere."""

    texts: set[str]
    ids: list[list[int]]

    @classmethod
    def of(cls, folder: Path) -> Secrets:
        tokenizer = load_tokenizer(folder)
        prompts = [tokenizer.encode(CANARY), tokenizer.encode(f" {CANARY}", add_special_tokens=False)]
        shallow = LocalSplit(folder).shallow(torch.tensor(prompts[0]))
        rows = [to_bytes(row) for row in shallow]
        # Whatever stands before it, one of three ways of cutting it into threes is that of the whole.
        base64s = {base64.b64encode(row[at : at + 48]).decode() for row in rows for at in range(3)}
        return cls({*WORDS, *base64s, *(row[:24].hex() for row in rows)}, prompts)

    def check(self, where: str, said: str) -> None:
        """Nothing of it is in a text."""
        assert said, where
        for secret in self.texts:
            assert secret not in said, f"{where}: {_around(said, said.index(secret))}"
        for form in FORBIDDEN_FORMS:
            found = form.search(said)
            assert found is None, f"{where}: {_around(said, found.start())}"
        for ids in self.ids:
            for at in range(len(ids) - 4):
                run = r"\D{1,6}".join(map(str, ids[at : at + 5]))
                found = re.search(rf"(?<!\d){run}(?!\d)", said)
                assert found is None, f"{where}: {_around(said, found.start())}"


def _around(text: str, at: int) -> str:
    return text[max(0, at - 200) : at + 200]


def test_the_search_finds_what_is_there(folder: Path) -> None:
    secrets = Secrets.of(folder)
    ids = secrets.ids[0]
    row = to_bytes(LocalSplit(folder).shallow(torch.tensor(ids))[1])
    for leak in (
        f"prompt={CANARY}",
        f"ids={ids}",
        " ".join(map(str, ids)),
        json.dumps({"x": [{"id": one} for one in ids]}).replace('"id": ', ""),
        base64.b64encode(b"x" + row + b"yy").decode(),
        base64.b64encode(b"xy" + row).decode(),
        row.hex(),
        f"Authorization: Bearer {KEY}",
        str(torch.tensor([1.0, 2.0])),
    ):
        with pytest.raises(AssertionError):
            secrets.check("leak", f"line one\n{leak}\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def draft(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(folder, tmp_path_factory.mktemp("chat") / "draft", 0.01)


@dataclass
class Processes:
    """A device and its cloud, which log all they can."""

    url: str
    admin: str
    link: EmulatedLink
    device: Child
    cloud: Child


@contextmanager
def processes(folder: Path, draft: Path | None, keys: Path) -> Iterator[Processes]:
    cloud_at, admin, api = free_address(), free_address(), free_address()
    common = ["--model", str(folder), "--dtype", "float32", "--log-level", "debug"]
    of_cloud = ["--input-layers", "2"] if draft is None else ["--mode", "picospec"]
    of_device = [] if draft is None else ["--mode", "picospec", "--draft-model", str(draft)]
    with EmulatedLink(cloud_at, LinkSpec.parse("100mbit,20ms")) as link, Children() as children:
        command = hat_command("cloud", "serve", *common, *of_cloud, "--listen", cloud_at)
        cloud = children.start("cloud", [*command, "--http-listen", admin, "--log-format", "json"])
        command = hat_command("device", "serve", *common, *of_device, "--cloud", link.address)
        command += ["--listen", api, "--model-name", MODEL, "--grace", "1", "--api-key-file", str(keys)]
        device = children.start("device", command, env={"HAT_DEVICE_NAME": "orin-1"})
        cloud.wait_ready(f"http://{admin}/readyz", tick=device.check)
        device.wait_ready(f"http://{api}/readyz", tick=cloud.check)
        yield Processes(f"http://{api}", f"http://{admin}", link, device, cloud)


BODY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": CANARY}],
    "max_tokens": 24,
    "temperature": 0,
}
WRONG: list[tuple[str, Any]] = [
    ("/v1/chat/completions", BODY | {"temperature": CANARY}),
    ("/v1/chat/completions", BODY | {CANARY: 1}),
    ("/v1/chat/completions", BODY | {"tools": [CANARY]}),
    ("/v1/chat/completions", BODY | {"model": CANARY}),
    ("/v1/chat/completions", BODY | {"messages": [{"role": "assistant", "content": CANARY}]}),
    ("/v1/chat/completions", BODY | {"messages": [{"role": CANARY, "content": CANARY}]}),
    ("/v1/chat/completions", BODY | {"max_tokens": 10**6}),
    ("/v1/completions", {"model": MODEL, "prompt": [CANARY, 7]}),
    ("/v1/completions", {"model": MODEL, "prompt": [70000, 70001, 70002, 70003, 70004, 70005]}),
    (f"/v1/{CANARY.split()[0]}?q={CANARY.split()[0]}", BODY),
    (f"/v1/models/{CANARY.split()[0]}", BODY),
]


async def talk(running: Processes, secrets: Secrets, kill: Callable[[], None]) -> None:
    """Right and wrong requests, and such that are cut on either side of the device."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=60) as client:
        answer = await client.post("/v1/chat/completions", json=BODY)
        assert answer.status_code == 200
        text = answer.json()["choices"][0]["message"]["content"]
        if len(text) > 8:
            secrets.texts.add(text)
        ids = secrets.ids[0]
        assert (
            await client.post("/v1/completions", json={"model": MODEL, "prompt": ids, "max_tokens": 8})
        ).is_success
        for path, body in WRONG:
            assert 400 <= (await client.post(path, json=body)).status_code < 500, (path, body)
        assert (await client.post("/v1/completions", content=f'{{"prompt": "{CANARY}"')).status_code == 400
        wrong = {"Authorization": f"Bearer {KEY}x"}
        assert (await client.post("/v1/completions", json=BODY, headers=wrong)).status_code == 401

        long = BODY | {"max_tokens": 100, "stream": True, "temperature": 0.5, "seed": 4}
        async with client.stream("POST", "/v1/chat/completions", json=long) as reply:  # the client goes away
            await anext(aiter(reply.aiter_lines()))
        for hurt in (running.link.cut, kill):
            async with client.stream("POST", "/v1/chat/completions", json=long) as reply:
                lines = reply.aiter_lines()
                await anext(lines)
                hurt()
                async for _ in lines:
                    pass
        host, port = running.url.removeprefix("http://").split(":")
        body = json.dumps(BODY).encode()
        half = http("POST", "/v1/chat/completions", body, [f"Authorization: Bearer {KEY}".encode()])[:-20]
        await send(host, int(port), Request("cut", half, cut=True))
        await send(host, int(port), Request("bytes", f"GET {CANARY}\r\n\r\n".encode()))


@pytest.mark.parametrize("mode", ["hat", "picospec"])
async def test_no_process_says_what_was_asked(folder: Path, draft: Path, mode: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    secrets = Secrets.of(folder)
    pages: dict[str, str] = {}

    def look() -> None:
        for base, paths in (
            (running.url, ("/metrics", "/readyz", "/v1/hat/stats", "/v1/models")),
            (running.admin, ("/metrics", "/v1/devices", "/v1/policy")),
        ):
            for path in paths:
                reply = httpx.get(base + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=20)
                pages[f"{base}{path}"] = reply.text

    with processes(folder, draft if mode == "picospec" else None, keys) as running:

        def kill() -> None:
            look()
            os.kill(running.cloud.pid, signal.SIGKILL)

        await talk(running, secrets, kill)
        device, cloud = running.device.output(), running.cloud.output()
    assert "orin-1" in pages[f"{running.admin}/v1/devices"]
    assert device.count("status=200") >= 3
    assert device.count("status=4") >= len(WRONG)
    assert "session" in cloud
    for where, said in (("device", device), ("cloud", cloud), *pages.items()):
        secrets.check(where, said)


@pytest.mark.parametrize("side", ["cloud", "both"])
async def test_a_failing_pass_says_nothing_of_what_it_was_for(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    secrets = Secrets.of(folder)
    with caplog.at_level(logging.DEBUG):
        async with serving_pair(folder) as pair:
            with monkeypatch.context() as patch:
                if side == "cloud":
                    patch.setattr(pair.cloud.engine.runner, "run", lambda segments: broken(segments))
                else:  # the device's pass comes first
                    patch.setattr(LayerRunner, "run", lambda _, segments: broken(segments))
                reply = await pair.http.post("/v1/chat/completions", json=BODY)
            assert reply.status_code >= 500
            secrets.check("reply", reply.text)
            assert (await pair.http.post("/v1/chat/completions", json=BODY)).status_code == 200
    assert "failed" in caplog.text
    secrets.check("log", caplog.text)


def broken(segments: list[Segment]) -> list[torch.Tensor]:
    """A pass that fails in torch, as one with a wrong shape would."""
    return [segment.hidden @ torch.zeros(3, 5) for segment in segments]
