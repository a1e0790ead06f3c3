"""The loop from a device's link to its chunk size and back, with real pods; `hat link` is the link."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from hat_runtime.cli.processes import Child
from tests.e2e.product import OPERATOR, SITE_NAMESPACE, SYSTEM, TEAM, Product, RequestError
from tests.harness import binaries
from tests.harness.prometheus import Prometheus, pod

pytestmark = [pytest.mark.timeout(1200), pytest.mark.default_model, pytest.mark.long]
NAME = "sizes"
READY_S = 400.0
WITHIN_S = float(os.environ.get("HAT_LOOP_S", "60"))
"""From a throttled link to sizes that agree everywhere. A machine that is busy with other things may need more."""
PORT = 31071
SCRAPED_PORT, PROMETHEUS_PORT = 31072, 9090
FAST, SLOW = "20mbit,5ms", "1mbit,5ms"
LARGEST, LEAST = 512, 64
TALKS = 3
"""Prompts between two looks."""


class Scene:
    """A HatDeployment whose device reaches the cloud over a link that can be changed."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self._link: Child | None = None
        self._prompts = itertools.count(1)

    def lay(self, rate: str) -> None:
        """Replace the link; streams end with the one before."""
        self.cut()
        edge, cloud = self.product.edge, self.product.cloud
        far, near = f"{cloud.address}:{PORT}", f"{edge.address}:{PORT}"
        words = ["link", "--listen", near, "--to", far, "--link", rate]
        command = [*edge.sandbox.network_only, sys.executable, "-m", "hat_runtime.cli.main", *words]
        self._link = Child("link", command)

    def cut(self) -> None:
        if self._link is not None:
            self._link.stop()
            self._link = None

    def talk(self) -> None:
        """One prompt that no other begins like; the link's rate and the device's figures come from it.

        It is answered by some tokens: passes of one size would not tell what a token costs.
        """
        number = next(self._prompts)
        text = " ".join(str((number * 7919 + index * 104729) % 1000) for index in range(16))
        body = {"model": NAME, "prompt": text, "max_tokens": 4, "temperature": 0}
        with suppress(RequestError):  # the link has just been replaced
            self.product.ask(NAME, "/v1/completions", body, timeout_s=60)

    def pod(self, side: str) -> dict[str, Any]:
        cluster = self.product.cloud if side == "cloud" else self.product.edge
        namespace = TEAM if side == "cloud" else SITE_NAMESPACE
        labels = f"hat.dev/deployment={NAME}"
        (found,) = self.product.objects(cluster, namespace, "pods", labels)
        return found

    def address(self, side: str) -> str:
        return str(self.pod(side)["status"]["podIP"])

    def prometheus(self, folder: Path, stack: ExitStack) -> tuple[str, Child]:
        """A Prometheus on the cloud's node that scrapes both pods, the device's through a port of its node."""
        edge, cloud = self.product.edge, self.product.cloud
        near = f"{edge.address}:{SCRAPED_PORT}"
        words = ["link", "--listen", near, "--to", f"{self.address('edge')}:8000", "--link", "100mbit,0ms"]
        link = Child(
            "way", [*edge.sandbox.network_only, sys.executable, "-m", "hat_runtime.cli.main", *words]
        )
        stack.callback(link.stop)
        there, here = self.pod("cloud"), self.pod("edge")
        targets = [
            pod(f"{self.address('cloud')}:7071", "cloud", there["metadata"]["name"], NAME, TEAM),
            pod(near, "edge", here["metadata"]["name"], NAME, TEAM, here["spec"]["nodeName"]),
        ]
        at = f"{cloud.address}:{PROMETHEUS_PORT}"
        made = Prometheus(binaries.find("prometheus"), folder, targets, at)
        process = Child("prometheus", [*cloud.sandbox.network_only, *made.command])
        stack.callback(process.stop)
        return made.url, process

    def own(self) -> int:
        """The device's own size, by its metrics."""
        url = f"http://{self.address('edge')}:8000/metrics"
        text = str(self.product.call(self.product.edge, url))
        (line,) = [line for line in text.splitlines() if line.startswith("hat_chunk_size_tokens ")]
        return round(float(line.split()[1]))

    def policy(self) -> dict[str, Any]:
        """The one in effect in the cloud's pod."""
        found: dict[str, Any] = self.product.admin(NAME, "/v1/policy")
        return found

    def sizes(self) -> dict[str, int]:
        """What each place says of the device's chunk size; 0: nothing yet."""
        row = self.product.hat(NAME).get("status", {}).get("devices", [{}])[0]
        proposed = self.policy()["devices"].get(row.get("name"), {})
        events = [
            event
            for event in self.product.objects(self.product.cloud, TEAM, "events")
            if event["reason"] == "ChunkSizeChanged" and event["involvedObject"]["name"] == NAME
        ]
        said = max((event["firstTimestamp"] + event["message"] for event in events), default="")
        told = re.search(rf"{row.get('name')}: \d+ to (\d+) tokens", said)
        return {
            "status": row.get("chunkSize", 0),
            "policy": proposed.get("chunk_tokens", 0),
            "device": self.own(),
            "event": int(told[1]) if told else 0,
        }

    def until(self, what: str, size: int, places: set[str], timeout_s: float) -> None:
        """Prompt after prompt until these places say that size."""
        begin, found = time.monotonic(), {}

        def agree() -> bool:
            nonlocal found
            # The device's rate is a moving average: some ten prompts tell it that a link has become slow.
            for _ in range(TALKS):
                self.talk()
            found = self.sizes()
            return all(found[place] == size for place in places)

        try:
            self.product.wait(what, agree, timeout_s)
        finally:
            print(f"{what}: {found} after {time.monotonic() - begin:.0f} s")


