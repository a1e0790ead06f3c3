"""What tests rely on in the control planes that they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kubernetes import client as kube
from urllib3.exceptions import HTTPError

from tests.harness.controlplane import ControlPlane

ORPHAN = """
import os, sys, time
from tests.harness.binaries import find_all
from tests.harness.controlplane import ControlPlane
plane = ControlPlane(find_all(), "orphan")
plane.start()
print(plane.folder, flush=True)
time.sleep(60)
"""


def users_of(folder: str) -> list[str]:
    """Processes whose command line names `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if folder in words:
            found.append(words)
    return found


def test_two_clusters_are_apart(
    control_plane: ControlPlane, edge_plane: ControlPlane, namespace: str
) -> None:
    kube.CoreV1Api(control_plane.client()).read_namespace(namespace)
    with pytest.raises(kube.ApiException, match="404"):
        kube.CoreV1Api(edge_plane.client()).read_namespace(namespace)


def test_apiserver_can_be_paused_and_stopped(edge_plane: ControlPlane) -> None:
    core = kube.CoreV1Api(edge_plane.client())
    with edge_plane.pause_apiserver(), pytest.raises(HTTPError):
        core.list_namespace(_request_timeout=1)
    core.list_namespace(_request_timeout=30)
    edge_plane.stop_apiserver()
    try:
        with pytest.raises(HTTPError):
            core.list_namespace(_request_timeout=1)
    finally:
        edge_plane.start_apiserver()
    core.list_namespace(_request_timeout=30)


def test_writes_are_in_the_audit_log(control_plane: ControlPlane, namespace: str) -> None:
    events = control_plane.audit_events()
    made = [event["verb"] for event in events if event.get("objectRef", {}).get("name") == namespace]
    assert "create" in made


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is asked for on Linux only")
def test_nothing_survives_a_killed_test_run(control_plane: ControlPlane) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        assert len(users_of(folder)) == 3
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while left := users_of(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
