"""A real Kubernetes API on loopback: etcd, kube-apiserver and kube-controller-manager, without nodes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kubernetes import client as kube
from kubernetes import config as kube_config

from hat_runtime.cli.processes import Child
from tests.harness.credentials import Credentials

SERVICE_CIDR = "10.96.0.0/16"
NODE_GRACE_S = 20
"""After this time without a word from its kubelet a node is NotReady."""
PREFIX = "hat-kube-"
_READY_S = 180.0
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


class KubectlError(Exception):
    """kubectl failed; the text holds its arguments and what it said."""


class ControlPlane:
    """Starts the three programs on free ports of loopback, with its own credentials, in a temporary folder.

    The programs end with the thread that called `start` (the kernel sees to it, even after kill -9), so call it from
    the main thread. The folder of a run that was killed is deleted by the next one. No scheduler and no kubelet: pods
    stay Pending (cluster.py has a node). Every HatError of `start` shows the last lines of the program that failed.
    """

    address = "127.0.0.1"
    """Where the apiserver listens."""

    def __init__(
        self,
        programs: Mapping[str, Path],
        name: str = "test",
        audit: bool = False,
        node_grace_s: int = NODE_GRACE_S,
    ) -> None:
        """Nothing starts yet.

        Args:
            programs: paths, as binaries.find_all() gives them.
            name: for messages.
            audit: keep a log of requests, for `audit_events`.
            node_grace_s: seconds without a heartbeat after which a node counts as lost.
        """
        self.name = name
        self._node_grace_s = node_grace_s
        self._programs = programs
        self._audit = audit
        self._children: dict[str, Child] = {}

    def start(self) -> None:
        """Starts everything and waits until it serves. Raises HatError, MissingProgramError."""
        _delete_abandoned()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        self._credentials = self._make_credentials()
        self._credentials.write()
        (self.folder / "audit-policy.json").write_text(json.dumps(_AUDIT_POLICY))
        self._etcd = f"http://127.0.0.1:{free_port()}"
        self._port = self._choose_port()
        self.server = f"https://{self.address}:{self._port}"
        self.kubeconfig = self._credentials.kubeconfig(
            self.folder / "admin.kubeconfig", self.server, self._credentials.admin
        )
        controllers = self._credentials.kubeconfig(
            self.folder / "controllers.kubeconfig", self.server, self._credentials.controllers
        )
        self._run(
            "etcd",
            data_dir=self.folder / "etcd",
            listen_client_urls=self._etcd,
            advertise_client_urls=self._etcd,
            listen_peer_urls="http://127.0.0.1:0",
        )
        self.start_apiserver()
        self._run(
            "kube-controller-manager",
            kubeconfig=controllers,
            service_account_private_key_file=self.folder / "accounts.key",
            root_ca_file=self.folder / "ca.crt",
            cluster_signing_cert_file=self.folder / "ca.crt",
            cluster_signing_key_file=self.folder / "ca.key",
            use_service_account_credentials="true",
            leader_elect="false",
            secure_port=0,
            horizontal_pod_autoscaler_sync_period="2s",
            node_monitor_grace_period=f"{self._node_grace_s}s",
        )
        core = kube.CoreV1Api(self.client())
        self._wait("kube-controller-manager", lambda: _why_no_account(core, "default"))

    def _make_credentials(self) -> Credentials:
        return Credentials(self.folder)

    def _choose_port(self) -> int:
        return free_port()

    def _apiserver_flags(self) -> dict[str, object]:
        """What differs where the cluster has nodes."""
        # A Service's endpoints cannot be loopback addresses; nothing here calls kubernetes.default.
        return {"endpoint_reconciler_type": "none"}

    def _prefix(self) -> list[str]:
        """Comes before each program's command."""
        return []

    def start_apiserver(self) -> None:
        """Starts the apiserver on its port and waits until it is ready. For use after `stop_apiserver`."""
        folder = self.folder
        flags: dict[str, object] = {
            "etcd_servers": self._etcd,
            "bind_address": self.address,
            "advertise_address": self.address,
            "secure_port": self._port,
            "service_cluster_ip_range": SERVICE_CIDR,
            "tls_cert_file": folder / "server.crt",
            "tls_private_key_file": folder / "server.key",
            "client_ca_file": folder / "ca.crt",
            "token_auth_file": folder / "tokens.csv",
            "service_account_issuer": "https://kubernetes.default.svc",
            "service_account_key_file": folder / "accounts.pub",
            "service_account_signing_key_file": folder / "accounts.key",
            "authorization_mode": "RBAC",
            # On in some distributions: without it no test would miss the right on an owner's finalizers.
            "enable_admission_plugins": "OwnerReferencesPermissionEnforcement",
            "cert_dir": folder / "apiserver",
            **self._apiserver_flags(),
        }
        if self._audit:
            flags["audit_policy_file"] = folder / "audit-policy.json"
            flags["audit_log_path"] = folder / "audit.log"
        self._run("kube-apiserver", **flags)
        self._wait("kube-apiserver", self._why_not_ready)

    def stop_apiserver(self) -> None:
        """Ends the apiserver: from now on connections are refused. The data stays in etcd."""
        self._children.pop("kube-apiserver").stop(grace_s=1.0)

    @contextmanager
    def pause_apiserver(self) -> Iterator[None]:
        """Freezes the apiserver inside the block: connections are accepted and nothing answers."""
        process = self._children["kube-apiserver"].pid
        os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process, signal.SIGCONT)

    def stop(self) -> None:
        """Ends the programs and deletes the folder; does nothing the second time."""
        for name in reversed(list(self._children)):
            self._children.pop(name).stop(grace_s=1.0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def client(self) -> kube.ApiClient:
        """A client with the administrator's rights."""
        return kube_config.new_client_from_config(str(self.kubeconfig))

    def kubectl(
        self, *arguments: str, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl as the administrator. Raises KubectlError where `check` and it fails."""
        done = subprocess.run(
            [str(self._programs["kubectl"]), "--kubeconfig", str(self.kubeconfig), *arguments],
            env={**os.environ, "KUBECACHEDIR": str(self.folder / "kubectl")},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if check and done.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def install_crds(self, folder: Path) -> None:
        """Applies all files of `folder` as a user would, and waits until their resources are served."""
        self.kubectl("apply", "--server-side", "-f", str(folder))
        self._wait("kube-apiserver", lambda: _why_not_established(self.client()))

    @contextmanager
    def namespace(self) -> Iterator[str]:
        """Name of a fresh namespace, which is deleted after the block (in the background)."""
        name = f"test-{uuid.uuid4().hex[:8]}"
        core = kube.CoreV1Api(self.client())
        core.create_namespace({"metadata": {"name": name}})
        try:
            self._wait("kube-controller-manager", lambda: _why_no_account(core, name))
            yield name
        finally:
            with suppress(kube.ApiException):
                core.delete_namespace(name)

    def audit_events(self) -> list[dict[str, Any]]:
        """The requests so far, in the apiserver's audit format. Only with audit=True."""
        if not self._audit:
            raise ValueError(f"audit_events: the control plane {self.name!r} was started with audit=False")
        lines = (self.folder / "audit.log").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def log(self, program: str) -> str:
        """What one of the programs has printed since it started."""
        return self._children[program].output()

    def _run(self, program: str, **flags: object) -> Child:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        command = [*self._prefix(), str(self._programs[program]), *arguments]
        child = Child(f"{program} ({self.name})", command)
        self._children[program] = child
        return child

    def _wait(self, program: str, reason: Callable[[], str | None]) -> None:
        """Waits until `reason` is None. Raises HatError if a program ends, TimeoutError."""
        deadline = time.monotonic() + _READY_S
        while (why := reason()) is not None:
            for child in self._children.values():
                child.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{program} ({self.name}) is not ready after {_READY_S:.0f} s: {why}")
            time.sleep(0.05)

    def _why_not_ready(self) -> str | None:
        request = urllib.request.Request(
            f"{self.server}/readyz", headers={"Authorization": f"Bearer {self._credentials.admin}"}
        )
        trust = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        try:
            with urllib.request.urlopen(request, timeout=5, context=trust):
                return None
        except urllib.error.HTTPError as error:
            with error:
                return error.read(500).decode(errors="replace")
        except OSError as error:
            return str(error)


def _why_not_established(client: kube.ApiClient) -> str | None:
    """None when all CRDs are served. `kubectl wait` fails on a CRD that has no conditions yet."""
    for crd in kube.ApiextensionsV1Api(client).list_custom_resource_definition().items:
        conditions = (crd.status and crd.status.conditions) or []
        if not any(one.type == "Established" and one.status == "True" for one in conditions):
            return f"{crd.metadata.name} is not established"
    return None


def _why_no_account(core: kube.CoreV1Api, namespace: str) -> str | None:
    """None when the namespace has the ServiceAccount that every pod needs."""
    try:
        core.read_namespaced_service_account("default", namespace)
    except kube.ApiException as error:
        return str(error.reason)
    return None


def free_port() -> int:
    """A port that is free now, below the range from which the kernel takes those of outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _delete_abandoned() -> None:
    """Deletes the folders of test runs that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if is_abandoned(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def is_abandoned(name: str) -> bool:
    """Whether a folder or a cgroup of this name belongs to a run that has ended."""
    owner = name.removeprefix(PREFIX).split("-")[0]
    return owner.isdigit() and not Path("/proc", owner).exists() and Path("/proc/self").exists()
