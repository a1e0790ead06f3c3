"""The chart on a real API server: every object is accepted, and the operator's rights are the meant ones."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import binaries
from tests.harness.controlplane import ControlPlane

CHART = Path(__file__).resolve().parents[2] / "charts" / "hat-operator"
DEPLOYMENT = "hat-hat-operator"


@pytest.fixture(scope="module")
def installed(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """The chart installed for one namespace: the release's namespace and the served one. Nothing runs there."""
    helm = binaries.cache_folder() / binaries.HELM / "helm"
    if not helm.is_file():
        pytest.skip("no helm; `python -m tests.harness.binaries helm` builds it")
    home = tmp_path_factory.mktemp("helm")
    with control_plane.namespace() as release, control_plane.namespace() as served:
        control_plane.kubectl("label", "namespace", release, "pod-security.kubernetes.io/enforce=restricted")

        def run(*arguments: str) -> None:
            command = [
                str(helm),
                "--kubeconfig",
                str(control_plane.kubeconfig),
                "--namespace",
                release,
                *arguments,
            ]
            env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
            assert done.returncode == 0, done.stderr

        settings = ("--set", f"namespaces={{{served}}}", "--set", "replicas=2", "--set", "crds.enabled=false")
        run("install", "hat", str(CHART), *settings)
        try:
            yield release, served
        finally:
            # No kubelet here, so the hook's job would never end.
            run("uninstall", "hat", "--no-hooks")


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
