"""`hat device serve` and `hat cloud serve` as a user starts and ends them: real processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.tiny_chat import make_tiny_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


@contextmanager
def hat(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hat_runtime.cli.main", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def get(url: str) -> httpx.Response:
    """As soon as somebody listens."""
    while True:
        try:
            return httpx.get(url)
        except httpx.ConnectError:
            time.sleep(0.05)


def test_a_device_waits_for_its_cloud_answers_and_ends_cleanly(folder: Path) -> None:
    cloud_at, api = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    served = ("--model", folder, "--dtype", "float32")
    with hat("device", "serve", *served, "--cloud", cloud_at, "--listen", api) as device:
        assert get(f"http://{api}/healthz").status_code == 200
        while cloud_at not in (ready := httpx.get(f"http://{api}/readyz")).text:
            assert ready.status_code == 503
        refused = httpx.post(f"http://{api}/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        cloud_options = ("--input-layers", 2, "--listen", cloud_at, "--http-listen", "127.0.0.1:0")
        with hat("cloud", "serve", *served, *cloud_options) as cloud:
            assert f"http://{api}/v1" in line(device)
            assert f"curl http://{api}/v1/chat/completions" in line(device)
            with OpenAI(base_url=f"http://{api}/v1", api_key="none", max_retries=0) as client:
                stream = client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "Hello"}],
                    temperature=0,
                    max_tokens=100,
                    stream=True,
                )
                next(stream)
                device.send_signal(signal.SIGTERM)
                # The answer that had begun is finished.
                assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
            assert device.wait() == 0
            cloud.send_signal(signal.SIGINT)
            assert cloud.wait() == 0
            errors = device.communicate()[1] + cloud.communicate()[1]
    assert "Traceback" not in errors
    assert "never destroyed" not in errors


def test_what_cannot_work_ends_with_a_plain_message(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with hat("device", "serve", "--model", folder, "--cloud", "127.0.0.1:1", "--listen", address) as busy:
            _, errors = busy.communicate()
    assert busy.returncode == 1
    assert f"--listen {address} cannot be listened on: Address already in use" in errors
    assert "Traceback" not in errors
    with hat("device", "serve", "--model", folder, "--cloud", "nonsense") as wrong:
        _, errors = wrong.communicate()
    assert wrong.returncode == 2
    assert "--cloud: 'nonsense' is not HOST:PORT" in errors
    with hat(
        "device", "serve", "--model", folder, "--cloud", "127.0.0.1:1", "--uplink-codec", "zip"
    ) as codec:
        _, errors = codec.communicate()
    assert codec.returncode == 2
    assert "--uplink-codec 'zip': codec 'zip' is none of raw, bf16, int8, int4" in errors
