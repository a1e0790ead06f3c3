"""The hat-operator command as a process, against a real API server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import yaml

from tests.harness.controlplane import ControlPlane
from tests.operator.manifests import hat_deployment


@contextmanager
def operator(plane: ControlPlane, namespace: str, pod: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A running operator and its health port."""
    ports = [free_port(), free_port()]
    environment = {
        **os.environ,
        "KUBECONFIG": str(plane.kubeconfig),
        "HAT_OPERATOR_NAMESPACES": namespace,
        "HAT_OPERATOR_POD_NAMESPACE": namespace,
        "HAT_OPERATOR_POD_NAME": pod,
        "HAT_OPERATOR_RESYNC_SECONDS": "1",
        "HAT_OPERATOR_METRICS_PORT": str(ports[0]),
        "HAT_OPERATOR_HEALTH_PORT": str(ports[1]),
    }
    command = [sys.executable, "-c", "from hat_operator.main import main; main()"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process, ports[1]
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def eventually(check: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.2)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def holder(plane: ControlPlane, namespace: str) -> str:
    path = "jsonpath={.spec.holderIdentity}"
    return plane.kubectl("get", "lease", "hat-operator", "-n", namespace, "-o", path, check=False).stdout


def test_works_hands_over_and_corrects_drift(control_plane: ControlPlane, namespace: str) -> None:
    def child(name: str) -> bool:
        return control_plane.kubectl("get", name, "-n", namespace, check=False).returncode == 0

    def apply(name: str) -> None:
        folder = control_plane.folder / f"{namespace}-{name}.yaml"
        folder.write_text(yaml.safe_dump(hat_deployment(name)))
        control_plane.kubectl("apply", "-f", str(folder), "-n", namespace)

    with operator(control_plane, namespace, "first") as (first, first_port):
        eventually(lambda: holder(control_plane, namespace).startswith("first"), "first leads")
        apply("one")
        eventually(lambda: child("service/one-cloud"), "children of one")
        # The watch: deleted children come back before a resync could be told apart, so this only says "soon".
        control_plane.kubectl("delete", "service/one-cloud", "-n", namespace)
        eventually(lambda: child("service/one-cloud"), "the deleted Service is back")
        eventually(lambda: healthy(first_port), "the leader is healthy")
        with operator(control_plane, namespace, "second") as (_, second_port):
            eventually(lambda: healthy(second_port), "who waits is healthy")
            assert holder(control_plane, namespace).startswith("first")
            first.send_signal(signal.SIGTERM)
            assert first.wait(30) == 0
            eventually(lambda: holder(control_plane, namespace).startswith("second"), "second leads", 20)
            apply("two")
            eventually(lambda: child("service/two-cloud"), "children of two")
            eventually(lambda: healthy(second_port), "the new leader is healthy")
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
