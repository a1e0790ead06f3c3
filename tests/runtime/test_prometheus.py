"""A real Prometheus with the chart's rules reads a real cloud and a real device: every query finds something."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hat_runtime.device import link
from tests.certificates import Site
from tests.harness import boards
from tests.runtime.api_pair import MODEL
from tests.runtime.scraped_pair import pair_with_prometheus
from tests.tiny_chat import make_tiny_chat_model

ROUNDS = 40


def asked_of_pods(expr: str) -> bool:
    """Whether a query is about pods of cloud and devices; tests/operator has those about the operator."""
    sides = {selector.metric.startswith("hat_operator_") for selector in boards.selectors(expr)}
    assert len(sides) == 1, expr
    return sides == {False}


def wanted() -> dict[str, str]:
    """Every query, by where it stands."""
    chosen = {
        "namespace": "team",
        "deployment": "chat",
        "pod": "chat-cloud-0",
        "device": "node-of-chat-edge-0",
    }
    found = {
        f"{name}: {title}: {expr}": boards.filled(expr, **chosen)
        for name in ("hat-fleet", "hat-device", "hat-cloud")
        for title, expr in boards.queries(name)
        if asked_of_pods(expr)
    }
    for rule in boards.rules():
        for selector in boards.selectors(rule["expr"]):
            if asked_of_pods(selector.text):
                name = rule.get("alert", rule.get("record"))
                found[f"{name}: {selector.text}"] = selector.text
    return found


async def test_every_query_finds_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "TELEMETRY_EVERY_S", 0.0)
    model = make_tiny_chat_model(tmp_path / "model")
    (tmp_path / "tls").mkdir()
    async with pair_with_prometheus(model, tmp_path, Site(tmp_path / "tls")) as (pair, prometheus):

        async def ask(words: int) -> None:
            prompt = " ".join(f"word{number % 7}" for number in range(words))
            await pair.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)

        missing = wanted()
        assert len(missing) > 80
        for number in range(ROUNDS):
            await asyncio.gather(ask(20 + number), ask(40 + number))
            pair.device.generator.conversations.clear()  # their streams end
            await asyncio.sleep(0.5)
            for where, expr in list(missing.items()):
                if await asyncio.to_thread(prometheus.has_data, expr):
                    del missing[where]
            if not missing:
                break
        assert list(missing) == []
        assert await asyncio.to_thread(prometheus.broken_rules) == []
