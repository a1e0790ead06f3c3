"""Fields of a HatDeployment, each seen in running pods. Weights come from claims, as at a site without internet."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import pytest

from tests.e2e.product import (
    REGISTRY,
    SITE_NAMESPACE,
    TEAM,
    Product,
    RequestError,
    create,
    fetching,
    make_claim,
)
from tests.harness.cluster import Cluster
from tests.operator.manifests import hat_deployment

pytestmark = [pytest.mark.timeout(900), pytest.mark.default_model, pytest.mark.long]
NAME = "tuned"
MODEL = "house-model"
KEY = uuid.uuid4().hex
LAYERS = 4
MEMORY = 3000 * 2**20
NODE_PORT = 31070
OTHER_IMAGE = f"{REGISTRY}/hat-edge:0.1.0"
QUESTION = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2, "model": MODEL}
TEMPLATE = {
    "labels": {"example.com/team": "a"},
    "annotations": {"example.com/note": "tuned"},
    "nodeSelector": {"example.com/rack": "7"},
    "tolerations": [{"key": "example.com/hat-only", "operator": "Exists", "effect": "NoSchedule"}],
    "priorityClassName": "precious",
}
RESOURCES = {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"memory": str(MEMORY)}}
CHANGES: dict[str, Any] = {
    "metadata.name": NAME,
    "spec.model": {"source": {"claim": {"name": "weights", "path": "part"}}, "dtype": "bfloat16"},
    "spec.split.inputLayers": LAYERS,
    "spec.runtime": {"version": "0.1.1"},
    "spec.cloud.image": f"{REGISTRY}/hat-cloud:0.1.0",
    "spec.cloud.expose.port": 7171,
    "spec.cloud.expose.nodePort": NODE_PORT,
    "spec.cloud.maxSessions": 7,
    "spec.cloud.quotas": {"deviceDefault": {"sessions": 6}},
    "spec.cloud.resources": RESOURCES,
    "spec.cloud.template": TEMPLATE,
    "spec.edge.weights": {"claim": {"name": "weights", "path": "part"}},
    "spec.edge.clusterRef.kubeconfigSecretRef": {"name": "sites", "context": "site"},
    "spec.edge.images": [{"name": "pc", "arch": "amd64"}, {"name": "orin", "l4t": "r36.4"}],
    "spec.edge.runtimeClassName": "nvidia",
    "spec.edge.resources": RESOURCES,
    "spec.edge.template": TEMPLATE,
    "spec.edge.api": {"port": 9000, "modelName": MODEL, "keySecretRef": {"name": "api-keys", "key": "list"}},
    "spec.chunking": {"mode": "fixed", "tokens": 64},
    "spec.imagePullSecrets": [{"name": "registry"}],
    "spec.security.networkPolicies": False,
    "spec.observability.logLevel": "debug",
}


@pytest.fixture(scope="module")
def tuned(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """A HatDeployment with nearly every field set, and all that it refers to; Ready."""
    from hat_runtime.model.prepare import prepare

    part: Literal["cloud", "device"]
    for cluster, namespace, part in (
        (product.cloud, TEAM, "cloud"),
        (product.edge, SITE_NAMESPACE, "device"),
    ):
        folder = tmp_path_factory.mktemp(part)
        prepare("default", out=folder / "part", part=part, input_layers=LAYERS, dtype="bfloat16")
        make_claim(cluster, namespace, "weights", folder)
        # A taint that only the templates' toleration passes, and the label that they select.
        cluster.kubectl("label", "node", cluster.node.name, "example.com/rack=7")
        cluster.kubectl("create", "priorityclass", "precious", "--value=1000")
        cluster.kubectl("-n", namespace, "create", "secret", "generic", "registry")
    sites = product.site_kubeconfig()
    sites["clusters"].append({"name": "gone", "cluster": {"server": "https://192.0.2.1"}})
    sites["contexts"].append({"name": "gone", "context": {"cluster": "gone", "user": "hat-operator"}})
    sites["current-context"] = "gone"
    secret = f"--from-literal=kubeconfig={json.dumps(sites)}"
    product.cloud.kubectl("-n", TEAM, "create", "secret", "generic", "sites", secret)
    runtime_class = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "runc"}
    create(product.edge, "", {**runtime_class, "metadata": {"name": "nvidia"}})
    keys = ("create", "secret", "generic", "api-keys", f"--from-literal=list={KEY}")
    product.edge.kubectl("-n", SITE_NAMESPACE, *keys)
    body = product.example(**{key.replace(".", "__"): value for key, value in CHANGES.items()})
    for cluster in (product.cloud, product.edge):
        cluster.kubectl("taint", "node", cluster.node.name, "example.com/hat-only=yes:NoSchedule")
    try:
        product.apply(body)
        product.wait_ready(NAME, 300)
        yield product
        product.delete(NAME)
    finally:
        for cluster in (product.cloud, product.edge):
            cluster.kubectl("taint", "node", cluster.node.name, "example.com/hat-only-", check=False)


def pods(product: Product) -> list[dict[str, Any]]:
    """The cloud's pod and the device's."""
    (cloud,) = product.objects(product.cloud, TEAM, "pods", f"hat.dev/deployment={NAME}")
    (device,) = product.objects(product.edge, SITE_NAMESPACE, "pods", f"hat.dev/deployment={NAME}")
    return [cloud, device]


def command_line(product: Product, cluster: Cluster, pod: dict[str, Any]) -> list[str]:
    """Arguments of the pod's process, from its node."""
    meta = pod["metadata"]
    said = cluster.kubectl("-n", meta["namespace"], "exec", meta["name"], "--", "cat", "/proc/1/cmdline")
    return said.stdout.split("\0")


