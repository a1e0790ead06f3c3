"""The HatDeployment API on a real apiserver: what it takes, fills in, refuses and explains."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from kubernetes import client as kube

from tests.harness.controlplane import ControlPlane
from tests.operator.conftest import ROOT
from tests.operator.manifests import (
    GROUP,
    PLURAL,
    QUOTAS,
    REMOVED,
    VERSION,
    changed,
    hat_deployment,
    token_mode,
    two_clusters,
)
from tests.operator.running import eventually
from tests.operator.wrong_specs import WRONG

EXAMPLES = sorted(
    path for path in (ROOT / "examples").rglob("*.yaml") if "\nkind: HatDeployment\n" in path.read_text()
)
DEFAULTS = {
    "mode": "hat",
    "suspend": False,
    "model": {"source": {"hub": "default"}, "revision": "", "dtype": "bfloat16"},
    "split": {"inputLayers": 3},
    "runtime": {"version": ""},
    "cloud": {
        "replicas": 1,
        "accelerator": {"type": "none", "count": 0},
        "runtimeClassName": "",
        "tensorParallel": 1,
        "maxSessions": 64,
        "image": "",
        "expose": {"type": "ClusterIP", "host": "", "port": 7070, "nodePort": 0},
        "template": {},
    },
    "speculation": {"drafter": "auto", "branches": 1, "sampler": "coupled"},
    "chunking": {"mode": "auto", "minTokens": 64, "maxTokens": 512},
    "wire": {"uplink": "none", "uplinkDecode": "none", "padFrames": False, "downlink": "none"},
    "security": {"networkPolicies": True, "tls": "", "certificateHours": 24},
    "observability": {"logLevel": "info", "podMonitor": "auto", "prometheusUrl": ""},
}
EDGE_DEFAULTS = {
    "clusterRef": {
        "kubeconfigSecretRef": {"name": "site", "key": "kubeconfig", "context": ""},
        "namespace": "devices",
    },
    "deviceSelector": {"matchLabels": {"hat.dev/device": "true"}},
    "images": [
        {"name": "orin", "l4t": "r36.4", "arch": "arm64", "image": ""},
        {"name": "pc", "l4t": "", "arch": "amd64", "image": ""},
    ],
    "runtimeClassName": "",
    "accelerator": {"type": "none"},
    "api": {"port": 8000, "hostPort": 0, "modelName": ""},
    "weights": {"claim": {"name": "part", "path": "."}},
    "template": {},
    "offline": "refuse",
    "deletionTimeoutSeconds": 300,
}
NOW = "2026-01-02T03:04:05Z"
STATUS = {
    "observedGeneration": 1,
    "model": "default",
    "conditions": [
        {
            "type": "Ready",
            "status": "False",
            "reason": "CloudNotReady",
            "message": "1 of 2 replicas serve",
            "lastTransitionTime": NOW,
            "observedGeneration": 1,
        }
    ],
    "cloud": {
        "replicas": 2,
        "ready": 1,
        "summary": "1/2",
        "selector": "hat.dev/deployment=chat",
        "endpoint": "chat-cloud.default.svc:7070",
        "revision": "0123abcd",
    },
    "edge": {"wanted": 1, "ready": 0, "summary": "0/1"},
    "devices": [{"name": "orin-1", "node": "orin-1", "l4t": "r36.4", "phase": "Pending", "lastSeen": NOW}],
}


class Hats:
    """The HatDeployments of one namespace, with strict checking of fields as kubectl asks for it."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self._api = kube.CustomObjectsApi(plane.client())
        self._place = (GROUP, VERSION, namespace, PLURAL)

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._api.create_namespaced_custom_object(*self._place, body, field_validation="Strict")

    def get(self, name: str = "chat") -> dict[str, Any]:
        return self._api.get_namespaced_custom_object(*self._place, name)

    def replace(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["metadata"]["name"]
        return self._api.replace_namespaced_custom_object(*self._place, name, body, field_validation="Strict")

    def replace_status(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["metadata"]["name"]
        return self._api.replace_namespaced_custom_object_status(
            *self._place, name, body, field_validation="Strict"
        )

    def refusal(self, call: Any, body: dict[str, Any]) -> str:
        """The message with which the apiserver refuses `call(body)`."""
        with pytest.raises(kube.ApiException) as caught:
            call(body)
        assert caught.value.status in (400, 422), caught.value
        return str(json.loads(caught.value.body)["message"])


@pytest.fixture
def hats(control_plane: ControlPlane, namespace: str) -> Hats:
    return Hats(control_plane, namespace)


@pytest.fixture(scope="module")
def shared_hats(control_plane: ControlPlane) -> Iterator[Hats]:
    """For tests that leave nothing behind."""
    with control_plane.namespace() as name:
        yield Hats(control_plane, name)


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(ROOT / "examples").as_posix())
def test_example_is_accepted(control_plane: ControlPlane, namespace: str, path: Any) -> None:
    documents = [document for document in yaml.safe_load_all(path.read_text()) if document]
    assert documents
    control_plane.kubectl("create", "--validate=strict", "-n", namespace, "-f", str(path))
    control_plane.kubectl("delete", "--wait=false", "-n", namespace, "-f", str(path))


def test_defaults_are_filled_in(hats: Hats) -> None:
    assert hats.create(hat_deployment())["spec"] == DEFAULTS


def test_defaults_of_the_edge_are_filled_in(hats: Hats) -> None:
    assert hats.create(two_clusters())["spec"]["edge"] == EDGE_DEFAULTS


def test_a_claim_means_the_root_of_its_volume(hats: Hats) -> None:
    body = changed(hat_deployment(), {"spec.model.source": {"claim": {"name": "weights"}}})
    assert hats.create(body)["spec"]["model"]["source"] == {"claim": {"name": "weights", "path": "."}}


@pytest.mark.parametrize("name", WRONG)
def test_mistake_is_refused_with_its_reason(shared_hats: Hats, name: str) -> None:
    wrong = WRONG[name]
    message = shared_hats.refusal(shared_hats.create, wrong.body)
    for part in wrong.says:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"spec.model.source.hub": "org/other"}, "model.source: cannot be changed"),
        ({"spec.model.source": {"claim": {"name": "weights"}}}, "model.source: cannot be changed"),
        ({"spec.runtime.version": ""}, "runtime.version: may be changed but not removed"),
        ({"spec.runtime": REMOVED}, "runtime.version: may be changed but not removed"),
        ({"spec.security.tls": ""}, "security.tls: may be changed but not removed"),
    ],
    ids=["other-hub-model", "hub-to-claim", "version-empty", "runtime-removed", "tls-empty"],
)
def test_change_is_refused(hats: Hats, changes: dict[str, Any], says: str) -> None:
    live = hats.create(hat_deployment(runtime={"version": "0.1.0"}, security={"tls": "mutual"}))
    assert says in hats.refusal(hats.replace, changed(live, changes))


