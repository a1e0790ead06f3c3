"""What a core of the cloud serves, with and without speculation: tokens a second, and sessions at a TBT target.

    python benchmarks/capacity.py            a quarter of an hour; writes docs/benchmarks/capacity.md
    python benchmarks/capacity.py --short    4 prompts, 1 and 4 sessions; writes nothing

The cloud is a real `hat cloud serve` on a core of its own. The load comes from the other core and replays what a device
sent when it answered Spec-Bench prompts before: the same shallow states in the same Steps, the wrong drafts included. A
session's next Step leaves when the Result of the one before it is there, so the device's own computing and the link
cost nothing and the cloud is never idle: what is measured is the cloud.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from common import (
    REPORTS,
    facts,
    metric,
    model_folder,
    one_core_each,
    progress,
    report,
    spread,
    table,
    warn_if_busy,
)
from replay import ETA, GAMMA, Recording, encoded_prompts, record

from hat_runtime.cli.options import add_dtype
from hat_runtime.cli.processes import Children, exits_on_sigterm, free_address, hat_command
from hat_runtime.device.link import CloudLink
from hat_runtime.device.steps import NONE, Binding
from hat_runtime.errors import HatError


@dataclass(frozen=True)
class Row:
    """A number of sessions, with or without drafts."""

    drafts: bool
    sessions: int
    tokens_per_s: float
    rounds_per_s: float
    tokens_a_round: float
    tbt_s: tuple[float, float, float]
    """10th percentile, median and 90th percentile over answers of the mean time between tokens."""
    ttft_s: float
    """Median."""
    rows_a_pass: float
    """Mean over the cloud's passes, prompts' rows included."""


def main() -> int:
    args = _arguments()
    warn_if_busy()
    folder = model_folder(args.model)
    about = facts(folder)
    load, cloud = one_core_each()
    os.sched_setaffinity(0, load)
    torch.set_num_threads(1)
    with exits_on_sigterm(), Children() as children:
        address, http = free_address(), free_address()
        command = hat_command("cloud", "serve", "--model", str(folder), "--dtype", args.dtype)
        command += ["--input-layers", str(args.input_layers), "--listen", address, "--http-listen", http]
        command += ["--max-sessions", str(max(args.sessions) + 1)]
        serving = children.start("cloud", command, cores=cloud)
        serving.wait_ready(f"http://{http}/readyz")
        rows = asyncio.run(_all(args, folder, address, f"http://{http}"))
    print(json.dumps([asdict(row) for row in rows]) if args.json else _body(rows, args.target_ms))
    if args.out:
        text = report("Capacity of a cloud core", _about(args), about, _body(rows, args.target_ms))
        args.out.write_text(text, encoding="utf-8")
    return 0


async def _all(args: argparse.Namespace, folder: Path, address: str, http: str) -> list[Row]:
    """Record and replay, without drafts and with them."""
    rows = []
    for drafts in (False, True):
        progress(f"recording {args.limit} answers {'with' if drafts else 'without'} drafts")
        drafter = args.drafter if drafts else "none"
        prompts = encoded_prompts(folder, args.prompts, args.limit)
        recorded = await record(folder, address, prompts, args.dtype, drafter, args.max_new_tokens)
        binding, recordings = recorded.binding, recorded.answers
        await _load(address, binding, recordings[:1], 1)  # the first time everything is slow
        for sessions in args.sessions:
            row = await _measure(args, http, address, binding, recordings, sessions, drafts)
            progress(f"{sessions} sessions: {row.tokens_per_s:.1f} tokens/s, TBT {row.tbt_s[1] * 1e3:.0f} ms")
            rows.append(row)
    return rows


async def _measure(
    args: argparse.Namespace,
    http: str,
    address: str,
    binding: Binding,
    recordings: Sequence[Recording],
    sessions: int,
    drafts: bool,
) -> Row:
    """`sessions` answers at a time, each session several after one another."""
    before = _passes(http)
    began = time.monotonic()
    answers = await _load(address, binding, recordings, sessions, args.answers)
    took_s = time.monotonic() - began
    computed, passes = (after - old for after, old in zip(_passes(http), before, strict=True))
    tokens = sum(answer.tokens for answer, _, _ in answers)
    rounds = sum(answer.rounds - 1 for answer, _, _ in answers)
    between = [tbt for _, _, tbt in answers]
    return Row(
        drafts,
        sessions,
        tokens / took_s,
        rounds / took_s,
        (tokens - len(answers)) / rounds,
        spread(between),
        statistics.median(ttft for _, ttft, _ in answers),
        computed / passes,
    )


def _passes(http: str) -> tuple[float, float]:
    """Rows that the cloud has computed, and passes that it took for them."""
    return metric(http, "hat_batch_tokens_sum"), metric(http, "hat_batch_tokens_count")


async def _load(
    address: str, binding: Binding, recordings: Sequence[Recording], sessions: int, answers: int = 1
) -> list[tuple[Recording, float, float]]:
    """(recording, seconds to its first token, mean seconds between its tokens) of every answer."""
    link = CloudLink(address, timeout_s=60.0)
    await link.describe()

    async def device(number: int) -> list[tuple[Recording, float, float]]:
        order = islice(cycle(recordings), number, number + answers)
        return [await _replay(link, binding, recording) for recording in order]

    try:
        return [one for many in await asyncio.gather(*map(device, range(sessions))) for one in many]
    finally:
        await link.close()


async def _replay(link: CloudLink, binding: Binding, recording: Recording) -> tuple[Recording, float, float]:
    session = link.open_session(binding)
    try:
        began = time.monotonic()
        first_s = 0.0
        waiting = []
        for step in recording.steps:
            future = session.submit(
                step.start, step.hidden, step.want, decode=step.decode, alternatives=step.alternatives
            )
            waiting.append(future)
            if step.want == NONE:
                continue  # all but the last chunk of a prompt: nobody waits for them
            for result in waiting:
                if (await result).stale:
                    raise HatError("the cloud gave a session's KV cache away: ask for fewer --sessions")
            waiting.clear()
            first_s = first_s or time.monotonic() - began
        return recording, first_s, (time.monotonic() - began - first_s) / max(1, recording.tokens - 1)
    finally:
        session.close()


def _body(rows: Sequence[Row], targets_ms: Sequence[float]) -> str:
    base = {row.sessions: row.tokens_per_s for row in rows if not row.drafts}
    lines = []
    for row in rows:
        low, median, high = (value * 1e3 for value in row.tbt_s)
        lines.append(
            [
                "with" if row.drafts else "without",
                row.sessions,
                f"{row.tokens_per_s:.1f}",
                f"{row.tokens_per_s / base[row.sessions]:.2f}",
                f"{row.tokens_a_round:.2f}",
                f"{row.rounds_per_s:.1f}",
                f"{row.rows_a_pass:.1f}",
                f"{low:.0f} / {median:.0f} / {high:.0f} ms",
                f"{row.ttft_s * 1e3:.0f} ms",
            ]
        )
    columns = ["drafts", "sessions", "tokens/s", "to without", "tokens a round", "rounds/s", "rows a pass"]
    columns += ["TBT (10 / 50 / 90 %)", "TTFT"]
    served = [
        [f"{target:g} ms", *(str(served_at(rows, drafts, target / 1e3)) for drafts in (False, True))]
        for target in targets_ms
    ]
    counts = ["TBT target", "sessions without drafts", "sessions with drafts"]
    return (
        f"{table(columns, lines)}\n\nSessions that a core serves while nine of ten answers stay below a target, of the "
        f"numbers tried:\n\n{table(counts, served)}"
    )


def served_at(rows: Sequence[Row], drafts: bool, target_s: float) -> int:
    """The largest number of sessions tried at which nine of ten answers meet the target; 0: none."""
    return max((row.sessions for row in rows if row.drafts == drafts and row.tbt_s[2] <= target_s), default=0)


def _about(args: argparse.Namespace) -> str:
    file = args.prompts.name if args.prompts else "Spec-Bench"
    return f"""
{args.limit} prompts of {file}, greedy answers of at most {args.max_new_tokens} tokens, {args.dtype}; drafter
{args.drafter}, gamma {GAMMA}, eta {ETA}. The cloud has one core; a load generator on another core replays what a device
sent for these prompts (shallow states, wrong drafts included), {args.answers} answers a session one after the other,
and sends a Step as soon as the Result before it is there. So the cloud never waits for devices or links, and every
session is the fastest device there can be: real ones leave the core more room, and a core then serves more of them.
Fewer sessions see fewer of the prompts: compare a row with the one without drafts, not with other numbers of sessions.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help="default: spec_bench.jsonl in $HAT_DATA"
    )
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="prompts (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--sessions",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        metavar="K",
        help="default 1 2 ... 32",
    )
    parser.add_argument(
        "--answers", type=int, default=3, metavar="N", help="of each session (default %(default)s)"
    )
    parser.add_argument(
        "--target-ms", type=float, nargs="+", default=[50, 100, 200, 400], metavar="MS", help="TBT targets"
    )
    parser.add_argument("--drafter", default="auto", help="as for `hat device serve` (default %(default)s)")
    parser.add_argument("--input-layers", type=int, default=3, metavar="M")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the default model")
    parser.add_argument("--short", action="store_true", help="4 prompts, 1 and 4 sessions, no report")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="default docs/benchmarks/capacity.md")
    add_dtype(parser)
    args = parser.parse_args()
    if args.short:
        args.limit, args.max_new_tokens, args.sessions, args.answers = 4, 24, [1, 4], 1
    elif args.out is None:
        args.out = REPORTS / "capacity.md"
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"capacity: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
