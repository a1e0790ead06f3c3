"""A whole Kubernetes cluster on whose nodes pods run: a ControlPlane, one or more Nodes, Services and cluster DNS."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from kubernetes import client as kube

from hat_runtime.cli.processes import Child
from tests.harness.binaries import (
    CONTROL_PLANE,
    NODE,
    MissingProgramError,
    Say,
    cache_folder,
    find_all,
    say_on_stderr,
)
from tests.harness.controlplane import PREFIX, ControlPlane, is_abandoned
from tests.harness.credentials import Credentials
from tests.harness.node import POD_CIDR, TOOLS, Node, missing_cni, missing_linker
from tests.harness.sandbox import Sandbox, cgroups, check_machine, remove_cgroups

_API_PORT = 6443
_API_SERVICE = "10.96.0.1"
_NODE_READY_S = 120.0
MOST_NODES = 4
"""The apiserver knows their users from its start on."""


def find_programs(say: Say = say_on_stderr) -> dict[str, Path]:
    """All programs of a cluster. Raises MissingProgramError where one is missing or this machine cannot run nodes."""
    check_machine(TOOLS)
    for missing in (missing_cni(), missing_linker()):
        if missing is not None:
            raise MissingProgramError(missing)
    return find_all((*CONTROL_PLANE, *NODE), say)


def remove_abandoned_cgroups() -> None:
    """Removes what test runs that were killed have left; their namespaces, mounts and processes ended with them."""
    for name in cgroups(PREFIX):
        if is_abandoned(name):
            remove_cgroups(name)


class Cluster(ControlPlane):
    """A ControlPlane whose programs run in the namespaces of its first node, which this machine reaches at `address`.

    `node` is that one; `add_node` makes others, which last until `remove_node` or the cluster's end. Everything ends
    with this process, however it ends. Pods reach other pods, Services and joined clusters, and no other network. All
    images must have been loaded with `node.load`, on every node.
    """

    def __init__(
        self,
        programs: Mapping[str, Path],
        name: str = "test",
        labels: Mapping[str, str] | None = None,
        audit: bool = False,
    ) -> None:
        """Nothing starts yet.

        Args:
            programs: those of `find_programs`.
            name: at most 9 characters; the first node is called NAME-node, the second one NAME-2-node.
            labels: of the first node.
            audit: see ControlPlane.
        """
        super().__init__(programs, name, audit)
        self._labels = dict(labels or {})
        self.nodes: list[Node] = []

    def start(self) -> None:
        """Starts everything and waits until the node is ready. Raises HatError, MissingProgramError."""
        remove_abandoned_cgroups()
        super().start()

    def _start(self) -> None:
        self.sandbox = Sandbox(self.name, self.folder)
        self.address = self.sandbox.address
        self.node = Node(self.sandbox, self.folder, self._programs)
        self.nodes = [self.node]
        super()._start()
        self._run(
            "kube-scheduler", kubeconfig=self._kubeconfig("system:kube-scheduler"), leader_elect="false"
        )
        self._start_dns()
        self._start_node(self.node, self._labels)

    def add_node(self, labels: Mapping[str, str] | None = None) -> Node:
        """Starts one more node with these labels, joins it to the others and waits until it is ready.

        Raises HatError, TimeoutError; ValueError beyond MOST_NODES.
        """
        number = next((n for n in range(2, MOST_NODES + 1) if self._node_name(n) not in self._names()), None)
        if number is None:
            raise ValueError(f"{self.name}: a cluster has at most {MOST_NODES} nodes")
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        shutil.copy(self.folder / "ca.crt", folder)
        node = Node(Sandbox(f"{self.name}-{number}", folder), folder, self._programs, number)
        for other in self.nodes:
            node.join(other)
        self.nodes.append(node)
        self._start_node(node, labels or {})
        return node

    def remove_node(self, node: Node) -> None:
        """Moves a node's pods to others, as far as that can be, and ends it. Not for the first one."""
        drain = ("drain", node.name, "--ignore-daemonsets", "--delete-emptydir-data", "--force")
        self.kubectl(*drain, "--timeout=50s", check=False)
        self.kubectl("delete", "node", node.name, "--wait=false", check=False)
        self.nodes.remove(node)
        self._children.pop(_proxy(node)).stop()
        _end(node)

    def _names(self) -> set[str]:
        return {node.name for node in self.nodes}

    def _node_name(self, number: int) -> str:
        return f"{self.name}-node" if number == 1 else f"{self.name}-{number}-node"

    def _start_node(self, node: Node, labels: Mapping[str, str]) -> None:
        self._start_proxy(node)
        node.start_containerd(cache_folder())
        node.start_kubelet(self._kubeconfig(f"system:node:{node.name}"), self.address, labels)
        self.wait_node(ready=True, node=node)

    def stop(self) -> None:
        """Ends everything and deletes the folder; does nothing the second time."""
        for node in self.nodes[1:]:
            _end(node)
        self.nodes = []
        if hasattr(self, "sandbox"):
            if hasattr(self, "node"):
                self.node.stop()
            self.sandbox.stop()
        super().stop()

    def wait_node(self, ready: bool, timeout_s: float = _NODE_READY_S, node: Node | None = None) -> None:
        """Waits until a node, by default the first one, is ready, or is not. Raises HatError, TimeoutError."""
        node = node or self.node
        core = kube.CoreV1Api(self.client())
        deadline = time.monotonic() + timeout_s
        while ((why := _why_not(core, node)) is None) != ready:
            node.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{node.name} is {why or 'ready'} after {timeout_s:.0f} s")
            time.sleep(0.2)

    def _make_credentials(self) -> Credentials:
        users = {
            "system:kube-scheduler": "",
            "system:kube-proxy": "",
            **{
                f"system:node:{self._node_name(number)}": "system:nodes"
                for number in range(1, MOST_NODES + 1)
            },
        }
        return Credentials(self.folder, ("127.0.0.1", self.address, _API_SERVICE), users)

    def _choose_port(self) -> int:
        return _API_PORT  # the usual one: network policies know it

    def _apiserver_flags(self) -> dict[str, object]:
        return {
            "authorization_mode": "Node,RBAC",
            "enable_admission_plugins": "NodeRestriction,OwnerReferencesPermissionEnforcement",
            "kubelet_client_certificate": self.folder / "kubelet-client.crt",
            "kubelet_client_key": self.folder / "kubelet-client.key",
            "kubelet_preferred_address_types": "InternalIP",
        }

    def _prefix(self) -> list[str]:
        return self.sandbox.network_only

    def _kubeconfig(self, user: str) -> Path:
        path = self.folder / f"{user.replace(':', '-')}.kubeconfig"
        return self._credentials.kubeconfig(path, self.server, self._credentials.tokens[user])

    def _start_proxy(self, node: Node) -> None:
        flags = {
            "kubeconfig": self._kubeconfig("system:kube-proxy"),
            "proxy-mode": "iptables",
            "hostname-override": node.name,
            "cluster-cidr": POD_CIDR,
            # Limits of the whole machine, which are not a test's to change.
            "conntrack-max-per-core": 0,
            "conntrack-min": 0,
        }
        command = [*node.sandbox.network_only, str(self._programs["kube-proxy"])]
        command += [f"--{name}={value}" for name, value in flags.items()]
        self._children[_proxy(node)] = Child(f"kube-proxy ({node.name})", command)

    def _start_dns(self) -> None:
        config = self.folder / "Corefile"
        config.write_text(
            f"""cluster.local in-addr.arpa {{
    bind {self.address}
    kubernetes {{
        kubeconfig {self.kubeconfig}
    }}
    errors
}}
. {{
    bind {self.address}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""
        )
        command = [*self._prefix(), str(self._programs["coredns"]), "-conf", str(config)]
        self._children["coredns"] = Child(f"coredns ({self.name})", command)


def _why_not(core: kube.CoreV1Api, node: Node) -> str | None:
    """None when pods can be scheduled to the node."""
    found = [one for one in core.list_node().items if one.metadata.name == node.name]
    if not found:
        return "not registered"
    for condition in found[0].status.conditions or []:
        if condition.type == "Ready" and condition.status != "True":
            return f"not ready: {condition.message}"
    return f"tainted: {found[0].spec.taints}" if found[0].spec.taints else None


def _proxy(node: Node) -> str:
    return f"kube-proxy of {node.name}"


def _end(node: Node) -> None:
    """Ends a further node and deletes its folder."""
    node.stop()
    node.sandbox.stop()
    shutil.rmtree(node.folder, ignore_errors=True)