def test_claim_of_the_source_cannot_change(hats: Hats) -> None:
    live = hats.create(two_clusters())
    for field in ("name", "path"):
        message = hats.refusal(hats.replace, changed(live, {f"spec.model.source.claim.{field}": "other"}))
        assert "model.source: cannot be changed" in message


@pytest.mark.parametrize("field", ["spec.edge", "spec.edge.clusterRef"])
def test_edge_cannot_leave_its_cluster(hats: Hats, field: str) -> None:
    live = hats.create(two_clusters())
    assert "edge: cannot be removed" in hats.refusal(hats.replace, changed(live, {field: REMOVED}))


@pytest.mark.parametrize("value", ["elsewhere", REMOVED], ids=["other", "removed"])
def test_edge_namespace_cannot_change(hats: Hats, value: Any) -> None:
    live = hats.create(two_clusters())
    message = hats.refusal(hats.replace, changed(live, {"spec.edge.clusterRef.namespace": value}))
    assert "edge.clusterRef.namespace: cannot be changed" in message


def test_the_longest_key_of_a_label(hats: Hats) -> None:
    labels = {f"{'a' * 249}.dev/{'b' * 63}": "true"}
    found = hats.create(hat_deployment(edge={"deviceSelector": {"matchLabels": labels}}))
    assert found["spec"]["edge"]["deviceSelector"]["matchLabels"] == labels


