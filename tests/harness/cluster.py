"""A whole Kubernetes cluster with one node, on which pods run: a ControlPlane, a Node, Services and cluster DNS."""

from __future__ import annotations

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
    """A ControlPlane whose programs run in the namespaces of its one node, which this machine reaches at `address`.

    Everything ends with this process, however it ends. Pods reach other pods, Services and joined clusters, and no
    other network. All images must have been loaded with `node.load`.
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
            name: at most 11 characters; the node is called NAME-node.
            labels: of the node.
            audit: see ControlPlane.
        """
        super().__init__(programs, name, audit)
        self._labels = dict(labels or {})

    def start(self) -> None:
        """Starts everything and waits until the node is ready. Raises HatError, MissingProgramError."""
        remove_abandoned_cgroups()
        super().start()

    def _start(self) -> None:
        self.sandbox = Sandbox(self.name, self.folder)
        self.address = self.sandbox.address
        self.node = Node(self.sandbox, self.folder, self._programs)
        super()._start()
        self._run(
            "kube-scheduler", kubeconfig=self._kubeconfig("system:kube-scheduler"), leader_elect="false"
        )
        self._start_proxy()
        self._start_dns()
        self.node.start_containerd(cache_folder())
        user = f"system:node:{self.node.name}"
        self.node.start_kubelet(self._kubeconfig(user), self.address, self._labels)
        self.wait_node(ready=True)

    def stop(self) -> None:
        """Ends everything and deletes the folder; does nothing the second time."""
        if hasattr(self, "sandbox"):
            if hasattr(self, "node"):
                self.node.stop()
            self.sandbox.stop()
        super().stop()

    def wait_node(self, ready: bool, timeout_s: float = _NODE_READY_S) -> None:
        """Waits until the node is ready, or is not. Raises HatError, TimeoutError."""
        core = kube.CoreV1Api(self.client())
        deadline = time.monotonic() + timeout_s
        while ((why := self._why_not(core)) is None) != ready:
            self.node.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.node.name} is {why or 'ready'} after {timeout_s:.0f} s")
            time.sleep(0.2)

    def _why_not(self, core: kube.CoreV1Api) -> str | None:
        """None when pods can be scheduled to the node."""
        found = [node for node in core.list_node().items if node.metadata.name == self.node.name]
        if not found:
            return "not registered"
        for condition in found[0].status.conditions or []:
            if condition.type == "Ready" and condition.status != "True":
                return f"not ready: {condition.message}"
        return f"tainted: {found[0].spec.taints}" if found[0].spec.taints else None

    def _make_credentials(self) -> Credentials:
        users = {
            "system:kube-scheduler": "",
            "system:kube-proxy": "",
            f"system:node:{self.node.name}": "system:nodes",
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

    def _start_proxy(self) -> None:
        self._run(
            "kube-proxy",
            kubeconfig=self._kubeconfig("system:kube-proxy"),
            proxy_mode="iptables",
            hostname_override=self.node.name,
            cluster_cidr=POD_CIDR,
            # Limits of the whole machine, which are not a test's to change.
            conntrack_max_per_core=0,
            conntrack_min=0,
        )

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
