"""Chunk sizes that follow the link and the load, against every fixed size.

    python benchmarks/chunking.py            some 15 minutes; writes docs/benchmarks/chunking.md
    python benchmarks/chunking.py --short    few prompts, two sizes, two phases; writes nothing

The link steps from 5 to 80 to 20 Mbit/s, then 16 other sessions begin to decode. In each phase two devices that
choose sizes by themselves (predictive, and HAT's balance) begin with what they learnt in the phase before and have a
few prompts to adapt; then they and a third device that is told each fixed size take turns. Device and cloud have one
core each. Last, others' time between tokens while a prompt of 2,000 tokens is computed beside them: with chunks and
the cloud's courtesy, and whole without it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path

import torch
from common import (
    REPORTS,
    data_prompts,
    facts,
    model_folder,
    one_core_each,
    progress,
    report,
    table,
    warn_if_busy,
)

from hat_runtime.cli.completions import stream_completion
from hat_runtime.cli.processes import Children, exits_on_sigterm, free_address, hat_command
from hat_runtime.device.link import CloudLink
from hat_runtime.device.steps import ALL, LAST, Binding
from hat_runtime.emulation.link import EmulatedLink
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError
from hat_runtime.model.split import LayerRange

PROMPT = 1000
"""Tokens."""
RTT_S = 0.020
SIZES = (32, 64, 128, 256, 512, 0)
"""0: whole."""
POLICIES = ("predictive", "balance")
FIXED = "fixed"
"""The device that is told sizes."""
LOADED = 2
"""Times as many prompts count beside other sessions, where times are further apart."""
APART = 2
"""Prompts after a step that do not count."""
AWAY_S = 0.030
"""What other sessions' devices and links take between an answer and the next Step."""
ALONE_S = 10.0
"""Others decode for so long before a prompt comes."""
SETTLE_S = 3.0
"""After a prompt, and before the first, others get back to their pace for so long."""
LONG_PROMPTS = 3
"""Of 2,000 tokens, beside which others decode."""
HISTORY = 200
"""Tokens of other sessions' texts."""


@dataclass(frozen=True)
class Phase:
    """Conditions that hold for some prompts."""

    mbit: float
    sessions: int

    def __str__(self) -> str:
        return f"{self.mbit:g} Mbit/s" + (f", {self.sessions} other sessions" if self.sessions else "")


PHASES = (Phase(5, 0), Phase(80, 0), Phase(20, 0), Phase(20, 16))


@dataclass
class Seen:
    """The prompts of one way in one phase."""

    ttft_s: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    """Predicted over measured, where there was a prediction."""
    chunks: list[int] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """Of the time to the first token."""
        return statistics.median(self.ttft_s)

    def __str__(self) -> str:
        return f"{self.median_s:.3f} s ({min(self.ttft_s):.2f} to {max(self.ttft_s):.2f})"


@dataclass(frozen=True)
class Others:
    """How long others' tokens took while a prompt was computed beside them."""

    name: str
    alone_s: tuple[float, float]
    """Median and 99th percentile of their time between tokens before."""
    beside_s: tuple[float, float]
    ttft_s: float

    @property
    def stretch(self) -> float:
        """Of the 99th percentile."""
        return self.beside_s[1] / self.alone_s[1]


class Load:
    """Sessions that decode: each sends a row, waits for its deep state and a device's and link's time, and so on."""

    def __init__(self, address: str, sessions: int) -> None:
        self.seen: list[tuple[float, float]] = []
        """(monotonic seconds, time between two tokens) of all sessions."""
        self._address, self._sessions = address, sessions
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        while not self.seen and self._thread.is_alive():
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        link = CloudLink(self._address, timeout_s=60.0)
        model = (await link.describe()).model
        layers = LayerRange(model.lo, model.hi)
        binding = Binding(model.model_revision, layers, torch.bfloat16, model.hidden_size)
        await asyncio.gather(*(self._decode(link, binding, number) for number in range(self._sessions)))
        await link.close()

    async def _decode(self, link: CloudLink, binding: Binding, number: int) -> None:
        noise = torch.Generator().manual_seed(number)
        rows = torch.randn(HISTORY, binding.hidden_size, generator=noise).to(binding.dtype)
        session = link.open_session(binding)
        await session.submit(0, rows, LAST)
        last_s = time.monotonic()
        for index in count():
            if self._stop.is_set():
                break
            await asyncio.sleep(AWAY_S)
            at = HISTORY + index % HISTORY
            await session.submit(at, rows[index % HISTORY][None], ALL)
            now = time.monotonic()
            if index:
                self.seen.append((now, now - last_s))
            last_s = now
        session.close()


