"""The hat-operator command as a process, against a real API server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from tests.harness.controlplane import ControlPlane
from tests.operator.manifests import hat_deployment
from tests.operator.running import Operator, eventually, healthy


def holder(plane: ControlPlane, namespace: str) -> str:
    path = "jsonpath={.spec.holderIdentity}"
    return plane.kubectl("get", "lease", "hat-operator", "-n", namespace, "-o", path, check=False).stdout


def test_works_hands_over_and_corrects_drift(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    def child(name: str) -> bool:
        return control_plane.kubectl("get", name, "-n", namespace, check=False).returncode == 0

    def apply(name: str) -> None:
        folder = control_plane.folder / f"{namespace}-{name}.yaml"
        folder.write_text(yaml.safe_dump(hat_deployment(name)))
        control_plane.kubectl("apply", "-f", str(folder), "-n", namespace)

    with Operator(control_plane, namespace, tmp_path, pod="first") as first:
        eventually(lambda: holder(control_plane, namespace).startswith("first"), "first leads")
        apply("one")
        eventually(lambda: child("service/one-cloud"), "children of one")
        # The watch: deleted children come back before a resync could be told apart, so this only says "soon".
        control_plane.kubectl("delete", "service/one-cloud", "-n", namespace)
        eventually(lambda: child("service/one-cloud"), "the deleted Service is back")
        eventually(lambda: healthy(first.port), "the leader is healthy")
        with Operator(control_plane, namespace, tmp_path, pod="second") as second:
            eventually(lambda: healthy(second.port), "who waits is healthy")
            assert holder(control_plane, namespace).startswith("first")
            first.process.send_signal(signal.SIGTERM)
            assert first.process.wait(30) == 0
            eventually(lambda: holder(control_plane, namespace).startswith("second"), "second leads", 20)
            apply("two")
            eventually(lambda: child("service/two-cloud"), "children of two")
            eventually(lambda: healthy(second.port), "the new leader is healthy")
        path = "jsonpath={.metadata.finalizers}{.metadata.annotations.kopf\\.zalando\\.org/last}"
        found = control_plane.kubectl("get", "hat", "two", "-n", namespace, "-o", path).stdout
        assert found == ""


def test_a_wrong_setting_is_named(control_plane: ControlPlane) -> None:
    environment = {
        **os.environ,
        "KUBECONFIG": str(control_plane.kubeconfig),
        "HAT_OPERATOR_METRICS_PORT": "x",
    }
    command = [sys.executable, "-c", "from hat_operator.main import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "HAT_OPERATOR_METRICS_PORT: 'x' is not a port from 1 to 65535"
