"""Fleets of fake nodes: kwok plays their kubelets, a real scheduler gives them pods.

A pod on such a node is Running and Ready at once, and nothing runs in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kubernetes import client as kube

from hat_runtime.cli.processes import Child
from tests.harness.controlplane import ControlPlane

PROGRAMS = ("kube-scheduler", "kwok")
"""What a fleet needs beside a control plane."""
LEASE_S = 40
"""As the kubelet's: renewed four times as often, each time a write to the API."""
_FAKE = {"kwok.x-k8s.io/node": "fake"}
_NODE = """
{{ $now := Now }}
phase: Running
addresses: [{type: InternalIP, address: {{ NodeIP | Quote }}}, {type: Hostname, address: {{ .metadata.name | Quote }}}]
allocatable: {cpu: "8", memory: 16Gi, pods: "110"}
capacity: {cpu: "8", memory: 16Gi, pods: "110"}
nodeInfo:
  {architecture: arm64, operatingSystem: linux, osImage: fake, kernelVersion: fake, containerRuntimeVersion: fake,
   kubeletVersion: fake, kubeProxyVersion: "", bootID: "", machineID: "", systemUUID: ""}
conditions:
{{ range NodeConditions }}
- {type: {{ .type | Quote }}, status: {{ .status | Quote }}, reason: {{ .reason | Quote }},
   message: {{ .message | Quote }}, lastHeartbeatTime: {{ $now | Quote }}, lastTransitionTime: {{ $now | Quote }}}
{{ end }}
"""
_POD = """
{{ $now := Now }}
phase: Running
startTime: {{ $now | Quote }}
podIP: {{ PodIPWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace | Quote }}
conditions:
- {type: PodScheduled, status: "True", lastTransitionTime: {{ $now | Quote }}}
- {type: Initialized, status: "True", lastTransitionTime: {{ $now | Quote }}}
- {type: ContainersReady, status: "True", lastTransitionTime: {{ $now | Quote }}}
- {type: Ready, status: "True", lastTransitionTime: {{ $now | Quote }}}
containerStatuses:
{{ range .spec.containers }}
- {name: {{ .name | Quote }}, image: {{ .image | Quote }}, imageID: "", ready: true, started: true, restartCount: 0,
   state: {running: {startedAt: {{ $now | Quote }}}}}
{{ end }}
"""


class Fleet:
    """Fake nodes of a control plane. Its programs end with this process, as the control plane's do."""

    def __init__(self, plane: ControlPlane, programs: Mapping[str, Path]) -> None:
        """Nothing starts yet; `programs` are the paths of PROGRAMS."""
        self._plane = plane
        self._programs = programs
        self._children: list[Child] = []
        self._names: list[str] = []

    def start(self) -> None:
        """Starts scheduler and kwok; there are no nodes yet."""
        config = self._plane.folder / "kwok.json"
        config.write_text("\n---\n".join(json.dumps(stage) for stage in _stages()))
        arguments = {
            "kube-scheduler": ["--leader-elect=false", "--secure-port=0"],
            "kwok": [
                f"--config={config}",
                "--manage-all-nodes=false",
                "--manage-nodes-with-annotation-selector=" + ",".join(f"{k}={v}" for k, v in _FAKE.items()),
                f"--node-lease-duration-seconds={LEASE_S}",
                "--v=WARN",
            ],
        }
        for program, flags in arguments.items():
            command = [str(self._programs[program]), f"--kubeconfig={self._plane.kubeconfig}", *flags]
            self._children.append(Child(f"{program} ({self._plane.name})", command))

    def stop(self) -> None:
        """Deletes the nodes and ends the programs; does nothing the second time."""
        try:
            self.delete_nodes()
        finally:
            for child in reversed(self._children):
                child.stop(grace_s=1.0)
            self._children.clear()

    def add_nodes(self, labels: Mapping[str, Mapping[str, str]]) -> None:
        """Makes nodes, by name with their labels; they become Ready by themselves."""
        core = kube.CoreV1Api(self._plane.client())

        def make(name: str) -> None:
            own = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "arm64"}
            meta = {"name": name, "annotations": _FAKE, "labels": {**own, **labels[name]}}
            core.create_node({"metadata": meta})

        self._for_each(make, labels)
        self._names += labels

    def delete_nodes(self) -> None:
        """Deletes all nodes that `add_nodes` has made. The garbage collector deletes their pods in a while."""
        core = kube.CoreV1Api(self._plane.client())
        self._for_each(core.delete_node, self._names)
        self._names.clear()

    def check(self) -> None:
        """Raises HatError with the last lines of a program that has ended."""
        for child in self._children:
            child.check()

    @staticmethod
    def _for_each(action: Callable[[str], object], names: Iterable[str]) -> None:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(action, names))


def jetson(site: str) -> dict[str, str]:
    """Labels of a Jetson that K3s runs on, of a site."""
    return {
        "hat.dev/device": "true",
        "hat.dev/l4t": "r36.4",
        "hat.dev/site": site,
        "node.kubernetes.io/instance-type": "k3s",
    }


def _stages() -> list[dict[str, object]]:
    """Stages as kwok reads them: what it does to which objects."""

    def stage(
        name: str, kind: str, what: list[dict[str, object]], then: dict[str, object]
    ) -> dict[str, object]:
        about = {"apiGroup": "v1", "kind": kind}
        spec = {"resourceRef": about, "selector": {"matchExpressions": what}, "next": then}
        return {
            "apiVersion": "kwok.x-k8s.io/v1alpha1",
            "kind": "Stage",
            "metadata": {"name": name},
            "spec": spec,
        }

    ready = '.status.conditions.[] | select( .type == "Ready" ) | .status'
    not_ready: dict[str, object] = {"key": ready, "operator": "NotIn", "values": ["True"]}
    alive: dict[str, object] = {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"}
    deleted: dict[str, object] = {"key": ".metadata.deletionTimestamp", "operator": "Exists"}
    return [
        stage("node-ready", "Node", [not_ready], {"statusTemplate": _NODE}),
        stage("pod-ready", "Pod", [alive, not_ready], {"statusTemplate": _POD}),
        stage("pod-delete", "Pod", [deleted], {"delete": True}),
    ]