def main() -> int:
    args = _arguments()
    warn_if_busy()
    folder = model_folder(args.model)
    prompts = _prompts(folder)
    seen_on = facts(folder)
    device, cloud = one_core_each()
    os.sched_setaffinity(0, device)  # the emulated link and the other sessions run beside the device
    torch.set_num_threads(1)
    with exits_on_sigterm(), Children() as children:
        served = _Served(children, folder, device, cloud)
        address = served.cloud(args.max_stretch)
        with EmulatedLink(address, _link(PHASES[0])) as link:
            urls = {name: served.device(link.address, name) for name in POLICIES}
            urls[FIXED] = served.device(link.address, POLICIES[0])
            results = {phase: _phase(args, phase, link, address, urls, prompts) for phase in args.phases}
            others = []
            if args.long_prompts:
                link.set_link(_link(Phase(80, 0)))
                name = "chunks, prompts leave time to others"
                others.append(_others(name, address, urls[POLICIES[0]], prompts, args.long_prompts, None))
        if args.long_prompts:
            address = served.cloud("none")
            with EmulatedLink(address, _link(Phase(80, 0))) as link:
                url = served.device(link.address, "predictive")
                name = "whole, first come first served"
                others.append(_others(name, address, url, prompts, args.long_prompts, 0))
    body = _body(results, others)
    print(body)
    if args.out:
        args.out.write_text(report("Chunk sizes", _about(args), seen_on, body), encoding="utf-8")
    return 0


@dataclass(frozen=True)
class _Served:
    """Starts clouds and devices."""

    children: Children
    folder: Path
    device_cores: frozenset[int]
    cloud_cores: frozenset[int]

    def cloud(self, max_stretch: str) -> str:
        """Its address."""
        address, http = free_address(), free_address()
        command = hat_command("cloud", "serve", "--model", str(self.folder), "--input-layers", "3")
        command += ["--listen", address, "--http-listen", http, "--max-stretch", max_stretch]
        self.children.start("cloud", command, cores=self.cloud_cores).wait_ready(f"http://{http}/readyz")
        return address

    def device(self, cloud: str, policy: str) -> str:
        """Its base URL. It does not draft: what is looked at is the first token."""
        api = free_address()
        command = hat_command(
            "device", "serve", "--model", str(self.folder), "--cloud", cloud, "--listen", api
        )
        command += ["--keep-sessions", "0", "--grace", "1", "--drafter", "none", "--chunk-policy", policy]
        self.children.start(f"device {policy}", command, cores=self.device_cores).wait_ready(
            f"http://{api}/readyz"
        )
        return f"http://{api}"


def _link(phase: Phase) -> LinkSpec:
    return LinkSpec(phase.mbit * 1e6 / 8, RTT_S)


