"""A device whose disk is full and whose clock jumps: running answers do not notice."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from hat_runtime.cli.processes import free_address, hat_command
from tests.runtime.api_pair import MODEL, serving_pair
from tests.tiny_chat import make_tiny_chat_model

BODY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "The quick brown fox"}],
    "temperature": 0,
    "max_tokens": 48,
}
CLOCKS = (0.0, 4e9, -1e9, 86400.0)
"""Seconds that the wall clock is off."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


def fill_disk(process: subprocess.Popen[bytes]) -> None:
    """From now on no file of a process can grow: the kernel says EFBIG, as it says ENOSPC of a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))


@contextmanager
def without_log(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A `hat` process whose output goes to a full device."""
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(
            hat_command(*map(str, arguments)),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=full,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ready(url: str, *processes: subprocess.Popen[bytes]) -> None:
    while True:
        assert [process.poll() for process in processes] == [None] * len(processes)
        try:
            if httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def test_such_a_process_cannot_write() -> None:
    """The test's own premise."""
    code = (
        "import tempfile; f = tempfile.TemporaryFile(); print(flush=True); input(); f.write(b'x'); f.flush()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        fill_disk(process)
        _, errors = process.communicate(b"go\n")
    assert process.returncode == 1
    assert b"File too large" in errors


def test_a_full_disk_changes_no_answer(folder: Path) -> None:
    cloud_at, admin, api = free_address(), free_address(), free_address()
    common = ("--model", folder, "--dtype", "float32", "--log-level", "debug")
    cloud_options = ("--input-layers", 2, "--listen", cloud_at, "--http-listen", admin)
    device_options = ("--cloud", cloud_at, "--listen", api, "--model-name", MODEL, "--grace", 1)
    with (
        without_log("cloud", "serve", *common, *cloud_options) as cloud,
        without_log("device", "serve", *common, *device_options) as device,
    ):
        ready(f"http://{admin}", cloud)
        ready(f"http://{api}", device, cloud)
        fill_disk(cloud)
        fill_disk(device)
        with httpx.Client(base_url=f"http://{api}", timeout=60) as client:
            whole = client.post("/v1/chat/completions", json=BODY)
            assert whole.status_code == 200
            streamed = client.post("/v1/chat/completions", json=BODY | {"stream": True})
            assert text_of(streamed.text) == whole.json()["choices"][0]["message"]["content"] != ""
            for path in ("/metrics", "/v1/hat/stats", "/"):
                assert client.get(path).status_code == 200
            assert client.post("/v1/chat/completions", json=BODY | {"max_tokens": 0}).status_code == 400
        device.terminate()
        assert device.wait() == 0
        cloud.terminate()
        assert cloud.wait() == 0


def text_of(stream: str) -> str:
    """Of a streamed chat."""
    assert stream.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


async def test_a_clock_that_jumps_changes_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jumps = time.time, itertools.cycle(CLOCKS)
    async with serving_pair(folder) as pair:
        right = (await pair.http.post("/v1/chat/completions", json=BODY)).json()
        asked = 0

        def jumping() -> float:
            nonlocal asked
            asked += 1
            return real() + next(jumps)

        monkeypatch.setattr(time, "time", jumping)
        replies = await asyncio.gather(
            *(pair.http.post("/v1/chat/completions", json=BODY) for _ in range(3)),
            *(pair.http.post("/v1/chat/completions", json=BODY | {"stream": True}) for _ in range(3)),
        )
        stats = (await pair.http.get("/v1/hat/stats")).json()
        monkeypatch.undo()
        assert asked >= len(replies)  # replies carry the time of their making
        content = right["choices"][0]["message"]["content"]
        for reply in replies[:3]:
            assert reply.json()["choices"] == right["choices"]
        for reply in replies[3:]:
            assert text_of(reply.text) == content
        for answer in stats["recent"]:
            assert 0 <= answer["age_s"] < 600
            assert 0 <= answer["ttft_s"] < 600
        await pair.all_free()


def test_serving_opens_no_file_for_writing(folder: Path) -> None:
    """Of the process that runs this: what a device has open while it answers is read, or no file of a disk."""
    before = written_files()

    async def answer() -> set[str]:
        async with serving_pair(folder) as pair:
            reply = asyncio.create_task(pair.http.post("/v1/chat/completions", json=BODY))
            opened: set[str] = set()
            while not reply.done():
                opened |= written_files()
                await asyncio.sleep(0.002)
            assert reply.result().status_code == 200
            return opened

    assert asyncio.run(answer()) <= before


def written_files() -> set[str]:
    """Regular files that this process has open for writing."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target, info = os.readlink(entry), Path(f"/proc/self/fdinfo/{entry.name}").read_text()
        except OSError:
            continue
        flags = int(info.split("flags:")[1].split()[0], 8)
        if flags & (os.O_WRONLY | os.O_RDWR) and target.startswith("/") and not target.startswith("/dev/"):
            found.add(target)
    return found