def test_source_claim_split_dtype_and_sessions(tuned: Product) -> None:
    """The process serves what the spec says: asked of itself, and of its command line."""
    cloud, device = pods(tuned)
    assert fetching(cloud) == []
    assert fetching(device) == []
    told = command_line(tuned, tuned.cloud, cloud)
    assert told[told.index("--max-sessions") + 1] == "7"
    address = cloud["status"]["podIP"]
    metrics = str(tuned.call(tuned.cloud, f"http://{address}:7071/metrics"))
    (model,) = [line for line in metrics.splitlines() if line.startswith("hat_model_info{")]
    assert 'dtype="bfloat16"' in model
    assert f'layers="{LAYERS}:30"' in model, model


def test_images_and_version(tuned: Product) -> None:
    cloud, device = pods(tuned)
    assert cloud["spec"]["containers"][0]["image"] == f"{REGISTRY}/hat-cloud:0.1.0"
    assert device["spec"]["containers"][0]["image"] == f"{REGISTRY}/hat-edge:0.1.1"


def test_images_by_kind_of_device(tuned: Product) -> None:
    """One DaemonSet for each; the node is no Jetson. An image of its own comes to the devices of its kind."""
    label = f"hat.dev/deployment={NAME}"
    found = tuned.objects(tuned.edge, SITE_NAMESPACE, "daemonsets", label)
    wanted = {item["metadata"]["name"]: item["status"]["desiredNumberScheduled"] for item in found}
    assert wanted == {f"{NAME}-edge-pc": 1, f"{NAME}-edge-orin": 0}
    tuned.patch(NAME, {"edge": {"images": [{"name": "pc", "arch": "amd64", "image": OTHER_IMAGE}]}})
    tuned.wait_ready(NAME, 300)
    _, device = pods(tuned)
    assert device["spec"]["containers"][0]["image"] == OTHER_IMAGE
    (left,) = tuned.objects(tuned.edge, SITE_NAMESPACE, "daemonsets", label)
    assert left["metadata"]["name"] == f"{NAME}-edge-pc"


