"""The harness itself: a run that is killed leaves no process, mount or interface of a node behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster, remove_abandoned_cgroups
from tests.harness.controlplane import PREFIX
from tests.harness.sandbox import cgroups

ROOT = Path(__file__).resolve().parents[2]
_RUN = """
import os, tempfile, time
from pathlib import Path
from tests.harness.controlplane import PREFIX
from tests.harness.sandbox import Sandbox

folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
sandbox = Sandbox("killed", folder)
sandbox.start("sleeper", ["sleep", "4321"])
while "sleep" not in sandbox.run("ps", "-A", "-o", "comm"):
    time.sleep(0.1)
print(sandbox.pid, sandbox.gateway, flush=True)
time.sleep(600)
"""


@pytest.mark.timeout(120)
def test_nothing_survives_kill_9(clusters: tuple[Cluster, Cluster]) -> None:
    run = subprocess.Popen([sys.executable, "-c", _RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pid, gateway = run.stdout.readline().split()
    namespaces = Path("/proc", pid, "ns", "pid").readlink()
    assert gateway in addresses()
    run.kill()
    run.wait(10)
    deadline = time.monotonic() + 30
    while (inside(namespaces) or gateway in addresses()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not inside(namespaces)
    assert gateway not in addresses()
    left = f"{PREFIX}{run.pid}-"
    assert cgroups(left)
    remove_abandoned_cgroups()
    assert not cgroups(left)


def inside(namespace: Path) -> list[str]:
    """Processes in a PID namespace."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns" / "pid").readlink() == namespace:
                found.append(process.name)
        except OSError:
            continue
    return found


def addresses() -> str:
    return subprocess.run(["ip", "-br", "addr"], capture_output=True, text=True, check=True).stdout


def test_this_machines_settings_are_untouched(clusters: tuple[Cluster, Cluster]) -> None:
    """The kubelet sets the kernel's overcommit and panic behaviour: here only in the node's own view."""
    inside_value = clusters[0].sandbox.run("cat", "/proc/sys/kernel/panic").strip()
    assert inside_value == "10"
    assert Path("/proc/sys/kernel/panic").read_text().strip() != inside_value
