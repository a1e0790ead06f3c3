"""What the operator makes of a Prometheus server's answers, and of servers that give none, over real HTTP and TLS."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from hat_operator import metrics, prometheus
from hat_operator.cluster import ClusterError
from hat_operator.policy import CloudTuning, DeviceSeen
from hat_operator.prometheus import PrometheusServers
from hat_operator.prometheus_answers import DEVICE_FIGURES, parse, query, what_it_said
from hat_operator.prometheus_ref import CaRef, Prometheus
from hat_operator.sources import SecretKey
from hat_runtime.control.pass_cost import PassCost
from tests.unit.operator.authority import self_signed
from tests.unit.operator.prometheus_server import AGE, CLOUD, EDGE, WHOLE, sample, serving, vector

KEY = ("team", "chat")


def test_an_answer_becomes_what_pods_would_have_said() -> None:
    told = parse(vector(*WHOLE), 100.0, 60.0)
    (report,) = told.reports
    assert (report.device, report.contact) == ("jetson-1", 97.0)
    assert report.seen == DeviceSeen(2.5e6, 0.021, 5e-5, 1152.0, 128)
    assert report.figures == {
        "chunkSize": 128,
        "uplinkMbps": 20.0,
        "rttMs": 21.0,
    }  # 0: no acceptance is known
    assert told.tunings == [CloudTuning(PassCost(0.0016, 2.5e-5, 1e-7), 0.00041, 1.25, 512)]
    assert told.sampled == pytest.approx(99.548)


def test_old_samples_of_a_replica_say_nothing_and_each_process_has_its_own_age() -> None:
    second = CLOUD | {"pod": "chat-cloud-1"}
    old = [sample(second | AGE, "61"), sample(second, "9", __name__="hat_step_wait_seconds")]
    told = parse(vector(*WHOLE, *old), 100.0, 60.0)
    assert len(told.tunings) == 1
    assert told.sampled == pytest.approx(99.548)
    only = parse(vector(*old), 100.0, 60.0)
    assert (only.tunings, only.sampled) == ([], 39.0)
    assert parse(vector(), 100.0, 60.0).sampled is None


def test_what_is_no_figure_is_left_out() -> None:
    nan = [sample(EDGE | {"hat_device": "new", "pod": "x"} | AGE, "1")]
    nan.append(
        sample(EDGE | {"hat_device": "new", "pod": "x"}, "NaN", __name__="hat_cloud_contact_age_seconds")
    )
    strange = [
        None,
        7,
        {},
        {"metric": [], "value": [1, "1"]},
        {"metric": EDGE, "value": [1]},
        {"metric": EDGE, "value": [1, "x"]},
        {"metric": EDGE, "value": [1, None]},
        {"metric": {"hat_device": 7}, "value": [1, "1"]},
        sample(EDGE | {"hat_device": "a b", "pod": "y"} | AGE, "1"),
        sample(EDGE | {"hat_device": "a b", "pod": "y"}, "1", __name__="hat_cloud_contact_age_seconds"),
        sample({}, "+Inf", __name__="hat_step_wait_seconds"),
    ]
    told = parse(vector(*strange, *nan, *WHOLE), 100.0, 60.0)
    assert told == parse(vector(*WHOLE), 100.0, 60.0)
    # Somebody's own labels: a device that says it is a cloud, and a cloud without an age.
    assert parse(vector(sample(CLOUD, "512", __name__="hat_pass_prompt_tokens")), 0.0, 60.0).tunings == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<html>login</html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "without status success"),
        (b'{"status": "error", "error": "query timed out"}', "it answers: query timed out"),
        (b'{"status": "success"}', "is this a Prometheus server?"),
        (b'{"status": "success", "data": {"resultType": "matrix", "result": []}}', "no vector"),
    ],
)
def test_what_is_no_answer_is_told_apart(body: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("?", r"\?")):
        parse(body, 0.0, 60.0)


def test_what_a_server_said_is_short_and_printable() -> None:
    said = what_it_said(json.dumps({"error": "a\nb" + "x" * 10_000}).encode())
    assert said.startswith("a b")
    assert len(said) == 200
    assert what_it_said(b'{"error": {"code": 1}}') == what_it_said(b"no") == what_it_said(b"[]") == ""


def test_the_question_names_the_hatdeployment_and_all_metrics() -> None:
    text = query(*KEY)
    assert text.count('hat_namespace="team",hat_deployment="chat"') == 2
    assert all(metric in text for metric in DEVICE_FIGURES)


class Store:
    """The Secrets and ConfigMaps of a cluster."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, str]] = {}
        self.forbidden = False

    async def get(self, kind: Any, name: str, namespace: str) -> dict[str, Any] | None:
        assert namespace == "team"
        if self.forbidden:
            raise ClusterError("Forbidden", "secrets is forbidden")
        data = self.objects.get((kind.name, name))
        return None if data is None else {"data": data}

    def secret(self, name: str, **data: str) -> None:
        self.objects["Secret", name] = {
            key: base64.b64encode(text.encode()).decode() for key, text in data.items()
        }


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def servers(store: Store) -> PrometheusServers:
    home: Any = store
    return PrometheusServers(home)


