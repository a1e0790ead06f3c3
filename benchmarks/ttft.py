"""Time to first token over slow links, beside its physical limit.

    python benchmarks/ttft.py            several minutes; writes docs/benchmarks/ttft.md and ttft.svg
    python benchmarks/ttft.py --short    two prompts, to see that it works; writes nothing

Prompts of 1,000 tokens (CNN/DailyMail articles from $HAT_DATA, joined) over two links: 60 Mbit/s, and one whose
transfer of the prompt takes as long as the cloud's compute, where chunks can save most. Device and cloud have one core
each. The limit's parts are bare transformers layers on the same cores and raw sockets through the link, measured before
and after; nothing of our engine or servers is in them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import (
    REPORTS,
    data_prompts,
    facts,
    model_folder,
    one_core_each,
    progress,
    report,
    spread,
    table,
    warn_if_busy,
)

from hat_runtime.cli.completions import stream_completion
from hat_runtime.cli.limit_parts import bare_layers, limit_parts
from hat_runtime.cli.options import add_dtype
from hat_runtime.cli.processes import Children, exits_on_sigterm
from hat_runtime.cli.split_pair import Pair, PairConfig, running_pair
from hat_runtime.control import limits
from hat_runtime.control.limits import LimitParts
from hat_runtime.emulation.spec import LinkSpec
from hat_runtime.errors import HatError, UsageError

RTT_S = 0.020
GOAL = 1.2
"""Chunked TTFT over its limit, at most, with the default chunk size."""
DEFAULT_CHUNK = 128
CHUNKS = (64, 128, 256, 0)
"""Chunk sizes in tokens; 0: the whole prompt at once, the plain U-shape."""


@dataclass(frozen=True)
class Row:
    """One link and chunk size."""

    chunk_tokens: int
    ttft_s: tuple[float, float, float]
    """10th percentile, median, 90th percentile over prompts and rounds, by the device's clock."""
    limit_s: float
    """Of any chunk size, or of no chunks for chunk_tokens = 0."""

    @property
    def over_limit(self) -> float:
        """Median over limit."""
        return self.ttft_s[1] / self.limit_s


@dataclass(frozen=True)
class LinkResult:
    """All chunk sizes on one link."""

    name: str
    link: LinkSpec
    parts: LimitParts
    rows: list[Row]

    def row(self, chunk: int) -> Row:
        """The row of a chunk size."""
        return next(row for row in self.rows if row.chunk_tokens == chunk)

    def saved(self, row: Row) -> float:
        """Part of the TTFT without chunks that this chunk size saves."""
        return 1 - row.ttft_s[1] / self.row(0).ttft_s[1]


def main() -> int:
    args = _arguments()
    warn_if_busy()
    folder = model_folder(args.model)
    prompts = _prompts(folder, args.prompt_tokens, args.prompts)
    seen_on = facts(folder)
    device, cloud = one_core_each()
    os.sched_setaffinity(
        0, device
    )  # the emulated link runs in this process: it must not compute on the cloud's core
    progress("measuring bare layers on one core each")
    before = _bare(folder, args, device, cloud)
    hidden, beta = before["cloud"]["hidden_bytes"], before["cloud"]["beta"]
    links = {
        "60 Mbit/s": LinkSpec(60e6 / 8, RTT_S),
        "transfer = compute": LinkSpec(float(f"{hidden / beta:.4g}"), RTT_S),
    }
    config = PairConfig(
        folder,
        next(iter(links.values())),
        input_layers=args.input_layers,
        dtype=args.dtype,
        device_cores=device,
        cloud_cores=cloud,
    )
    times: dict[str, dict[int, list[float]]] = {}
    with exits_on_sigterm(), Children() as children, running_pair(config, children, progress) as pair:
        for name, link in links.items():
            progress(f"{name}: {link.describe()}")
            assert pair.link is not None
            pair.link.set_link(link)
            times[name] = _measure(pair, prompts, args.rounds)
    progress("measuring bare layers again, and the links")
    parts = _best(before, _bare(folder, args, device, cloud))
    results = []
    for name, link in links.items():
        of_link = limit_parts(parts["device"], parts["cloud"], link)
        chunked = limits.ttft_chunked_limit(of_link, args.prompt_tokens)
        whole = limits.ttft_unchunked(of_link, args.prompt_tokens)
        rows = [Row(chunk, spread(seen), chunked if chunk else whole) for chunk, seen in times[name].items()]
        results.append(LinkResult(name, link, of_link, rows))
    reached = all(result.row(DEFAULT_CHUNK).over_limit <= GOAL for result in results)
    if args.json:
        print(json.dumps({"reached": reached, "links": [_as_json(result) for result in results]}))
    else:
        print(_body(args, results, reached))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        plot = args.out.with_suffix(".svg")
        _plot(results, args.prompt_tokens, plot)
        body = f"{_body(args, results, reached)}\n\n![TTFT by chunk size]({plot.name})"
        args.out.write_text(report("Time to first token", _about(args), seen_on, body), encoding="utf-8")
    return 0 if reached else 1


def _prompts(folder: Path, tokens: int, count: int) -> list[list[int]]:
    """Articles one after the other, cut into prompts of exactly `tokens` tokens; no prompt shares an article."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: list[list[int]] = []
    ids: list[int] = []
    for article in data_prompts("cnn_dm.jsonl"):
        ids += tokenizer.encode(article.text + "\n\n")
        if len(ids) >= tokens:
            found.append(ids[:tokens])
            ids = []
        if len(found) == count:
            return found
    raise UsageError(
        f"--prompts {count}: the articles are enough for {len(found)} prompts of {tokens} tokens"
    )


def _bare(
    folder: Path, args: argparse.Namespace, device: frozenset[int], cloud: frozenset[int]
) -> dict[str, dict[str, Any]]:
    def on(cores: frozenset[int]) -> dict[str, Any]:
        return dict(bare_layers(folder, args.input_layers, args.dtype, args.prompt_tokens, cores))

    return {"device": on(device), "cloud": on(cloud)}


def _best(one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the two measurements the smaller times; the rest is equal."""
    return {
        side: {
            name: min(value, two[side][name]) if isinstance(value, float) else value
            for name, value in parts.items()
        }
        for side, parts in one.items()
    }


