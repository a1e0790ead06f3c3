"""The simulator against a real cloud: 8 devices with the same arrivals, prompts and drafts in both.

A real device records what it sends for its answers. 8 devices then send that again, each over an emulated link of its
own to a real `hat cloud serve`, cut prompts by the product's Chunker, and sleep for as long as a device computes. The
simulator gets the same requests, the same times of the device, the cloud's own fit of its passes, and what one device
alone takes longer than these explain.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import model_folder, one_core_each, progress, table, warn_if_busy
from replay import Recorded, Recording, encoded_prompts, record

from fleet.costs import DeviceCost, MeasuredCloud
from fleet.device import LinkRates, Way
from fleet.guesses import Round
from fleet.simulation import Outcome, simulate
from fleet.workload import Request
from hat_runtime.cli.limit_parts import bare_layers
from hat_runtime.cli.processes import Children, exits_on_sigterm, free_address, hat_command
from hat_runtime.control.chunks import varying_ends
from hat_runtime.control.pass_cost import PassCost
from hat_runtime.device.chunking import ChunkConfig, Chunker
from hat_runtime.device.link import CloudLink
from hat_runtime.device.policy import DraftConfig
from hat_runtime.device.steps import ALL, LAST, NONE, Binding, StepResult
from hat_runtime.emulation.link import EmulatedLink
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError
from hat_runtime.proto.hat.v1 import runtime_pb2 as pb

DEVICES = 8
EVERY_S = 4.0
"""Mean time from one request of a device to its next."""
WITHIN = 0.15
"""Of the real median: the goal."""
LINKS = ((20, 10), (60, 10), (20, 20), (40, 20), (60, 20), (20, 40), (40, 40), (60, 40))
"""Mbit/s and ms of each device's link."""
RECORDED = Way(
    "recorded", ChunkConfig(), drafting=DraftConfig(window=1, branches=0, alternatives=0, adaptive=False)
)


@dataclass(frozen=True)
class Seen:
    """One answer with the real cloud."""

    ttft_s: float
    tbt_s: float
    rounds: int
    tokens: int


def check(args: argparse.Namespace) -> str:
    """Run both and compare: Markdown, or JSON with --json."""
    warn_if_busy()
    folder = model_folder(args.model)
    load, cloud = one_core_each()
    with exits_on_sigterm(), Children() as children, ExitStack() as links:
        address, http = free_address(), free_address()
        command = hat_command(
            "cloud", "serve", "--model", str(folder), "--input-layers", str(args.input_layers)
        )
        command += ["--listen", address, "--http-listen", http]
        serving = children.start("cloud", command, cores=cloud)
        serving.wait_ready(f"http://{http}/readyz")
        head_s = bare_layers(folder, args.input_layers, "bfloat16", 64, load)["t_head"]
        os.sched_setaffinity(0, load)
        specs = [LinkSpec(mbit * 1e6 / 8, ms / 1e3) for mbit, ms in LINKS]
        addresses = [links.enter_context(EmulatedLink(address, spec)).address for spec in specs]
        ran = asyncio.run(_real(args, folder, address, addresses, head_s))
    return ran.compared(specs, as_json=args.json)


