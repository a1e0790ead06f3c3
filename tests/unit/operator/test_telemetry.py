"""What the operator makes of the answers of the cloud's pods, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hat_operator import metrics
from hat_operator.admin import Doors
from hat_operator.answers import STALE_S, Report, newest, parse
from hat_operator.cluster import ClusterError
from hat_operator.figures import CONTACT
from hat_operator.policy import CloudTuning, DeviceSeen
from hat_operator.settings import Settings
from hat_operator.status import MetricsSeen
from hat_operator.telemetry import Telemetry
from hat_runtime.control.pass_cost import PassCost
from hat_runtime.errors import UsageError


def answer(*rows: dict[str, Any]) -> bytes:
    return json.dumps({"devices": rows}).encode()


def device(name: str, age: float, chunk: int) -> dict[str, Any]:
    return {"name": name, "seconds_since_contact": age, "chunk_tokens": chunk}


def test_the_pod_that_heard_a_device_last_is_right() -> None:
    first = parse(answer(device("a", 5.0, 64), device("b", 1.0, 64)), 100.0).reports
    second = parse(answer(device("a", 2.0, 128), {"name": "b", "seconds_since_contact": 0.0}), 100.0).reports
    # A contact without figures says nothing: b's stay those of the first pod.
    expected = {"a": {"chunkSize": 128}, "b": {"chunkSize": 64}}

    def figures(*reports: list[Report], now: float) -> dict[str, Any]:
        return {name: report.figures for name, report in newest(reports, now).items()}

    assert figures(first, second, now=100.0) == expected
    assert figures(second, first, now=100.0) == expected
    assert figures(first, second, now=100.0 + STALE_S - 1.5) == {"b": {"chunkSize": 64}}


def test_rows_that_are_none_are_left_out() -> None:
    rows = [
        device("ok", 1.0, 64),
        device("late", STALE_S + 1, 64),
        {"name": "x"},
        {"name": 7},
        device("a b", 1.0, 1),
        None,
        "a",
        [],
    ]
    assert [report.device for report in parse(answer(*rows), 0.0).reports] == ["ok"]


def test_what_the_loop_needs_is_read() -> None:
    row = {**device("a", 1.0, 96), "uplink_bytes_per_s": 1e6, "rtt_s": 0.02, "shallow_s_per_token": 5e-5}
    row |= {"row_bytes": 1152, "acceptance": 0.5, "ttft_s": 1.0}
    cost = {"fixed_s": 0.03, "per_token_s": 5e-4, "per_pair_s": 1e-7, "per_cached_s": 0.0, "error": 0.1}
    load = {"wait_s": 0.004, "company_tokens": 3.5, "prompt_rows": 96}
    said = parse(
        json.dumps({"devices": [row], "policy_version": 7, "cost": cost, "load": load}).encode(), 0.0
    )
    assert said.reports[0].seen == DeviceSeen(1e6, 0.02, 5e-5, 1152.0, 96)
    assert said.tuning == CloudTuning(PassCost(0.03, 5e-4, 1e-7), 0.004, 3.5, 96)
    assert said.policy_version == 7


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"cost": None, "load": None, "policy_version": None},
        {"cost": {"fixed_s": 1}, "load": {"wait_s": -1, "company_tokens": "x"}, "policy_version": -3},
        {"cost": [], "load": [], "policy_version": True},
        {"cost": {"per_token_s": float("nan")}, "load": {"prompt_rows": float("inf")}, "policy_version": 1.5},
    ],
)
def test_what_a_pod_does_not_know_or_garbles_is_not_known(more: dict[str, Any]) -> None:
    said = parse(json.dumps({"devices": [], **more}).encode(), 0.0)
    assert (said.tuning, said.policy_version) == (CloudTuning(), None)


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b"{}", b'{"devices": {}}'])
def test_an_answer_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own or ours
        parse(body, 0.0)


class Pods:
    """The API's list of pods."""

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.away = False

    async def list(self, kind: Any, namespace: str | None, selector: str) -> list[dict[str, Any]]:
        assert selector == "app.kubernetes.io/managed-by=hat-operator,app.kubernetes.io/component=cloud"
        if self.away:
            raise ClusterError("Unreachable", "away")
        return [pod for pod in self.pods if namespace in (None, pod["metadata"]["namespace"])]

    def add(self, name: str, *, ready: bool = True, namespace: str = "team-a") -> None:
        meta = {"name": name, "uid": name, "namespace": namespace, "labels": {"hat.dev/deployment": "chat"}}
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        self.pods.append({"metadata": meta, "status": {"podIP": "192.0.2.1", "conditions": conditions}})