async def why(servers: PrometheusServers) -> str:
    """Ask, and say what people would read a minute later."""
    async with aiohttp.ClientSession() as session:
        await servers.ask_all(session)
    assert not servers.fresh(KEY)
    return servers._servers[KEY].error or ""


async def test_a_round_and_what_is_known_when_the_next_ones_fail(
    servers: PrometheusServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok, failed = (metrics.PROMETHEUS_QUERIES.labels(result) for result in ("ok", "failed"))
    before = ok._value.get(), failed._value.get()
    async with serving() as server, aiohttp.ClientSession() as session:
        where = Prometheus(server.url)
        assert servers.use(KEY, where)
        assert not servers.use(KEY, where)
        assert servers.seen(KEY).asked == 1
        await servers.ask_all(session)
        assert servers.fresh(KEY)
        (request,) = server.requests
        assert request.query["query"] == query(*KEY)
        assert "Authorization" not in request.headers
        seen = servers.seen(KEY)
        assert (seen.telling, seen.source) == (1, f"the Prometheus server {server.url}")
        told = servers.told(KEY)

        async def refuses(_: web.Request) -> web.StreamResponse:
            return web.json_response({"status": "error", "error": "server is shutting down"}, status=503)

        server.answer = refuses
        await servers.ask_all(session)
        assert not servers.fresh(KEY)
        assert servers.told(KEY) == told
        assert servers.seen(KEY).telling == 1  # for a minute
        monkeypatch.setattr(prometheus, "FRESH_S", 0.0)
        seen = servers.seen(KEY)
        assert seen.frozen
        assert seen.error == "it answers with status 503: server is shutting down"
        assert (ok._value.get(), failed._value.get()) == (before[0] + 1, before[1] + 1)
    assert servers.use(KEY, None)
    assert not servers.named(KEY)


async def test_servers_that_give_no_answer_are_told_apart_and_bounded(
    servers: PrometheusServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "MAX_BYTES", 100_000)
    async with serving() as server:
        servers.use(KEY, Prometheus(server.url))

        async def moved(_: web.Request) -> web.StreamResponse:
            raise web.HTTPFound("/login")

        async def html(_: web.Request) -> web.StreamResponse:
            return web.Response(text="<p>secret page</p>", content_type="text/html")

        async def long(_: web.Request) -> web.StreamResponse:
            response = web.Response(body=b" " * 10_000_000)
            response.enable_compression()  # short on the wire
            return response

        async def broken(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.close()
            return web.Response()

        async def stalls(_: web.Request) -> web.StreamResponse:
            await asyncio.sleep(60)
            return web.Response()

        for answer, says in (
            (moved, "it answers with status 302"),
            (html, "it answers with something that is not JSON"),
            (long, "more than 100000 bytes"),
            (broken, "ServerDisconnectedError"),
        ):
            server.answer = answer
            assert await why(servers) == says
        monkeypatch.setattr(prometheus, "TIMEOUT_S", 0.2)
        server.answer = stalls
        assert await why(servers) == "no answer in 0.2 s"
    assert await why(servers) == "not reachable: Connection refused"
    servers.use(KEY, Prometheus("http://prometheus.invalid"))
    assert (await why(servers)).startswith("not reachable: ")
    servers.use(KEY, Prometheus("http://127.0.0.1:99999"))
    assert await why(servers) == "InvalidUrlClientError"


async def test_token_and_authority_come_from_the_namespace_and_may_be_rotated(
    servers: PrometheusServers, store: Store, tmp_path: Path
) -> None:
    pem, context = self_signed(tmp_path)
    async with serving(context) as server, aiohttp.ClientSession() as session:
        where = Prometheus(server.url)
        servers.use(KEY, where)
        assert "certificate is refused" in await why(servers)
        servers.use(KEY, replace(where, ca=CaRef("ConfigMap", "authority", "ca.crt")))
        assert await why(servers) == "there is no ConfigMap 'authority'"
        store.objects["ConfigMap", "authority"] = {"ca.pem": pem}
        assert await why(servers) == "the ConfigMap 'authority' has no key 'ca.crt'"
        store.objects["ConfigMap", "authority"] = {"ca.crt": "nonsense"}
        assert await why(servers) == "key 'ca.crt' of the ConfigMap 'authority' holds no certificates in PEM"
        store.objects["ConfigMap", "authority"] = {"ca.crt": pem}
        await servers.ask_all(session)
        assert servers.fresh(KEY)
        store.secret("authority", pem=pem)
        where = replace(where, ca=CaRef("Secret", "authority", "pem"), token=SecretKey("reader", "token"))
        servers.use(KEY, where)
        assert await why(servers) == "there is no Secret 'reader'"
        store.secret("reader", token="first\nX-Other: header")
        assert "is no token: one line of ASCII" in await why(servers)
        assert len(server.requests) == 1
        for token in ("first", "second"):
            store.secret("reader", token=f"{token}\n")
            await servers.ask_all(session)
            assert servers.fresh(KEY)
            assert server.requests[-1].headers["Authorization"] == f"Bearer {token}"
        store.forbidden = True
        await servers.ask_all(session)
        assert servers._servers[KEY].error == "the operator may not read the Secret 'reader'"
