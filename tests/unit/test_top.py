"""`hat top`: what it asks, what it remembers, and what it looks like."""

from __future__ import annotations

import argparse
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from hat_runtime.cli.processes import free_address
from hat_runtime.cli.top import COMMAND
from hat_runtime.cli.top_view import BARS, rate, seconds, sparkline, view
from hat_runtime.cli.top_watch import Device, Watch
from hat_runtime.errors import UsageError


def answer(number: int, ttft_s: float | None = 0.31, tbt_s: float | None = 0.024) -> dict[str, Any]:
    return {"number": number, "ttft_s": ttft_s, "predicted_ttft_s": 0.29, "tbt_s": tbt_s}


def said(**fields: Any) -> dict[str, Any]:
    return {
        "model": "smollm2",
        "version": "0.1.0",
        "started": 1,
        "cloud": {"address": "10.0.0.5:7070", "ok": True, "reason": None},
        "sessions": {"running": 1, "waiting": 0, "idle": 2},
        "mode": "hat",
        "drafting": True,
        "uplink_bytes_per_s": 7_500_000,
        "rtt_s": 0.0212,
        "acceptance": 0.62,
        "chunk_tokens": 128,
        "tokens_per_round": 1.84,
        "answers": 2,
        "running": [],
        "recent": [],
    } | fields


def shown(devices: list[Device], width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(view(devices, width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_every_figure_is_there_and_no_line_is_too_long(width: int) -> None:
    device, silent = Device("http://192.168.1.20:8000"), Device("http://192.168.1.21:8000")
    for number in range(1, 300):
        device.take(said(recent=[answer(number, ttft_s=number / 100)], rtt_s=0.02 + number / 10_000))
    device.take(said())
    silent.error = "not reachable: connection refused"
    text = shown([device, silent], width)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) == width
    for figure in (
        *("2.99 s", "290 ms", "24 ms", "128 tokens", "60 Mbit/s", "21 ms", "62 %"),
        *(
            "cloud 10.0.0.5:7070",
            "mode hat",
            "drafting on",
            "1.84 tokens a round",
            "1 running, 0 waiting, 2 kept",
        ),
        *("http://192.168.1.20:8000", "smollm2", "http://192.168.1.21:8000", "connection refused"),
    ):
        assert figure in text
    (ttft,) = [line for line in lines if "TTFT" in line]
    assert ttft.count("█") > 3
    tall = sum("http" in line or "│" in line or "╰" in line for line in lines)
    assert tall == len(lines)  # blocks, nothing between
    assert ("chunk size" in ttft) == (width == 200)  # a wide terminal has figures side by side


def test_before_the_first_answer_and_without_a_cloud_there_are_still_lines() -> None:
    starting, away = Device("http://a:1"), Device("http://b:2")
    starting.take(
        {
            "model": "m",
            "version": "0",
            "started": 1,
            "cloud": {
                "address": None,
                "ok": False,
                "reason": "asking the cloud at b:7070, then loading the model",
            },
            "sessions": {"running": 0, "waiting": 0, "idle": 0},
        }
    )
    away.take(
        said(cloud={"address": "b:7070", "ok": False, "reason": "x " * 200}, acceptance=None, chunk_tokens=0)
    )
    text = shown([starting, away], 80)
    assert "asking the cloud at b:7070" in text
    assert text.count("the cloud does not answer") == 2
    assert "the small model" not in text
    away.take(said(cloud={"address": "b:7070", "ok": False, "reason": "no route"}, offline="draft-only"))
    assert "the cloud does not answer; the small model answers alone: no route" in shown([away], 80)
    assert "whole prompt" in text
    assert max(map(cell_len, text.splitlines())) == 80


def test_answers_are_remembered_once_and_again_after_a_restart() -> None:
    device = Device("http://a:1")
    device.take(said(recent=[answer(1, 0.1), answer(2, 0.2)], answers=2))
    device.take(said(recent=[answer(2, 0.2), answer(3, 0.3, tbt_s=None)], answers=3))
    assert list(device.values["ttft_s"]) == [0.1, 0.2, 0.3]
    assert list(device.values["tbt_s"]) == [0.024, 0.024]
    assert list(device.values["rtt_s"]) == [0.0212, 0.0212]
    device.take(said(running=[answer(0, 0.9)]))
    assert (device.latest("ttft_s"), device.seen) == (0.9, 3)
    device.take(said(started=2, recent=[answer(1, 0.5)], answers=1))
    assert list(device.values["ttft_s"]) == [0.1, 0.2, 0.3, 0.5]
    assert device.seen == 1


@given(st.lists(st.floats(0, 1e9)), st.integers(0, 300), st.one_of(st.none(), st.floats(0.1, 1e9)))
def test_sparklines_fit_and_keep_the_order(values: list[float], width: int, top: float | None) -> None:
    line = sparkline(values, width, top)
    assert len(line) == min(width, len(values))
    assert set(line) <= set(BARS)
    heights = [BARS.index(bar) for bar in line]
    kept = values[len(values) - len(line) :]
    for (a, low), (b, high) in zip(
        zip(kept, heights, strict=True), list(zip(kept, heights, strict=True))[1:], strict=False
    ):
        assert (a <= b) <= (low <= high)


def test_units() -> None:
    assert [seconds(value) for value in (0.0031, 0.031, 0.31, 3.1)] == ["3.1 ms", "31 ms", "310 ms", "3.10 s"]
    assert [rate(value) for value in (125_000, 7_500_000)] == ["1.0 Mbit/s", "60 Mbit/s"]


@contextmanager
def server(
    status: int, body: bytes, headers: dict[str, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that says the same to everybody; its URL, and the keys that it was sent."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization", ""))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}", keys
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def look(url: str, key: str | None = None) -> Device:
    with Watch([url], key) as watch:
        watch.look()
        return watch.devices[0]


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (404, b'{"detail": "Not Found"}', "older version"),
        (401, b"{}", "--api-key-file"),
        (503, b'{"error": {"message": "all is lost"}}', "status 503: all is lost"),
        (502, b"<html>", "status 502"),
        (302, b"", "status 302"),
        (200, b"<html>", "right URL"),
        (200, b"[]", "right URL"),
        (200, b'{"model": "x"}', "right URL"),
    ],
)
def test_what_is_wrong_is_said_plainly(status: int, body: bytes, text: str) -> None:
    with server(status, body, {"Location": "http://127.0.0.1:1/"} if status == 302 else {}) as (url, _):
        device = look(url)
        assert device.error is not None
        assert text in device.error
        assert device.error in " ".join(shown([device], 200).split())