class CloudPods:
    """An HTTP server that answers for each pod under its name."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.replies: dict[str, web.Response] = {}
        self.slow: set[str] = set()
        self.url = ""

    async def reply(self, request: web.Request) -> web.Response:
        pod = request.match_info["pod"]
        self.asked.append(pod)
        if pod in self.slow:
            await asyncio.sleep(60)
        return self.replies.get(pod) or web.Response(status=404)


@pytest.fixture
async def cloud() -> AsyncIterator[CloudPods]:
    pods = CloudPods()
    app = web.Application()
    app.router.add_get("/{namespace}/{pod}/v1/devices", pods.reply)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    pods.url = f"http://127.0.0.1:{port}/{{namespace}}/{{pod}}/v1/devices"
    yield pods
    await runner.cleanup()


async def test_ready_pods_are_asked_and_one_that_does_not_answer_costs_its_timeout_only(
    cloud: CloudPods,
) -> None:
    api = Pods()
    for name in ("one", "two", "gone", "moved", "long"):
        api.add(name)
    api.add("starting", ready=False)
    api.add("elsewhere", namespace="team-b")
    cloud.replies = {
        "one": web.Response(body=answer(device("a", 1.0, 64))),
        "two": web.Response(body=answer(device("a", 0.5, 128), device("b", 0.5, 32))),
        "moved": web.Response(status=307, headers={"Location": "/team-a/one/v1/devices"}),
        "long": web.Response(body=b" " * (3 << 20)),
        "elsewhere": web.Response(body=answer(device("a", 0.0, 999))),
    }
    telemetry = Telemetry(api, ["team-a"], Doors(Settings(devices_url=cloud.url)), 60.0)  # type: ignore[arg-type]
    failed = metrics.DEVICE_POLLS.labels("failed")
    before = failed._value.get()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.5)) as session:
        cloud.slow = {"gone"}
        await telemetry.ask_all(session)
        assert sorted(cloud.asked) == ["gone", "long", "moved", "one", "two"]
        assert failed._value.get() == before + 3
        both = {"a": {"chunkSize": 128}, "b": {"chunkSize": 32}}

        def shown() -> dict[str, Any]:
            found = telemetry.figures("team-a", "chat")
            assert all(figures[CONTACT].endswith("Z") for figures in found.values())
            return {name: {"chunkSize": figures["chunkSize"]} for name, figures in found.items()}

        assert shown() == both
        assert telemetry.figures("team-b", "chat") == {}
        # A pod that fails keeps what it said; a pod that is gone does not; a list that fails changes nothing.
        del cloud.replies["two"]
        await telemetry.ask_all(session)
        assert shown() == both
        api.away = True
        await telemetry.ask_all(session)
        assert shown() == both
        api.away = False
        api.pods = [pod for pod in api.pods if pod["metadata"]["name"] != "two"]
        await telemetry.ask_all(session)
        assert shown() == {"a": {"chunkSize": 64}}


async def test_pods_that_do_not_answer_for_a_while_are_silent(
    cloud: CloudPods, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Pods()
    for name in ("one", "two"):
        api.add(name)
    cloud.replies["one"] = web.Response(body=answer())
    telemetry = Telemetry(api, ["team-a"], Doors(Settings(devices_url=cloud.url)), 0.01)  # type: ignore[arg-type]
    assert telemetry.seen("team-a", "chat") is None
    async with aiohttp.ClientSession() as session:
        await telemetry.ask_all(session)
        assert telemetry.seen("team-a", "chat") == MetricsSeen(telling=1, asked=1)
        assert telemetry.seen("team-a", "other") == MetricsSeen()
        monkeypatch.setattr(telemetry, "_silent_s", 0.0)
        await asyncio.sleep(0.01)
        assert telemetry.seen("team-a", "chat") == MetricsSeen(silent=2, error="")
        del cloud.replies["one"]
        await telemetry.ask_all(session)
        assert telemetry.seen("team-a", "chat") == MetricsSeen(silent=2, error="status 404")


async def test_rounds_go_on_when_the_api_is_away(cloud: CloudPods) -> None:
    api = Pods()
    api.add("one")
    api.away = True
    cloud.replies["one"] = web.Response(body=answer(device("a", 0.0, 64)))
    telemetry = Telemetry(api, (), Doors(Settings(devices_url=cloud.url)), 0.01)  # type: ignore[arg-type]
    task = asyncio.create_task(telemetry.run())
    try:
        await asyncio.sleep(0.05)
        api.away = False
        deadline = time.monotonic() + 20
        while not telemetry.figures("team-a", "chat"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
    finally:
        task.cancel()


@pytest.mark.parametrize("url", ["ftp://{ip}", "http://{host}/", "http://{}/", "http://{ip", "{ip}:7071"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="HAT_OPERATOR_DEVICES_URL"):
        Settings.from_environment({"HAT_OPERATOR_DEVICES_URL": url})
