"""The product as a user has it: a chart in the cloud's cluster, a site with a device, and clients of the device."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from hat_operator.identity.authority import pem
from hat_operator.identity.authority import read as read_authority
from tests.harness import images
from tests.harness.cluster import Cluster
from tests.harness.controlplane import KubectlError
from tests.harness.node import Node
from tests.harness.release import Helm
from tests.operator.manifests import changed

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "smollm2.yaml"
SITE = ROOT / "examples" / "hat-site.yaml"
REGISTRY = "registry.test/hat"
VERSIONS = ("0.1.0", "0.1.1")
"""Tags of the images; their content is the same."""
SYSTEM, TEAM, SITE_NAMESPACE = "hat-system", "team-a", "hat"
KUBECONFIG_SECRET = "site-a"
OPERATOR = "hat-hat-operator"
_NOT_LISTED = ("componentstatuses", "certificatesigningrequests.certificates.k8s.io")
_RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
_CLIENT = """
import json, sys, urllib.error, urllib.request
request = json.load(sys.stdin)
body = json.dumps(request["body"]).encode() if request["body"] is not None else None
headers = {"Content-Type": "application/json", **request["headers"]}
asked = urllib.request.Request(request["url"], body, headers)
try:
    with urllib.request.urlopen(asked, timeout=request["timeout"]) as answer:
        print(answer.read().decode())
except urllib.error.HTTPError as error:
    sys.exit(f"{error} {error.read().decode()}")
