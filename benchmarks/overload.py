"""Three times as many devices as a cloud has time for: who talks keeps its speed, who cannot is told at once.

    python benchmarks/overload.py            twelve minutes; writes docs/benchmarks/overload.md
    python benchmarks/overload.py --short    seconds; writes nothing

The cloud is a real `hat cloud serve` on a core of its own, with a target for the time of a Step and prompts that leave
time to answers. The load, from the other core, replays what a device sent when it answered prompts before. First one
device at a time (unloaded); then many, which tells how many the cloud lets in (its capacity); then three times as many
of two tenants, one of them with five in six of the devices, first without quotas and then with them: the file is
written while the cloud runs. A device that is refused comes back when the cloud said. A line: rows are counted by the
cloud, times by the devices.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import (
    REPORTS,
    facts,
    metric,
    model_folder,
    one_core_each,
    progress,
    report,
    table,
    warn_if_busy,
)
from replay import ETA, GAMMA, Recorded, Recording, encoded_prompts, record

from hat_runtime.cli.options import add_dtype
from hat_runtime.cli.processes import Child, Children, exits_on_sigterm, free_address, hat_command
from hat_runtime.device.link import CloudLink
from hat_runtime.device.session import CloudSession
from hat_runtime.device.steps import NONE, Binding
from hat_runtime.errors import CloudOverloaded, HatError

GREEDY, MODEST = "greedy", "modest"
TIMES = 3
"""Devices, in capacities."""
TBT_GOAL, REFUSAL_GOAL_S = 1.5, 0.05


@dataclass
class Seen:
    """What devices saw in a phase."""

    tbt_s: list[float] = field(default_factory=list)
    """Mean time between tokens of each answer."""
    step_s: list[float] = field(default_factory=list)
    """From a Step of an answer to its Result."""
    refusal_s: list[float] = field(default_factory=list)
    """From Open to the refusal."""
    retry_s: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Row:
    """A phase."""

    phase: str
    devices: int
    sessions: float
    """Mean number that talk."""
    tokens_per_s: float
    tbt_p50_s: float
    tbt_p99_s: float
    step_p50_s: float
    step_p99_s: float
    answers: int
    refusals: int
    refusal_p50_s: float
    refusal_p99_s: float
    refusal_max_s: float
    retry_s: float
    """Mean time after which refused devices were to come back."""
    modest_share: float
    """Of the rows computed, the modest tenant's."""
    modest_wants: float
    """Of the devices, the modest tenant's."""


@dataclass(frozen=True)
class Memory:
    """Resident memory of the cloud while it was loaded, in MiB."""

    minutes: float
    begin: float
    half: float
    end: float
    """Medians of the first, the sixth and the last tenth of the time."""
    most: float


