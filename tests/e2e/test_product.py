"""One HatDeployment on two clusters: from `kubectl apply` to an answer, and back to nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.product import OPERATOR, SITE_NAMESPACE, SYSTEM, TEAM, Product, RequestError
from tests.harness.cluster import Cluster
from tests.harness.controlplane import NODE_GRACE_S

pytestmark = [pytest.mark.timeout(1200), pytest.mark.default_model]
NAME = "smollm2"
PROMPT = "Name three rivers of Europe."
DEVICE = "edge-node"
READY_S = float(os.environ.get("HAT_READY_S", "180"))
"""From `kubectl apply` to Ready. A machine that is busy with other things may need more."""


@pytest.fixture(scope="module")
def example(product: Product) -> Iterator[Product]:
    """The example, Ready."""
    product.apply(product.example())
    started = time.monotonic()
    product.wait_ready(NAME, READY_S)
    print(f"Ready {time.monotonic() - started:.0f} s after kubectl apply")
    yield product
    if product.cloud.kubectl("-n", TEAM, "get", "hat", NAME, check=False).returncode == 0:
        product.delete(NAME)


def local_answer(folder: Path, prompt: str, max_tokens: int) -> str:
    """What the whole model says by transformers' own generate, without HAT's split."""
    from hat_runtime.model.prepare import prepare

    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"question": prompt}) + "\n")
    command = [sys.executable, "-m", "hat_runtime.cli.main", "generate", "--local", "--json"]
    command += ["--model", str(prepare("default")), "--prompts", str(prompts), "--dtype", "float32"]
    command += ["--max-new-tokens", str(max_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return str(json.loads(done.stdout)["text"])


def test_answer_is_the_whole_models(example: Product, tmp_path: Path) -> None:
    answer = example.chat(NAME, PROMPT, 32)
    assert answer.strip()
    assert answer == local_answer(tmp_path, PROMPT, 32)


def test_hidden_states_crossed_the_exposed_port(example: Product) -> None:
    """The device dials the cloud node's address; the cloud has computed what was asked of the device."""
    endpoint = example.hat(NAME)["status"]["cloud"]["endpoint"]
    host, port = endpoint.split(":")
    assert host == example.cloud.address
    services = example.objects(example.cloud, TEAM, "services", f"hat.dev/deployment={NAME}")
    ports = {port.get("nodePort") for service in services for port in service["spec"]["ports"]}
    assert int(port) in ports
    (device,) = example.objects(example.edge, SITE_NAMESPACE, "pods")
    args = device["spec"]["containers"][0]["args"]
    assert args[args.index("--cloud") + 1] == endpoint
    (replica,) = example.objects(example.cloud, TEAM, "pods")
    before = cloud_tokens(example, replica["status"]["podIP"])
    example.chat(NAME, "Hello!", 8)
    assert cloud_tokens(example, replica["status"]["podIP"]) >= before + 8


def cloud_tokens(product: Product, address: str) -> float:
    """Tokens that a replica has computed since it started, by its metrics."""
    text = str(product.call(product.cloud, f"http://{address}:7071/metrics"))
    lines = [line for line in text.splitlines() if line.startswith("hat_tokens_computed_total")]
    assert lines, text[:2000]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_both_sides_show_certificates_that_the_operator_has_signed(example: Product) -> None:
    assert example.hat(NAME)["spec"]["security"]["tls"] == "mutual"
    assert example.condition(NAME, "IdentitiesSigned") == ("True", "Signing")
    sides = ((example.edge, SITE_NAMESPACE, "device"), (example.cloud, TEAM, "cloud"))
    for cluster, namespace, kind in sides:
        asked = example.objects(cluster, namespace, "csr", f"hat.dev/deployment={NAME}")
        filed = [item for item in asked if item["spec"]["signerName"] == f"hat.dev/{kind}"]
        assert filed
        for item in filed:
            assert item["status"]["conditions"][0]["type"] == "Approved"
            assert item["status"]["certificate"]
        (pod,) = example.objects(cluster, namespace, "pods", f"hat.dev/deployment={NAME}")
        # The process that serves has no token of the API server, and so cannot ask for anything itself.
        token = "/var/run/secrets/kubernetes.io/serviceaccount"
        mounted = [item["mountPath"] for item in pod["spec"]["containers"][0]["volumeMounts"]]
        assert "/tls" in mounted
        assert token not in mounted
    (replica,) = example.objects(example.cloud, TEAM, "pods", f"hat.dev/deployment={NAME}")
    with pytest.raises(RequestError):
        example.call(example.cloud, f"http://{replica['status']['podIP']}:7071/v1/devices")
    assert example.admin(NAME, "/v1/devices")["devices"][0]["name"] == DEVICE


