"""Becomes another program that the kernel kills when its parent dies, even by kill -9.

    python -m hat_runtime.cli.guarded PARENT_PID CORES PROGRAM ARGUMENT ...

CORES: "0,2", the processor cores that it may use, or "-" for the parent's. A step of its own, and no code between
fork and exec: there, Python swallows a Ctrl-C that comes at the wrong moment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Arrange for the end, then become the program."""
    parent, cores, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(parent):  # it died before we asked
            sys.exit(1)
        if cores != "-":
            os.sched_setaffinity(0, map(int, cores.split(",")))
    os.execvp(command[0], command)  # noqa: S606 (what our own parent asks for, without a shell)


if __name__ == "__main__":
    main()
