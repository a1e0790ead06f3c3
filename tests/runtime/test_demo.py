"""`hat demo` as a newcomer meets it, and every way in which it may end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.tiny_chat import make_tiny_chat_model

DEMO = [sys.executable, "-m", "hat_runtime.cli.main", "demo"]
FAST = ["--link", "200mbit,4ms", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An own cache; the first demo prepares the tiny model in it."""
    return tmp_path_factory.mktemp("cache")


def _start(*arguments: str, cache: Path | None = None) -> subprocess.Popen[str]:
    env = {**os.environ, **({"HAT_CACHE": str(cache)} if cache else {})}
    return subprocess.Popen(
        [*DEMO, *FAST, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


@pytest.fixture
def start(tiny: Path, cache: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a demo of the tiny model, in float32."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        return _start(
            *("--model", str(tiny), "--prompt", "The quick brown fox", "--input-layers", "2"),
            *arguments,
            cache=cache,
        )

    return start


def _wait_for(demo: subprocess.Popen[str], text: str) -> None:
    assert demo.stdout is not None
    for line in demo.stdout:
        if text in line:
            return
    pytest.fail(f"the demo ended before {text!r}: {demo.stderr.read() if demo.stderr else ''}")


def _children(demo: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(demo.pid).children(recursive=True)


def _still_there(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=20)[1]


@pytest.mark.default_model
@pytest.mark.timeout(600)
def test_the_default_model_and_its_figures_beside_their_limits() -> None:
    demo = _start("--json")
    out, errors = demo.communicate(timeout=500)
    assert demo.returncode == 0, errors
    report = json.loads(out)
    hat, u_shape, limit = report["hat"], report["u_shape"], report["limit"]
    assert hat["prompt_tokens"] == u_shape["prompt_tokens"] > 3 * hat["chunk_tokens"] > 0
    assert u_shape["chunk_tokens"] == 0
    for seen in (hat, u_shape):
        assert 0 < seen["completion_tokens"] <= 4
        # Every hidden state crosses the link once, with little around it.
        assert limit["bytes_per_token"] <= seen["up_bytes_per_token"] < 1.1 * limit["bytes_per_token"]
        assert limit["bytes_per_token"] <= seen["down_bytes_per_token"] < 2 * limit["bytes_per_token"]
    assert 0 < limit["ttft_s"] < limit["ttft_unchunked_s"]
    assert limit["tbt_s"] > 0.004  # the round trip at least


@pytest.mark.timeout(400)
def test_twice_in_a_row_with_the_cache_damaged_between(
    start: Callable[..., subprocess.Popen[str]], cache: Path
) -> None:
    for run in range(2):
        if run == 1:
            shard = sorted(cache.rglob("*.safetensors"))[1]
            content = shard.read_bytes()
            shard.write_bytes(content[: len(content) // 2])
        demo = start()
        out, errors = demo.communicate(timeout=170)
        assert demo.returncode == 0, errors
        for row in ("time to first token", "time between tokens", "bytes up a token", "bytes down a token"):
            assert row in out
        assert "U-shape" in out
    assert shard.read_bytes() == content  # prepared anew


@pytest.mark.parametrize("moment", ["Starting the cloud", "Measuring"])
def test_ctrl_c_leaves_no_process(start: Callable[..., subprocess.Popen[str]], moment: str) -> None:
    demo = start("--max-new-tokens", "200")
    _wait_for(demo, moment)
    children = _children(demo)
    assert children
    demo.send_signal(signal.SIGINT)
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == "hat: interrupted"
    assert "Traceback" not in errors
    assert _still_there(children) == []


def test_a_killed_demo_leaves_no_process(start: Callable[..., subprocess.Popen[str]]) -> None:
    demo = start("--max-new-tokens", "200")
    _wait_for(demo, "--- the answer ---")
    children = _children(demo)
    assert len(children) == 3  # cloud, link, device
    demo.kill()
    demo.communicate(timeout=60)
    assert _still_there(children) == []


def test_a_process_that_dies_is_named(start: Callable[..., subprocess.Popen[str]]) -> None:
    demo = start("--max-new-tokens", "400", "--link", "1mbit,50ms")
    _wait_for(demo, "--- the answer ---")
    next(child for child in _children(demo) if "device" in child.cmdline()).kill()
    _, errors = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "the device process was ended by SIGKILL" in errors
    assert "Traceback" not in errors


def test_a_busy_port_is_reported_before_any_work(start: Callable[..., subprocess.Popen[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        demo = start("--listen", address)
        out, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert address in errors
    assert "Address already in use" in errors
    assert out == ""


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    demo = _start(cache=blocked / "cache")
    _, errors = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "HAT_CACHE" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--link", "fast"), "'fast'"),
        (("--chunk-tokens", "0"), "--chunk-tokens 0"),
        (("--listen", "nowhere"), "'nowhere'"),
    ],
)
def test_a_wrong_option_is_echoed(arguments: tuple[str, ...], named: str) -> None:
    demo = _start(*arguments)
    out, errors = demo.communicate(timeout=60)
    assert demo.returncode == 2
    assert named in errors
    assert out == ""
