"""Every flow between the product's pods and their neighbours, against the policies of the chart and of `hat render`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from hat_operator.objects.policies import edge
from hat_operator.render import render
from hat_operator.schema import apply_defaults, load_schema
from hat_operator.settings import Settings
from hat_operator.spec import HatDeployment
from tests.harness.netpol import Party, allowed, guards
from tests.harness.release import Helm

Object = dict[str, Any]
PORTS = (22, 443, 6443, 7070, 7071, 7072, 8000, 8080, 8081, 8443, 9090, 30770)
GUARDED = {"operator", "test", "uninstall", "cloud", "cloud-b", "edge", "edge-b"}
LOCAL = """
apiVersion: hat.dev/v1alpha1
kind: HatDeployment
metadata: {name: NAME, namespace: NAMESPACE}
spec:
  model: {source: {hub: default}}
  split: {inputLayers: 3}
  edge: {deviceSelector: {matchLabels: {hat.dev/device: "true"}}}
"""
REMOTE = """
apiVersion: hat.dev/v1alpha1
kind: HatDeployment
metadata: {name: far, namespace: team-a}
spec:
  model: {source: {claim: {name: models}}}
  split: {inputLayers: 3}
  cloud: {expose: {type: NodePort, host: cloud.example.com, nodePort: 30770}}
  edge:
    clusterRef: {kubeconfigSecretRef: {name: site}, namespace: hat}
    deviceSelector: {matchLabels: {hat.dev/device: "true"}}
    weights: {claim: {name: models}}
"""

EVERYONE = GUARDED | {"neighbour", "prometheus", "dns", "api-server", "internet", "device"}
PODS = EVERYONE - {"api-server", "internet", "device"}
UNGUARDED_PODS = PODS - GUARDED
OUTSIDE = EVERYONE - PODS
FREE = UNGUARDED_PODS | OUTSIDE
"""No policy of the product's is about these."""


def expected(source: str, target: str) -> set[int]:
    """Ports (TCP, without 53) that must pass; every other one must not. One of both is a pod of the product's."""
    # What is let in, for callers that no policy holds back.
    into = {
        "operator": {8080} if source in PODS else set(),  # metrics, for whoever is in the cluster
        "cloud": {7070} | ({7071, 7072} if source in PODS else set()),  # devices dial from anywhere
        "edge": {8000},
    }
    into |= {"cloud-b": into["cloud"], "edge-b": into["edge"], "test": set(), "uninstall": set()}
    # What is let out, to those whom no policy protects.
    out = {
        # API servers, this cluster's and the sites', and Prometheus servers in this one
        "operator": {443, 6443} | ({9090} if target in PODS else set()),
        "uninstall": {443, 6443},
        "test": set(),
        "cloud": {443, 6443},  # the model's hub; certificates
        "edge": {443, 6443, 7070},
    }
    out |= {"cloud-b": out["cloud"], "edge-b": out["edge"]}
    between = {
        ("operator", "cloud"): {7071, 7072},  # without and with certificates
        ("operator", "cloud-b"): {7071, 7072},
        ("test", "operator"): {8081},
        ("edge", "cloud"): {7070},
        ("edge-b", "cloud-b"): {7070},
        # The policy cannot know which address a Service leads to: an edge pod reaches every cloud. A handshake of
        # another model is refused there.
        ("edge", "cloud-b"): {7070},
        ("edge-b", "cloud"): {7070},
    }
    if source in GUARDED and target in GUARDED:
        return between.get((source, target), set())
    return into[target] if target in GUARDED else out[source]


def pod(name: str, number: int, namespace: str, labels: Object) -> Party:
    known = {"kubernetes.io/metadata.name": namespace}
    return Party(name, f"10.42.0.{number}", namespace, labels, known)


def template_labels(objects: list[Object], kind: str) -> Object:
    (found,) = (one for one in objects if one["kind"] == kind)
    labels: Object = (found if kind == "Pod" else found["spec"]["template"])["metadata"]["labels"]
    return labels


def hat_objects(name: str, namespace: str) -> list[Object]:
    wanted = render(LOCAL.replace("NAMESPACE", namespace).replace("NAME", name))
    return [*wanted.cloud, *wanted.edge]


def chart(folder: Path, mode: tuple[str, ...] = ()) -> list[Object]:
    return Helm(folder / "none", "hat-system", folder).template("hat", "--set", "crds.enabled=false", *mode)


MODES = {"cluster": (), "namespaces": ("--set", "namespaces={team-a,team-b}")}


