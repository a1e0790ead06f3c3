"""`hat doctor` against a real cloud, a wrong one and none."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from hat_runtime.cli.doctor import Finding, examine
from hat_runtime.cli.main import main
from hat_runtime.cloud.serve import CloudConfig, running_cloud


async def examined(served: Path, model: Path | None, dtype: str = "float32") -> dict[str, Finding]:
    async with running_cloud(CloudConfig(served, 2, dtype="float32", kv_bytes=1 << 24, drain_s=0.0)) as cloud:
        return {finding.name: finding for finding in await examine(cloud.address, model, dtype)}


async def test_a_pair_that_fits(tiny_llama: Path) -> None:
    findings = await examined(tiny_llama, tiny_llama)
    assert all(finding.ok for finding in findings.values())
    assert {"reachable", "protocol", "version", "round trip", "rate", "page budget"} <= findings.keys()
    assert {"weights_id", "model_revision", "layers", "dtype"} <= findings.keys()
    assert "2:6" in findings["layers"].text
    assert findings["session"].text == "opens; kept for 60 s after a lost connection"


async def test_another_model_and_dtype_are_named(tiny_llama: Path, other_llama: Path) -> None:
    findings = await examined(tiny_llama, other_llama, "bfloat16")
    failed = {name for name, finding in findings.items() if not finding.ok}
    assert failed == {"weights_id", "model_revision", "dtype"}
    assert "hat model prepare" in findings["weights_id"].fix
    assert "--dtype float32" in findings["dtype"].fix


async def test_a_folder_without_a_model(tiny_llama: Path, tmp_path: Path) -> None:
    findings = await examined(tiny_llama, tmp_path)
    assert not findings["model"].ok
    assert findings["reachable"].ok


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cloud", "127.0.0.1:9"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL  reachable")
    assert "fix: start `hat cloud serve`" in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cloud", "127.0.0.1:9", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["findings"][0]["name"] == "reachable"


def test_a_wrong_address_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cloud", "nowhere"]) == 2
    assert "--cloud: 'nowhere' is not HOST:PORT" in capsys.readouterr().err


async def test_a_port_that_is_no_cloud() -> None:
    async def answer_http(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer_http, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        findings = await examine(f"127.0.0.1:{port}", None, "float32", timeout_s=1.0)
    assert not all(finding.ok for finding in findings)