def test_everything_else_can_change(hats: Hats) -> None:
    live = hats.create(two_clusters())
    for changes in (
        {"spec.runtime.version": "0.1.0"},
        {"spec.runtime.version": "0.2.0"},
        {"spec.model.dtype": "float32"},
        {"spec.split.inputLayers": 4},
        {"spec.cloud.replicas": 0, "spec.suspend": True},
        {"spec.edge.images": [{"name": "pc", "arch": "amd64"}]},
        {"spec.edge.clusterRef.kubeconfigSecretRef.name": "site-2"},
        {"spec.speculation": SPECULATION, "spec.wire": WIRE},
        {"spec.speculation": {"drafter": "none"}},
    ):
        live = hats.replace(changed(live, changes))
    assert live["metadata"]["generation"] == 10


SPECULATION = {
    "drafter": "hybrid",
    "maxDraft": 32,
    "stopThreshold": 0.35,
    "window": 16,
    "branches": 8,
    "alternatives": 8,
    "sampler": "rejection",
}
WIRE = {"uplink": "int4", "uplinkDecode": "bf16", "padFrames": True, "downlink": "none"}


def test_drafting_and_codecs_are_kept_as_written(hats: Hats) -> None:
    spec = hats.create(hat_deployment(speculation=SPECULATION, wire=WIRE))["spec"]
    assert (spec["speculation"], spec["wire"]) == (SPECULATION, WIRE)


@pytest.mark.parametrize(
    ("speculation", "wire"),
    [
        *(({"drafter": name}, {}) for name in ("auto", "none", "ngram", "adapter", "feature", "hybrid")),
        *(({}, {"uplink": name, "uplinkDecode": name}) for name in ("none", "bf16", "int8", "int4")),
        *(({"stopThreshold": value}, {}) for value in (0, 1, 0.5)),
        ({"maxDraft": 1, "window": 1, "branches": 1}, {}),
        # As it stands in an object of the version before, which knew one value of each.
        ({"drafter": "none"}, {"uplink": "none", "downlink": "none"}),
    ],
    ids=str,
)
def test_values_of_drafting_and_codecs(
    control_plane: ControlPlane, namespace: str, speculation: dict[str, Any], wire: dict[str, Any]
) -> None:
    body = hat_deployment(speculation=speculation, wire=wire)
    spec = Hats(control_plane, namespace).create(body)["spec"]
    assert spec["speculation"] == DEFAULTS["speculation"] | speculation  # type: ignore[operator]
    assert spec["wire"] == DEFAULTS["wire"] | wire  # type: ignore[operator]


@pytest.mark.parametrize(
    "speculation",
    [
        *({"sampler": name} for name in ("coupled", "thinning", "topk")),
        *({"maxDraft": drafts, "window": window} for drafts, window in ((0, 16), (32, 2), (4, 16))),
        {"maxDraft": 32},
        {"window": 16},
        {"draftModel": {"hub": "org/small"}},
        {"draftModel": {"claim": {"name": "drafts", "path": "small"}}},
    ],
    ids=str,
)
def test_values_of_token_mode(hats: Hats, speculation: dict[str, Any]) -> None:
    found = hats.create(changed(token_mode(), {"spec.speculation": speculation}))["spec"]
    assert found["speculation"] == DEFAULTS["speculation"] | speculation  # type: ignore[operator]
    assert (found["mode"], "split" in found) == ("picospec", False)


@pytest.mark.parametrize(
    "url",
    [
        "http://prometheus:9090",
        "https://prometheus.example.com/tenant-a/",
        "http://10.0.0.9",
        "https://[2001:db8::9]:9090/a_b~c/%20",
    ],
)
def test_prometheus_servers_are_kept_as_written(hats: Hats, url: str) -> None:
    observability: dict[str, Any] = {"prometheusUrl": url}
    if url.startswith("https"):
        observability |= {"prometheusTokenSecretRef": {"name": "reader"}, "prometheusCaRef": {"name": "ca"}}
    found = hats.create(hat_deployment(observability=observability))["spec"]["observability"]
    assert found["prometheusUrl"] == url
    if url.startswith("https"):
        assert found["prometheusTokenSecretRef"] == {"name": "reader", "key": "token"}
        assert found["prometheusCaRef"] == {"kind": "ConfigMap", "name": "ca", "key": "ca.crt"}


