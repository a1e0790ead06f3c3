"""A HatDeployment of two replicas and three devices on five nodes, and what strikes it in the middle of answers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.e2e.product import SITE_NAMESPACE, TEAM, Product, RequestError, load_images, make_claim
from tests.e2e.streams import Place, Reply, Streams
from tests.harness.cluster import Cluster
from tests.harness.node import Node

NAME = "struck"
LABEL = f"hat.dev/deployment={NAME}"
LAYERS = 3
REPLICAS = 2
DEVICES = 3
"""Each answers up to 8 questions at once."""
READY_S = 600.0
ANSWERS_S = 600.0
LEFT_S = 150.0
"""For what is left over to go: sessions whose device could not say that it wants them no more are kept for 60 s."""
PAGE_TOKENS, CACHE_BYTES, TOKEN_BYTES = 16, 1 << 30, 2 * 27 * 3 * 64 * 4
"""Of a replica's KV cache: 27 layers, 3 heads of 64 numbers in float32."""
PAGES = CACHE_BYTES // (TOKEN_BYTES * PAGE_TOKENS)
RESOURCES = {"requests": {"cpu": "50m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}}


@dataclass
class Tally:
    """What came of a fault."""

    name: str
    exact: int = 0
    told: int = 0
    """Ended with an error that the contract allows; what came before it was right."""
    wrong: list[str] = field(default_factory=list)
    resumes: int = 0
    refusals: int = 0
    pause_s: float = 0.0
    seconds: float = 0.0

    def add(self, reply: Reply, want: Reply, allowed: Sequence[str]) -> None:
        """Counts an answer, which should be `want`; `allowed` are the errors that it may end with instead."""
        self.resumes += reply.resumes
        self.refusals += reply.refusals
        self.pause_s = max(self.pause_s, reply.pause_s)
        right = want.text.startswith(reply.text)
        if reply.finish and (reply.text, reply.finish, reply.tokens) == (want.text, want.finish, want.tokens):
            self.exact += 1
        elif reply.error in allowed and right:
            self.told += 1
        else:
            self.wrong.append(
                f"answer {reply.number}: {len(reply.text)} of {len(want.text)} characters, "
                f"{'a prefix' if right else 'another text'}, {reply.tokens} of {want.tokens} tokens, "
                f"finish {reply.finish!r}, error {reply.error!r}"
            )


class Scene:
    """The HatDeployment, and what an administrator sees of it and does to it."""

    def __init__(self, product: Product, devices: Sequence[Node]) -> None:
        """Ready; `devices` are the site's nodes."""
        self.product = product
        self._devices = list(devices)

    def ask(self, bodies: Sequence[Mapping[str, Any]], again: bool = False) -> Streams:
        """The questions, spread over the devices."""
        service = self.product.get(self.product.edge, SITE_NAMESPACE, "service", f"{NAME}-edge")
        address = f"{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}"
        url = f"http://{address}/v1/chat/completions"
        return Streams([Place(node.sandbox.network_only, url) for node in self._devices], bodies, again)

    def pods(self, side: Literal["cloud", "edge"]) -> list[dict[str, Any]]:
        """Those that serve and are not about to end."""
        cluster, namespace = self._side(side)
        return [pod for pod in self.product.objects(cluster, namespace, "pods", LABEL) if serves(pod)]

    def all_pods(self, side: Literal["cloud", "edge"]) -> dict[str, dict[str, Any]]:
        """All of them by uid, those that start or end as well."""
        cluster, namespace = self._side(side)
        found = self.product.objects(cluster, namespace, "pods", LABEL)
        return {pod["metadata"]["uid"]: pod for pod in found}

    def figures(self, side: Literal["cloud", "edge"], pod: Mapping[str, Any]) -> dict[str, float]:
        """A pod's gauges by name."""
        cluster, _ = self._side(side)
        port = 7071 if side == "cloud" else 8000
        text = str(self.product.call(cluster, f"http://{pod['status']['podIP']}:{port}/metrics"))
        return {name: float(value) for name, value in re.findall(r"^(hat_\w+) (\S+)$", text, re.MULTILINE)}

    def busiest(self) -> dict[str, Any]:
        """The replica with most sessions."""
        return max(self.pods("cloud"), key=lambda pod: self.figures("cloud", pod)["hat_num_sessions_open"])

    def wait_serving(self) -> None:
        """Until all replicas and all devices serve, and no other pod is left."""

        def serving() -> bool:
            for side, wanted in (("cloud", REPLICAS), ("edge", len(self._devices))):
                if not len(self.pods(side)) == len(self.all_pods(side)) == wanted:  # type: ignore[arg-type]
                    return False
            return True

        self.product.wait("all replicas and devices serve", serving, READY_S)
        self.product.wait_ready(NAME, READY_S)

    def left_over(self, longest_tokens: int) -> str:
        """What cloud and devices hold beyond the devices' idle conversations of at most so many tokens; "": nothing."""
        try:
            return self._left_over(longest_tokens)
        except RequestError as error:
            return f"no metrics: {error}"

    def _left_over(self, longest_tokens: int) -> str:
        found, idle, streams = list[str](), 0.0, 0.0
        for pod in self.pods("edge"):
            figures, name = self.figures("edge", pod), pod["metadata"]["name"]
            idle += figures["hat_num_sessions_idle"]
            if figures["hat_num_sessions_running"]:
                found.append(f"{name}: {figures['hat_num_sessions_running']:g} running")
        pages = 0.0
        for pod in self.pods("cloud"):
            figures, name = self.figures("cloud", pod), pod["metadata"]["name"]
            own, used = figures["hat_num_sessions_open"], figures["hat_kv_cache_usage_ratio"] * PAGES
            streams, pages = streams + own, pages + used
            for gauge in ("lost", "waiting", "queued"):
                if figures[f"hat_num_sessions_{gauge}"]:
                    found.append(f"{name}: {figures[f'hat_num_sessions_{gauge}']:g} {gauge}")
            if used > own * -(-longest_tokens // PAGE_TOKENS):
                found.append(f"{name}: {used:.0f} pages of {own:g} sessions")
        if streams != idle:
            found.append(f"{streams:g} sessions in the cloud, {idle:g} idle conversations on devices")
        return "; ".join(found)

    def _side(self, side: Literal["cloud", "edge"]) -> tuple[Cluster, str]:
        cloud = side == "cloud"
        return (self.product.cloud, TEAM) if cloud else (self.product.edge, SITE_NAMESPACE)


def serves(pod: Mapping[str, Any]) -> bool:
    """Whether a pod is ready and not about to end."""
    conditions = pod["status"].get("conditions", ())
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


@contextmanager
def scene(product: Product, make_folder: Callable[[str], Path]) -> Iterator[Scene]:
    """Two nodes in the cloud, three devices, and the HatDeployment on them, Ready; then all is as before."""
    from hat_runtime.model.prepare import prepare

    cloud, edge = product.cloud, product.edge
    parts: tuple[tuple[Cluster, str, Literal["cloud", "device"]], ...] = (
        (cloud, TEAM, "cloud"),
        (edge, SITE_NAMESPACE, "device"),
    )
    with ExitStack() as stack:
        for cluster, namespace, part in parts:
            folder = make_folder(f"struck-{part}")
            prepare("default", out=folder / "part", part=part, input_layers=LAYERS)
            make_claim(cluster, namespace, f"struck-{part}", folder)
        devices = [edge.node]
        for cluster, labels in ((cloud, {}), *[(edge, {"hat.dev/device": "true"})] * (DEVICES - 1)):
            node = cluster.add_node(labels)
            stack.callback(cluster.remove_node, node)
            load_images(node, make_folder(node.name))
            for other in (edge if cluster is cloud else cloud).nodes:
                node.sandbox.join(other.sandbox)
            if cluster is edge:
                devices.append(node)
        product.apply(
            product.example(
                metadata__name=NAME,
                spec__model__source={"claim": {"name": "struck-cloud", "path": "part"}},
                spec__split__inputLayers=LAYERS,
                spec__cloud__replicas=REPLICAS,
                spec__cloud__resources=RESOURCES,
                spec__edge__resources=RESOURCES,
                spec__edge__weights={"claim": {"name": "struck-device", "path": "part"}},
            )
        )
        stack.callback(product.delete, NAME)
        made = Scene(product, devices)
        made.wait_serving()
        yield made


def delete_by_force(there: Scene) -> None:
    """`kubectl delete pod --grace-period=0 --force` of the busiest replica."""
    _delete(there, "--grace-period=0", "--force")


def delete(there: Scene) -> None:
    """`kubectl delete pod` of the busiest replica: SIGTERM after its pause, then it drains."""
    _delete(there)


def _delete(there: Scene, *how: str) -> None:
    name = there.busiest()["metadata"]["name"]
    there.product.cloud.kubectl("-n", TEAM, "delete", "pod", name, "--wait=false", *how)


def kill(there: Scene) -> None:
    """SIGKILL to the process of the busiest replica, from its node: Kubernetes starts it again."""
    pod = there.busiest()
    (status,) = pod["status"]["containerStatuses"]
    (node,) = [one for one in there.product.cloud.nodes if one.name == pod["spec"]["nodeName"]]
    node.kill_container(status["containerID"].removeprefix("containerd://"))


def drain_node(there: Scene) -> None:
    """`kubectl drain` of the busiest replica's node, then `kubectl uncordon`.

    Meanwhile the other replica cannot be evicted: the PodDisruptionBudget allows one at a time.
    """
    product, pod = there.product, there.busiest()
    node = pod["spec"]["nodeName"]
    (other,) = [one for one in there.pods("cloud") if one["metadata"]["uid"] != pod["metadata"]["uid"]]
    kubectl = product.cloud.kubectl
    try:
        kubectl("cordon", node)
        _evict(product, pod)
        refused = _evict(product, other, check=False)
        assert "disruption budget" in refused, refused or "the second replica was evicted as well"
        drain = ("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=50s")
        product.wait("the node is drained", lambda: kubectl(*drain, check=False).returncode == 0, READY_S)
    finally:
        kubectl("uncordon", node)


def _evict(product: Product, pod: Mapping[str, Any], check: bool = True) -> str:
    """What the API server says to an eviction; "" where it is done."""
    meta = pod["metadata"]
    names = {"name": meta["name"], "namespace": meta["namespace"]}
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": names}
    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/eviction"
    done = product.cloud.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(body), check=check)
    return done.stderr if done.returncode else ""


def roll(there: Scene, change: Mapping[str, Any], sides: Sequence[Literal["cloud", "edge"]]) -> None:
    """A change of the spec; returns when pods of these sides are all new, and those of the other side are not."""
    before = {side: set(there.all_pods(side)) for side in ("cloud", "edge")}  # type: ignore[arg-type]
    there.product.patch(NAME, change)
    for side in sides:
        there.product.wait(
            f"no pod of {side} is left as it was",
            lambda side=side: not before[side] & set(there.all_pods(side)),  # type: ignore[misc]
            READY_S,
        )
    there.wait_serving()
    for side in {"cloud", "edge"} - set(sides):
        assert before[side] == set(there.all_pods(side)), f"{side} was rolled too"  # type: ignore[arg-type]


def struck(
    there: Scene,
    name: str,
    bodies: Sequence[Mapping[str, Any]],
    want: Mapping[int, Reply],
    strike: Callable[[Scene], None],
    again: bool,
    allowed: Sequence[str],
) -> Tally:
    """Answers, with something that strikes when a third of them is there; `again`: asked again until it is over."""
    tally, began = Tally(name), time.monotonic()
    streams = there.ask(bodies, again)
    try:
        enough = sum(reply.pieces for reply in want.values()) // 3

        def ripe() -> bool:
            return streams.pieces >= enough and all(reply.pieces or reply.over for reply in streams.now())

        there.product.wait("a third of the answers is there", ripe, ANSWERS_S)
        assert sum(not reply.over for reply in streams.now()) > len(bodies) // 2, "most answers have ended"
        strike(there)
        streams.stop()
        for reply in streams.join(ANSWERS_S):
            tally.add(reply, want[reply.number], allowed)
    finally:
        streams.kill()
    tally.seconds = time.monotonic() - began
    return tally
