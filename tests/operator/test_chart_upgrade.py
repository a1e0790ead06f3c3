"""Upgrade, rollback and uninstall of the chart while HatDeployments run, against a real API server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness.audit import by_user
from tests.harness.controlplane import ControlPlane, KubectlError
from tests.harness.release import CHART, Helm, HelmError
from tests.operator.manifests import hat_deployment
from tests.operator.running import eventually
from tests.operator.test_rbac import account_kubeconfig, apply, count, operator

Object = dict[str, Any]
EDGE = {"deviceSelector": {"matchLabels": {"hat.dev/device": "true"}}}
NAMES = ("one", "two")
pytestmark = pytest.mark.timeout(400)
CRD = "hatdeployments.hat.dev"
CRDS = CHART.parents[1] / "crds"
HELM_S = 60


@dataclass
class Installed:
    """A release in `release` that serves the namespace `served`."""

    plane: ControlPlane
    helm: Helm
    release: str
    served: str
    folder: Path

    def install(self, *settings: str, chart: Path = CHART, verb: str = "upgrade") -> None:
        """Without hooks: no kubelet here runs their Jobs, except in the tests that play it."""
        served = ("--set", f"namespaces={{{self.served}}}", "--set", "crds.enabled=false")
        self.helm.run(verb, "hat", str(chart), *served, *settings, "--no-hooks")

    def deployment(self) -> Object:
        return self.get("deployment", "hat-hat-operator", self.release)

    def get(self, kind: str, name: str, namespace: str) -> Object:
        found: Object = json.loads(
            self.plane.kubectl("-n", namespace, "get", kind, name, "-o", "json").stdout
        )
        return found

    def children(self) -> dict[str, tuple[str, int]]:
        """Identity and generation of everything that has pods."""
        said = self.plane.kubectl("-n", self.served, "get", "deployments,daemonsets", "-o", "json").stdout
        return {
            f"{one['kind']}/{one['metadata']['name']}": (
                one["metadata"]["uid"],
                one["metadata"]["generation"],
            )
            for one in json.loads(said)["items"]
        }


@pytest.fixture
def installed(control_plane: ControlPlane, tmp_path: Path) -> Iterator[Installed]:
    with control_plane.namespace() as release, control_plane.namespace() as served:
        found = Installed(
            control_plane, Helm(control_plane.kubeconfig, release, tmp_path), release, served, tmp_path
        )
        found.install(verb="install")
        try:
            yield found
        finally:
            control_plane.kubectl("-n", served, "delete", "hatdeployments", "--all", "--wait=false")
            found.helm.run("uninstall", "hat", "--no-hooks", "--ignore-not-found")


def run_operator(installed: Installed) -> Any:
    """The operator as the release now says, until the block ends."""
    deployment = installed.deployment()
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    config = account_kubeconfig(installed.plane, installed.release, account, installed.folder)
    return operator(config, deployment, installed.release)


def reconciled(installed: Installed, marker: int) -> bool:
    """Whether an operator that started after `marker` audit events has looked at both HatDeployments."""
    user = f"system:serviceaccount:{installed.release}:hat-hat-operator"
    seen = {
        event["objectRef"].get("name")
        for event in by_user(installed.plane.audit_events()[marker:], user)
        if event.get("objectRef", {}).get("resource") == "hatdeployments"
    }
    return seen >= set(NAMES)


def newer_chart(folder: Path) -> Path:
    """A chart of a later version whose operator starts images of that version, as the next release would be."""
    chart = folder / "newer"
    shutil.copytree(CHART, chart)
    described = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(
        yaml.safe_dump({**described, "version": "9.9.9", "appVersion": "9.9.9"})
    )
    return chart


def test_upgrade_and_rollback_restart_no_pod(installed: Installed) -> None:
    with run_operator(installed):
        for name in NAMES:
            apply(
                installed.plane,
                installed.folder,
                hat_deployment(name, edge=EDGE, cloud={"replicas": 2}),
                namespace=installed.served,
            )
        eventually(lambda: len(installed.children()) == 4, "all children")
        time.sleep(3)  # a resync: what the first pass did not know yet is settled
        before = installed.children()
    first = installed.deployment()["spec"]["template"]

    installed.install(
        "--set", "runtime.version=9.9.9", "--set", "replicas=2", "--set", "resources.limits.memory=512Mi",
        chart=newer_chart(installed.folder),
    )  # fmt: skip
    second = installed.deployment()["spec"]["template"]
    assert second["spec"]["containers"][0]["image"].endswith(":9.9.9")
    assert {"name": "HAT_OPERATOR_VERSION", "value": "9.9.9"} in second["spec"]["containers"][0]["env"]
    marker = len(installed.plane.audit_events())
    with run_operator(installed):
        eventually(lambda: reconciled(installed, marker), "the new operator has looked at both")
        time.sleep(3)
        assert installed.children() == before
        # A new HatDeployment does get the new version: the operator is another one.
        apply(installed.plane, installed.folder, hat_deployment("three"), namespace=installed.served)
        eventually(lambda: count(installed.plane, installed.served, "deployment", "three") == 1, "three's")
        assert installed.get("hatdeployment", "three", installed.served)["spec"]["runtime"] == {
            "version": "9.9.9"
        }
        installed.plane.kubectl("-n", installed.served, "delete", "hatdeployment", "three")
        eventually(lambda: installed.children() == before, "three's children are gone")

    installed.helm.run("rollback", "hat", "1", "--no-hooks")
    assert installed.deployment()["spec"]["template"]["spec"] == first["spec"]
    marker = len(installed.plane.audit_events())
    with run_operator(installed):
        eventually(lambda: reconciled(installed, marker), "the old operator has looked at both")
        time.sleep(3)
        assert installed.children() == before


def test_uninstall_takes_everything_along(installed: Installed) -> None:
    with run_operator(installed):
        for name in NAMES:
            apply(
                installed.plane, installed.folder, hat_deployment(name, edge=EDGE), namespace=installed.served
            )
        eventually(lambda: len(installed.children()) == 4, "all children")
        assert uninstall(installed) == 0
        eventually(lambda: not installed.children(), "no children")
    assert installed.helm.run("list", "--short") == ""
    assert installed.plane.kubectl("get", "crd", CRD, "-o", "name").stdout.strip()
    left = "deployments,services,serviceaccounts,roles,rolebindings,networkpolicies,jobs"
    found = installed.plane.kubectl(
        "-n", installed.release, "get", left, "-l", "app.kubernetes.io/instance=hat", "-o", "name"
    )
    assert found.stdout == ""


def test_uninstall_without_an_operator_ends_and_says_what_is_left(installed: Installed) -> None:
    body = hat_deployment("held")
    body["metadata"]["finalizers"] = ["hat.dev/edge-cleanup"]
    apply(installed.plane, installed.folder, body, namespace=installed.served)
    installed.install("--set", "uninstall.timeoutSeconds=3")
    began = time.monotonic()
    assert uninstall(installed) == 1
    assert time.monotonic() - began < HELM_S
    # The release is still there, so that its operator can be looked at and the command be given again.
    assert "STATUS: " in installed.helm.run("status", "hat")
    free = '{"metadata": {"finalizers": null}}'
    installed.plane.kubectl(
        "-n", installed.served, "patch", "hatdeployment", "held", "--type=merge", "-p", free
    )
    assert uninstall(installed) == 0


def uninstall(installed: Installed) -> int:
    """`helm uninstall` with its hook, whose Job's pod is played: the same command with the same account.

    Returns:
        The exit status of the Job's command; helm must have ended as it did.
    """
    command = subprocess.Popen(
        [*installed.helm.command, "uninstall", "hat", "--timeout", f"{HELM_S}s"],
        env=installed.helm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        get = (
            "-n",
            installed.release,
            "get",
            "pods",
            "-l",
            "app.kubernetes.io/component=uninstall",
            "-o",
            "json",
        )

        def pods() -> list[Object]:
            found: list[Object] = json.loads(installed.plane.kubectl(*get).stdout)["items"]
            # That of an uninstall before is still there until helm has made the new one.
            return [one for one in found if one["status"]["phase"] == "Pending"]

        eventually(lambda: bool(pods()) or command.poll() is not None, "the hook's pod")
        assert command.poll() is None, command.communicate()[0]
        (pod,) = pods()
        code = play(installed, pod)
        said, _ = command.communicate(timeout=HELM_S + 30)
        assert (command.returncode == 0) == (code == 0), said
    finally:
        command.kill()
        command.communicate()
    return code


def play(installed: Installed, pod: Object) -> int:
    """Run a pod's command here, and write its end into the pod's status as a kubelet would."""
    (container,) = pod["spec"]["containers"]
    account = pod["spec"]["serviceAccountName"]
    folder = installed.folder / pod["metadata"]["name"]
    folder.mkdir()
    config = account_kubeconfig(installed.plane, installed.release, account, folder)
    assert container["command"][:2] == ["python", "-m"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    done = subprocess.run(
        [sys.executable, *container["command"][1:]],
        env={**environment, "PATH": "/usr/bin:/bin", "KUBECONFIG": str(config)},
        capture_output=True,
        text=True,
        timeout=HELM_S,
        check=False,
    )
    ended = {"exitCode": done.returncode, "reason": "Completed" if done.returncode == 0 else "Error"}
    status = {
        "phase": "Succeeded" if done.returncode == 0 else "Failed",
        "containerStatuses": [
            {
                "name": container["name"],
                "state": {"terminated": ended},
                "ready": False,
                "restartCount": 0,
                "image": container["image"],
                "imageID": "",
            }
        ],
    }
    change = json.dumps({"status": status})
    installed.plane.kubectl(
        "-n", installed.release, "patch", "pod", pod["metadata"]["name"],
        "--subresource=status", "--type=merge", "-p", change,
    )  # fmt: skip
    return done.returncode


@pytest.fixture
def no_crd(control_plane: ControlPlane) -> Iterator[None]:
    """A cluster without the CRD, as before the first install; afterwards it has that of the other tests again."""
    control_plane.kubectl("delete", "crd", CRD, "--timeout=60s")
    yield
    control_plane.kubectl("delete", "crd", CRD, "--timeout=60s", "--ignore-not-found")
    control_plane.install_crds(CRDS)


def test_the_crd_is_upgraded_and_outlives_its_release(
    control_plane: ControlPlane, no_crd: None, tmp_path: Path
) -> None:
    explain = ("explain", "hatdeployment.spec.observability")
    with control_plane.namespace() as release, control_plane.namespace() as served:
        helm = Helm(control_plane.kubeconfig, release, tmp_path)
        mode = ("--set", f"namespaces={{{served}}}", "--no-hooks")
        helm.run("install", "hat", str(CHART), *mode)
        kept = hat_deployment("kept")
        eventually(lambda: applied(control_plane, tmp_path, kept, served), "the new API accepts an object")
        uid = ("-n", served, "get", "hatdeployment", "kept", "-o", "jsonpath={.metadata.uid}")
        before = control_plane.kubectl(*uid).stdout

        chart = newer_chart(tmp_path)
        crd = chart / "templates" / "crd.yaml"
        text = crd.read_text()
        assert text.count("description: How pods are seen.") == 1
        crd.write_text(text.replace("description: How pods are seen.", "description: How pods are watched."))
        helm.run("upgrade", "hat", str(chart), *mode)
        eventually(lambda: "How pods are watched." in control_plane.kubectl(*explain).stdout, "the newer CRD")
        assert control_plane.kubectl(*uid).stdout == before
        helm.run("rollback", "hat", "1", "--no-hooks")
        eventually(lambda: "How pods are seen." in control_plane.kubectl(*explain).stdout, "the older CRD")
        assert control_plane.kubectl(*uid).stdout == before
        helm.run("uninstall", "hat", "--no-hooks")
        assert control_plane.kubectl(*uid).stdout == before

        # docs/kubernetes.md: another release takes it over.
        with pytest.raises(HelmError, match="release-name"):
            helm.run("install", "heir", str(CHART), *mode)
        marks = ("meta.helm.sh/release-name=heir", f"meta.helm.sh/release-namespace={release}")
        control_plane.kubectl("annotate", "crd", CRD, *marks, "--overwrite")
        helm.run("install", "heir", str(CHART), *mode)
        assert control_plane.kubectl(*uid).stdout == before
        helm.run("uninstall", "heir", "--no-hooks")


def applied(plane: ControlPlane, folder: Path, body: Object, namespace: str) -> bool:
    try:
        apply(plane, folder, body, namespace=namespace)
    except KubectlError:
        return False
    return True


def test_lint_is_clean(control_plane: ControlPlane, tmp_path: Path) -> None:
    helm = Helm(control_plane.kubeconfig, "default", tmp_path)
    assert "0 chart(s) failed" in helm.run("lint", "--strict", str(CHART))
    with pytest.raises(HelmError, match="replicas"):
        helm.run("lint", "--strict", str(CHART), "--set", "replicas=3")
