"""The operator as a process of its own, and what a test waits for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.harness.controlplane import ControlPlane


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def eventually(check: Callable[[], bool], what: str, timeout_s: float = 60, every_s: float = 0.2) -> None:
    """Wait until `check` holds. Fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(every_s)


def healthy(port: int) -> bool:
    """Whether a process says that it is alive."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Operator:
    """One process of `hat-operator` that serves one namespace with the administrator's rights."""

    def __init__(
        self, plane: ControlPlane, namespace: str, folder: Path, resync_s: float = 1, pod: str = "one"
    ) -> None:
        """Starts it; its log is in `folder`."""
        self.port, self.metrics_port = free_port(), free_port()
        self.log = folder / f"{pod}.log"
        environment = {
            **os.environ,
            "KUBECONFIG": str(plane.kubeconfig),
            "HAT_OPERATOR_NAMESPACES": namespace,
            "HAT_OPERATOR_POD_NAMESPACE": namespace,
            "HAT_OPERATOR_POD_NAME": pod,
            "HAT_OPERATOR_RESYNC_SECONDS": f"{resync_s:g}",
            "HAT_OPERATOR_METRICS_PORT": str(self.metrics_port),
            "HAT_OPERATOR_HEALTH_PORT": str(self.port),
        }
        command = [sys.executable, "-c", "from hat_operator.main import main; main()"]
        with self.log.open("a") as output:
            self.process = subprocess.Popen(command, env=environment, stderr=output)

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
