"""The operator reads the same figures from a real Prometheus as from the cloud's own list."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hat_operator import answers
from hat_operator.prometheus import PrometheusServers
from hat_operator.prometheus_ref import Prometheus as Reference
from hat_runtime.device import link
from hat_runtime.device.generator import GeneratorConfig
from tests.runtime.api_pair import MODEL, Pair
from tests.runtime.scraped_pair import EDGE_POD, pair_with_prometheus
from tests.tiny_chat import make_tiny_chat_model

KEY = ("team", "chat")
DEVICE = f"node-of-{EDGE_POD}"
CLOSE = 1e-4
"""Prometheus' text and the wire's numbers have some digits."""


async def ask(pair: Pair, words: int) -> None:
    prompt = " ".join(f"word{number % 7}" for number in range(words))
    await pair.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)


def listed(pair: Pair) -> answers.Said:
    with urllib.request.urlopen(f"{pair.cloud.admin_url}/v1/devices", timeout=30) as reply:
        return answers.parse(reply.read(), time.monotonic())


def rtt_of(pair: Pair) -> Any:
    return pytest.approx(pair.device.generator.link.estimate.rtt_s, rel=CLOSE)


def tell_once_more(pair: Pair) -> None:
    """All that the device knows now: Results have come since its last Telemetry."""
    generator = pair.device.generator
    session = next(session for session in generator.link.sessions if session.alive)
    chunk = pair.device.metrics.registry.get_sample_value("hat_chunk_size_tokens")
    generator.link.send_telemetry(
        session, shallow_s_per_token=generator.model.shallow_s_per_token, chunk=int(chunk or 0), ttft_s=0.1
    )


async def test_what_prometheus_tells_is_what_the_cloud_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "TELEMETRY_EVERY_S", 0.0)
    model = make_tiny_chat_model(tmp_path / "model")
    generator = GeneratorConfig(device_name=DEVICE)
    async with (
        pair_with_prometheus(model, tmp_path, generator=generator) as (pair, prometheus),
        aiohttp.ClientSession() as session,
    ):
        no_secrets: Any = None
        servers = PrometheusServers(no_secrets)
        assert servers.use(KEY, Reference(prometheus.url))
        # Short and long, alone and together: the cost model tells them apart, the link's rate is known.
        for number in count():
            if number >= 8 and pair.device.generator.link.estimate.uplink_bytes_per_s:
                break  # on a busy machine loopback's rate shows only after some more
            await asyncio.gather(ask(pair, 6 + 9 * (number % 8)), ask(pair, 20))
        tell_once_more(pair)
        while (await asyncio.to_thread(listed, pair)).reports[0].seen.rtt_s != rtt_of(pair):
            await asyncio.sleep(0.05)  # until the cloud has read it
        said = await asyncio.to_thread(listed, pair)
        (there,) = said.reports
        assert said.tuning.cost is not None
        rows = pair.device.metrics.registry.get_sample_value("hat_prompt_row_bytes")
        assert there.seen.row_bytes == rows

        def complete() -> bool:
            told = servers.told(KEY)
            return bool(told.reports and told.reports[0].seen.chunk_tokens and told.tunings)

        while not complete():
            await asyncio.sleep(0.3)
            await servers.ask_all(session)
            assert servers.seen(KEY).error == ""
        await asyncio.sleep(2.5)  # two scrapes of what has come to rest
        await servers.ask_all(session)
        told = servers.told(KEY)
        assert servers.fresh(KEY)
        (here,) = told.reports
        assert here.device == there.device == DEVICE
        assert here.contact == pytest.approx(there.contact, abs=0.5)
        assert vars(here.seen) == pytest.approx(vars(there.seen), rel=CLOSE)
        assert here.seen.chunk_tokens == there.seen.chunk_tokens
        assert here.figures.keys() == there.figures.keys() > {"chunkSize", "uplinkMbps", "rttMs"}
        (tuning,) = told.tunings
        assert tuning.cost is not None
        # The metric is that of the pass before the last one.
        for new, total in ((1, 100), (64, 64), (256, 400)):
            assert tuning.cost.seconds(new, total) == pytest.approx(
                said.tuning.cost.seconds(new, total), rel=0.25
            )
        assert tuning.prompt_rows == said.tuning.prompt_rows
        # Somebody else's HatDeployment has nothing there, and its owner is told what was looked for.
        assert servers.use(("team", "other"), Reference(prometheus.url))
        await servers.ask_all(session)
        monkeypatch.setattr("hat_operator.prometheus.FRESH_S", 0.0)
        other = servers.seen(("team", "other"))
        assert other.frozen
        assert 'hat_deployment="other"' in other.error
        assert prometheus.url in other.source
        assert json.dumps(other.error).count("word") == 0