@pytest.mark.parametrize(
    "quotas", [QUOTAS, {}, {"tenantDefault": {}, "devices": []}], ids=["all", "none", "empty"]
)
def test_quotas_are_kept_as_written(hats: Hats, quotas: dict[str, Any]) -> None:
    assert hats.create(hat_deployment(cloud={"quotas": quotas}))["spec"]["cloud"]["quotas"] == quotas


def test_quotas_can_come_change_and_go(hats: Hats) -> None:
    live = hats.create(hat_deployment())
    assert "quotas" not in live["spec"]["cloud"]
    for changes in (
        {"spec.cloud.quotas": {}},
        {"spec.cloud.quotas": QUOTAS},
        {"spec.cloud.quotas.devices": [], "spec.cloud.quotas.deviceDefault.sessions": 0},
        {"spec.cloud.quotas": REMOVED},
    ):
        live = hats.replace(changed(live, changes))
    assert live["metadata"]["generation"] == 5


def test_null_is_no_limit_that_could_be_kept(hats: Hats) -> None:
    """The reason for `unlimited`: what null stands for in a quota file would be the default's limit here."""
    device = {"name": "jetson-1", "sessions": None}
    live = hats.create(hat_deployment(cloud={"quotas": {"devices": [device]}}))
    assert live["spec"]["cloud"]["quotas"]["devices"] == [{"name": "jetson-1"}]


def test_a_thousand_names_fit(hats: Hats) -> None:
    """And the rules over all of them cost less than an apiserver allows."""
    one = {"sessions": 1, "burstTokens": 1.5, "unlimited": ["kvShare"]}
    full = [{**one, "name": f"{index:060}"} for index in range(1000)]
    default = {"tokensPerSecond": 1}
    quotas = {"tenantDefault": default, "deviceDefault": default, "tenants": full, "devices": full}
    assert hats.create(hat_deployment(cloud={"quotas": quotas}))["spec"]["cloud"]["quotas"] == quotas
    quotas["devices"] = [*full[:-1], {**full[-1], "unlimited": ["tokensPerSecond"]}]
    message = hats.refusal(hats.create, hat_deployment("other", cloud={"quotas": quotas}))
    assert "cloud.quotas.devices: burstTokens goes with tokensPerSecond" in message


def test_devices_of_token_mode_may_go_on_without_the_cloud(hats: Hats) -> None:
    edge = {"deviceSelector": {"matchLabels": {"hat.dev/device": "true"}}, "offline": "draft-only"}
    assert hats.create(changed(token_mode(), {"spec.edge": edge}))["spec"]["edge"]["offline"] == "draft-only"


def test_token_mode_without_devices_needs_no_draft_model(hats: Hats) -> None:
    source = {"spec.model.source": {"claim": {"name": "weights"}}, "spec.edge": REMOVED}
    assert hats.create(changed(token_mode(), source))["spec"]["mode"] == "picospec"


def test_the_mode_can_change_and_back(hats: Hats) -> None:
    live = hats.create(hat_deployment(edge=token_mode()["spec"]["edge"]))
    live = hats.replace(changed(live, {"spec.mode": "picospec", "spec.split": REMOVED}))
    live = hats.replace(changed(live, {"spec.speculation": {"maxDraft": 2, "sampler": "thinning"}}))
    assert "split: required in mode hat" in hats.refusal(hats.replace, changed(live, {"spec.mode": "hat"}))
    back = {"spec.mode": "hat", "spec.split": {"inputLayers": 3}, "spec.speculation": {}}
    assert hats.replace(changed(live, back))["metadata"]["generation"] == 4


def test_scale_subresource(control_plane: ControlPlane, hats: Hats, namespace: str) -> None:
    live = hats.create(hat_deployment())
    hats.replace_status({**live, "status": STATUS})
    control_plane.kubectl("scale", "hat/chat", "--replicas=3", "-n", namespace)
    assert hats.get()["spec"]["cloud"]["replicas"] == 3
    path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/chat/scale"
    scale = json.loads(control_plane.kubectl("get", "--raw", path).stdout)
    assert scale["spec"] == {"replicas": 3}
    assert scale["status"] == {"replicas": 2, "selector": STATUS["cloud"]["selector"]}