@dataclass
class Load:
    """Devices that talk to one cloud."""

    address: str
    http: str
    recorded: Recorded
    cloud: Child
    memory: list[float] = field(default_factory=list)

    @property
    def binding(self) -> Binding:
        """Of the recordings."""
        return self.recorded.binding

    async def run(self, phase: str, devices: Sequence[str], seconds: float) -> Row:
        """Let devices, given by their tenants, talk for so long."""
        progress(f"{phase}: {len(devices)} devices for {seconds:.0f} s")
        seen, link = Seen(), CloudLink(self.address, timeout_s=60.0)
        await link.describe()
        before, talking = await self._rows(), list[float]()
        ends = time.monotonic() + seconds
        tasks = [
            asyncio.create_task(self._device(link, tenant, number, ends, seen))
            for number, tenant in enumerate(devices)
        ]
        began = time.monotonic()
        while (left := ends - time.monotonic()) > 0:
            await asyncio.sleep(min(1.0, left))
            self.memory.append(self._resident())
            talking.append(await asyncio.to_thread(metric, self.http, "hat_num_sessions_open"))
            self.cloud.check()
        took_s = time.monotonic() - began
        after = await self._rows()
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, asyncio.CancelledError):
                raise outcome
        await link.close()
        rows = {tenant: after[tenant] - before[tenant] for tenant in after}
        return Row(
            phase,
            len(devices),
            statistics.mean(talking),
            seen.tokens / took_s,
            percentile(seen.tbt_s, 0.5),
            percentile(seen.tbt_s, 0.99),
            percentile(seen.step_s, 0.5),
            percentile(seen.step_s, 0.99),
            len(seen.tbt_s),
            len(seen.refusal_s),
            percentile(seen.refusal_s, 0.5),
            percentile(seen.refusal_s, 0.99),
            max(seen.refusal_s, default=0.0),
            statistics.mean(seen.retry_s) if seen.retry_s else 0.0,
            rows[MODEST] / max(1.0, sum(rows.values())),
            devices.count(MODEST) / len(devices),
        )

    async def _device(self, link: CloudLink, tenant: str, number: int, ends: float, seen: Seen) -> None:
        answers = self.recorded.answers
        order = cycle(answers[number % len(answers) :] + answers[: number % len(answers)])
        while time.monotonic() < ends:
            began = time.monotonic()
            session = link.open_session(self.binding, tenant=tenant, device_name=f"{tenant}-{number}")
            try:
                await session.opened()
            except CloudOverloaded as refusal:
                seen.refusal_s.append(time.monotonic() - began)
                retry_s = refusal.retry_after_s or 1.0
                seen.retry_s.append(retry_s)
                await asyncio.sleep(retry_s * random.uniform(0.75, 1.25))
                continue
            try:
                await _answer(session, next(order), seen)
            finally:
                session.close()

    async def _rows(self) -> dict[str, float]:
        text = await asyncio.to_thread(_metrics, self.http)
        return {
            tenant: text.get(f'hat_tenant_tokens_computed_total{{tenant="{tenant}"}}', 0.0)
            for tenant in (GREEDY, MODEST)
        }

    def _resident(self) -> float:
        for line in Path(f"/proc/{self.cloud.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise HatError(f"/proc/{self.cloud.pid}/status has no VmRSS")


async def _answer(session: CloudSession, recording: Recording, seen: Seen) -> None:
    """Send an answer's Steps, each round when the Result of the one before it is there."""
    waiting, first = [], 0.0
    for step in recording.steps:
        sent = time.monotonic()
        waiting.append(
            session.submit(
                step.start, step.hidden, step.want, decode=step.decode, alternatives=step.alternatives
            )
        )
        if step.want == NONE:
            continue
        for result in waiting:
            if (await result).stale:
                raise HatError("the cloud gave a session's KV cache away: give it more memory")
        waiting.clear()
        now = time.monotonic()
        if first:
            seen.step_s.append(now - sent)
        first = first or now
    seen.tbt_s.append((time.monotonic() - first) / max(1, recording.tokens - 1))
    seen.tokens += recording.tokens


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which so large a share of the values lies; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _metrics(base_url: str) -> dict[str, float]:
    """Every sample at `base_url`/metrics."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def main() -> int:
    args = _arguments()
    warn_if_busy()
    folder = model_folder(args.model)
    about = facts(folder)
    load, cloud = one_core_each()
    os.sched_setaffinity(0, load)
    torch.set_num_threads(1)
    with exits_on_sigterm(), Children() as children, TemporaryDirectory() as temporary:
        rows, memory, target_s = asyncio.run(_measure(args, folder, children, cloud, Path(temporary)))
    figures = {"rows": [asdict(row) for row in rows], "memory": asdict(memory), "target_s": target_s}
    print(json.dumps(figures) if args.json else _body(rows, memory))
    if args.out:
        text = report("Overload", _about(args, target_s), about, _body(rows, memory))
        args.out.write_text(text, encoding="utf-8")
    return 0


async def _measure(
    args: argparse.Namespace, folder: Path, children: Children, cores: frozenset[int], temporary: Path
) -> tuple[list[Row], Memory, float]:
    quotas = temporary / "quotas.yaml"
    # Both tenants are named, without a limit, so that the cloud counts their rows.
    quotas.write_text(json.dumps({"tenants": {GREEDY: {}, MODEST: {}}}))

    def start(*options: str) -> tuple[str, str, Child]:
        address, http = free_address(), free_address()
        command = hat_command("cloud", "serve", "--model", str(folder), "--dtype", args.dtype)
        command += ["--input-layers", str(args.input_layers), "--listen", address, "--http-listen", http]
        command += ["--quotas", str(quotas), "--max-sessions", "256", "--log-level", "warning", *options]
        child = children.start("cloud", command, cores=cores)
        child.wait_ready(f"http://{http}/readyz")
        return address, f"http://{http}", child

    courtesy = ("--max-stretch", "0.25")
    address, http, child = start(*courtesy)
    progress(f"recording {args.limit} answers")
    prompts = encoded_prompts(folder, args.prompts, args.limit)
    recorded = await record(folder, address, prompts, args.dtype, args.drafter, args.max_new_tokens)
    first = Load(address, http, recorded, child)
    await first.run("warm-up", [MODEST], args.warm_s)
    alone = await first.run("unloaded", [MODEST], args.alone_s)
    child.stop()
    target_s = args.target_factor * alone.step_p99_s
    options = ("--tbt-target-ms", f"{target_s * 1e3:.3f}", *courtesy)
    address, http, child = start(*options)
    load = Load(address, http, recorded, child)
    await load.run("warm-up", [MODEST], args.warm_s)
    load.memory.clear()
    many = await load.run("as many as are let in", [GREEDY] * args.crowd, args.crowd_s)
    capacity = max(2, round(many.sessions))
    modest = max(1, TIMES * capacity // 6)
    devices = [GREEDY] * (TIMES * capacity - modest) + [MODEST] * modest
    without = await load.run("3 x, no quotas", devices, args.seconds)
    half = {"sessions": max(1, capacity // 2)}
    quotas.write_text(json.dumps({"tenants": {GREEDY: half, MODEST: half}}))
    await asyncio.sleep(3.0)  # the cloud looks at the file every 2 s
    with_quotas = await load.run(f"3 x, {half['sessions']} sessions each", devices, args.seconds)
    tenth, middle = max(1, len(load.memory) // 10), len(load.memory) // 2
    memory = Memory(
        len(load.memory) / 60,
        statistics.median(load.memory[:tenth]),
        statistics.median(load.memory[middle : middle + tenth]),
        statistics.median(load.memory[-tenth:]),
        max(load.memory),
    )
    return [alone, many, without, with_quotas], memory, target_s


def _body(rows: Sequence[Row], memory: Memory) -> str:
    alone = rows[0]
    lines = []
    for row in rows:
        refused = (
            "" if not row.refusals else _milliseconds(row.refusal_p50_s, row.refusal_p99_s, row.refusal_max_s)
        )
        lines.append(
            [
                row.phase,
                row.devices,
                f"{row.sessions:.1f}",
                f"{row.tokens_per_s:.1f}",
                row.answers,
                _milliseconds(row.tbt_p50_s, row.tbt_p99_s),
                f"{row.tbt_p99_s / alone.tbt_p99_s:.2f}",
                _milliseconds(row.step_p50_s, row.step_p99_s),
                f"{row.step_p99_s / alone.step_p99_s:.2f}",
                row.refusals,
                refused,
                f"{row.retry_s:.1f} s" if row.refusals else "",
                f"{row.modest_share:.0%} of {row.modest_wants:.0%}",
            ]
        )
    columns = ["", "devices", "sessions", "tokens/s", "answers", "TBT (50 / 99 %)", "p99 to unloaded"]
    columns += [
        "Step (50 / 99 %)",
        "p99 to unloaded",
        "refusals",
        "refused after (50 / 99 / 100 %)",
        "retry in",
    ]
    columns += ["modest tenant's rows, of its devices"]
    loaded = rows[2:]
    tbt = max(row.tbt_p99_s for row in loaded) / alone.tbt_p99_s
    refusal_s = max(row.refusal_p99_s for row in loaded)
    checks = [
        ["p99 of the time between tokens, to unloaded", f"{tbt:.2f}", f"{TBT_GOAL}"],
        ["p99 of the time to a refusal", _milliseconds(refusal_s), _milliseconds(REFUSAL_GOAL_S)],
        [
            f"the cloud's memory at the begin, the half and the end of {memory.minutes:.1f} minutes",
            f"{memory.begin:.0f}, {memory.half:.0f}, {memory.end:.0f} MiB, at most {memory.most:.0f}",
            "flat",
        ],
        ["the modest tenant's share with quotas", f"{rows[-1].modest_share:.0%}", "50 %"],
    ]
    return f"{table(columns, lines)}\n\n{table(['', 'seen', 'goal'], checks)}"


def _milliseconds(*values: float) -> str:
    return " / ".join(f"{value * 1e3:.0f}" for value in values) + " ms"


def _about(args: argparse.Namespace, target_s: float) -> str:
    file = args.prompts.name if args.prompts else "Spec-Bench"
    return f"""
{args.limit} prompts of {file}, greedy answers of at most {args.max_new_tokens} tokens, {args.dtype}; drafter
{args.drafter}, gamma {GAMMA}, eta {ETA}. The cloud has one core; a load generator on another core replays what a device
sent for these prompts, a session for each answer, and sends a Step as soon as the Result before it is there: each
session is the fastest device there can be. The cloud has `--tbt-target-ms {target_s * 1e3:.0f}` ({args.target_factor:g}
times the 99th percentile of a Step without load) and `--max-stretch 0.25`. "As many as are let in" has {args.crowd}
devices and gives the capacity; then there are three times as many, five in six of them of one tenant. A device that is
refused comes back when the cloud said, give or take a quarter. TBT is the mean time between tokens of an answer; a Step
is the time from sending a round to its Result. Rows are counted by the cloud, for each tenant of the quota file; the
last line has a quota of sessions for each of the two, put into the file while the cloud ran. Memory grows while passes
have numbers of rows that they never had before: torch's kernels keep what they prepared for each, up to a number.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help="default: spec_bench.jsonl in $HAT_DATA"
    )
    parser.add_argument("--limit", type=int, default=12, metavar="N", help="prompts (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=270, metavar="S", help="of each overload (default %(default)s)"
    )
    parser.add_argument(
        "--alone-s", type=float, default=30, metavar="S", help="one device (default %(default)s)"
    )
    parser.add_argument("--crowd-s", type=float, default=30, metavar="S", help="many (default %(default)s)")
    parser.add_argument(
        "--warm-s", type=float, default=5, metavar="S", help="before each (default %(default)s)"
    )
    parser.add_argument("--crowd", type=int, default=24, metavar="N", help="devices (default %(default)s)")
    parser.add_argument(
        "--target-factor",
        type=float,
        default=0.7,
        metavar="F",
        help="--tbt-target-ms of the cloud, in 99th percentiles of a Step without load (default %(default)s)",
    )
    parser.add_argument("--drafter", default="auto", help="as for `hat device serve` (default %(default)s)")
    parser.add_argument("--input-layers", type=int, default=3, metavar="M")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the default model")
    parser.add_argument("--short", action="store_true", help="seconds, no report")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="default docs/benchmarks/overload.md")
    add_dtype(parser)
    args = parser.parse_args()
    if args.short:
        args.limit, args.max_new_tokens, args.crowd = 2, 12, 8
        args.seconds, args.alone_s, args.crowd_s, args.warm_s = 3, 2, 2, 0.5
    elif args.out is None:
        args.out = REPORTS / "overload.md"
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"overload: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