def test_a_denied_device_is_cut_off_in_the_middle_of_an_answer(example: Product) -> None:
    outcome: list[str] = []

    def talk() -> None:
        body = {"model": NAME, "prompt": "1 2 3 4 5 6", "max_tokens": 1800, "temperature": 0}
        try:
            example.ask(NAME, "/v1/completions", body, timeout_s=170)
            outcome.append("answered")
        except RequestError as error:
            outcome.append(str(error))

    (replica,) = example.objects(example.cloud, TEAM, "pods", f"hat.dev/deployment={NAME}")
    before = cloud_tokens(example, replica["status"]["podIP"])
    client = threading.Thread(target=talk)
    client.start()
    try:
        example.wait(
            "the answer is under way",
            lambda: cloud_tokens(example, replica["status"]["podIP"]) > before + 20,
            60,
        )
        began = time.monotonic()
        example.patch(NAME, {"security": {"deniedDevices": [DEVICE]}})
        client.join(180)
        print(f"cut off {time.monotonic() - began:.1f} s after kubectl patch: {outcome}")
        assert outcome
        assert "device_forbidden" in outcome[0]
        with pytest.raises(RequestError):
            example.chat(NAME, PROMPT, 4, timeout_s=60)
        assert [item["reason"] for item in example.objects(example.cloud, TEAM, "events")].count(
            "DevicesDenied"
        ) == 1
    finally:
        example.patch(NAME, {"security": {"deniedDevices": []}})
        client.join(180)
    example.wait("the device answers again", partial(answers, example), 60)


