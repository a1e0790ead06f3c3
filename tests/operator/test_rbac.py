"""The operator with its ServiceAccount's rights only: none is missing, and none is there that it does not use."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from hat_operator import cleanup
from hat_operator.identity.api import Requests
from hat_operator.identity.pod import Identity
from hat_runtime.security.spiffe import SpiffeId
from tests.harness.controlplane import ControlPlane
from tests.harness.release import Helm
from tests.operator.manifests import hat_deployment
from tests.operator.rights import Right, granted, refused, used
from tests.operator.running import eventually, free_port, healthy

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "examples" / "hat-site.yaml"
SITE_NAMESPACE = "hat"
SITE_USER = f"system:serviceaccount:{SITE_NAMESPACE}:hat-operator"
POD_SECURITY = "pod-security.kubernetes.io/enforce"
DEVICE = {"name": "device", "labels": {"hat.dev/device": "true"}}
NODES = Right("", "nodes", "list")
OWNERS = Right("hat.dev", "hatdeployments/finalizers", "update")
"""The apiserver asks for this one inside other requests, so that no audit log shows it."""
ASKING = {
    Right("certificates.k8s.io", "certificatesigningrequests", "create"),
    Right("certificates.k8s.io", "certificatesigningrequests", "get"),
}
"""Of pods."""
SIGNER = {Right("certificates.k8s.io", "signers", verb) for verb in ("approve", "sign")}
"""Asked for in the same way as OWNERS."""
POD_MONITOR_CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: podmonitors.monitoring.coreos.com}
spec:
  group: monitoring.coreos.com
  scope: Namespaced
  names: {kind: PodMonitor, listKind: PodMonitorList, plural: podmonitors, singular: podmonitor}
  versions:
    - name: v1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"""
Object = dict[str, Any]


@dataclass
class Lived:
    """What is left of an operator that has gone through everything that it can do."""

    objects: list[Object]
    release: str
    served: str
    account: str
    home: ControlPlane
    home_events: list[Object] = field(default_factory=list)
    site_events: list[Object] = field(default_factory=list)

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{self.release}:{self.account}"


@pytest.fixture(scope="module")
def monitors(control_plane: ControlPlane, edge_plane: ControlPlane) -> Iterator[None]:
    """Both clusters with the API of Prometheus Operator."""
    planes = (control_plane, edge_plane)
    for plane in planes:
        (plane.folder / "podmonitors.yaml").write_text(POD_MONITOR_CRD)
        plane.install_crds(plane.folder / "podmonitors.yaml")
    yield
    for plane in planes:
        plane.kubectl("delete", "-f", str(plane.folder / "podmonitors.yaml"))


