"""Fleets of devices in a simulator: the paper's 30 Jetsons, then 1,000 and 10,000; and a check against real clouds.

    python benchmarks/fleet_simulation.py            some ten minutes; writes docs/benchmarks/simulation.md
    python benchmarks/fleet_simulation.py --check    8 devices, simulated and with a real cloud (needs HAT_DATA)
    python benchmarks/fleet_simulation.py --short    seconds; writes nothing

Discrete events; scheduler, pacing, sessions, pages, chunk sizes and drafting are the product's own classes
(docs/decisions/0014-simulator.md). What passes cost is published (the paper's hardware) or, with --check, measured in
the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from common import REPORTS, facts, progress, report
from fleet.costs import VICUNA_7B, VICUNA_13B
from fleet.planning import Load, Need, Target, most, pods_needed
from fleet.simulation import PaperFleet
from fleet.tables import compared, needed
from fleet.ways import FLEET_WAYS, HAT, PAPER_WAYS, U_SHAPE
from fleet.workload import CNN_DM, SPEC_BENCH

from hat_runtime.errors import HatError

PAPER_DEVICES, PAPER_GPUS = 30, 4
RATES = ((VICUNA_7B, SPEC_BENCH, (4.0, 6.0, 8.0)), (VICUNA_13B, CNN_DM, (4.0,)))
FLEETS = (1_000, 10_000)
PER_DEVICE_S = 1 / 60
TARGETS = (Target(2.0, 0.080), Target(2.0, 0.120))
SAMPLE = 2
"""Pods of a fleet that are simulated."""
FEWEST, MOST, STEP = 10, 640, 20
"""Devices of a pod that are tried."""


def main() -> int:
    args = _arguments()
    torch.set_num_threads(1)
    if args.check:
        from fleet.check import check

        print(check(args))
        return 0
    seen_on = facts(None)
    began_s = time.monotonic()
    body = f"{_paper(args)}\n\n{_fleets(args)}"
    body += f"\n\nAll of it took {time.monotonic() - began_s:.0f} s."
    print(body)
    if args.out:
        args.out.write_text(report("Simulated fleets", _about(args), seen_on, body), encoding="utf-8")
    return 0


def _paper(args: argparse.Namespace) -> str:
    """30 devices, all ways."""
    parts = [f"## {PAPER_DEVICES} devices, as in the paper"]
    for model, lengths, rates in args.rates:
        for rate in rates:
            progress(f"{model.name}, {lengths.name}, {rate:g} requests/s")
            fleet = PaperFleet(model, lengths, PAPER_DEVICES, PAPER_GPUS, rate)
            seen = [
                (way, fleet.run(way, warm_s=args.warm, measured_s=args.seconds, seed=args.seed))
                for way in args.paper_ways
            ]
            requests = len(seen[0][1].records)
            parts.append(
                f"### {model.name}, {lengths.name}, {rate:g} requests/s ({requests} requests)\n\n"
                f"{compared(lengths.name, rate, seen)}"
            )
    return "\n\n".join(parts)


def _fleets(args: argparse.Namespace) -> str:
    """Pods that larger fleets need."""
    load = Load(VICUNA_7B, SPEC_BENCH, PER_DEVICE_S, args.warm, args.seconds)
    parts = [
        f"## {' and '.join(f'{devices:,}' for devices in FLEETS)} devices\n\n"
        f"Each device asks once a minute: {PER_DEVICE_S * FLEETS[0]:.0f} and {PER_DEVICE_S * FLEETS[1]:.0f} requests/s."
    ]
    for target in args.targets:
        rows = []
        for way in args.fleet_ways:
            # A pod's devices are the same ones, and their prompts alike, whatever their number: so it is a search.
            per_pod = most(
                lambda count, way=way, target=target: target.met(load.on_pod(way, count, args.seed)),  # type: ignore[misc]
                args.fewest,
                args.most,
                STEP,
            )
            progress(f"{way.name}: {per_pod} devices on a pod with {target}")
            needs: list[Need] = []
            if per_pod:
                needs = [pods_needed(load, way, target, devices, per_pod, args.sample) for devices in FLEETS]
            rows.append((way, per_pod, needs))
        parts.append(needed(target, rows))
    return "\n\n".join(parts)


def _about(args: argparse.Namespace) -> str:
    return f"""
Nothing here was measured on a fleet: it is a discrete-event simulation with the product's own scheduler, chunk sizes
and drafting over published costs of the paper's hardware (benchmarks/fleet/costs.py names each source). 20 Xavier and
10 Orin, uplinks of 5 to 10 MB/s and downlinks of 10 to 15 MB/s, round trip 4 ms, answers of 128 tokens, {args.warm:g} s
before {args.seconds:g} s that count. The paper's server is taken as {PAPER_GPUS} pods with an A6000 each, to one of
which a device belongs; the paper ran one pipeline over them. A draft's confidence is drawn, and it is right that often;
the mean is such that the paper's rule gives its tokens a round ({VICUNA_7B.tokens_a_round} with 7B,
{VICUNA_13B.tokens_a_round} with 13B). TBT: a round's time over its tokens. U-Medusa is not simulated. "to U-shape"
compares means. Larger fleets: {args.sample} pods of each are simulated, which is exact but for chance: a session
stays on its pod. "answers' TBT" is the mean of an answer.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="that count (default 30)")
    parser.add_argument("--warm", type=float, default=10.0, metavar="S", help="before them (default 10)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of chance (default 0)")
    parser.add_argument("--short", action="store_true", help="a few seconds of a few loads, no report")
    parser.add_argument("--check", action="store_true", help="compare with a real cloud, no report")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="of --check; default: the default model")
    parser.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="of --check; default: Spec-Bench")
    parser.add_argument("--answers", type=int, default=6, metavar="N", help="of a device, of --check")
    parser.add_argument(
        "--drafter", default="auto", help="of --check, as for `hat device serve` (default auto)"
    )
    parser.add_argument("--input-layers", type=int, default=3, metavar="M", help="of --check")
    parser.add_argument("--json", action="store_true", help="of --check: print the figures as JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="default docs/benchmarks/simulation.md")
    args = parser.parse_args()
    args.rates, args.paper_ways, args.fleet_ways = RATES, PAPER_WAYS, FLEET_WAYS
    args.targets, args.fewest, args.most, args.sample = TARGETS, FEWEST, MOST, SAMPLE
    if args.short:
        args.seconds, args.warm, args.answers = 4.0, 1.0, 2
        args.rates, args.paper_ways, args.fleet_ways = ((*RATES[0][:2], (6.0,)),), (U_SHAPE, HAT), (HAT,)
        args.targets, args.fewest, args.most, args.sample = TARGETS[1:], 60, 61, 1
    elif args.out is None and not args.check:
        args.out = REPORTS / "simulation.md"
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"fleet_simulation: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