def test_expose_port_and_node_port(tuned: Product) -> None:
    """The device's process dials the node port, and answers: see the API's test."""
    service = tuned.get(tuned.cloud, TEAM, "service", f"{NAME}-cloud")
    (port,) = service["spec"]["ports"]
    assert (port["port"], port["nodePort"]) == (7171, NODE_PORT)
    _, device = pods(tuned)
    told = command_line(tuned, tuned.edge, device)
    assert told[told.index("--cloud") + 1] == f"{tuned.cloud.address}:{NODE_PORT}"


def test_template(tuned: Product) -> None:
    """Both pods run on nodes that only the template's toleration and selector lead them to."""
    for pod in pods(tuned):
        assert pod["metadata"]["labels"]["example.com/team"] == "a"
        assert pod["metadata"]["annotations"]["example.com/note"] == "tuned"
        assert pod["spec"]["nodeSelector"]["example.com/rack"] == "7"
        assert pod["spec"]["priority"] == 1000
        assert pod["status"]["phase"] == "Running"


def test_resources_are_the_containers_limits(tuned: Product) -> None:
    for cluster, pod in zip((tuned.cloud, tuned.edge), pods(tuned), strict=True):
        meta = pod["metadata"]
        files = ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max")
        read = ("sh", "-c", f"cat {files[0]} 2>/dev/null || cat {files[1]}")
        said = cluster.kubectl("-n", meta["namespace"], "exec", meta["name"], "--", *read)
        assert int(said.stdout) == MEMORY


def test_api_port_key_and_model_name(tuned: Product) -> None:
    service = tuned.get(tuned.edge, SITE_NAMESPACE, "service", f"{NAME}-edge")
    assert service["spec"]["ports"][0]["port"] == 9000
    with pytest.raises(RequestError, match="401"):
        tuned.ask(NAME, "/v1/chat/completions", QUESTION)
    key = {"Authorization": f"Bearer {KEY}"}
    assert tuned.ask(NAME, "/v1/chat/completions", QUESTION, key)["usage"]["completion_tokens"] == 2
    assert [model["id"] for model in tuned.ask(NAME, "/v1/models", None, key)["data"]] == [MODEL]


def test_quotas_change_without_a_restart(tuned: Product) -> None:
    """A device over its limit is told which one; the pods are the same before, meanwhile and after."""
    key = {"Authorization": f"Bearer {KEY}"}

    def answer() -> str:
        """Of a text that shares no beginning with the ones before: no session that is open can go on with it."""
        body = {"prompt": uuid.uuid4().hex, "max_tokens": 2, "model": MODEL}
        try:
            return str(tuned.ask(NAME, "/v1/completions", body, key)["usage"]["completion_tokens"])
        except RequestError as error:
            return str(error)

    def containers() -> list[str]:
        """Each start of a container has an id of its own."""
        return [status["containerID"] for pod in pods(tuned) for status in pod["status"]["containerStatuses"]]

    assert answer() == "2"
    before = containers()
    device = tuned.edge.node.name
    tuned.patch(NAME, {"cloud": {"quotas": {"devices": [{"name": device, "sessions": 0}]}}})
    try:
        # The kubelet brings a ConfigMap into a pod at its next look at it, once in a minute or so.
        refusal = tuned.wait("it is refused", lambda: (said := answer()) != "2" and said, 240)
        assert "429" in refusal, refusal
        assert f"device '{device}' has all sessions that its quota sessions=0 gives" in refusal
    finally:
        tuned.patch(NAME, {"cloud": {"quotas": {"devices": [{"name": device, "unlimited": ["sessions"]}]}}})
    tuned.wait("it is answered again", lambda: answer() == "2", 240)
    assert containers() == before


def test_chunk_tokens(tuned: Product) -> None:
    _, device = pods(tuned)
    told = command_line(tuned, tuned.edge, device)
    assert told[told.index("--chunk-tokens") + 1] == "64"