def test_nobody_there_is_said_plainly() -> None:
    assert look(f"http://{free_address()}").error == "not reachable: connection refused"


def test_several_devices_are_asked_with_the_key_and_one_that_fails_keeps_its_figures(tmp_path: Path) -> None:
    good = json.dumps(said(recent=[answer(1)])).encode()
    with server(200, good) as (url, keys):
        with Watch([f"{url}/v1", f"http://{free_address()}"], "secret") as watch:
            watch.look()
            assert [device.error is None for device in watch.devices] == [True, False]
        assert keys == ["Bearer secret"]
    with Watch([url]) as watch:
        watch.devices[0].take(said())
        watch.look()
        text = shown(watch.devices, 80)
        assert "connection refused" in text
        assert "the figures are those of before" in text
        assert "128 tokens" in text
        assert watch.devices[0].as_json()["stats"] is None


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    COMMAND.configure(parser)
    return parser.parse_args(arguments)


def test_once_prints_and_its_exit_code_says_whether_all_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.run is not None
    with server(200, json.dumps(said()).encode()) as (url, _):
        assert COMMAND.run(parsed("--once", "--json", "--url", url)) == 0
        (device,) = json.loads(capsys.readouterr().out)["devices"]
        assert (device["url"], device["error"], device["stats"]["chunk_tokens"]) == (url, None, 128)
        assert COMMAND.run(parsed("--once", "--url", url, "--url", f"http://{free_address()}")) == 1
        assert "connection refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--url", "127.0.0.1:8000"], "'127.0.0.1:8000'"),
        (["--url", "ftp://x"], "'ftp://x'"),
        (["--interval", "0"], "--interval 0"),
        (["--interval", "nan"], "--interval nan"),
        (["--api-key-file", "/nonexistent/keys"], "/nonexistent/keys"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], text: str) -> None:
    assert COMMAND.run is not None
    with pytest.raises(UsageError, match=r".*") as caught:
        COMMAND.run(parsed("--once", *arguments))
    assert text in str(caught.value)
