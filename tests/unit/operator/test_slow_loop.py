"""The slow loop's rounds over real HTTP: push, freeze, restart, events, and when the ConfigMap changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from prometheus_client import REGISTRY

from hat_operator import slow_loop
from hat_operator.admin import Doors
from hat_operator.objects.replica_files import POLICY
from hat_operator.policy import Choice
from hat_operator.policy_news import EVERY_S, NAMED, News
from hat_operator.settings import Settings
from hat_operator.slow_loop import SlowLoop
from hat_operator.spec import HatDeployment
from hat_operator.telemetry import Telemetry
from hat_operator.tuning import Chunking
from hat_runtime.control.published import Proposal, PublishedPolicy, parse
from tests.harness.cloudpods import CloudPods
from tests.unit.operator import prometheus_server
from tests.unit.operator.prometheus_server import AGE, CLOUD, EDGE, WHOLE, sample
from tests.unit.operator.samples import body

KEY = ("team", "chat")
RULE = Chunking("balance", 128, 64, 512)


@dataclass
class Api:
    """The part of a Cluster that lists pods and takes events."""

    pods: list[str]
    events: list[str] = field(default_factory=list)

    async def list(self, kind: Any, namespace: str | None, selector: str) -> list[dict[str, Any]]:
        labels = {"hat.dev/deployment": "chat"}
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        return [
            {
                "metadata": {"name": name, "uid": name, "namespace": "team", "labels": labels},
                "status": {**ready, "podIP": "192.0.2.1"},
            }
            for name in self.pods
        ]

    async def create(self, event: dict[str, Any]) -> dict[str, Any]:
        assert event["reason"] == "ChunkSizeChanged"
        self.events.append(event["message"])
        return event


class Scene:
    """One HatDeployment, its pods, and an operator."""

    def __init__(self, cloud: CloudPods, session: aiohttp.ClientSession) -> None:
        self.cloud, self.session = cloud, session
        self.api = Api(["chat-cloud-1", "chat-cloud-2"])
        self.requests: list[tuple[str, str]] = []
        self.prometheus = ""
        self.restart()

    def restart(self) -> None:
        """A new process."""
        self.telemetry = Telemetry(self.api, ["team"], Doors(Settings(devices_url=self.cloud.url)), 60.0)  # type: ignore[arg-type]
        self.loop = SlowLoop(self.api, self.telemetry, lambda *key: self.requests.append(key))  # type: ignore[arg-type]

    def reconcile(self, live: str | None = None, **spec: Any) -> str | None:
        """The text that the ConfigMap should hold, after a pass that has found `live` in it."""
        found = body(chunking={"mode": "balance", **spec}, observability={"prometheusUrl": self.prometheus})
        hat = HatDeployment.parse(found)
        self.telemetry.follow(hat)
        return self.loop.stored(
            found, hat, None if live is None else POLICY.config_map(hat, {POLICY.key: live})
        )

    async def round(self) -> None:
        await self.telemetry.ask_all(self.session)
        await self.loop.round(self.session)

    def in_pods(self) -> list[PublishedPolicy]:
        return [self.cloud.policies[name].current for name in self.api.pods]


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr(slow_loop, "STORE_EVERY_S", 0.0)
    with CloudPods({"chat": ["a", "b"]}, tuning=True).serving() as cloud:
        cloud.hold({"a": 200.0, "b": 1.0})
        async with aiohttp.ClientSession() as session:
            yield Scene(cloud, session)


def metric(name: str) -> float | None:
    return REGISTRY.get_sample_value(
        f"hat_operator_policy_{name}", dict(zip(("namespace", "name"), KEY, strict=True))
    )


async def test_every_pod_gets_the_policy_and_one_that_restarts_gets_it_again(scene: Scene) -> None:
    changes = metric("changes_total") or 0.0
    assert parse(scene.reconcile() or "") == PublishedPolicy()
    assert metric("changes_total") == changes
    await scene.round()
    one, two = scene.in_pods()
    assert one == two
    assert {name: proposal.chunk_tokens for name, proposal in one.devices.items()} == {"a": 512, "b": 64}
    assert (one.version, one.default) == (1, Proposal(64, 64, 512))
    assert metric("changes_total") == changes + 1
    assert scene.requests == [KEY]
    assert parse(scene.reconcile() or "") == one
    # Nothing has changed: nobody is told anything.
    await scene.round()
    assert scene.in_pods() == [one, one]
    assert scene.requests == [KEY]
    assert metric("changes_total") == changes + 1
    del scene.cloud.policies["chat-cloud-2"]
    await scene.round()
    assert scene.in_pods() == [one, one]
    scene.loop.forget(*KEY)


async def test_a_new_process_goes_on_from_the_config_map_and_above_what_pods_have(scene: Scene) -> None:
    scene.reconcile()
    await scene.round()
    await scene.round()
    text = scene.reconcile()
    scene.cloud.policies["chat-cloud-1"].put(PublishedPolicy(40).to_json().encode())  # somebody else's
    scene.restart()
    assert scene.reconcile(text) == text
    await scene.round()
    found = scene.in_pods()
    assert [one.version for one in found] == [41, 41]
    assert found[0].devices == parse(text or "").devices
    assert scene.api.events == []  # what a process finds is no change
    scene.restart()
    assert parse(scene.reconcile("garbage") or "") == PublishedPolicy()
    scene.loop.forget(*KEY)


async def test_a_new_process_tells_of_what_has_changed_meanwhile(scene: Scene) -> None:
    scene.reconcile()
    await scene.round()
    text = scene.reconcile()
    scene.restart()
    scene.reconcile(text)
    scene.cloud.hold({"a": 1.0})
    await scene.round()
    assert [event.partition(" (")[0] for event in scene.api.events] == ["a: 512 to 64 tokens"]
    scene.loop.forget(*KEY)


async def test_a_throttled_link_moves_its_device_and_an_event_says_why(scene: Scene) -> None:
    scene.reconcile()
    await scene.round()
    scene.cloud.hold({"a": 2.0})
    await scene.round()
    assert scene.in_pods()[0].chunk_for("a") == 64
    (text,) = scene.api.events
    assert text.startswith("a: 512 to 64 tokens (link rate ")
    before, after = text.removesuffix(" Mbit/s)").rpartition("rate ")[2].split(" -> ")
    assert float(before) == pytest.approx(200, rel=0.06)
    assert float(after) == pytest.approx(2, rel=0.06)
    scene.loop.forget(*KEY)


async def test_bounds_of_the_spec_hold_at_once_also_in_what_is_frozen(scene: Scene) -> None:
    scene.reconcile()
    await scene.round()
    scene.cloud.hold({"a": 200.0, "b": 1.0})
    scene.reconcile(minTokens=100, maxTokens=200)
    await scene.round()
    sizes = {name: one.chunk_tokens for name, one in scene.in_pods()[0].devices.items()}
    assert sizes == {"a": 200, "b": 100}
    assert "spec.chunking allows 100 to 200" in scene.api.events[0]
    scene.loop.forget(*KEY)


async def test_a_device_that_is_quiet_keeps_its_size_and_moves_no_others(scene: Scene) -> None:
    scene.reconcile()
    await scene.round()
    scene.cloud.quiet = {"a"}
    scene.cloud.hold({"a": 1.0, "b": 200.0})
    await scene.round()
    (found, _) = scene.in_pods()
    assert (found.chunk_for("a"), found.chunk_for("b")) == (512, 512)
    assert metric("frozen") == 0  # the pods tell, there is only nothing new of this device
    scene.cloud.quiet = set()
    await scene.round()
    assert scene.in_pods()[0].chunk_for("a") == 64
    scene.loop.forget(*KEY)


async def test_silent_pods_freeze_it_and_it_goes_on_with_them(scene: Scene) -> None:
    scene.reconcile()
    await scene.round()
    before = scene.in_pods()
    assert metric("frozen") == 0
    age = metric("age_seconds")
    assert age is not None
    scene.cloud.silent = True
    scene.cloud.hold({"a": 1.0, "b": 200.0})
    scene.telemetry._silent_s = 0.0
    await scene.round()
    await scene.round()
    assert scene.in_pods() == before
    assert metric("frozen") == 1
    assert (metric("age_seconds") or 0.0) > age
    scene.cloud.silent = False
    scene.telemetry._silent_s = 60.0
    await scene.round()
    assert metric("frozen") == 0
    assert scene.in_pods()[0].chunk_for("b") == 512
    # Without pods there is nobody to be silent.
    scene.api.pods = []
    await scene.round()
    assert metric("frozen") == 0
    assert metric("age_seconds") == 0
    assert metric("changes_total") is not None
    scene.loop.forget(*KEY)
    assert metric("frozen") is metric("age_seconds") is metric("changes_total") is None


async def test_a_prometheus_server_tells_in_the_pods_place_and_the_pods_get_the_policy(
    scene: Scene,
) -> None:
    async with prometheus_server.serving() as server:
        scene.prometheus = server.url
        scene.reconcile()
        await scene.round()
        one, two = scene.in_pods()
        assert one == two
        # The pods' own figures, of a and b, are nobody's business.
        assert {name: proposal.chunk_tokens for name, proposal in one.devices.items()} == {"jetson-1": 64}
        assert scene.telemetry.figures(*KEY)["jetson-1"]["uplinkMbps"] == 20.0
        assert (metric("frozen"), scene.telemetry.seen(*KEY)) == (0, scene.telemetry._servers.seen(KEY))
        # Old samples freeze it, however well the server answers.
        age = sample(CLOUD | AGE, "61")
        fast = sample(EDGE, "1e9", __name__="hat_link_uplink_bytes_per_second")
        rest = [series for series in WHOLE if "link_uplink" not in series["metric"].get("__name__", "")]
        server.tells(age, fast, *rest[1:])
        await scene.round()
        assert scene.in_pods() == [one, one]
        assert metric("frozen") == 1
        seen = scene.telemetry.seen(*KEY)
        assert seen is not None
        assert server.url in seen.source
        # A device that was not heard for a minute moves nothing, however fresh its scrape.
        server.tells(*rest, fast, sample(EDGE, "59.5", __name__="hat_cloud_contact_age_seconds"))
        await scene.round()
        assert scene.in_pods() == [one, one]
        assert metric("frozen") == 0
        server.tells(*rest, fast)
        await scene.round()
        assert scene.in_pods()[0].chunk_for("jetson-1") == 512
        # Without the URL it is the pods again.
        scene.prometheus = ""
        scene.reconcile()
        await scene.round()
        assert {"a", "b"} <= scene.in_pods()[0].devices.keys()
    scene.loop.forget(*KEY)
    scene.telemetry.forget(*KEY)


async def test_sizes_that_are_fixed_are_nobodys_business(scene: Scene) -> None:
    scene.reconcile()
    await scene.round()
    assert metric("age_seconds") is not None
    assert scene.reconcile(mode="fixed") is None
    assert metric("age_seconds") is metric("changes_total") is None
    scene.cloud.policies.clear()
    await scene.round()
    assert scene.in_pods() == [PublishedPolicy(), PublishedPolicy()]


async def test_the_config_map_changes_for_large_changes_only_and_not_often(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.reconcile()
    await scene.round()
    text = scene.reconcile()
    monkeypatch.setattr(slow_loop, "STORE_EVERY_S", 3600.0)
    scene.cloud.hold({"a": 1.0})
    await scene.round()
    assert scene.in_pods()[0].chunk_for("a") == 64
    assert scene.reconcile() == text
    monkeypatch.setattr(slow_loop, "STORE_EVERY_S", 0.0)
    await scene.round()
    assert parse(scene.reconcile() or "") == scene.in_pods()[0]
    scene.loop.forget(*KEY)


def test_a_thousand_changes_are_one_event() -> None:
    news = News()
    before = {f"d{i:04}": Choice(64, 1e6) for i in range(1000)}
    after = {name: Choice(512, 1e7) for name in before}
    assert news.tell(before, RULE, 0.0) is None
    text = news.tell(after, RULE, 1.0)
    assert text is not None
    assert text.count("64 to 512 tokens (link rate 8 -> 80 Mbit/s)") == NAMED
    assert text.endswith("and 995 other devices")
    assert len(text) < 1000
    # The way back within 30 s is told with what has changed until then.
    assert news.tell(before, RULE, 2.0) is None
    assert news.tell({**after, "d0007": before["d0007"]}, RULE, 3.0) is None
    assert news.tell({**after, "d0007": before["d0007"]}, RULE, 1.0 + EVERY_S) == (
        "d0007: 512 to 64 tokens (link rate 80 -> 8 Mbit/s)"
    )


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (Choice(512, 1e7, 0.0), Choice(64, 1e7, 12.0), "load 0 -> 12 rows of others in a pass"),
        (Choice(512), Choice(64, 1e6, 3.0), "link rate 8 Mbit/s, 3 rows of others in a pass"),
        (Choice(600, 1e7), Choice(64, 1e6), "spec.chunking allows 64 to 512"),
    ],
)
def test_the_reason_is_what_changed_most(old: Choice, new: Choice, why: str) -> None:
    news = News()
    news.tell({"a": old}, RULE, 0.0)
    assert news.tell({"a": new}, RULE, 1.0) == f"a: {old.chunk} to {new.chunk} tokens ({why})"