@pytest.fixture(scope="module")
def scene(product: Product) -> Iterator[Scene]:
    """Ready, with a fast link."""
    found = Scene(product)
    expose = {"type": "NodePort", "host": product.edge.address, "nodePort": PORT}
    found.lay(FAST)
    try:
        body = product.example(
            metadata__name=NAME, spec__cloud__expose=expose, spec__chunking={"mode": "balance"}
        )
        product.apply(body)
        product.wait_ready(NAME, READY_S)
        yield found
        product.delete(NAME)
    finally:
        found.cut()


def test_a_throttled_link_is_seen_everywhere(scene: Scene) -> None:
    scene.until("the first policy", LARGEST, {"status", "policy", "device"}, 120)
    scene.lay(SLOW)
    scene.until("the slow link is known everywhere", LEAST, {"status", "policy", "device", "event"}, WITHIN_S)
    row = scene.product.hat(NAME)["status"]["devices"][0]
    assert row["uplinkMbps"] < 10  # a moving average of 1 Mbit/s and what was before
    assert row["rttMs"] > 0
    assert row["lastContact"] > row["lastSeen"]


def test_silence_freezes_the_policy_and_devices_adapt_without_an_operator(scene: Scene) -> None:
    product = scene.product
    (operator,) = product.objects(product.cloud, SYSTEM, "pods", "app.kubernetes.io/component=operator")
    rule = ["FORWARD", "-s", operator["status"]["podIP"], "-p", "tcp", "--dport", "7072", "-j", "DROP"]
    before = scene.policy()
    product.cloud.sandbox.run("iptables", "-I", *rule)
    try:
        product.wait(
            "the condition tells",
            lambda: product.condition(NAME, "MetricsAvailable") == ("False", "PolicyFrozen"),
            180,
        )
        assert product.condition(NAME)[0] == "True"  # it serves all the same
        product.cloud.kubectl("-n", SYSTEM, "scale", "deployment", OPERATOR, "--replicas=0")
        scene.lay(FAST)
        scene.until("the device adapts by itself", LARGEST, {"device"}, 60)
        assert scene.policy() == before
    finally:
        product.cloud.sandbox.run("iptables", "-D", *rule)
        product.cloud.kubectl("-n", SYSTEM, "scale", "deployment", OPERATOR, "--replicas=1")
    scene.until("the policy follows again", LARGEST, {"status", "policy", "device", "event"}, 180)
    assert scene.policy()["version"] > before["version"]
    held = product.get(product.cloud, TEAM, "configmap", f"{NAME}-cloud-policy")["data"]["policy.json"]
    assert json.loads(held)["version"] <= scene.policy()["version"]
    assert product.condition(NAME, "MetricsAvailable")[0] == "True"


def test_the_loop_goes_on_with_the_figures_of_a_prometheus_server(scene: Scene, tmp_path: Path) -> None:
    product = scene.product

    def metrics() -> tuple[str, str]:
        return product.condition(NAME, "MetricsAvailable")

    scene.lay(FAST)
    scene.until("the first policy", LARGEST, {"status", "policy", "device"}, 180)
    pods = [scene.pod(side)["metadata"]["uid"] for side in ("cloud", "edge")]
    with ExitStack() as stack:
        url, process = scene.prometheus(tmp_path, stack)
        product.patch(NAME, {"observability": {"prometheusUrl": url}})
        product.wait("the server tells", lambda: metrics() == ("True", "PrometheusTells"), 120)
        scene.lay(SLOW)
        scene.until("the slow link is known", LEAST, {"policy", "event"}, 2 * WITHIN_S)

        def slow() -> bool:
            scene.talk()
            return float(product.hat(NAME)["status"]["devices"][0]["uplinkMbps"]) < 10

        product.wait("the status shows it", slow, 2 * WITHIN_S)
        process.stop()
        before = scene.policy()
        product.wait("the condition tells", lambda: metrics() == ("False", "PolicyFrozen"), 180)
        (text,) = (
            condition["message"]
            for condition in product.hat(NAME)["status"]["conditions"]
            if condition["type"] == "MetricsAvailable"
        )
        assert f"the Prometheus server {url} tells nothing of cloud and devices: not reachable" in text
        assert scene.policy() == before
    product.patch(NAME, {"observability": {"prometheusUrl": ""}})
    product.wait("the pods are asked again", lambda: metrics() == ("True", "ReplicasTell"), 120)
    assert [scene.pod(side)["metadata"]["uid"] for side in ("cloud", "edge")] == pods
