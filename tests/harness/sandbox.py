"""Namespaces of one node: a machine of its own as far as Kubernetes can see, gone without a trace when it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hat_runtime.cli.processes import Child
from tests.harness.binaries import MissingProgramError
from tests.harness.pid1 import READY

_TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "iptables": "iptables"}
_READY_S = 60.0
_WEIGHTS = {"cpu.shares": 4 * 1024, "cpu.weight": 4 * 100}
"""Without these all pods of a node together count as one process of a busy machine."""


def check_machine(tools: dict[str, str]) -> None:
    """Raises MissingProgramError where this machine cannot run nodes; `tools` are commands and their packages."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise MissingProgramError("Kubernetes nodes need root on Linux (namespaces, mounts, cgroups)")
    for name, package in {**_TOOLS, **tools}.items():
        if not shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
            raise MissingProgramError(f"{name} is not on PATH (Debian's package {package})")


class Sandbox:
    """Mount, PID and network namespaces, and a cgroup, that end with `stop` or with this process."""

    def __init__(self, name: str, folder: Path) -> None:
        """Starts them.

        Args:
            name: for messages.
            folder: an empty place for the node's files; its name must be unique on this machine.
        """
        self.name = name
        self._cgroup = folder.name
        flags = ["--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
        first = [sys.executable, "-m", "tests.harness.pid1", str(folder)]
        self._main = Child(f"namespaces of {name}", ["unshare", *flags, *first])
        try:
            self.wait_for((folder / READY).exists, self._main)
            self.pid = _only_child(self._main)
            self._make_cgroups()
            self.run("ip", "link", "set", "lo", "up")
            self.address, self.gateway = self._connect_to_host()
        except BaseException:
            self.stop()
            raise

    @property
    def cgroup(self) -> str:
        """Path of its cgroup below the root of each hierarchy."""
        return f"/{self._cgroup}"

    @property
    def network_only(self) -> list[str]:
        """Command prefix: the node's network and this machine's files and processes."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    @property
    def inside(self) -> list[str]:
        """Command prefix: all of the node's namespaces. The program becomes a child of nsenter."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "--"]

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        """Runs a command inside and returns what it prints. Raises RuntimeError with its message."""
        return _run([*self.inside, *command], timeout_s)

    def join(self, other: Sandbox) -> None:
        """Lays a cable between two nodes; only their own addresses can be reached over it."""
        link = f"to-{other.name}"[:15], f"to-{self.name}"[:15]
        ends = ("name", link[1], "netns", str(other.pid))
        _run(["ip", "link", "add", link[0], "netns", str(self.pid), "type", "veth", "peer", *ends])
        for here, there, device in ((self, other, link[0]), (other, self, link[1])):
            here.run("ip", "link", "set", device, "up")
            here.run("ip", "route", "add", f"{there.address}/32", "dev", device, "src", here.address)

    def cut(self, other: Sandbox, away: bool) -> None:
        """Unplugs the cable to `other`, or plugs it in again: what is sent meanwhile is lost."""
        device = f"to-{other.name}"[:15]
        self.run("ip", "link", "set", device, "down" if away else "up")
        if not away:  # a link that goes down takes its routes along
            self.run("ip", "route", "replace", f"{other.address}/32", "dev", device, "src", self.address)

    def start(self, name: str, command: list[str]) -> Child:
        """Starts a program inside; `end` stops it."""
        return Child(name, [*self.inside, *command])

    def end(self, child: Child, sign: signal.Signals = signal.SIGTERM, grace_s: float = 10.0) -> None:
        """Ends a program of `start`: the signal is for the program, not for nsenter."""
        with suppress(ProcessLookupError, FileNotFoundError, IndexError):
            os.kill(_only_child(child), sign)
        with suppress(Exception):
            child.wait(grace_s)
        child.stop(grace_s=0.1)

    def wait_for(self, condition: Callable[[], bool], program: Child) -> None:
        """Waits until `condition` holds. Raises HatError if the program ends, TimeoutError."""
        deadline = time.monotonic() + _READY_S
        while not condition():
            program.check()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the {program.name} were not ready after {_READY_S:.0f} s: {program.output()}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends all that runs inside, and removes the cgroup; mounts and interfaces go with the namespaces."""
        with suppress(ProcessLookupError, FileNotFoundError, IndexError):
            os.kill(_only_child(self._main), signal.SIGKILL)
            self._main.wait(_READY_S)
        self._main.stop(grace_s=0.1)
        remove_cgroups(self._cgroup)

    def _make_cgroups(self) -> None:
        for root in _hierarchies():
            own = root / self._cgroup
            own.mkdir(exist_ok=True)
            for file, weight in _WEIGHTS.items():
                if (own / file).exists():
                    (own / file).write_text(str(weight))

    def _connect_to_host(self) -> tuple[str, str]:
        """A cable to this machine: the node's address, and this machine's on that cable."""
        for number in range(256):
            host = f"hat-{number}"
            peer = ("peer", "name", "eth0", "netns", str(self.pid))
            command = ["ip", "link", "add", host, "type", "veth", *peer]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
            if "exists" not in done.stderr:
                raise MissingProgramError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
        else:
            raise MissingProgramError("all 256 networks of test nodes (10.77.0.0/16) are taken")
        address, gateway = f"10.77.{number}.2", f"10.77.{number}.1"
        _run(["ip", "addr", "add", f"{gateway}/24", "dev", host])
        _run(["ip", "link", "set", host, "up"])
        self.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        # This machine forwards nothing: pods reach no further than the clusters that are joined.
        self.run("ip", "route", "add", "default", "via", gateway)
        return address, gateway


def remove_cgroups(name: str) -> None:
    """Removes the cgroup `name` from every hierarchy, with all below it; its processes must have ended."""
    for root in _hierarchies():
        top = root / name
        for folder, _, _ in os.walk(top, topdown=False):
            _remove_cgroup(Path(folder))


def _remove_cgroup(path: Path) -> None:
    """The last process may be dying still."""
    for _ in range(50):
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return


def cgroups(prefix: str) -> set[str]:
    """Names of cgroups that start with `prefix`."""
    return {path.name for root in _hierarchies() for path in root.glob(f"{prefix}*") if path.is_dir()}


def _hierarchies() -> list[Path]:
    """Where cgroups are mounted: one folder with version 2, one for each controller with version 1."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return [Path(mount[1]) for mount in mounts if mount[2] in ("cgroup", "cgroup2")]


def _only_child(process: Child) -> int:
    """Process id of what unshare or nsenter started. Raises FileNotFoundError, IndexError when it has ended."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def _run(command: list[str], timeout_s: float = 60.0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
