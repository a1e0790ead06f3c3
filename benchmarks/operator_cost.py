"""What the operator costs a cluster: writes while devices' figures stand or move, time, memory.

    python benchmarks/operator_cost.py            twenty minutes; writes docs/benchmarks/operator_cost.md
    python benchmarks/operator_cost.py --short    30 devices, to see that it works; writes nothing

A real API server with its audit log, controller manager and scheduler; the hat-operator command as a process; nodes and
pods by kwok; the answers of the cloud's pods by a stand-in. The programs are built on first use (minutes).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from common import REPORTS, ROOT, facts, progress, report, table, warn_if_busy

sys.path.insert(0, str(ROOT))  # the clusters of the tests

from hat_operator.figures import EVERY_S
from hat_runtime.cli.processes import exits_on_sigterm
from hat_runtime.errors import HatError
from tests.harness import kwok
from tests.harness.audit import most_in_window
from tests.harness.binaries import CONTROL_PLANE, KUBERNETES, KWOK, MissingProgramError, find_all
from tests.harness.controlplane import ControlPlane
from tests.harness.scene import Scene

SHAPES = ((30, 20), (300, 20), (1000, 20))
"""Devices and HatDeployments."""
GOAL_DEVICES = 300
"""The goals are set for so many."""
QUIET_S, MOVING_S, MOVE_EVERY_S = 60, 120, 5
GOAL_RECONCILE_S, GOAL_OBJECTS_S, AIM_MEMORY_MB = 0.25, 2.0, 150

Metrics = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True)
class Result:
    """What one shape has cost."""

    devices: int
    deployments: int
    quiet_writes: int
    moving_writes: int
    most_in_30_s: int
    """Writes to one HatDeployment in any 30 s while figures moved."""
    reconcile_p95_s: float
    """Of quiet and moving figures together."""
    rollout_p95_s: float
    """From the first HatDeployment until all devices were ready."""
    first_objects_s: float
    """From the request that made one HatDeployment to the last of its objects."""
    slowest_objects_s: float
    """The slowest of the others, which were all applied at once."""
    memory_mb: float
    cores: float
    """CPU seconds per second while figures moved."""
    reads_per_min: int

    @property
    def reached(self) -> bool:
        """Whether the goals are met; memory is an aim."""
        return (
            self.quiet_writes == 0
            and self.most_in_30_s <= 1
            and self.moving_writes > 0
            and self.reconcile_p95_s <= GOAL_RECONCILE_S
            and self.first_objects_s <= GOAL_OBJECTS_S
        )


def main() -> int:
    args = _arguments()
    warn_if_busy()
    try:
        programs = find_all((*CONTROL_PLANE, *kwok.PROGRAMS))
    except MissingProgramError as error:
        raise HatError(f"this benchmark needs a Kubernetes control plane: {error}") from error
    results = []
    with exits_on_sigterm():
        for devices, deployments in args.shapes:
            progress(f"{devices} devices, {deployments} HatDeployments")
            results.append(_measure(programs, devices, deployments))
            progress(f"  {asdict(results[-1])}")
    reached = all(result.reached for result in results if result.devices <= GOAL_DEVICES)
    if args.json:
        print(json.dumps({"reached": reached, "shapes": [asdict(result) for result in results]}))
    else:
        print(_body(results))
    if args.out:
        about = facts(None, ("kopf", "kubernetes", "aiohttp"))
        about["software"] += f", Kubernetes {KUBERNETES}, kwok {KWOK}"
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = report("What the operator costs", _about(), about, _body(results))
        args.out.write_text(text, encoding="utf-8")
    return 0 if reached else 1


def _measure(programs: Mapping[str, Path], devices: int, deployments: int) -> Result:
    # A thousand fake nodes on a busy machine miss heartbeats, and lost nodes are not what is measured.
    plane = ControlPlane(programs, "bench", audit=True, node_grace_s=600)
    plane.start()
    try:
        plane.install_crds(ROOT / "crds")
        with plane.namespace() as namespace:
            scene = Scene(plane, programs, namespace, devices, deployments)
            with scene.running():
                return _observe(scene, devices, deployments)
    finally:
        plane.stop()


def _observe(scene: Scene, devices: int, deployments: int) -> Result:
    scene.wait(scene.nodes_ready, "all nodes ready", 300)
    first, *others = scene.sites
    begin = scene.metrics()
    scene.apply(first)
    time.sleep(5)
    for name in others:
        scene.apply(name)
    scene.wait(scene.all_ready, "all devices ready", 900)
    rolled_out = scene.metrics()
    progress("  all devices are ready; waiting for the first figures")
    # A HatDeployment shows at most 200 rows.
    shown = sum(min(len(names), 200) for names in scene.sites.values())
    scene.wait(lambda: len(scene.shown_uplinks()) == shown, "figures of all rows", 3 * EVERY_S + 60)
    time.sleep(EVERY_S + 5)
    progress("  quiet")
    steady, quiet = scene.metrics(), time.time()
    time.sleep(QUIET_S)
    progress("  moving")
    before, moving = scene.metrics(), time.time()
    while time.time() < moving + MOVING_S:
        scene.cloud.move()
        time.sleep(MOVE_EVERY_S)
    after, end = scene.metrics(), time.time()
    writes = scene.writes()
    while_moving = [write for write in writes if moving <= write.received < end]
    objects = scene.objects_after_s()
    cpu = ("process_cpu_seconds_total", ())
    return Result(
        devices,
        deployments,
        quiet_writes=sum(quiet <= write.received < moving for write in writes),
        moving_writes=len(while_moving),
        most_in_30_s=max(
            most_in_window([write.received for write in while_moving if write.name == name], EVERY_S)
            for name in scene.sites
        ),
        reconcile_p95_s=_quantile(steady, after, 0.95),
        rollout_p95_s=_quantile(begin, rolled_out, 0.95),
        first_objects_s=objects[first],
        slowest_objects_s=max((objects[name] for name in others), default=objects[first]),
        memory_mb=scene.peak_memory() / 1e6,
        cores=(after[cpu] - before[cpu]) / (end - moving),
        reads_per_min=round(scene.reads(quiet, moving) * 60 / (moving - quiet)),
    )


def _quantile(before: Metrics, after: Metrics, share: float) -> float:
    """Of the durations of reconciles between two looks, as PromQL's histogram_quantile; infinite above all buckets."""
    counts: dict[float, float] = {}
    for (name, labels), value in after.items():
        if name == "hat_operator_reconcile_seconds_bucket":
            bound = float(dict(labels)["le"])
            counts[bound] = counts.get(bound, 0.0) + value - before.get((name, labels), 0.0)
    wanted = share * counts[math.inf]
    below, reached = 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count >= wanted:
            part = (wanted - reached) / (count - reached) if count > reached else 1.0
            return below + part * (bound - below) if bound < math.inf else math.inf
        below, reached = bound, count
    return math.inf