def _measure(pair: Pair, prompts: list[list[int]], rounds: int) -> dict[int, list[float]]:
    """TTFT of each chunk size; sizes take turns, so that a change of the machine's speed hits all alike."""
    times: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
    for chunk in CHUNKS:
        stream_completion(pair.url, prompts[0], max_tokens=2, chunk_tokens=chunk)  # not counted
    for _ in range(rounds):
        for prompt in prompts:
            for chunk in CHUNKS:
                answer = stream_completion(pair.url, prompt, max_tokens=2, chunk_tokens=chunk)
                times[chunk].append(answer.figures["ttft_s"])
    return times


def _body(args: argparse.Namespace, results: list[LinkResult], reached: bool) -> str:
    parts = []
    for result in results:
        rows = [
            [
                row.chunk_tokens or "none (U-shape)",
                f"{row.ttft_s[1] * 1e3:.0f} ms",
                f"{row.ttft_s[0] * 1e3:.0f} to {row.ttft_s[2] * 1e3:.0f} ms",
                f"{row.limit_s * 1e3:.0f} ms",
                f"{row.over_limit:.2f}",
                f"{result.saved(row):.0%}" if row.chunk_tokens else "",
            ]
            for row in result.rows
        ]
        columns = ["chunk", "TTFT, median", "10 to 90 %", "limit", "TTFT / limit", "saved by chunks"]
        p, n = result.parts, args.prompt_tokens
        device, link, cloud = (f"{n * seconds * 1e3:.0f} ms" for seconds in (p.s, p.up, p.beta))
        detail = (
            f"Measured parts of the limit: uplink {p.rate_up * 8e-6:.1f} Mbit/s, RTT {p.rtt * 1e3:.1f} ms; the prompt "
            f"takes {device} on the device, {link} on the link, {cloud} in the cloud; one token takes "
            f"{p.t_in * 1e3:.1f}, {p.t_cloud * 1e3:.1f} and {p.t_head * 1e3:.1f} ms (input, middle, head)."
        )
        parts.append(f"## {result.name}: {result.link.describe()}\n\n{table(columns, rows)}\n\n{detail}")
    worst = max(result.row(DEFAULT_CHUNK).over_limit for result in results)
    verdict = "reached" if reached else "NOT reached"
    parts.append(
        f"Goal, chunks of {DEFAULT_CHUNK} at most {GOAL} x the limit on both: {verdict} ({worst:.2f})."
    )
    return "\n\n".join(parts)


def _about(args: argparse.Namespace) -> str:
    return f"""
From a prompt of {args.prompt_tokens:,} tokens to the first token of the answer, on the device's clock: {args.prompts}
prompts of joined CNN/DailyMail articles, {args.rounds} rounds, {args.dtype}, {args.input_layers} layers on the device,
device and cloud pinned to one core each. Absolute times depend on the machine; ratios are of things measured in one
run.

The limit is R + max(S h/B + t_c0, S beta, S s + h/B + t_c0) + h/B + t_h with chunks of any size, and
S s + S h/B + R + S beta + h/B + t_h without (hat_runtime/control/limits.py). Its parts are bare transformers layers on
the same cores, before and after the run (the faster counts), and raw sockets through the same emulated link. It counts
nothing for cutting the prompt into passes; docs/decisions/0007 tells what that costs.
"""


def _plot(results: list[LinkResult], tokens: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hat"  # the same figures give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, result in zip(axes, results, strict=True):
        rows = result.rows
        names = [str(row.chunk_tokens or "none") for row in rows]
        medians = [row.ttft_s[1] * 1e3 for row in rows]
        errors = [
            [(row.ttft_s[1] - row.ttft_s[0]) * 1e3 for row in rows],
            [(row.ttft_s[2] - row.ttft_s[1]) * 1e3 for row in rows],
        ]
        axis.bar(
            names, medians, yerr=errors, capsize=4, width=0.6, color="#4878a8", label="measured (10 to 90 %)"
        )
        for place, row in enumerate(rows):
            label = "limit" if place == 0 else None
            axis.hlines(
                row.limit_s * 1e3, place - 0.4, place + 0.4, color="#c04020", linewidth=2, label=label
            )
        axis.set_title(f"{result.name}\n{result.link.describe()}", fontsize=9)
        axis.set_xlabel("tokens of a chunk")
    axes[0].set_ylabel(f"time to first token, ms ({tokens:,}-token prompt)", fontsize=9)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _as_json(result: LinkResult) -> dict[str, Any]:
    rows = [{**asdict(row), "over_limit": row.over_limit, "saved": result.saved(row)} for row in result.rows]
    return {"name": result.name, "link": str(result.link), "parts": asdict(result.parts), "rows": rows}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of all prompts (default %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=1000, metavar="N", help="default %(default)s")
    parser.add_argument("--input-layers", type=int, default=3, metavar="M")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the default model")
    parser.add_argument("--short", action="store_true", help="2 prompts, 1 round, no report")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.md", help="where the report goes (default docs/benchmarks/ttft.md)"
    )
    add_dtype(parser)
    args = parser.parse_args()
    if args.short:
        args.prompts, args.rounds = 2, 1
    elif args.out is None:
        args.out = REPORTS / "ttft.md"
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HatError as error:
        sys.exit(f"ttft: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