def test_log_level(tuned: Product) -> None:
    for cluster, pod in zip((tuned.cloud, tuned.edge), pods(tuned), strict=True):
        told = command_line(tuned, cluster, pod)
        assert told[told.index("--log-level") + 1] == "debug"


def test_runtime_class_and_pull_secrets(tuned: Product) -> None:
    cloud, device = pods(tuned)
    assert device["spec"]["runtimeClassName"] == "nvidia"
    assert "runtimeClassName" not in cloud["spec"]
    for pod in (cloud, device):
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]


def test_network_policies_off(tuned: Product) -> None:
    for cluster, namespace in ((tuned.cloud, TEAM), (tuned.edge, SITE_NAMESPACE)):
        assert not tuned.objects(cluster, namespace, "networkpolicies", f"hat.dev/deployment={NAME}")


def test_device_selector(tuned: Product) -> None:
    """A node that is no device any more loses its pod and its row; and gets them back."""
    node = tuned.edge.node.name
    tuned.edge.kubectl("label", "node", node, "hat.dev/device-")
    try:
        tuned.wait("no device", lambda: tuned.hat(NAME)["status"]["edge"]["summary"] == "0/0", 90)
        selected = partial(tuned.objects, tuned.edge, SITE_NAMESPACE, "pods", f"hat.dev/deployment={NAME}")
        tuned.wait("no pod", lambda: not selected(), 60)
    finally:
        tuned.edge.kubectl("label", "node", node, "hat.dev/device=true")
    tuned.wait_ready(NAME, 300)


def test_host_port_is_refused_by_restricted_pod_security(tuned: Product) -> None:
    """The field's text says so; the condition names the reason."""
    tuned.patch(NAME, {"edge": {"api": {"hostPort": 8000}}})
    try:
        reason = ("False", "PodsRefused")
        tuned.wait("a condition tells of it", lambda: tuned.condition(NAME, "EdgeReady") == reason, 90)
        assert "hostPort" in json.dumps(tuned.hat(NAME)["status"]["conditions"])
    finally:
        tuned.patch(NAME, {"edge": {"api": {"hostPort": 0}}})
    tuned.wait_ready(NAME, 300)


def test_suspend(tuned: Product) -> None:
    tuned.patch(NAME, {"suspend": True})
    for cluster, namespace in ((tuned.cloud, TEAM), (tuned.edge, SITE_NAMESPACE)):
        left = partial(tuned.objects, cluster, namespace, "pods", f"hat.dev/deployment={NAME}")
        tuned.wait(f"no pod in {cluster.name}", lambda left=left: not left(), 90)  # type: ignore[misc]
    tuned.patch(NAME, {"suspend": False})
    tuned.wait_ready(NAME, 300)


def test_hub_revision_and_token(tuned: Product) -> None:
    """A replica waits for the token's Secret, and then asks the hub, which cannot be reached here, for the revision."""
    model = {
        "source": {"hub": "example/none"},
        "revision": "v2",
        "tokenSecretRef": {"name": "hub", "key": "token"},
    }
    tuned.apply(hat_deployment("gated", model=model, cloud={"resources": RESOURCES, "template": TEMPLATE}))
    try:
        of_pod = partial(tuned.objects, tuned.cloud, TEAM, "pods", "hat.dev/deployment=gated")
        tuned.wait("a pod", of_pod, 60)
        time.sleep(5)
        (pod,) = of_pod()
        assert "startedAt" not in json.dumps(pod["status"]), "it runs without its Secret"
        tuned.cloud.kubectl("-n", TEAM, "create", "secret", "generic", "hub", "--from-literal=token=hf_x")
        name = pod["metadata"]["name"]
        logs = ("-n", TEAM, "logs", "-c", "prepare", name)

        def log() -> str:
            return tuned.cloud.kubectl(*logs, check=False).stdout

        tuned.wait("the log names model and revision", lambda: "example/none" in log() and "v2" in log(), 200)
    finally:
        tuned.delete("gated")
