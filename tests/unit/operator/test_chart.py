"""The chart: its CRD, its schema, and what it gives to the cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.chart_crd import SOURCE, TARGET, template
from tests.harness import binaries, boards
from tests.harness.ci import skip_or_fail

CHART = Path(__file__).resolve().parents[3] / "charts" / "hat-operator"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())

Object = dict[str, Any]


def test_crd_is_made_from_its_source() -> None:
    assert TARGET.read_text() == template(SOURCE.read_text()), "run scripts/chart_crd.py"


def test_crd_without_the_templates_lines_is_the_source() -> None:
    lines = [line for line in TARGET.read_text().splitlines() if "{{" not in line]
    assert yaml.safe_load("\n".join(lines))["spec"] == yaml.safe_load(SOURCE.read_text())["spec"]


def test_crd_that_would_lose_something_is_refused() -> None:
    crd = {"metadata": {"name": "x", "annotations": {}}, "spec": {}}
    with pytest.raises(ValueError, match="annotations"):
        template(yaml.safe_dump(crd))
    with pytest.raises(ValueError, match="Helm"):
        template("metadata: {name: x}\nspec: {description: 'a {{ b'}")


def below(schema: Object, path: str = "") -> Iterator[tuple[str, Object]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from below(child, f"{path}.{name}")


def test_schema_refuses_unknown_names() -> None:
    open_objects = [
        path for path, node in below(SCHEMA) if "properties" in node and "additionalProperties" not in node
    ]
    assert open_objects == [".global"]
    assert all(
        node.get("additionalProperties", False) is False for _, node in below(SCHEMA) if "properties" in node
    )


def test_schema_and_values_have_the_same_names() -> None:
    for path, node in below(SCHEMA):
        if "properties" not in node:
            continue
        values = VALUES
        for name in path.split(".")[1:]:
            values = values[name]
        assert set(values) == set(node["properties"]), path


def test_values_fit_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(VALUES, SCHEMA)
    for wrong in ({"replica": 2}, {"replicas": 3}, {"image": {"digest": "latest"}}, {"namespaces": ["A"]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


# With Helm.


@pytest.fixture(scope="module")
def helm() -> Path:
    """Helm, if it is on this machine: building it takes longer than a unit test may."""
    built = binaries.cache_folder() / binaries.HELM / "helm"
    found = str(built) if built.is_file() else shutil.which("helm")
    if not found:
        skip_or_fail("no helm; `python -m tests.harness.binaries helm` builds it")
    return Path(found)


def run_helm(helm: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(helm), "template", "hat", str(CHART), "--namespace", "hat-system", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def render(helm: Path, *arguments: str) -> list[Object]:
    done = run_helm(helm, *arguments)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


def pod_templates(objects: list[Object]) -> list[Object]:
    return [
        found if found["kind"] == "Pod" else found["spec"]["template"]
        for found in of_kind(objects, "Deployment", "Job", "Pod")
    ]


EVERY_NAMESPACE: tuple[str, ...] = ()
TWO_NAMESPACES = ("--set", "namespaces={team-a,team-b}", "--set", "replicas=2")
MODES = pytest.mark.parametrize("mode", [EVERY_NAMESPACE, TWO_NAMESPACES], ids=["cluster", "namespaces"])


@MODES
def test_rights_are_the_least(helm: Path, mode: tuple[str, ...]) -> None:
    objects = render(helm, *mode)
    roles = of_kind(objects, "Role", "ClusterRole")
    assert roles
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]], rule
            assert not {"bind", "escalate", "impersonate", "deletecollection"} & set(rule["verbs"]), rule
            assert not re.search(r"pods/|nodes/|roles|tokenreview|token\b", " ".join(rule["resources"])), rule
            if "secrets" in rule["resources"]:
                # Of its own one it changes the content; a name that is not there yet cannot be asked for.
                own = rule.get("resourceNames") == ["hat-ca"] and rule["verbs"] == ["patch"]
                assert rule["verbs"] in (["get"], ["create"]) or own
            if rule["resources"] == ["signers"]:
                assert rule["resourceNames"] == ["hat.dev/device", "hat.dev/cloud"]
            if "pods" in rule["resources"] or "nodes" in rule["resources"]:
                assert set(rule["verbs"]) <= {"get", "list", "watch"}


def test_rights_in_namespaces_only(helm: Path) -> None:
    without = render(helm, *TWO_NAMESPACES, "--set", "identities.enabled=false")
    assert not of_kind(without, "ClusterRole", "ClusterRoleBinding")
    objects = render(helm, *TWO_NAMESPACES)
    # Requests for certificates have no namespace.
    wide = [rule for role in of_kind(objects, "ClusterRole") for rule in role["rules"]]
    assert {group for rule in wide for group in rule["apiGroups"]} == {"certificates.k8s.io"}
    (asking,) = [
        item for item in of_kind(objects, "ClusterRoleBinding") if "requester" in item["metadata"]["name"]
    ]
    groups = [subject["name"] for subject in asking["subjects"]]
    assert groups == ["system:serviceaccounts:team-a", "system:serviceaccounts:team-b"]
    assert "nodes" not in [
        name for role in of_kind(objects, "Role") for rule in role["rules"] for name in rule["resources"]
    ]
    assert {role["metadata"]["namespace"] for role in of_kind(objects, "Role")} == {
        "hat-system",
        "team-a",
        "team-b",
    }


def test_secrets_by_name(helm: Path) -> None:
    (rule,) = [
        rule
        for role in of_kind(render(helm, "--set", "rbac.secretNames={site-a}"), "ClusterRole")
        for rule in role["rules"]
        if "secrets" in rule["resources"] and "get" in rule["verbs"]
    ]
    assert rule["resourceNames"] == ["site-a", "hat-ca"]


@MODES
def test_bindings_name_what_is_there(helm: Path, mode: tuple[str, ...]) -> None:
    objects = render(helm, *mode)
    there = {
        (found["kind"], found["metadata"].get("namespace"), found["metadata"]["name"]) for found in objects
    }
    bindings = of_kind(objects, "RoleBinding", "ClusterRoleBinding")
    assert bindings
    for binding in bindings:
        role = binding["roleRef"]
        assert (role["kind"], binding["metadata"].get("namespace"), role["name"]) in there
        for subject in binding["subjects"]:
            if subject["kind"] == "Group":  # of pods that only the operator makes
                assert subject["name"].startswith("system:serviceaccounts")
                continue
            assert (subject["kind"], subject["namespace"], subject["name"]) in there


def test_lease_is_the_one_that_may_be_changed(helm: Path) -> None:
    objects = render(helm)
    (name,) = [
        rule["resourceNames"]
        for role in of_kind(objects, "Role")
        for rule in role["rules"]
        if rule["resources"] == ["leases"] and "resourceNames" in rule
    ]
    (deployment,) = of_kind(objects, "Deployment")
    env = {
        entry["name"]: entry.get("value")
        for entry in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert name == [env["HAT_OPERATOR_LEASE_NAME"]]


@MODES
def test_pods_are_restricted(helm: Path, mode: tuple[str, ...]) -> None:
    pods = pod_templates(render(helm, *mode))
    assert len(pods) == 3
    for pod in pods:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert {next(iter(set(volume) - {"name"})) for volume in spec["volumes"]} <= {"emptyDir", "projected"}
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["runAsUser"] >= 10000
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert set(container["resources"]) == {"requests", "limits"}
            assert all("hostPort" not in port for port in container.get("ports", []))


@MODES
def test_every_pod_has_a_network_policy_of_both_directions(helm: Path, mode: tuple[str, ...]) -> None:
    objects = render(helm, *mode)
    policies = of_kind(objects, "NetworkPolicy")
    for pod in pod_templates(objects):
        labels = pod["metadata"]["labels"].items()
        chosen = [p for p in policies if p["spec"]["podSelector"]["matchLabels"].items() <= labels]
        assert [policy["spec"]["policyTypes"] for policy in chosen] == [["Ingress", "Egress"]]
    assert not of_kind(render(helm, *mode, "--set", "networkPolicy.enabled=false"), "NetworkPolicy")


def test_one_registry_for_every_image(helm: Path) -> None:
    pods = pod_templates(
        render(helm, "--set", "global.imageRegistry=mirror/hat", "--set", "image.registry=other")
    )
    images = {container["image"] for pod in pods for container in pod["spec"]["containers"]}
    assert images == {
        f"mirror/hat/hat-operator:{yaml.safe_load((CHART / 'Chart.yaml').read_text())['appVersion']}"
    }
    env = [
        entry for pod in pods for container in pod["spec"]["containers"] for entry in container.get("env", [])
    ]
    assert {"name": "HAT_OPERATOR_REGISTRY", "value": "mirror/hat"} in env


def test_digest_wins_over_tag(helm: Path) -> None:
    digest = "sha256:" + "0" * 64
    pods = pod_templates(render(helm, "--set", f"image.digest={digest}", "--set", "image.tag=x"))
    assert {c["image"] for pod in pods for c in pod["spec"]["containers"]} == {f"hat-operator@{digest}"}


@pytest.mark.parametrize(
    ("setting", "has_api", "expected"),
    [("auto", False, 0), ("auto", True, 1), ("enabled", False, 1), ("disabled", True, 0)],
)
def test_pod_monitor(helm: Path, setting: str, has_api: bool, expected: int) -> None:
    api = ("--api-versions", "monitoring.coreos.com/v1/PodMonitor") if has_api else ()
    objects = render(helm, "--set", f"metrics.podMonitor={setting}", *api)
    assert len(of_kind(objects, "PodMonitor")) == expected


@pytest.mark.parametrize(
    ("setting", "has_api", "expected"),
    [("auto", False, 0), ("auto", True, 1), ("enabled", False, 1), ("disabled", True, 0)],
)
def test_prometheus_rule(helm: Path, setting: str, has_api: bool, expected: int) -> None:
    api = ("--api-versions", "monitoring.coreos.com/v1/PrometheusRule") if has_api else ()
    objects = render(helm, "--set", f"alerts.prometheusRule={setting}", *api)
    assert len(of_kind(objects, "PrometheusRule")) == expected


def test_prometheus_rule_is_the_file_with_the_targets_and_the_base_of_pages(helm: Path) -> None:
    wanted = ("--set", "alerts.prometheusRule=enabled")
    (rule,) = of_kind(render(helm, *wanted), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(boards.RULES.read_text())
    changes = (
        "alerts.ttftSeconds=0.8",
        "alerts.tbtSeconds=1",
        "alerts.runbookBaseUrl=https://example.com/pages/",
    )
    settings = [word for change in changes for word in ("--set", change)]
    (rule,) = of_kind(render(helm, *wanted, *settings, "--set", "alerts.labels.release=x"), "PrometheusRule")
    assert rule["metadata"]["labels"]["release"] == "x"
    rules = [one for group in rule["spec"]["groups"] for one in group["rules"]]
    assert [one["expr"] for one in rules if one.get("record", "").endswith(":target")] == [
        "vector(0.8)",
        "vector(1)",
    ]
    urls = {one["annotations"]["runbook_url"] for one in rules if "alert" in one}
    assert urls == {f"https://example.com/pages/{alert}.md" for alert in boards.alerts()}


def test_dashboards(helm: Path) -> None:
    found = of_kind(render(helm, "--set", "dashboards.annotations.grafana_folder=HAT"), "ConfigMap")
    assert {key: text + "\n" for one in found for key, text in one["data"].items()} == {
        path.name: path.read_text() for path in boards.FOLDER.iterdir()
    }
    for one in found:
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert one["metadata"]["annotations"] == {"grafana_folder": "HAT"}
    assert len({one["metadata"]["name"] for one in found}) == len(boards.BOARDS)
    assert not of_kind(render(helm, "--set", "dashboards.enabled=false"), "ConfigMap")


def test_disruption_budget_for_two(helm: Path) -> None:
    assert not of_kind(render(helm), "PodDisruptionBudget")
    assert of_kind(render(helm, "--set", "replicas=2"), "PodDisruptionBudget")


def test_crd_is_kept(helm: Path) -> None:
    (crd,) = of_kind(render(helm), "CustomResourceDefinition")
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert crd["spec"] == yaml.safe_load(SOURCE.read_text())["spec"]
    assert not of_kind(render(helm, "--set", "crds.enabled=false"), "CustomResourceDefinition")


@pytest.mark.parametrize(
    "wrong",
    [
        "replica=2",
        "replicas=3",
        "image.tagg=x",
        "metrics.podMonitor=yes",
        "namespaces={A}",
        "alerts.ttftSeconds=0",
        "alerts.tbtSeconds=0.0",
        "alerts.prometheusRule=true",
        "dashboards.enabled=1",
    ],
)
def test_wrong_values_are_refused(helm: Path, wrong: str) -> None:
    done = run_helm(helm, "--set", wrong)
    assert done.returncode != 0
    assert re.split(r"[.=]", wrong)[-2] in done.stderr


def test_uninstall_leaves_hat_deployments_when_told(helm: Path) -> None:
    assert of_kind(render(helm), "Job")
    assert not of_kind(render(helm, "--set", "uninstall.deleteHatDeployments=false"), "Job")
