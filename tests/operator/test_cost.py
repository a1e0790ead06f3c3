"""What the operator writes while devices' figures move; the long form is benchmarks/operator_cost.py."""

from __future__ import annotations

import time
from pathlib import Path

from hat_operator.figures import EVERY_S
from tests.harness.audit import Request, most_in_window
from tests.harness.controlplane import ControlPlane
from tests.harness.scene import Scene

DEVICES, DEPLOYMENTS = 30, 3


def test_moving_figures_are_written_once_in_30_s_and_quiet_ones_never(
    control_plane: ControlPlane, programs: dict[str, Path], namespace: str
) -> None:
    scene = Scene(control_plane, programs, namespace, DEVICES, DEPLOYMENTS)

    def of_figures(since: float) -> list[Request]:
        return [write for write in scene.writes() if write.received >= since]

    with scene.running(resync_s=1) as running:
        for name in scene.sites:
            running.apply(name)
        running.wait(running.all_ready, "all devices ready", 60)
        # The events that tell of it are written after the status that shows it.
        running.wait(running.is_quiet, "nothing written for 2 s", 20)
        ready = time.time()
        # The operator knows each HatDeployment for less than 30 s, so the first figures are held back for now.
        while len(scene.shown_uplinks()) < DEVICES:
            scene.cloud.move()
            time.sleep(1)
            assert time.time() < ready + 2 * EVERY_S, "figures are shown"
        # The figures go on within 5 % of what is shown, and passes follow every second. What the operator had asked
        # before may still be written, where the last time was 30 s ago.
        scene.cloud.hold(scene.shown_uplinks())
        time.sleep(5)
        shown = scene.shown_uplinks()
        scene.cloud.hold(shown)
        written = of_figures(ready)
        assert {write.resource for write in written} == {"hatdeployments/status"}
        assert {write.name for write in written} == set(scene.sites)
        assert all(write.code == 200 for write in written)
        before, quiet, statuses = scene.metrics(), time.time(), scene.statuses()
        time.sleep(8)
        assert scene.statuses() == statuses
        passes = ("hat_operator_reconcile_seconds_count", (("result", "ok"),))
        assert scene.metrics()[passes] >= before[passes] + 3 * DEPLOYMENTS
        assert of_figures(quiet) == []
        assert scene.shown_uplinks() == shown
    for name in scene.sites:
        times = [write.received for write in written if write.name == name]
        assert most_in_window(times, EVERY_S) == 1