"""
_ADMIN = """
import http.client, json, socket, ssl, sys
asked = json.load(sys.stdin)
context = ssl.create_default_context(cadata=asked["trusted"])
context.load_cert_chain(asked["certificate"])
connection = http.client.HTTPSConnection(asked["host"], 7072)
raw = socket.create_connection((asked["host"], 7072), timeout=20)
connection.sock = context.wrap_socket(raw, server_hostname="hat-cloud.hat.internal")
connection.request("GET", asked["path"])
answer = connection.getresponse()
text = answer.read().decode()
sys.exit(f"{answer.status} {text}") if answer.status != 200 else print(text)
"""


class Product:
    """Two clusters, joined, and what an administrator and a user do with them."""

    def __init__(self, cloud: Cluster, edge: Cluster, folder: Path) -> None:
        """Both run; `folder` holds helm's and archives' files."""
        self.cloud, self.edge = cloud, edge
        self._folder = folder
        self.helm = Helm(cloud.kubeconfig, SYSTEM, folder)

    def prepare(self) -> None:
        """What docs/kubernetes.md asks for before the chart: namespaces, rights at the site, its kubeconfig."""
        for namespace in (SYSTEM, TEAM):
            self.cloud.kubectl("create", "namespace", namespace)
            self.cloud.kubectl("label", "namespace", namespace, _RESTRICTED)
        self.edge.kubectl("apply", "-f", str(SITE))
        secret = f"--from-literal=kubeconfig={json.dumps(self.site_kubeconfig())}"
        self.cloud.kubectl("-n", TEAM, "create", "secret", "generic", KUBECONFIG_SECRET, secret)

    def install(self, *settings: str) -> None:
        """`helm install`, and waits until the operator is ready."""
        registry = ("--set", f"global.imageRegistry={REGISTRY}")
        self.helm.run(
            "install", "hat", str(self.helm.chart), "--wait", "--timeout=120s", *registry, *settings
        )

    def example(self, **changes: Any) -> dict[str, Any]:
        """examples/smollm2.yaml in float32, with its devices at the site; `changes` by dotted path, __ for a dot."""
        expose = {"type": "NodePort", "host": self.cloud.address}
        ref = {"kubeconfigSecretRef": {"name": KUBECONFIG_SECRET}, "namespace": SITE_NAMESPACE}
        own = {"spec.model.dtype": "float32", "spec.cloud.expose": expose, "spec.edge.clusterRef": ref}
        body: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
        return changed(body, {**own, **{key.replace("__", "."): value for key, value in changes.items()}})

    def apply(self, body: Mapping[str, Any]) -> None:
        """`kubectl apply` in the team's namespace."""
        path = self._folder / "applied.json"
        path.write_text(json.dumps(body))
        self.cloud.kubectl("-n", TEAM, "apply", "-f", str(path))

    def patch(self, name: str, spec: Mapping[str, Any]) -> None:
        """`kubectl patch --type=merge` of a HatDeployment's spec."""
        self.cloud.kubectl("-n", TEAM, "patch", "hat", name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def hat(self, name: str) -> dict[str, Any]:
        """A HatDeployment."""
        return self.get(self.cloud, TEAM, "hat", name)

    def get(self, cluster: Cluster, namespace: str, kind: str, name: str) -> dict[str, Any]:
        """One object."""
        found: dict[str, Any] = json.loads(
            cluster.kubectl("-n", namespace, "get", kind, name, "-o", "json").stdout
        )
        return found

    def objects(self, cluster: Cluster, namespace: str, kind: str, labels: str = "") -> list[dict[str, Any]]:
        """Objects by label."""
        asked = ("-n", namespace, "get", kind, "-o", "json", *(("-l", labels) if labels else ()))
        found: list[dict[str, Any]] = json.loads(cluster.kubectl(*asked).stdout)["items"]
        return found

    def condition(self, name: str, kind: str = "Ready") -> tuple[str, str]:
        """Status and reason of a condition; ("", "") while it is not there."""
        for item in self.hat(name).get("status", {}).get("conditions", ()):
            if item["type"] == kind:
                return item["status"], item["reason"]
        return "", ""

    def wait(self, what: str, holds: Callable[[], Any], timeout_s: float = 180.0) -> Any:
        """Waits until `holds` gives something true, and returns it. Raises AssertionError with both clusters' state."""
        deadline = time.monotonic() + timeout_s
        while True:
            why = ""
            try:
                if found := holds():
                    return found
            # An API server on a busy machine may miss a request.
            except (KubectlError, subprocess.TimeoutExpired) as error:
                why = f": {error}"
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s:.0f} s: {what}{why}\n{self.state()}")
            time.sleep(0.5)

    def wait_ready(self, name: str, timeout_s: float = 180.0) -> None:
        """Until the HatDeployment's present generation is Ready."""

        def ready() -> bool:
            body = self.hat(name)
            seen = body.get("status", {}).get("observedGeneration") == body["metadata"]["generation"]
            return (
                seen
                and self.condition(name)[0] == "True"
                and self.condition(name, "Progressing")[0] == "False"
            )

        self.wait(f"{name} is Ready", ready, timeout_s)

    def state(self) -> str:
        """What both clusters hold, for a failed test."""
        said = []
        for cluster in (self.cloud, self.edge):
            for asked in (
                ("get", "pods,deployments,daemonsets,services", "-A", "-o", "wide"),
                ("get", "events", "-A", "--sort-by=.lastTimestamp"),
            ):
                said.append(f"--- {cluster.name}: kubectl {' '.join(asked)}")
                said += cluster.kubectl(*asked, check=False).stdout.splitlines()[-40:]
            for namespace in (SYSTEM, TEAM, SITE_NAMESPACE):
                for pod in cluster.kubectl(
                    "-n", namespace, "get", "pods", "-o", "name", check=False
                ).stdout.split():
                    said.append(f"--- {cluster.name}: log of {pod}")
                    logs = ("logs", "--all-containers", "--tail=12", pod)
                    said += cluster.kubectl("-n", namespace, *logs, check=False).stdout.splitlines()
        said.append(self.cloud.kubectl("-n", TEAM, "get", "hat", "-o", "yaml", check=False).stdout)
        return "\n".join(said)

    def ask(
        self,
        name: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 100.0,
    ) -> Any:
        """The answer of a device's API, asked on the device's node by the Service's address.

        Raises RequestError with what the client saw.
        """
        service = self.get(self.edge, SITE_NAMESPACE, "service", f"{name}-edge")
        address = f"{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}"
        return self.call(self.edge, f"http://{address}{path}", body, headers, timeout_s)

    def call(
        self,
        cluster: Cluster,
        url: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 100.0,
    ) -> Any:
        """An HTTP answer as seen from a cluster's node: JSON, or text. Raises RequestError."""
        request = {"url": url, "body": body, "headers": dict(headers or {}), "timeout": timeout_s}
        done = subprocess.run(
            [*cluster.sandbox.network_only, sys.executable, "-c", _CLIENT],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s + 20,
        )
        if done.returncode:
            raise RequestError((done.stderr.strip().splitlines() or ["no message"])[-1])
        with suppress(json.JSONDecodeError):
            return json.loads(done.stdout)
        return done.stdout

    def admin(self, name: str, path: str) -> Any:
        """JSON of a replica's admin port, asked as an operator would. Raises RequestError."""
        (replica,) = self.objects(self.cloud, TEAM, "pods", f"hat.dev/deployment={name}")
        signing = read_authority(self.get(self.cloud, TEAM, "secret", "hat-ca"), "hat.internal")
        issued = signing.authority.issue(TEAM, "operator", "test")
        file = self._folder / "operator.pem"
        file.touch(mode=0o600)
        file.write_bytes(issued.key_pem + pem(issued.certificate))
        asked = {
            "host": replica["status"]["podIP"],
            "path": path,
            "trusted": signing.bundle,
            "certificate": str(file),
        }
        done = subprocess.run(
            [*self.cloud.sandbox.network_only, sys.executable, "-c", _ADMIN],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode:
            raise RequestError((done.stderr.strip().splitlines() or ["no message"])[-1])
        return json.loads(done.stdout)

    def chat(self, name: str, prompt: str, max_tokens: int = 24, **more: Any) -> str:
        """Greedy answer of the device to one message."""
        body = {
            "model": more.pop("model", name),
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        answer = self.ask(name, "/v1/chat/completions", body, **more)
        return str(answer["choices"][0]["message"]["content"])

    def made_for(self, cluster: Cluster, name: str) -> list[str]:
        """Every object of any kind that carries the HatDeployment's label, KIND/NAME.

        But for pods' requests for certificates, which the API server forgets an hour after they were answered.
        """
        kinds = cluster.kubectl("api-resources", "--verbs=list", "-o", "name").stdout.split()
        served = ",".join(sorted(kind for kind in kinds if kind not in _NOT_LISTED))
        said = cluster.kubectl("get", served, "-A", "-l", f"hat.dev/deployment={name}", "-o", "json").stdout
        return sorted(f"{item['kind']}/{item['metadata']['name']}" for item in json.loads(said)["items"])

    def delete(self, name: str, timeout_s: float = 90.0) -> None:
        """`kubectl delete`, and waits until it is gone."""
        self.cloud.kubectl("-n", TEAM, "delete", "hat", name, "--wait=false")
        gone = ("-n", TEAM, "get", "hat", name)
        self.wait(f"{name} is deleted", lambda: self.cloud.kubectl(*gone, check=False).returncode, timeout_s)

    def site_kubeconfig(self) -> dict[str, Any]:
        """As in docs/kubernetes.md: address, authority and token of the site's account."""

        def data() -> dict[str, str] | None:
            secret = self.get(self.edge, SITE_NAMESPACE, "secret", "hat-operator-token")
            return secret.get("data")

        found = self.wait("the site's token", data, 30)
        token = base64.b64decode(found["token"]).decode()
        cluster = {"server": self.edge.server, "certificate-authority-data": found["ca.crt"]}
        context = {"cluster": "site", "user": "hat-operator", "namespace": SITE_NAMESPACE}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "site", "cluster": cluster}],
            "users": [{"name": "hat-operator", "user": {"token": token}}],
            "contexts": [{"name": "site", "context": context}],
            "current-context": "site",
        }