@pytest.fixture(scope="module")
def site(edge_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kubeconfig that docs/kubernetes.md makes at the site, with the rights of examples/hat-site.yaml."""
    edge_plane.kubectl("apply", "-f", str(SITE))
    secret = ("-n", SITE_NAMESPACE, "get", "secret", "hat-operator-token", "-o", "json")

    def data() -> dict[str, str]:
        found: dict[str, str] = json.loads(edge_plane.kubectl(*secret).stdout).get("data", {})
        return found

    eventually(lambda: "token" in data(), "the site's token")
    token = base64.b64decode(data()["token"]).decode()
    yield kubeconfig(edge_plane, token, tmp_path_factory.mktemp("site"))
    edge_plane.kubectl("delete", "-f", str(SITE), "--wait=false", "--ignore-not-found")


def kubeconfig(plane: ControlPlane, token: str, folder: Path) -> Path:
    """The administrator's with another user."""
    content = yaml.safe_load(Path(plane.kubeconfig).read_text())
    content["users"][0]["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    return path


def account_kubeconfig(plane: ControlPlane, namespace: str, account: str, folder: Path) -> Path:
    token = plane.kubectl("-n", namespace, "create", "token", account).stdout.strip()
    return kubeconfig(plane, token, folder)


def apply(plane: ControlPlane, folder: Path, *objects: Object, namespace: str | None = None) -> None:
    path = folder / "objects.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    plane.kubectl("apply", "-f", str(path), *(("-n", namespace) if namespace else ()))


@contextmanager
def operator(config: Path, deployment: Object, release: str) -> Iterator[None]:
    """The operator as a process, with the environment that the chart gives to its pod."""
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    chart = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    health = free_port()
    environment = {
        **os.environ,
        **chart,
        "KUBECONFIG": str(config),
        "HAT_OPERATOR_POD_NAME": "one",
        "HAT_OPERATOR_POD_NAMESPACE": release,
        "HAT_OPERATOR_RESYNC_SECONDS": "2",
        "HAT_OPERATOR_METRICS_PORT": str(free_port()),
        "HAT_OPERATOR_HEALTH_PORT": str(health),
    }
    command = [sys.executable, "-c", "from hat_operator.main import main; main()"]
    log = config.with_name("operator.log")
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stderr=output)
        try:
            eventually(lambda: healthy(health), "the operator is healthy")
            yield
            process.terminate()
            assert process.wait(30) == 0, log.read_text()[-3000:]
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module", params=["cluster", "namespaces"])
def lived(
    request: pytest.FixtureRequest,
    control_plane: ControlPlane,
    edge_plane: ControlPlane,
    monitors: None,
    site: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Lived]:
    folder = tmp_path_factory.mktemp("rbac")
    with control_plane.namespace() as release, control_plane.namespace() as served:
        mode = ("--set", f"namespaces={{{served}}}") if request.param == "namespaces" else ()
        helm = Helm(control_plane.kubeconfig, release, folder)
        objects = helm.template("hat", "--set", "crds.enabled=false", *mode)
        # The hook's Job has no kubelet to run it; its rights are tried below.
        apply(
            control_plane,
            folder,
            *(one for one in objects if one["kind"] not in ("Job", "Pod", "PodMonitor")),
        )
        (deployment,) = (one for one in objects if one["kind"] == "Deployment")
        account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
        found = Lived(objects, release, served, account, control_plane)
        begins = len(edge_plane.audit_events())
        config = account_kubeconfig(control_plane, release, account, folder)
        try:
            with operator(config, deployment, release):
                live(found, edge_plane, site, folder)
                eventually(lambda: lease_is_renewed(control_plane, release), "the lease is renewed")
                found.home_events = control_plane.audit_events()
                found.site_events = edge_plane.audit_events()[begins:]
                yield found
        finally:
            control_plane.kubectl(
                "-n", served, "delete", "hatdeployments", "--all", "--wait=false", check=False
            )
            cluster_wide = [one for one in objects if one["kind"] in ("ClusterRole", "ClusterRoleBinding")]
            for one in cluster_wide:
                control_plane.kubectl("delete", one["kind"], one["metadata"]["name"])


def lease_is_renewed(home: ControlPlane, namespace: str) -> bool:
    """Whether the leader has written its Lease once more since it took it: a fast machine lives through all before."""
    leases = json.loads(home.kubectl("-n", namespace, "get", "leases", "-o", "json").stdout)["items"]
    return any(lease["spec"]["renewTime"] != lease["spec"]["acquireTime"] for lease in leases)


def live(lived: Lived, edge: ControlPlane, site: Path, folder: Path) -> None:
    """Create, update, drift and delete of HatDeployments with devices here and at the site."""
    home, served = lived.home, lived.served
    home.kubectl("-n", served, "create", "secret", "generic", "site", f"--from-file=kubeconfig={site}")
    selector = {"deviceSelector": {"matchLabels": {"hat.dev/device": "true"}}}
    far = {"kubeconfigSecretRef": {"name": "site"}, "namespace": SITE_NAMESPACE}
    expose = {"expose": {"type": "NodePort", "host": "cloud.example.com"}}
    apply(
        home,
        folder,
        hat_deployment("near", edge=selector),
        hat_deployment("far", edge={**selector, "clusterRef": far}, cloud=expose),
        namespace=served,
    )
    near = ("deployment", "daemonset", "service", "serviceaccount", "networkpolicy", "podmonitor")
    for kind in near:
        eventually(lambda kind=kind: count(home, served, kind, "near") > 0, f"near's {kind}")  # type: ignore[misc]
    at_site = near[1:]
    for kind in at_site:
        eventually(lambda kind=kind: count(edge, SITE_NAMESPACE, kind, "far") > 0, f"far's {kind}")  # type: ignore[misc]
    for plane, namespace, name in ((home, served, "near"), (edge, SITE_NAMESPACE, "far")):
        plane.kubectl("label", "namespace", namespace, f"{POD_SECURITY}=restricted", "--overwrite")
        apply(plane, folder, {"apiVersion": "v1", "kind": "Node", "metadata": DEVICE})
        heartbeat(plane)
        patch(home, served, name, {"edge": {"api": {"hostPort": 8000}}})
        refused = partial(pod_is_refused, plane, home, served, name)
        eventually(refused, f"{name}'s condition tells why it has no pod")
        patch(home, served, name, {"edge": {"api": {"hostPort": 0}}})
        get_certificate(plane, namespace, name, served, folder)
        plane.kubectl("delete", "node", DEVICE["name"])
        plane.kubectl("label", "namespace", namespace, f"{POD_SECURITY}-")
    # What the operator has made with its own rights: an authority, and now another one.
    home.kubectl("-n", served, "annotate", "secret", "hat-ca", "hat.dev/rotate=now")
    resources = {"requests": {"cpu": "700m", "memory": "1Gi"}}
    for name in ("near", "far"):
        patch(
            home,
            served,
            name,
            {"edge": {"resources": resources}, "observability": {"podMonitor": "disabled"}},
        )
        patch(home, served, name, {"security": {"networkPolicies": False}, "split": {"inputLayers": 4}})
    for kind in ("podmonitor", "networkpolicy"):
        eventually(lambda kind=kind: count(home, served, kind, "near") == 0, f"no {kind} of near")  # type: ignore[misc]
        eventually(lambda kind=kind: count(edge, SITE_NAMESPACE, kind, "far") == 0, f"no {kind} of far")  # type: ignore[misc]
    eventually(lambda: count(home, served, "deployment", "near") == 1, "near's old Deployment is gone")
    drift(home, served, "near", "deployment,daemonset,service,serviceaccount,poddisruptionbudget")
    drift(edge, SITE_NAMESPACE, "far", "daemonset,service,serviceaccount")
    patch(home, served, "near", {"suspend": True})
    eventually(lambda: count(home, served, "daemonset", "near") == 0, "near's devices are gone")
    home.kubectl("-n", served, "delete", "hatdeployment", "near", "far", "--timeout=60s")
    for kind in at_site:
        assert count(edge, SITE_NAMESPACE, kind, "far") == 0


def get_certificate(plane: ControlPlane, namespace: str, name: str, served: str, folder: Path) -> None:
    """Ask as the pod of the device, with the rights of its account."""
    own = (
        "-n",
        namespace,
        "get",
        "pods",
        "-l",
        f"hat.dev/deployment={name}",
        "-l",
        "app.kubernetes.io/component=edge",
    )

    def pods() -> list[Object]:
        heartbeat(plane)
        plane.kubectl("taint", "node", DEVICE["name"], "node.kubernetes.io/not-ready-", check=False)
        found: list[Object] = json.loads(plane.kubectl(*own, "-o", "json").stdout)["items"]
        return [
            pod
            for pod in found
            if "deletionTimestamp" not in pod["metadata"]
            and "hostPort" not in pod["spec"]["containers"][0]["ports"][0]
        ]

    eventually(lambda: bool(pods()), f"{name} has a pod")
    pod = pods()[0]["metadata"]["name"]
    target = {"apiVersion": "v1", "kind": "Node", "name": DEVICE["name"]}
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}, "target": target}
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/binding"
    plane.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(binding))
    account = folder / f"{name}-account"
    account.mkdir()
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}")
    token = plane.kubectl("-n", namespace, "create", "token", f"{name}-edge", *bound).stdout
    (account / "token").write_text(token)
    (account / "ca.crt").write_bytes((plane.folder / "ca.crt").read_bytes())
    (account / "tls").mkdir()
    identity = SpiffeId("hat.internal", served, "device", DEVICE["name"])
    selector = {"hat.dev/deployment": name, "hat.dev/namespace": served}
    labels = {
        "app.kubernetes.io/managed-by": "hat-operator",
        "app.kubernetes.io/component": "edge",
        **selector,
    }
    Identity(identity, account / "tls", Requests(account, plane.server), labels).renew()