def _prompts(folder: Path) -> Iterator[list[int]]:
    """Articles one after the other, cut into prompts of PROMPT tokens, without end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    articles = [tokenizer.encode(article.text + "\n\n") for article in data_prompts("cnn_dm.jsonl")]
    ids: list[int] = []
    for article in cycle(articles):
        ids += article
        while len(ids) >= PROMPT:
            yield ids[:PROMPT]
            del ids[:PROMPT]


def _phase(
    args: argparse.Namespace,
    phase: Phase,
    link: EmulatedLink,
    address: str,
    urls: dict[str, str],
    prompts: Iterator[list[int]],
) -> dict[str, Seen]:
    """All ways under the conditions of a phase."""
    progress(str(phase))
    link.set_link(_link(phase))
    with Load(address, phase.sessions) if phase.sessions else nullcontext():
        for policy in POLICIES:
            for _ in range(APART):
                _ask(urls[policy], next(prompts), None, Seen())
        ways: dict[str, tuple[str, int | None]] = {policy: (urls[policy], None) for policy in POLICIES}
        ways |= {_name(size): (urls[FIXED], size) for size in args.sizes}
        seen = {name: Seen() for name in ways}
        order = list(ways)
        # All take turns: a change of the machine's speed hits all alike.
        for turn in range(args.prompts * (LOADED if phase.sessions else 1)):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                url, size = ways[name]
                _ask(url, next(prompts), size, seen[name])
        progress(", ".join(f"{name} {found}" for name, found in seen.items()))
    return seen


def _ask(url: str, prompt: list[int], chunk: int | None, seen: Seen) -> None:
    figures = stream_completion(url, prompt, max_tokens=1, chunk_tokens=chunk).figures
    seen.ttft_s.append(figures["ttft_s"])
    seen.chunks.append(figures["chunk_tokens"])
    if figures["predicted_ttft_s"] is not None:
        seen.predicted.append(figures["predicted_ttft_s"] / figures["ttft_s"])


def _name(size: int) -> str:
    return str(size) if size else "whole"


def _others(
    name: str, address: str, url: str, prompts: Iterator[list[int]], times: int, chunk: int | None
) -> Others:
    """16 sessions decode for a while alone, then beside a long prompt; so several times."""
    progress(f"others' time between tokens: {name}")
    alone: list[float] = []
    beside: list[float] = []
    ttfts_s = []
    with Load(address, PHASES[-1].sessions) as load:
        time.sleep(SETTLE_S)
        for _ in range(times):
            calm_s = time.monotonic()
            time.sleep(ALONE_S)
            begun_s = time.monotonic()
            prompt = next(prompts) + next(prompts)
            ttfts_s.append(stream_completion(url, prompt, max_tokens=1, chunk_tokens=chunk).figures["ttft_s"])
            ended_s = time.monotonic()
            time.sleep(SETTLE_S)  # those that were answered late count too
            alone += [took for when, took in load.seen if calm_s < when < begun_s]
            beside += [took for when, took in load.seen if begun_s <= when <= ended_s + 0.1]
    return Others(name, _percentiles(alone), _percentiles(beside), statistics.median(ttfts_s))


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    return statistics.median(values), statistics.quantiles(values, n=100, method="inclusive")[98]


def _body(results: dict[Phase, dict[str, Seen]], others: Sequence[Others]) -> str:
    names = list(next(iter(results.values())))
    fixed = [name for name in names if name not in POLICIES]
    rows = []
    for phase, seen in results.items():
        best = min(fixed, key=lambda name: seen[name].median_s)
        chosen = statistics.median(seen["predictive"].chunks)
        rows.append(
            [
                phase,
                *(f"{seen[name].median_s * 1e3:.0f}" for name in names),
                f"{best}",
                f"{seen['predictive'].median_s / seen[best].median_s:.2f}",
                f"{seen['balance'].median_s / seen[best].median_s:.2f}",
                f"{chosen:.0f}",
            ]
        )
    overall = [
        sum(statistics.mean(seen[name].ttft_s) for seen in results.values()) / len(results) for name in names
    ]
    rows.append(["mean of all", *(f"{value * 1e3:.0f}" for value in overall), "", "", "", ""])
    best_of = [min(seen[name].median_s for name in fixed) for seen in results.values()]
    over = [
        statistics.geometric_mean(
            seen[name].median_s / best for seen, best in zip(results.values(), best_of, strict=True)
        )
        for name in names
    ]
    rows.append(["to the best of each phase", *(f"{value:.2f} x" for value in over), "", "", "", ""])
    columns = ["phase", *names, "best fixed", "predictive / best", "balance / best", "predictive chose"]
    ratios = [ratio for seen in results.values() for ratio in seen["predictive"].predicted]
    off = statistics.median(abs(1 - ratio) for ratio in ratios) if ratios else float("nan")
    kept = [
        [
            one.name,
            *(f"{value * 1e3:.0f} ms" for value in (*one.alone_s, *one.beside_s)),
            f"{one.stretch:.2f}",
            f"{one.ttft_s:.2f} s",
        ]
        for one in others
    ]
    heads = [
        "prompt",
        "median alone",
        "99 % alone",
        "median beside",
        "99 % beside",
        "99 % stretched",
        "its TTFT",
    ]
    return (
        f"Time to first token in ms, medians:\n\n{table(columns, rows)}\n\nPredicted TTFT of `predictive` against the "
        f"measured one: {off:.0%} off at the median ({len(ratios)} prompts).\n\n"
        f"Time between tokens of {PHASES[-1].sessions} sessions while prompts of {2 * PROMPT:,} tokens are computed "
        f"beside them, one at a time:\n\n{table(heads, kept)}"
    )


def _about(args: argparse.Namespace) -> str:
    return f"""
Prompts of {PROMPT:,} tokens (joined CNN/DailyMail articles), {args.prompts} of each way in each phase after {APART}
that do not count, {LOADED} times as many beside other sessions, bfloat16, 3 layers on the device, round trip
{RTT_S * 1e3:.0f} ms, device and cloud on a core each. Emulated link and other sessions run on the device's core.
predictive and balance choose sizes from 64 to 512 by themselves and know of a phase only what they measure in it. Other
sessions decode a token, are away for {AWAY_S * 1e3:.0f} ms, and so on. The cloud runs with --max-stretch
{args.max_stretch}, but for the last row.
"""


def _whole(args: argparse.Namespace) -> bool:
    return (args.phases, tuple(args.sizes), args.long_prompts, args.max_stretch) == (
        PHASES,
        SIZES,
        LONG_PROMPTS,
        "0.25",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=int, default=7, metavar="N", help="of each way (default %(default)s)"
    )
    parser.add_argument(
        "--phases",
        type=int,
        nargs="+",
        choices=range(1, len(PHASES) + 1),
        default=range(1, len(PHASES) + 1),
        help="only these; with less than all nothing is written unless --out says so",
    )
    parser.add_argument(
        "--max-stretch", default="0.25", metavar="SHARE", help="of the cloud, or none (default %(default)s)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="default: all")
    parser.add_argument(
        "--long-prompts", type=int, default=LONG_PROMPTS, metavar="N", help="default %(default)s"
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the default model")
    parser.add_argument("--short", action="store_true", help="2 prompts, two phases and sizes, no report")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="default docs/benchmarks/chunking.md")
    args = parser.parse_args()
    args.phases = tuple(PHASES[number - 1] for number in args.phases)
    if args.short:
        args.prompts, args.phases, args.sizes, args.long_prompts = 2, (PHASES[1], PHASES[3]), (128, 0), 1
    elif args.out is None and _whole(args):
        args.out = REPORTS / "chunking.md"
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"chunking: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