def test_a_pod_on_the_device_asks_by_the_services_name(example: Product) -> None:
    """The command of docs/kubernetes.md, 4."""
    (device,) = example.objects(example.edge, SITE_NAMESPACE, "pods", f"hat.dev/deployment={NAME}")
    image = device["spec"]["containers"][0]["image"]
    request = {"model": NAME, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
    program = (
        "import json, urllib.request as u; print(json.load(u.urlopen(u.Request("
        f"'http://{NAME}-edge:8000/v1/chat/completions', json.dumps({request}).encode(), "
        "{'Content-Type': 'application/json'}))))"
    )
    container = {
        "name": "ask",
        "image": image,
        "command": ["python", "-c", program],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"restartPolicy": "Never", "securityContext": security, "containers": [container]}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ask"}, "spec": spec}
    kubectl = example.edge.kubectl
    kubectl("-n", SITE_NAMESPACE, "create", "-f", "-", stdin=json.dumps(body))
    try:
        example.wait(
            "the pod that asks has ended",
            lambda: (
                example.get(example.edge, SITE_NAMESPACE, "pod", "ask")["status"]["phase"]
                in ("Succeeded", "Failed")
            ),
            60,
        )
        assert "'content'" in kubectl("-n", SITE_NAMESPACE, "logs", "ask").stdout
    finally:
        kubectl("-n", SITE_NAMESPACE, "delete", "pod", "ask", "--grace-period=1")


def test_kubectl_get_shows_what_matters(example: Product) -> None:
    said = example.cloud.kubectl("-n", TEAM, "get", "hat").stdout.splitlines()
    assert said[0].split() == ["NAME", "MODEL", "SPLIT", "CLOUD", "DEVICES", "READY", "AGE"]
    assert said[1].split()[:6] == [NAME, "default", "3", "1/1", "1/1", "True"]


def test_status_has_a_row_for_the_device(example: Product) -> None:
    (row,) = example.hat(NAME)["status"]["devices"]
    assert (row["name"], row["node"], row["phase"]) == (DEVICE, DEVICE, "Ready")


def test_helm_test(example: Product) -> None:
    example.helm.run("test", "hat", "--timeout=100s")


def test_every_pod_keeps_to_restricted_pod_security(example: Product) -> None:
    """Both namespaces enforce it, so that the pods are there says enough; and it is no empty label."""
    for cluster, namespace in (
        (example.cloud, SYSTEM),
        (example.cloud, TEAM),
        (example.edge, SITE_NAMESPACE),
    ):
        labels = example.get(cluster, "", "namespace", namespace)["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
        assert example.objects(cluster, namespace, "pods")
        refused = cluster.kubectl("-n", namespace, "run", "root", "--image=any", check=False)
        assert refused.returncode
        assert 'violates PodSecurity "restricted' in refused.stderr


def test_scale(example: Product) -> None:
    example.cloud.kubectl("-n", TEAM, "scale", "hat", NAME, "--replicas=2")
    example.wait("two replicas", lambda: example.hat(NAME)["status"]["cloud"]["summary"] == "2/2")
    scale = example.cloud.kubectl(
        "get", "--raw", f"/apis/hat.dev/v1alpha1/namespaces/{TEAM}/hatdeployments/{NAME}/scale"
    )
    status = json.loads(scale.stdout)["status"]
    assert status["replicas"] == 2
    assert len(example.objects(example.cloud, TEAM, "pods", status["selector"])) == 2
    example.cloud.kubectl("-n", TEAM, "scale", "hat", NAME, "--replicas=1")
    example.wait("one replica", lambda: example.hat(NAME)["status"]["cloud"]["summary"] == "1/1")


def answers(product: Product) -> bool:
    """Whether the device's Service leads to an answer.

    A connection tried before kube-proxy has its rules never gets one: the kernel has settled where it goes.
    """
    try:
        return bool(product.chat(NAME, PROMPT, 4, timeout_s=10))
    except RequestError:
        return False


def test_operators_pod_is_killed(example: Product) -> None:
    """Devices answer without it, and the next one takes over: a child deleted meanwhile is back."""
    labels = "app.kubernetes.io/component=operator"
    (pod,) = example.objects(example.cloud, SYSTEM, "pods", labels)
    example.cloud.kubectl(
        "-n", SYSTEM, "delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force"
    )
    example.edge.kubectl("-n", SITE_NAMESPACE, "delete", "service", f"{NAME}-edge")
    example.wait(
        "the Service is back",
        lambda: example.objects(example.edge, SITE_NAMESPACE, "services", f"hat.dev/deployment={NAME}"),
        90,
    )
    (device,) = example.objects(example.edge, SITE_NAMESPACE, "pods", f"hat.dev/deployment={NAME}")
    assert device["status"]["containerStatuses"][0]["restartCount"] == 0
    example.wait("kube-proxy knows the new Service", partial(answers, example), 60)
    deployment = ("-n", SYSTEM, "rollout", "status", f"deployment/{OPERATOR}", "--timeout=50s")
    example.cloud.kubectl(*deployment)


def test_a_device_is_lost_and_comes_back(example: Product) -> None:
    (before,) = example.objects(example.edge, SITE_NAMESPACE, "pods", f"hat.dev/deployment={NAME}")
    example.edge.node.stop_kubelet()
    try:
        example.edge.wait_node(ready=False, timeout_s=NODE_GRACE_S + 60)

        def phase() -> str:
            (row,) = example.hat(NAME)["status"]["devices"]
            return str(row["phase"])

        example.wait("the device's row says Lost", lambda: phase() == "Lost", 90)
        (pod,) = example.objects(example.edge, SITE_NAMESPACE, "pods", f"hat.dev/deployment={NAME}")
        assert pod["metadata"]["uid"] == before["metadata"]["uid"]
        assert "deletionTimestamp" not in pod["metadata"]
    finally:
        example.edge.node.resume_kubelet()
    example.edge.wait_node(ready=True)
    example.wait("the device's row says Ready", lambda: phase() == "Ready", 90)
    (pod,) = example.objects(example.edge, SITE_NAMESPACE, "pods", f"hat.dev/deployment={NAME}")
    assert pod["metadata"]["uid"] == before["metadata"]["uid"]
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
    assert example.chat(NAME, PROMPT, 4)


def test_deletion_leaves_nothing(example: Product) -> None:
    assert example.made_for(example.cloud, NAME)
    assert example.made_for(example.edge, NAME)
    example.delete(NAME)
    for cluster in (example.cloud, example.edge):
        example.wait(
            f"nothing of {NAME} is left in {cluster.name}", partial(has_nothing, example, cluster), 90
        )


def has_nothing(product: Product, cluster: Cluster) -> bool:
    return not product.made_for(cluster, NAME)