@dataclass(frozen=True)
class _Ran:
    """What the real run gave, and what the simulator needs to repeat it."""

    binding: Binding
    device: DeviceCost
    requests: list[Request]
    seen: list[Seen]
    alone: list[Request]
    seen_alone: list[Seen]
    hints: pb.CostHints

    def compared(self, specs: Sequence[LinkSpec], *, as_json: bool) -> str:
        """Simulate the same and compare medians."""
        before = self._simulated(self.device, specs, self.alone)
        rounds = sum(one.tokens - 1 for one in self.seen_alone) / max(
            1, sum(s.rounds for s in self.seen_alone)
        )
        missing_s = statistics.mean(one.tbt_s for one in self.seen_alone) - before.answer_tbt.mean
        device = replace(self.device, step_s=max(0.0, missing_s * rounds / 2))
        simulated = self._simulated(device, specs, self.requests)
        times = {
            "TTFT": (statistics.median(one.ttft_s for one in self.seen), simulated.ttft.p50),
            "TBT": (
                statistics.median(one.tbt_s for one in self.seen if one.tokens > 1),
                simulated.answer_tbt.p50,
            ),
        }
        if as_json:
            found = {name: {"real_s": real, "simulated_s": sim} for name, (real, sim) in times.items()}
            return json.dumps({**found, "answers": len(self.seen), "step_s": device.step_s})
        rows = [
            [
                name,
                f"{real * 1e3:.1f} ms",
                f"{sim * 1e3:.1f} ms",
                f"{sim / real:.2f}",
                "yes" if abs(sim / real - 1) <= WITHIN else "no",
            ]
            for name, (real, sim) in times.items()
        ]
        cost = self.hints
        about = (
            f"{DEVICES} devices, {len(self.seen)} answers. A pass costs {cost.fixed_s * 1e3:.1f} ms + "
            f"{cost.per_token_s * 1e3:.3f} ms a row + {cost.per_pair_s * 1e6:.3f} us a pair + "
            f"{cost.per_cached_s * 1e6:.2f} us a token cached; a Step on its way up or down "
            f"{device.step_s * 1e3:.1f} ms beyond its bytes and half the round trip (from one device alone)."
        )
        columns = ["median", "real", "simulated", "simulated / real", f"within {WITHIN:.0%}"]
        return f"{about}\n\n{table(columns, rows)}"

    def _simulated(
        self, device: DeviceCost, specs: Sequence[LinkSpec], requests: Sequence[Request]
    ) -> Outcome:
        cost = PassCost(
            self.hints.fixed_s, self.hints.per_token_s, self.hints.per_pair_s, self.hints.per_cached_s
        )
        links = [LinkRates(spec.rate_bytes_per_s, spec.rate_bytes_per_s, spec.rtt_s) for spec in specs]
        return simulate(
            RECORDED,
            requests,
            clouds=[MeasuredCloud(cost)],
            kv_tokens=1 << 17,
            devices=[(device, link) for link in links],
            hidden_size=self.binding.hidden_size,
            one_by_one=True,
        )


async def _real(
    args: argparse.Namespace, folder: Path, address: str, addresses: Sequence[str], head_s: float
) -> _Ran:
    """Record, then replay with one device alone, then with all of them."""
    prompts = encoded_prompts(folder, args.prompts, 12)
    progress(f"recording {len(prompts)} answers")
    recorded = await record(folder, address, prompts, "bfloat16", args.drafter, 48, alternatives=0)
    torch.set_num_threads(1)
    if recorded.shallow is None:
        raise HatError("too few prompts to tell what the device's passes cost")
    draft_s = max(0.0, recorded.draft_s - recorded.shallow.seconds(1, MEDIAN_TEXT))
    device = DeviceCost(recorded.shallow, PassCost(head_s, 0.0), draft_s)
    alone, requests = _requests(recorded.answers, args)
    progress(f"{len(alone)} answers of one device alone, then {len(requests)} of {DEVICES}")
    _, seen_alone = await _replayed(recorded, device, addresses, alone)
    hints, seen = await _replayed(recorded, device, addresses, requests)
    if not hints.fixed_s and not hints.per_token_s:
        raise HatError("the cloud does not know what its passes cost: ask for more --answers")
    return _Ran(recorded.binding, device, requests, seen, alone, seen_alone, hints)


MEDIAN_TEXT = 200
"""Tokens of a text for which the cost of a draft is taken."""


def _requests(answers: Sequence[Recording], args: argparse.Namespace) -> tuple[list[Request], list[Request]]:
    """One device's requests one after the other; and all devices', as they come."""
    rng = random.Random(args.seed)
    count = len(answers)
    alone = [_request(answers[index % count], 0.0, 0) for index in range(max(3, args.answers))]
    arriving = []
    for device in range(DEVICES):
        now = 0.0
        for index in range(args.answers):
            now += rng.expovariate(1 / EVERY_S)
            arriving.append(_request(answers[(device * args.answers + index) % count], now, device))
    return alone, sorted(arriving, key=lambda request: request.arrival_s)