def test_an_autoscaler_drives_the_replicas(control_plane: ControlPlane, hats: Hats, namespace: str) -> None:
    """Kubernetes' own controller, within its bounds: those it holds without a metrics API, which is not served here."""
    live = hats.create(hat_deployment())
    hats.replace_status({**live, "status": STATUS})
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    (text,) = (block for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "Autoscaler" in block)
    scaler = yaml.safe_load(text)
    scaler["metadata"] = {"name": "chat"}
    scaler["spec"] |= {"minReplicas": 3, "maxReplicas": 4}
    scaler["spec"]["scaleTargetRef"]["name"] = "chat"
    control_plane.kubectl("-n", namespace, "apply", "-f", "-", stdin=json.dumps(scaler))
    eventually(lambda: hats.get()["spec"]["cloud"]["replicas"] == 3, "up to minReplicas")
    hats.replace(changed(hats.get(), {"spec.cloud.replicas": 9}))
    eventually(lambda: hats.get()["spec"]["cloud"]["replicas"] == 4, "down to maxReplicas")


def test_status_is_kept_whole(hats: Hats) -> None:
    live = hats.create(hat_deployment())
    assert "status" not in live
    after = hats.replace_status({**live, "status": STATUS})
    assert after["status"] == STATUS
    assert after["metadata"]["generation"] == live["metadata"]["generation"]


def test_spec_and_status_are_written_apart(hats: Hats) -> None:
    live = hats.create({**hat_deployment(), "status": STATUS})
    assert "status" not in live
    after = hats.replace_status(changed({**live, "status": STATUS}, {"spec.cloud.replicas": 9}))
    assert after["spec"]["cloud"]["replicas"] == 1


def test_unknown_field_of_the_status_is_refused(hats: Hats) -> None:
    live = hats.create(hat_deployment())
    message = hats.refusal(hats.replace_status, {**live, "status": {"cloud": {"redy": 1}}})
    assert 'unknown field "status.cloud.redy"' in message


def test_table_shows_what_matters(control_plane: ControlPlane, hats: Hats, namespace: str) -> None:
    live = hats.create(hat_deployment())
    hats.replace_status({**live, "status": STATUS})
    header, row = control_plane.kubectl("get", "hat", "-n", namespace, "-o", "wide").stdout.splitlines()
    assert header.split() == ["NAME", "MODEL", "SPLIT", "CLOUD", "DEVICES", "READY", "MODE", "REASON", "AGE"]
    assert row.split()[:-1] == ["chat", "default", "3", "1/2", "0/1", "False", "hat", "CloudNotReady"]


def openapi(plane: ControlPlane) -> dict[str, Any]:
    """The schema of a HatDeployment as `kubectl explain` gets it; published a moment after the CRD."""
    deadline = time.monotonic() + 30
    while True:
        done = plane.kubectl("get", "--raw", f"/openapi/v3/apis/{GROUP}/{VERSION}", check=False)
        schemas = json.loads(done.stdout)["components"]["schemas"] if done.returncode == 0 else {}
        if found := schemas.get("dev.hat.v1alpha1.HatDeployment"):
            return found
        assert time.monotonic() < deadline, done.stderr or sorted(schemas)
        time.sleep(0.2)


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field below `schema` with its path; elements of lists and maps too."""
    for name, child in schema.get("properties", {}).items():
        yield f"{path}.{name}", child
        yield from fields(child, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(child := schema.get(key), dict):
            yield f"{path}{mark}", child
            yield from fields(child, f"{path}{mark}")


def test_every_field_is_explained(control_plane: ControlPlane) -> None:
    schema = openapi(control_plane)
    described = {path: child.get("description", "") for path, child in fields(schema)}
    assert len(described) > 100
    assert schema["description"].strip()
    assert [path for path, text in described.items() if not text.strip()] == []


def test_kubectl_explains(control_plane: ControlPlane) -> None:
    openapi(control_plane)
    said = control_plane.kubectl("explain", "hat.spec.cloud.expose.nodePort").stdout
    assert "Port on the nodes for type NodePort" in said
    assert "inputLayers" in control_plane.kubectl("explain", "hat", "--recursive").stdout
    mode = control_plane.kubectl("explain", "hat.spec.mode").stdout
    assert "token ids cross the network" in " ".join(mode.split())
    assert "chat template" in control_plane.kubectl("explain", "hat.spec.speculation.draftModel").stdout
