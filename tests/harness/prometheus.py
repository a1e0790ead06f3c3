"""A real Prometheus that scrapes processes of a test once a second."""

from __future__ import annotations

import json
import math
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hat_operator.objects.monitor import relabelings
from tests.harness.boards import RULES
from tests.operator.running import free_port


@dataclass(frozen=True)
class Target:
    """One process: HOST:PORT, and the labels under which Prometheus finds it."""

    address: str
    labels: Mapping[str, str] = field(default_factory=dict)
    component: str = ""
    """cloud or edge: the relabelings of that side's PodMonitor apply. "": none."""


def pod(
    address: str,
    component: str,
    name: str,
    deployment: str = "chat",
    namespace: str = "team",
    node: str | None = None,
) -> Target:
    """A process as service discovery would find it in a pod that the operator made, by default on node-of-NAME."""
    labels = {
        "namespace": namespace,
        "pod": name,
        "__meta_kubernetes_pod_node_name": node or f"node-of-{name}",
        "__meta_kubernetes_pod_label_hat_dev_namespace": namespace,
        "__meta_kubernetes_pod_label_hat_dev_deployment": deployment,
        "__meta_kubernetes_pod_label_app_kubernetes_io_component": component,
    }
    return Target(address, labels, component)


class Prometheus:
    """The process, with the chart's rules. A context manager; stops with it."""

    def __init__(self, program: Path, folder: Path, targets: Sequence[Target], address: str = "") -> None:
        """Nothing is started yet; its files are in `folder`, its address is a free port of loopback by default."""
        self._targets = targets
        self._address = address or f"127.0.0.1:{free_port()}"
        self.url = f"http://{self._address}"
        self._config = folder / "prometheus.yml"
        self._log = folder / "prometheus.log"
        self._config.write_text(yaml.safe_dump(self._configuration()))
        self.command = [
            str(program),
            f"--config.file={self._config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self._address}",
            "--log.level=warn",
        ]

    def _configuration(self) -> dict[str, Any]:
        jobs = [
            {
                "job_name": f"job-{number}",
                # As in the operator's own PodMonitor.
                "honor_labels": not target.component,
                "static_configs": [{"targets": [target.address], "labels": dict(target.labels)}],
                "relabel_configs": [_relabeling(one) for one in relabelings(target.component)]
                if target.component
                else [],
            }
            for number, target in enumerate(self._targets)
        ]
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        return {"global": every, "rule_files": [str(RULES)], "scrape_configs": jobs}

    def __enter__(self) -> Prometheus:
        with self._log.open("w") as output:
            self._process = subprocess.Popen(self.command, stdout=output, stderr=output)
        try:
            while len(self.query("up == 1")) < len(self._targets):
                if self._process.poll() is not None:
                    raise RuntimeError(f"Prometheus ended: {self._log.read_text()[-2000:]}")
                time.sleep(0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The result of an instant query; none while Prometheus starts. Raises ValueError for a wrong query."""
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                return found
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return []
            raise ValueError(f"{expr}: {error.read().decode()}") from None
        except (urllib.error.URLError, ConnectionError):
            return []

    def has_data(self, expr: str) -> bool:
        """Whether a query finds at least one number."""
        return any(math.isfinite(float(series["value"][1])) for series in self.query(expr))

    def broken_rules(self) -> list[str]:
        """Names of rules whose evaluation failed."""
        with urllib.request.urlopen(f"http://{self._address}/api/v1/rules", timeout=30) as answer:
            groups = json.load(answer)["data"]["groups"]
        return [rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "err"]


def _relabeling(relabeling: Mapping[str, Any]) -> dict[str, Any]:
    """A PodMonitor's relabeling as Prometheus Operator writes it into Prometheus' configuration."""
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label", "action": "action"}
    return {names[key]: value for key, value in relabeling.items()}