def _request(answer: Recording, arrival_s: float, device: int) -> Request:
    rounds = [step for step in answer.steps if step.decode]
    ends = [step.start for step in rounds[1:]]
    tokens = [end - step.start for step, end in zip(rounds, ends, strict=False)]
    tokens.append(answer.tokens - 1 - sum(tokens))
    prompt = sum(len(step.hidden) for step in answer.steps if not step.decode)
    script = tuple(Round(len(step.hidden), count) for step, count in zip(rounds, tokens, strict=False))
    return Request(arrival_s, device, prompt, answer.tokens, script)


async def _replayed(
    recorded: Recorded, cost: DeviceCost, addresses: Sequence[str], requests: Sequence[Request]
) -> tuple[pb.CostHints, list[Seen]]:
    """All requests with the real cloud, and what it says last of its passes."""
    by_request = {_request(answer, 0.0, 0): answer for answer in recorded.answers}
    links = [CloudLink(address, timeout_s=60.0) for address in addresses]
    for link in links:
        await link.describe()
    began_s = time.monotonic() + 0.2
    hints = pb.CostHints()

    async def device(number: int) -> list[Seen]:
        nonlocal hints
        chunker = Chunker(ChunkConfig(), links[number], recorded.binding)
        seen = []
        for request in requests:
            if request.device == number:
                await asyncio.sleep(max(0.0, began_s + request.arrival_s - time.monotonic()))
                answer = by_request[replace(request, arrival_s=0.0, device=0)]
                link = links[number]
                seen.append(await _answered(link, recorded.binding, chunker, cost, answer, request))
                hints = link.cloud_cost
        return seen

    try:
        seen = await asyncio.gather(*map(device, range(len(links))))
        return hints, [one for many in seen for one in many]
    finally:
        for link in links:
            await link.close()


async def _answered(
    link: CloudLink, binding: Binding, chunker: Chunker, cost: DeviceCost, answer: Recording, request: Request
) -> Seen:
    """Send what was recorded, and sleep where a device would compute."""
    began_s = free_s = time.monotonic()
    rows = torch.cat([step.hidden for step in answer.steps if not step.decode])
    total, start, chunks = len(rows), 0, 0

    def chunk_at(position: int) -> int:
        nonlocal chunks
        chunks += 1
        return chunker.size(position, total, cost.shallow, first=chunks == 1) or total

    def drafted_s(judged: int, drafts: int | None, text: int) -> float:
        """Judging, then the next round's drafts; None: the text is complete."""
        head_s = cost.head.seconds(judged, 0)
        if drafts is None:
            return head_s
        return head_s + (drafts + 1) * cost.shallow.seconds(1, text) + drafts * cost.draft_s

    session = link.open_session(binding)
    try:
        last: asyncio.Future[StepResult] | None = None
        for end in varying_ends(0, total, chunk_at):
            free_s = max(free_s, time.monotonic()) + cost.shallow.seconds(end - start, end)
            await _sleep_until(free_s)
            last = session.submit(start, rows[start:end], LAST if end == total else NONE)
            start = end
        assert last is not None
        await last
        rounds = [step for step in answer.steps if step.decode]
        drafts = [len(step.hidden) - 1 for step in rounds]
        upcoming: list[int | None] = [*drafts, None]
        await _sleep_until(time.monotonic() + drafted_s(1, upcoming[0], total))
        first_s = now_s = time.monotonic()
        chunker.saw_ttft(None, first_s - began_s)
        for step, following in zip(rounds, upcoming[1:], strict=True):
            result = await session.submit(step.start, step.hidden, ALL, decode=True)
            if result.stale:
                raise HatError("the cloud gave a session's KV cache away")
            await _sleep_until(time.monotonic() + drafted_s(len(step.hidden), following, step.start))
            now_s = time.monotonic()
        between = (now_s - first_s) / max(1, answer.tokens - 1)
        return Seen(first_s - began_s, between, len(rounds), answer.tokens)
    finally:
        session.close()


async def _sleep_until(when_s: float) -> None:
    await asyncio.sleep(max(0.0, when_s - time.monotonic()))