def heartbeat(plane: ControlPlane) -> None:
    """What the device's kubelet would say, without which its node is soon unreachable."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    ready = {"type": "Ready", "status": "True", "lastHeartbeatTime": now}
    change = json.dumps({"status": {"conditions": [ready]}})
    plane.kubectl("patch", "node", DEVICE["name"], "--subresource=status", "--type=merge", "-p", change)


def pod_is_refused(plane: ControlPlane, home: ControlPlane, namespace: str, name: str) -> bool:
    """Whether EdgeReady names the field that the pod security standard refuses."""
    heartbeat(plane)
    return "hostPort" in why_not_ready(home, namespace, name)


def why_not_ready(home: ControlPlane, namespace: str, name: str) -> str:
    """The message of EdgeReady."""
    body = json.loads(home.kubectl("-n", namespace, "get", "hat", name, "-o", "json").stdout)
    conditions = body.get("status", {}).get("conditions", ())
    return next((item["message"] for item in conditions if item["type"] == "EdgeReady"), "")


def count(plane: ControlPlane, namespace: str, kind: str, name: str) -> int:
    said = plane.kubectl("-n", namespace, "get", kind, "-o", "name", "-l", f"hat.dev/deployment={name}")
    return len(said.stdout.split())


def patch(plane: ControlPlane, namespace: str, name: str, spec: Object) -> None:
    change = json.dumps({"spec": spec})
    plane.kubectl("-n", namespace, "patch", "hatdeployment", name, "--type=merge", "-p", change)


def drift(plane: ControlPlane, namespace: str, name: str, kinds: str) -> None:
    """Take the operator's labels' companion away from each object, and wait until it is back."""
    chosen = (kinds, "-l", f"hat.dev/deployment={name}")
    plane.kubectl("-n", namespace, "label", *chosen, "app.kubernetes.io/name=other", "--overwrite")
    other = ("get", *chosen[:2], f"{chosen[2]},app.kubernetes.io/name=other", "-o", "name")
    eventually(lambda: not plane.kubectl("-n", namespace, *other).stdout, f"the labels of {name} are back")


def test_no_right_is_missing(lived: Lived) -> None:
    namespaced = NODES not in granted(lived.objects)
    # Without the list of nodes a lost device is shown as not ready: values.yaml says so.
    assert refused(lived.home_events, lived.user) == ({NODES} if namespaced else set())


def test_every_right_is_used(lived: Lived) -> None:
    asking = [one for one in lived.objects if one["metadata"]["name"].endswith("-requester")]
    rights = granted(
        one
        for one in lived.objects
        if "helm.sh/hook" not in one["metadata"].get("annotations", {}) and one not in asking
    )
    assert rights - used(lived.home_events, lived.user) - {OWNERS} - SIGNER == set()
    pod = f"system:serviceaccount:{lived.served}:near-edge"
    assert granted(asking) == used(lived.home_events, pod) == ASKING
    assert refused(lived.home_events, pod) == set()


def test_rights_at_the_site(lived: Lived) -> None:
    objects = list(yaml.safe_load_all(SITE.read_text()))
    asking = [one for one in objects if one["metadata"]["name"] == "hat-device"]
    rights = granted(one for one in objects if one not in asking)
    assert refused(lived.site_events, SITE_USER) == set()
    assert rights - used(lived.site_events, SITE_USER) - SIGNER == set()
    pod = f"system:serviceaccount:{SITE_NAMESPACE}:far-edge"
    assert granted(asking) == used(lived.site_events, pod) == ASKING


def test_children_need_the_right_on_their_owner(lived: Lived, tmp_path: Path) -> None:
    kinds = ("Role", "ClusterRole")
    (role,) = (one for one in lived.objects if one["kind"] in kinds and OWNERS in granted([one]))
    kept = [rule for rule in role["rules"] if "hatdeployments/finalizers" not in rule["resources"]]
    apply(lived.home, tmp_path, {**role, "rules": kept})
    begins = len(lived.home.audit_events())
    apply(lived.home, tmp_path, hat_deployment("owner"), namespace=lived.served)

    def events() -> list[Object]:
        return lived.home.audit_events()[begins:]

    missing = Right("apps", "deployments", "patch")
    eventually(lambda: missing in refused(events(), lived.user), "a Deployment is refused")
    assert count(lived.home, lived.served, "deployment", "owner") == 0
    apply(lived.home, tmp_path, role)
    eventually(lambda: count(lived.home, lived.served, "deployment", "owner") == 1, "the Deployment is there")
    lived.home.kubectl("-n", lived.served, "delete", "hatdeployment", "owner")


def test_uninstall_has_its_rights_and_uses_all(
    lived: Lived, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hooks = [one for one in lived.objects if "pre-delete" in one["metadata"].get("annotations", {}).values()]
    (job,) = (one for one in hooks if one["kind"] == "Job")
    spec = job["spec"]["template"]["spec"]
    account = spec["serviceAccountName"]
    config = account_kubeconfig(lived.home, lived.release, account, tmp_path)
    apply(lived.home, tmp_path, hat_deployment("last"), namespace=lived.served)
    begins = len(lived.home.audit_events())
    environment = {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"]}
    done = subprocess.run(
        [sys.executable, "-m", cleanup.__name__, *spec["containers"][0]["command"][3:]],
        env={**os.environ, **environment, "KUBECONFIG": str(config)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    user = f"system:serviceaccount:{lived.release}:{account}"
    events = lived.home.audit_events()[begins:]
    assert refused(events, user) == set()
    assert used(events, user) == granted(hooks)
