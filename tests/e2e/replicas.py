"""A HatDeployment of two replicas and three devices on five nodes: what is in it, and what is left over in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from hat_operator.devices import is_ready
from tests.e2e.product import SITE_NAMESPACE, TEAM, Product, RequestError, load_images, make_claim
from tests.e2e.streams import Place, Streams
from tests.harness.cluster import Cluster
from tests.harness.node import Node
from tests.operator.manifests import REMOVED

Mode = Literal["hat", "picospec"]
Side = Literal["cloud", "edge"]
SIDES: tuple[Side, ...] = ("cloud", "edge")
NAME = "struck"
LABEL = f"hat.dev/deployment={NAME}"
LAYERS = 3
REPLICAS = 2
DEVICES = 3
"""Each answers up to 8 questions at once."""
READY_S = 600.0
PAGE_TOKENS, CACHE_BYTES, LAYER_BYTES = 16, 1 << 30, 2 * 3 * 64 * 4
"""Of a replica's KV cache; a token has so many bytes in each layer: two times 3 heads of 64 numbers in float32."""
RESOURCES = {"requests": {"cpu": "50m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}}


class Scene:
    """The HatDeployment, and what an administrator sees of it and does to it."""

    def __init__(self, product: Product, devices: Sequence[Node], mode: Mode) -> None:
        """`devices` are the site's nodes."""
        self.product = product
        self.mode = mode
        self._devices = list(devices)
        self._pages = CACHE_BYTES // (PAGE_TOKENS * LAYER_BYTES * (30 - LAYERS if mode == "hat" else 30))

    def ask(self, bodies: Sequence[Mapping[str, Any]], again: bool = False) -> Streams:
        """The questions, spread over the devices."""
        service = self.product.get(self.product.edge, SITE_NAMESPACE, "service", f"{NAME}-edge")
        address = f"{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}"
        url = f"http://{address}/v1/chat/completions"
        return Streams([Place(node.sandbox.network_only, url) for node in self._devices], bodies, again)

    def pods(self, side: Side) -> list[dict[str, Any]]:
        """Those that serve and are not about to end."""
        cluster, namespace = self._side(side)
        return [pod for pod in self.product.objects(cluster, namespace, "pods", LABEL) if serves(pod)]

    def all_pods(self, side: Side) -> dict[str, dict[str, Any]]:
        """All of them by uid, those that start or end as well."""
        cluster, namespace = self._side(side)
        found = self.product.objects(cluster, namespace, "pods", LABEL)
        return {pod["metadata"]["uid"]: pod for pod in found}

    def figures(self, side: Side, pod: Mapping[str, Any]) -> dict[str, float]:
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
            wanted: dict[Side, int] = {"cloud": REPLICAS, "edge": len(self._devices)}
            return all(
                len(self.pods(side)) == len(self.all_pods(side)) == count for side, count in wanted.items()
            )

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
        for pod in self.pods("cloud"):
            figures, name = self.figures("cloud", pod), pod["metadata"]["name"]
            own, used = figures["hat_num_sessions_open"], figures["hat_kv_cache_usage_ratio"] * self._pages
            streams += own
            for gauge in ("lost", "waiting", "queued"):
                if figures[f"hat_num_sessions_{gauge}"]:
                    found.append(f"{name}: {figures[f'hat_num_sessions_{gauge}']:g} {gauge}")
            if used > own * -(-longest_tokens // PAGE_TOKENS):
                found.append(f"{name}: {used:.0f} pages of {own:g} sessions")
        if streams != idle:
            found.append(f"{streams:g} sessions in the cloud, {idle:g} idle conversations on devices")
        return "; ".join(found)

    def _side(self, side: Side) -> tuple[Cluster, str]:
        cloud = side == "cloud"
        return (self.product.cloud, TEAM) if cloud else (self.product.edge, SITE_NAMESPACE)


def serves(pod: Mapping[str, Any]) -> bool:
    """Whether a pod is ready and not about to end."""
    return is_ready(pod) and "deletionTimestamp" not in pod["metadata"]


@contextmanager
def more_nodes(product: Product, make_folder: Callable[[str], Path]) -> Iterator[list[Node]]:
    """A second node of the cloud and two more devices; yields all devices. All is as before afterwards."""
    cloud, edge = product.cloud, product.edge
    wanted: list[tuple[Cluster, dict[str, str]]] = [(cloud, {})]
    wanted += [(edge, {"hat.dev/device": "true"})] * (DEVICES - 1)
    with ExitStack() as stack:
        for cluster, labels in wanted:
            node = cluster.add_node(labels)
            stack.callback(cluster.remove_node, node)
            load_images(node, make_folder(node.name))
            for other in (edge if cluster is cloud else cloud).nodes:
                node.sandbox.join(other.sandbox)
        yield list(edge.nodes)


@contextmanager
def scene(
    product: Product, devices: Sequence[Node], mode: Mode, make_folder: Callable[[str], Path]
) -> Iterator[Scene]:
    """The HatDeployment in one of the modes, Ready, with its weights in claims."""
    from hat_runtime.model.draft_model import prepare_draft_model
    from hat_runtime.model.prepare import prepare

    folders = {side: make_folder(f"struck-{mode}-{side}") for side in ("cloud", "edge")}
    if mode == "hat":
        prepare("default", out=folders["cloud"] / "part", part="cloud", input_layers=LAYERS)
        prepare("default", out=folders["edge"] / "part", part="device", input_layers=LAYERS)
    else:
        prepare("default", out=folders["cloud"] / "part")
        prepare_draft_model("default", folders["edge"] / "part")
    claims = {side: {"claim": {"name": folder.name, "path": "part"}} for side, folder in folders.items()}
    make_claim(product.cloud, TEAM, folders["cloud"].name, folders["cloud"])
    make_claim(product.edge, SITE_NAMESPACE, folders["edge"].name, folders["edge"])
    own: dict[str, Any] = (
        {"spec__split__inputLayers": LAYERS, "spec__edge__weights": claims["edge"]}
        if mode == "hat"
        else {
            "spec__mode": mode,
            "spec__split": REMOVED,
            "spec__speculation": {"draftModel": claims["edge"]},
        }
    )
    product.apply(
        product.example(
            metadata__name=NAME,
            spec__model__source=claims["cloud"],
            spec__cloud__replicas=REPLICAS,
            spec__cloud__resources=RESOURCES,
            spec__edge__resources=RESOURCES,
            **own,
        )
    )
    try:
        made = Scene(product, devices, mode)
        made.wait_serving()
        yield made
    finally:
        product.delete(NAME)
