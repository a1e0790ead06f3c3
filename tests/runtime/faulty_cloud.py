"""`hat` whose layers do what a file says: HAT_FAULT_FILE holds one order, taken by the next pass.

raise   this pass raises
poison  every pass with one of its sessions raises, from now on
hang    this pass never ends
clock   the wall clock jumps by a day
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hat_runtime.cli.main import main
from hat_runtime.model.pages import PagedSequence
from hat_runtime.model.runner import LayerRunner, Segment

DAY_S = 86_400.0


class Faults:
    """Stands before LayerRunner.run."""

    def __init__(self, orders: Path) -> None:
        self._orders = orders
        self._run: Any = LayerRunner.run
        self._poisoned: PagedSequence | None = None

    def install(self) -> None:
        faults = self

        def run(runner: LayerRunner, segments: list[Segment]) -> Any:
            faults.strike(segments)
            return faults._run(runner, segments)

        setattr(LayerRunner, "run", run)  # noqa: B010 (mypy takes it for an assignment)

    def strike(self, segments: list[Segment]) -> None:
        order = ""
        if self._orders.exists():
            order = self._orders.read_text()
            self._orders.unlink()
        if order == "poison":
            self._poisoned = segments[-1].sequence
        if order == "hang":
            threading.Event().wait()
        if order == "clock":
            real = time.time
            time.time = lambda: real() + DAY_S
        if order == "raise" or any(segment.sequence is self._poisoned for segment in segments):
            raise RuntimeError("a fault that was asked for")


if __name__ == "__main__":
    Faults(Path(os.environ["HAT_FAULT_FILE"])).install()
    sys.exit(main())
