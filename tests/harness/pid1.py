"""First process of a node's namespaces: makes the node's folders its own, says so, and reaps what loses its parent.

    python -m tests.harness.pid1 FOLDER

It runs in mount, PID and network namespaces of its own. When it is killed the kernel kills every process in them and
takes mounts, interfaces and firewall rules away: nothing of a node survives, however the test run ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

READY = "namespaces-ready"
# The kubelet sets these for the whole machine; it finds what it wants in files that only it sees.
_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def main() -> None:
    """Mounts, then waits for its end."""
    folder = Path(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    # Programs' fixed paths, such as /run/containerd and /var/lib/kubelet, lie in the test's folder here.
    for path in ("/var/lib", "/var/log"):
        own = folder / path.replace("/", "-").strip("-")
        own.mkdir()
        _mount("--bind", str(own), path)
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for name, value in _SYSCTLS.items():
        if Path("/proc/sys", name).exists():
            own = folder / name.replace("/", "-")
            own.write_text(f"{value}\n")
            _mount("--bind", str(own), f"/proc/sys/{name}")
    (folder / READY).touch()
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main()
