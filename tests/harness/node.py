"""One Kubernetes node in a sandbox: containerd, kubelet, kube-proxy and pods."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

from hat_runtime.cli.processes import Child
from tests.harness import images
from tests.harness.sandbox import Sandbox

TOOLS = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "mount": "mount",
}
CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
POD_CIDR = "10.244.0.0/16"
"""Of a whole cluster."""
_STORE = "/var/lib/containerd"
_STATE = "/run/containerd"
_SOCKET = f"{_STATE}/containerd.sock"


class Node:
    """Runs in the namespaces of `sandbox`; its pods end with them."""

    def __init__(self, sandbox: Sandbox, folder: Path, programs: Mapping[str, Path], number: int = 1) -> None:
        """Nothing starts yet.

        Args:
            sandbox: a running one.
            folder: for configuration files.
            programs: paths of kubelet and kube-proxy.
            number: of the node in its cluster, 1 to 255: pods of two nodes have different addresses.
        """
        self.name = f"{sandbox.name}-node"
        self.sandbox = sandbox
        self.pod_cidr = f"10.244.{number - 1}.0/24"
        self.folder = folder
        self._programs = programs
        self._children: dict[str, Child] = {}
        self._kubelet: list[str] = []

    def start_containerd(self, cache: Path) -> None:
        """Starts the container runtime and waits until it serves. `cache`: where the model's package is kept."""
        spec = json.loads(self.sandbox.run("ctr", "oci", "spec"))
        for place, folder in images.host_folders(images.model_package(cache)).items():
            options = ["rbind", "ro", "nosuid", "nodev"]
            spec["mounts"].append(
                {"destination": str(place), "type": "bind", "source": str(folder), "options": options}
            )
        base = self._write("container.json", spec)
        network = self.folder / "cni"
        network.mkdir(exist_ok=True)
        # A point-to-point link for each pod: traffic between pods passes the node's firewall rules, which are the
        # Services, without the kernel's bridge filter.
        addresses = {
            "type": "host-local",
            "ranges": [[{"subnet": self.pod_cidr}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        link = {"type": "ptp", "ipMasq": True, "ipam": addresses}
        ports = {"type": "portmap", "capabilities": {"portMappings": True}}
        self._write("cni/10-pods.conflist", {"cniVersion": "1.0.0", "name": "pods", "plugins": [link, ports]})
        cni = next(folder for folder in CNI_FOLDERS if folder.is_dir())
        config = self.folder / "containerd.toml"
        config.write_text(
            f"""version = 2
root = "{_STORE}"
state = "{_STATE}"
[grpc]
  address = "{_SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{self.folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{images.PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    base_runtime_spec = "{base}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
    conf_dir = "{network}"
"""
        )
        self._children["containerd"] = self.sandbox.start(
            f"containerd ({self.name})", ["containerd", "--config", str(config)]
        )
        self.sandbox.wait_for(lambda: self._answers("version"), self._children["containerd"])
        self.load(images.write_pause(self.folder / "pause.tar"))

    def load(self, archive: Path) -> None:
        """Adds the images of an OCI archive to those that pods can use, and deletes the archive."""
        self.sandbox.run(
            "ctr", "-a", _SOCKET, "-n", "k8s.io", "images", "import", str(archive), timeout_s=300
        )
        archive.unlink()

    def start_kubelet(self, kubeconfig: Path, dns: str, labels: Mapping[str, str]) -> None:
        """Starts the kubelet. `labels`: the node's own; `dns`: address of the cluster's name server."""
        callers = {"anonymous": {"enabled": False}, "webhook": {"enabled": True}}
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self.sandbox.cgroup,
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "failCgroupV1": False,
            "makeIPTablesUtilChains": False,
            # A full disk of the machine is not this node's matter.
            "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "resolvConf": "",
            "clusterDNS": [dns],
            "clusterDomain": "cluster.local",
            "nodeStatusUpdateFrequency": "4s",
            "containerRuntimeEndpoint": f"unix://{_SOCKET}",
            "authentication": {**callers, "x509": {"clientCAFile": str(self.folder / "ca.crt")}},
            "authorization": {"mode": "Webhook"},
        }
        flags = {
            "config": self._write("kubelet.json", config),
            "kubeconfig": kubeconfig,
            "hostname-override": self.name,
            "node-ip": self.sandbox.address,
            "node-labels": ",".join(f"{key}={value}" for key, value in labels.items()),
        }
        self._kubelet = [
            str(self._programs["kubelet"]),
            *(f"--{key}={value}" for key, value in flags.items()),
        ]
        self.resume_kubelet()

    def stop_kubelet(self) -> None:
        """The node is lost to its cluster: pods go on running."""
        self.sandbox.end(self._children.pop("kubelet"), signal.SIGKILL)

    def resume_kubelet(self) -> None:
        """Starts the kubelet as it was."""
        self._children["kubelet"] = self.sandbox.start(f"kubelet ({self.name})", self._kubelet)

    def join(self, other: Node) -> None:
        """Lays a cable between two nodes of a cluster: they and their pods reach each other."""
        self.sandbox.join(other.sandbox)
        for here, there in ((self, other), (other, self)):
            here.sandbox.run("ip", "route", "add", there.pod_cidr, "via", there.sandbox.address)

    def kill_container(self, container: str) -> None:
        """SIGKILL to a container's processes, as when the kernel is out of memory; `container` is containerd's id."""
        self.sandbox.run(
            *("ctr", "-a", _SOCKET, "-n", "k8s.io", "tasks", "kill", "--all", "-s", "SIGKILL", container)
        )

    def check(self) -> None:
        """Raises HatError if containerd or the kubelet has ended."""
        for child in self._children.values():
            child.check()

    def log(self, program: str) -> str:
        """What containerd or kubelet have printed."""
        return self._children[program].output()

    def stop(self) -> None:
        """Ends kubelet and containerd. Pods end with the sandbox."""
        for name in ("kubelet", "containerd"):
            if name in self._children:
                self.sandbox.end(self._children.pop(name), signal.SIGKILL)

    def _answers(self, *arguments: str) -> bool:
        try:
            self.sandbox.run("ctr", "-a", _SOCKET, *arguments)
        except RuntimeError:
            return False
        return True

    def _write(self, name: str, content: object) -> Path:
        path = self.folder / name
        path.write_text(json.dumps(content, indent=1))
        return path


def missing_cni() -> str | None:
    """None where the network plugins are installed."""
    if any((folder / "ptp").is_file() for folder in CNI_FOLDERS):
        return None
    return f"no CNI plugins in {CNI_FOLDERS[0]} (Debian's package containernetworking-plugins)"


def missing_linker() -> str | None:
    """None where `ldd` is there, by which the pause image is made."""
    return None if shutil.which("ldd") else "ldd is not on PATH"