def _body(results: list[Result]) -> str:
    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.0f} ms"

    lines: list[tuple[str, str, list[object]]] = [
        ("writes in a quiet minute", "0", [result.quiet_writes for result in results]),
        (f"writes in {MOVING_S} s of moving figures", "", [result.moving_writes for result in results]),
        ("most of them to one HatDeployment in 30 s", "1", [result.most_in_30_s for result in results]),
        (
            "reconcile, p95",
            f"< {ms(GOAL_RECONCILE_S)}",
            [ms(result.reconcile_p95_s) for result in results],
        ),
        ("the same while devices are rolled out", "", [ms(result.rollout_p95_s) for result in results]),
        (
            "from apply to the last object, one alone",
            f"< {GOAL_OBJECTS_S:g} s",
            [f"{result.first_objects_s:.2f} s" for result in results],
        ),
        (
            "the slowest of the others, applied at once",
            "",
            [f"{result.slowest_objects_s:.2f} s" if result.deployments > 1 else "" for result in results],
        ),
        (
            "operator's memory, peak",
            f"aim {AIM_MEMORY_MB} MB",
            [f"{result.memory_mb:.0f} MB" for result in results],
        ),
        ("operator's CPU while figures move", "", [f"{result.cores:.2f} cores" for result in results]),
        ("reads in a quiet minute", "", [result.reads_per_min for result in results]),
    ]
    columns = ["", "goal", *(f"{result.devices:,} devices, {result.deployments}" for result in results)]
    rows = [[name, goal, *values] for name, goal, values in lines]
    verdict = ", ".join(
        f"{'reached' if result.reached else 'NOT reached'} with {result.devices:,} devices"
        for result in results
    )
    goals = f"Goals, set for {GOAL_DEVICES} devices: {verdict}."
    return f"{table(columns, rows)}\n\nColumns: devices and HatDeployments. {goals}"


def _about() -> str:
    return f"""
Fake Jetsons (kwok) shared out among HatDeployments in one cluster, with a real API server, controller manager and
scheduler on the same machine; the operator as a process of its own, with its default resync of 30 s. A stand-in answers
for the cloud's pods at /v1/devices. Quiet: every uplink rate varies by 5 %. Moving: every {MOVE_EVERY_S} s each rate
changes by a factor of 1.5 to 3. Writes and reads are the requests of user agent hat-operator in the API server's audit
log, Leases apart. The reconcile's times are the operator's own metric, from quiet and moving figures together.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        action="append",
        dest="shapes",
        type=_shape,
        metavar="DEVICES,HATDEPLOYMENTS",
        help=f"may be repeated (default {' '.join(f'{d},{h}' for d, h in SHAPES)})",
    )
    parser.add_argument("--short", action="store_true", help="30 devices only, write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, default=REPORTS / "operator_cost.md", metavar="FILE")
    args = parser.parse_args()
    args.shapes = args.shapes or (SHAPES[:1] if args.short else SHAPES)
    if args.short:
        args.out = None
    return args


def _shape(text: str) -> tuple[int, int]:
    devices, _, deployments = text.partition(",")
    if not (devices.isdigit() and deployments.isdigit() and 1 <= int(deployments) <= int(devices)):
        raise argparse.ArgumentTypeError(f"{text!r} is not DEVICES,HATDEPLOYMENTS with a device for each")
    return int(devices), int(deployments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
