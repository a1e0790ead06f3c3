"""The chart on a real API server: every object is accepted, and the operator's rights are the meant ones."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.harness.controlplane import ControlPlane
from tests.harness.release import CHART, Helm

DEPLOYMENT = "hat-hat-operator"


@pytest.fixture(scope="module")
def installed(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """The chart installed for one namespace: the release's namespace and the served one. Nothing runs there."""
    with control_plane.namespace() as release, control_plane.namespace() as served:
        control_plane.kubectl("label", "namespace", release, "pod-security.kubernetes.io/enforce=restricted")
        helm = Helm(control_plane.kubeconfig, release, tmp_path_factory.mktemp("helm"))
        settings = ("--set", f"namespaces={{{served}}}", "--set", "replicas=2", "--set", "crds.enabled=false")
        helm.run("install", "hat", str(CHART), *settings)
        try:
            yield release, served
        finally:
            # No kubelet here, so the hook's job would never end.
            helm.run("uninstall", "hat", "--no-hooks")


def test_pods_pass_restricted_pod_security(control_plane: ControlPlane, installed: tuple[str, str]) -> None:
    deadline = time.monotonic() + 60
    pods = ""
    while time.monotonic() < deadline and pods.count("pod/") < 2:
        time.sleep(0.5)
        pods = control_plane.kubectl("-n", installed[0], "get", "pods", "-o", "name").stdout
    assert pods.count(f"pod/{DEPLOYMENT}") == 2


@pytest.mark.parametrize(
    ("verb", "resource", "allowed"),
    [
        ("watch", "hatdeployments.hat.dev", True),
        ("patch", "hatdeployments.hat.dev/status", True),
        ("delete", "hatdeployments.hat.dev", False),
        ("create", "deployments.apps", True),
        ("delete", "daemonsets.apps", True),
        ("get", "secrets", True),
        ("list", "secrets", False),
        ("watch", "secrets", False),
        ("create", "pods", False),
        ("create", "pods/exec", False),
        ("create", "roles.rbac.authorization.k8s.io", False),
        ("list", "nodes", False),
    ],
)
def test_rights(
    control_plane: ControlPlane, installed: tuple[str, str], verb: str, resource: str, allowed: bool
) -> None:
    release, served = installed
    user = f"--as=system:serviceaccount:{release}:{DEPLOYMENT}"
    said = control_plane.kubectl(
        "-n", served, "auth", "can-i", verb, resource, user, check=False
    ).stdout.strip()
    assert said == ("yes" if allowed else "no")
    elsewhere = control_plane.kubectl("-n", "default", "auth", "can-i", verb, resource, user, check=False)
    assert elsewhere.stdout.strip() == "no"


def test_lease(control_plane: ControlPlane, installed: tuple[str, str]) -> None:
    release, served = installed
    user = f"--as=system:serviceaccount:{release}:{DEPLOYMENT}"
    for namespace, lease, expected in (
        (release, DEPLOYMENT, "yes"),
        (release, "another", "no"),
        (served, DEPLOYMENT, "no"),
    ):
        asked = ("auth", "can-i", "update", f"leases.coordination.k8s.io/{lease}", user)
        assert control_plane.kubectl("-n", namespace, *asked, check=False).stdout.strip() == expected