@pytest.fixture(params=MODES)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[Object], dict[str, Party]]:
    """All policies of a cluster with the chart and two HatDeployments, and who lives in and around it."""
    objects = chart(tmp_path, MODES[request.param])
    first, second = hat_objects("a", "team-a"), hat_objects("b", "team-b")
    policies = [one for one in (*objects, *first, *second) if one["kind"] == "NetworkPolicy"]
    found = [
        pod("operator", 1, "hat-system", template_labels(objects, "Deployment")),
        pod("test", 2, "hat-system", template_labels(objects, "Pod")),
        pod("uninstall", 3, "hat-system", template_labels(objects, "Job")),
        pod("cloud", 4, "team-a", template_labels(first, "Deployment")),
        pod("edge", 5, "team-a", template_labels(first, "DaemonSet")),
        pod("cloud-b", 6, "team-b", template_labels(second, "Deployment")),
        pod("edge-b", 7, "team-b", template_labels(second, "DaemonSet")),
        pod("neighbour", 8, "team-a", {"app": "shop"}),
        pod("prometheus", 9, "monitoring", {"app.kubernetes.io/name": "prometheus"}),
        pod("dns", 10, "kube-system", {"k8s-app": "kube-dns"}),
        Party("api-server", "192.168.1.10"),
        Party("internet", "203.0.113.7"),
        Party("device", "2001:db8::7"),
    ]
    return policies, {party.name: party for party in found}


def test_each_flow(world: tuple[list[Object], dict[str, Party]]) -> None:
    policies, parties = world
    wrong = []
    for source, target in itertools.permutations(parties, 2):
        if source not in GUARDED and target not in GUARDED:
            continue
        passes = {port for port in PORTS if allowed(policies, parties[source], parties[target], port)}
        if passes != expected(source, target):
            wrong.append(f"{source} > {target}: {sorted(passes)}, not {sorted(expected(source, target))}")
    assert wrong == []


def test_names_are_looked_up_and_nobody_is_asked_for_them(
    world: tuple[list[Object], dict[str, Party]],
) -> None:
    policies, parties = world
    for name in GUARDED:
        for protocol in ("UDP", "TCP"):
            assert allowed(policies, parties[name], parties["dns"], 53, protocol)
            assert not allowed(policies, parties["neighbour"], parties[name], 53, protocol)


def test_other_protocols_are_refused(world: tuple[list[Object], dict[str, Party]]) -> None:
    policies, parties = world
    for (source, target), port in itertools.product(itertools.permutations(parties, 2), PORTS):
        if source in GUARDED or target in GUARDED:
            assert not allowed(policies, parties[source], parties[target], port, "UDP"), (
                source,
                target,
                port,
            )


def test_who_is_guarded(world: tuple[list[Object], dict[str, Party]]) -> None:
    policies, parties = world
    for direction in ("Ingress", "Egress"):
        assert {name for name in parties if guards(policies, direction, parties[name])} == GUARDED


def test_a_site_reaches_only_the_cloud() -> None:
    objects = render(REMOTE).edge
    policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
    device = pod("device", 1, "hat", template_labels(objects, "DaemonSet"))
    app, internet = pod("app", 2, "hat", {"app": "shop"}), Party("cloud", "203.0.113.7")
    asked = {443, 6443}  # for certificates, wherever the site's API server is
    assert {port for port in PORTS if allowed(policies, device, internet, port)} == {30770} | asked
    assert {port for port in PORTS if allowed(policies, app, device, port)} == {8000}
    assert {port for port in PORTS if allowed(policies, device, app, port)} == {30770} | asked
    narrow = Settings(api_ports=(6443,), api_cidrs=("192.168.1.0/24",))
    wanted = HatDeployment.parse(apply_defaults(load_schema(), yaml.safe_load(REMOTE)))
    policies = [edge(wanted, narrow, ["cloud.example.com:30770"])]
    server = Party("api-server", "192.168.1.10")
    assert {port for port in PORTS if allowed(policies, device, server, port)} == {30770, 6443}
    assert {port for port in PORTS if allowed(policies, device, internet, port)} == {30770}
    policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
    assert allowed(policies, device, app, 53, "UDP")


def test_addresses_and_scrapers_can_be_narrowed(tmp_path: Path) -> None:
    settings = {
        "networkPolicy": {
            "apiServer": {"cidrs": ["192.168.1.0/24"], "ports": [6443]},
            "prometheus": {"to": [{"ipBlock": {"cidr": "192.168.2.0/24"}}], "ports": [443]},
            "metricsFrom": [
                {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
            ],
        }
    }
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(settings))
    objects = chart(tmp_path, ("--values", str(values)))
    policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
    operator = pod("operator", 1, "hat-system", template_labels(objects, "Deployment"))
    prometheus = pod("prometheus", 2, "monitoring", {})
    neighbour = pod("neighbour", 3, "hat-system", {})
    assert {port for port in PORTS if allowed(policies, operator, Party("api", "192.168.1.10"), port)} == {
        6443
    }
    assert {port for port in PORTS if allowed(policies, operator, Party("x", "203.0.113.7"), port)} == set()
    assert {port for port in PORTS if allowed(policies, operator, Party("p", "192.168.2.9"), port)} == {443}
    assert {port for port in PORTS if allowed(policies, operator, prometheus, port)} == set()
    assert {port for port in PORTS if allowed(policies, prometheus, operator, port)} == {8080}
    assert {port for port in PORTS if allowed(policies, neighbour, operator, port)} == set()
