"""A fleet with the operator at work: fake devices, HatDeployments, moving figures, and what all of it costs.

Real: etcd, apiserver with audit log, controller manager, scheduler, and the hat-operator command in its own process.
Fake: the nodes and pods (kwok) and the answers of the cloud's pods (cloudpods.py).
"""

from __future__ import annotations

import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kubernetes import client as kube
from prometheus_client.parser import text_string_to_metric_families

from hat_runtime.cli.processes import Child, free_address
from tests.harness import audit
from tests.harness.audit import Request
from tests.harness.cloudpods import CloudPods
from tests.harness.controlplane import ControlPlane
from tests.harness.kwok import Fleet, jetson

AGENT = "hat-operator/"
_CLOUD_NODES = 8
_API = ("hat.dev", "v1alpha1")


class Scene:
    """`deployments` HatDeployments with `devices` devices shared out among them, in one namespace."""

    def __init__(
        self,
        plane: ControlPlane,
        programs: Mapping[str, Path],
        namespace: str,
        devices: int,
        deployments: int,
    ) -> None:
        """Nothing starts yet; `programs` are those of the control plane and of a fleet."""
        self.namespace = namespace
        self.sites: dict[str, list[str]] = {f"chat-{i}": [] for i in range(deployments)}
        """Names of the devices of each HatDeployment."""
        names = list(self.sites)
        for i in range(devices):
            self.sites[names[i % deployments]].append(f"jetson-{i}")
        self.cloud = CloudPods(self.sites)
        self._plane = plane
        self._fleet = Fleet(plane, programs)
        self._hats = kube.CustomObjectsApi(plane.client())
        self._core = kube.CoreV1Api(plane.client())

    @contextmanager
    def running(self, resync_s: float = 30.0) -> Iterator[Scene]:
        """Fleet, stand-in and operator inside the block; there is no HatDeployment yet."""
        with ExitStack() as stack:
            stack.enter_context(self.cloud.serving())
            stack.callback(self._fleet.stop)
            self._fleet.start()
            self._fleet.add_nodes({f"cloud-{i}": {"hat.dev/cloud": "true"} for i in range(_CLOUD_NODES)})
            self._fleet.add_nodes(
                {name: jetson(site) for site, names in self.sites.items() for name in names}
            )
            metrics, health = (free_address().rpartition(":")[2] for _ in range(2))
            self._metrics_url = f"http://127.0.0.1:{metrics}/metrics"
            self._operator = Child(
                "operator",
                [sys.executable, "-c", "from hat_operator.main import main; main()"],
                {
                    "KUBECONFIG": str(self._plane.kubeconfig),
                    "HAT_OPERATOR_NAMESPACES": self.namespace,
                    "HAT_OPERATOR_POD_NAMESPACE": self.namespace,
                    "HAT_OPERATOR_RESYNC_SECONDS": str(resync_s),
                    "HAT_OPERATOR_METRICS_PORT": metrics,
                    "HAT_OPERATOR_HEALTH_PORT": health,
                    "HAT_OPERATOR_DEVICES_URL": self.cloud.url,
                },
            )
            stack.callback(self._operator.stop)
            self._operator.wait_ready(f"http://127.0.0.1:{health}/healthz", 60)
            yield self

    def nodes_ready(self) -> bool:
        """Whether all nodes are Ready."""
        nodes = self._core.list_node(resource_version="0").items
        ready = [
            any(one.type == "Ready" and one.status == "True" for one in node.status.conditions or ())
            for node in nodes
        ]
        return len(ready) == _CLOUD_NODES + sum(map(len, self.sites.values())) and all(ready)

    def apply(self, name: str) -> None:
        """Make one of the HatDeployments."""
        body = {
            "apiVersion": "/".join(_API),
            "kind": "HatDeployment",
            "metadata": {"name": name},
            "spec": {
                "model": {"source": {"hub": "default"}},
                "split": {"inputLayers": 3},
                "cloud": {"template": {"nodeSelector": {"hat.dev/cloud": "true"}}},
                "edge": {
                    "deviceSelector": {"matchLabels": {"hat.dev/site": name}},
                    "images": [{"name": "orin", "l4t": "r36.4", "arch": "arm64"}],
                },
            },
        }
        self._hats.create_namespaced_custom_object(*_API, self.namespace, "hatdeployments", body)

    def statuses(self) -> dict[str, dict[str, Any]]:
        """status of each HatDeployment."""
        found = self._hats.list_namespaced_custom_object(*_API, self.namespace, "hatdeployments")
        return {item["metadata"]["name"]: item.get("status", {}) for item in found["items"]}

    def shown_uplinks(self) -> dict[str, float]:
        """uplinkMbps of each device that has one."""
        rows = [row for status in self.statuses().values() for row in status.get("devices", ())]
        return {row["name"]: row["uplinkMbps"] for row in rows if "uplinkMbps" in row}

    def all_ready(self) -> bool:
        """Whether each HatDeployment is Ready with all its devices, and nothing is being rolled out any more."""

        def ready(name: str, status: Mapping[str, Any]) -> bool:
            found = {one["type"]: one["status"] for one in status.get("conditions", ())}
            settled = found.get("Ready") == "True" and found.get("Progressing") == "False"
            settled = settled and found.get("MetricsAvailable") == "True"
            return settled and bool(status["edge"]["ready"] == len(self.sites[name]))

        return all(ready(name, status) for name, status in self.statuses().items())

    def wait(self, check: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait until `check` holds. Raises HatError if a program ends, TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not check():
            self._operator.check()
            self._fleet.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout_s:g} s: {what}")
            time.sleep(0.5)

    def writes(self) -> list[Request]:
        """All writes of the operator so far."""
        return [
            write
            for write in audit.writes(self._plane.audit_events(), AGENT)
            if write.namespace == self.namespace
        ]

    def is_quiet(self, seconds: float = 2.0) -> bool:
        """Whether the operator has written nothing for so many seconds."""
        return time.time() - max((write.done for write in self.writes()), default=0.0) > seconds

    def reads(self, since: float, until: float) -> int:
        """Requests of the operator between two times (seconds since 1970) that wrote nothing."""
        return sum(
            since <= request.received < until
            for request in audit.requests(self._plane.audit_events(), AGENT)
            if request.verb not in audit.WRITING
        )

    def objects_after_s(self) -> dict[str, float]:
        """Seconds from the request that made each HatDeployment to the answer that made the last of its objects."""
        applied = {
            request.name: request.received
            for request in audit.requests(self._plane.audit_events())
            if (request.verb, request.resource) == ("create", "hatdeployments")
        }
        made = [write for write in self.writes() if write.code == 201]
        return {
            name: max(write.done for write in made if write.name.startswith(f"{name}-")) - applied[name]
            for name in self.sites
        }

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """The operator's metrics: value by name and labels."""
        with urllib.request.urlopen(self._metrics_url, timeout=10) as reply:
            text = reply.read().decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def peak_memory(self) -> int:
        """The most resident bytes that the operator has had."""
        status = Path(f"/proc/{self._operator.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