def load_images(node: Node, folder: Path) -> None:
    """Gives a node the images of cloud, edge and operator; `folder` is for the archive."""
    refs = [f"{REGISTRY}/hat-{side}:{tag}" for side in ("cloud", "edge", "operator") for tag in VERSIONS]
    node.load(images.write_hat(folder / f"{node.name}.tar", refs))


def fetching(pod: Mapping[str, Any]) -> list[str]:
    """Names of a pod's init containers that end: those that fetch a model."""
    found = pod["spec"].get("initContainers", ())
    return [item["name"] for item in found if item.get("restartPolicy") != "Always"]


def create(cluster: Cluster, namespace: str, body: Mapping[str, Any]) -> None:
    """`kubectl create` of one object."""
    cluster.kubectl("-n", namespace, "create", "-f", "-", stdin=json.dumps(body))


def make_claim(cluster: Cluster, namespace: str, name: str, folder: Path) -> None:
    """A volume that many nodes read, with what is in `folder`, and a claim on it; both have this name."""
    folder.chmod(0o755)
    common = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    volume = {
        **common,
        "capacity": {"storage": "1Gi"},
        "hostPath": {"path": str(folder), "type": "Directory"},
        "claimRef": {"namespace": namespace, "name": name},
    }
    wanted = {**common, "resources": {"requests": {"storage": "1Gi"}}}
    for kind, spec in {"PersistentVolume": volume, "PersistentVolumeClaim": wanted}.items():
        create(
            cluster, namespace, {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        )


class RequestError(Exception):
    """A client's request failed."""
